"""Bootstrap over clusters, summaries, paired differences, corrections of p."""

import numpy as np
import pandas as pd
import pytest

from companion.report import intervals


def test_bootstrap_interval_covers_and_keeps_clusters_together():
    generator, hits = np.random.default_rng(1), 0
    for _ in range(60):
        _, low, high = intervals.mean_interval(generator.standard_normal(80), range(80))
        hits += low <= 0 <= high
    assert 50 <= hits <= 60
    weights = intervals.bootstrap(["a", "a", "b", "c"], resamples=50)
    assert np.allclose(weights.sum(1), 1) and np.allclose(weights[:, 0], weights[:, 1])
    values = np.array([1.0, -1.0] * 40)  # pairs that cancel: no spread between clusters
    assert np.allclose(intervals.mean_interval(values, np.arange(80) // 2), 0)


def test_wilson_and_holm_are_the_textbooks():
    z, p, n = 1.959964, 0.8, 10
    middle = (p + z**2 / 2 / n) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5
    assert np.allclose(intervals.wilson(8, 10), (middle - half, middle + half), atol=1e-5)
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
