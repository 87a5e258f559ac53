"""Corrections of p."""

import pandas as pd
import pytest

from companion.report import intervals


def test_p_is_corrected_for_all_rows():
    table = intervals.holm(pd.DataFrame({"p": [0.01, 0.04, 0.03, 0.5]}))
    assert table["corrected"].to_list() == pytest.approx([0.04, 0.09, 0.09, 0.5])


def test_a_summary_has_a_row_for_each_group():
    rows = [("b", f"e{k}", k % 2) for k in range(40)] + [("a", "e0", 1), ("a", "e0", 0)]
    table = pd.DataFrame(rows, columns=["place", "e2", "share"])
    by = intervals.summary(table, "share", "place").set_index("place")
    assert by.index.tolist() == ["b", "a"] and by["mean"].tolist() == [0.5, 0.5]
    assert by["n"].tolist() == [40, 2] and 0 < by.loc["b", "low"] < 0.5 < by.loc["b", "high"] < 1
    assert by.loc["a", ["low", "high"]].isna().all()  # one name has no interval
    assert intervals.summary(table, "share")["n"].tolist() == [42]


def test_pairs_are_of_the_same_units():
    rows = [(arm, 0, k, f"e{k}", k + lead) for arm, lead in (("a", 2), ("b", 0)) for k in range(9)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "question", "e2", "value"])
    shuffled = table.sample(frac=1, random_state=0)
    less = intervals.paired(shuffled, "a", "b", by="arm", value="value")
    assert less == pytest.approx({"mean": 2, "low": 2, "high": 2, "n": 9})
    with pytest.raises(ValueError, match="same questions"):
        intervals.paired(table[1:], "a", "b", by="arm", value="value")
