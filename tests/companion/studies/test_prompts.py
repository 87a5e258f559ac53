"""Questions on the same names in other words, and the rule of N1."""

import numpy as np
import pandas as pd
import pytest

from companion.studies.other_reasoning_and_cost.prompts import other_prompts_too, pooled_table


def test_the_same_questions_in_other_words_do_not_narrow_the_interval(answers_of):
    draw = np.random.default_rng(0)
    arms = [
        answers_of(draw.random((3, 300)) < chance, arm=arm)
        for arm, chance in (("back attention", 0.7), ("bias", 0.5))
    ]
    rows = pd.concat(arms)
    twin = rows.assign(dataset="other", question="other " + rows["question"])
    alone, both = (
        pooled_table(part, "back attention", ["bias"]).iloc[0]
        for part in (rows, pd.concat([rows, twin]))
    )
    assert both["n"] == 2 * alone["n"] and both["names"] == alone["names"]
    for name in ("difference", "low", "high", "worst", "best"):
        assert both[name] == pytest.approx(alone[name])
    assert both["worst"] <= both["difference"] <= both["best"] and both["low"] > 0


@pytest.mark.parametrize(
    "zero_shot, bias, verdict",
    [
        (0.2, 0.1, "reproduced"),
        (0.2, 0.0, "partly"),
        (0.0, 0.0, "not at this scale"),
        (-0.2, -0.1, "contradicted"),
    ],
)
def test_n1_follows_its_rule(zero_shot, bias, verdict):
    leads = {"zero-shot": zero_shot, "few-shot": zero_shot, "bias": bias}
    rows = [(data, other, lead) for data in ("two-hop", "all") for other, lead in leads.items()]
    table = pd.DataFrame(rows, columns=["dataset", "other", "difference"])
    table = table.assign(low=table["difference"] - 0.05, high=table["difference"] + 0.05, n=50)
    row = other_prompts_too(table, ["bias"])
    assert (row["id"], row["verdict"]) == ("N1", verdict) and "n = 50 (two-hop)" in row["ours"]
