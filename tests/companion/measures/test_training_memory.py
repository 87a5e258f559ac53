"""Runs with other memories in training, compared on the same questions."""

import itertools

import numpy as np
import pandas as pd
import pytest

from companion.measures.training_memory import (
    ANOTHERS,
    EXCHANGED,
    OWN,
    TOLD,
    by_test_memory,
    by_training_memory,
    costs_more,
    exchanged_in_test,
    training_memories,
)
from companion.questions.datasets import PLANTED
from companion.runs.run import Run


class Results:
    def result(self, run):
        return {"right_exchanged": "0" * 50}


@pytest.fixture
def frame():
    draw, rows = np.random.default_rng(0), []
    for (dataset, arm), memory in TOLD.items():
        for seed in range(3):
            right = draw.random(50) < (0.9 if memory == "e2 told" else 0.4)
            names = [f"{dataset} {seed} {k}" for k in range(50)]
            groups = [f"e{k % 10} {seed}" for k in range(50)]
            columns = {"dataset": dataset, "arm": arm, "seed": seed, "question": names}
            rows.append(pd.DataFrame({**columns, "group": groups, "right": right.astype(float)}))
    runs = [Run(PLANTED[0], "back attention", seed=seed) for seed in range(3)]
    return by_training_memory(pd.concat(rows, ignore_index=True), runs, Results())


def test_each_is_named_and_asked_the_same_questions(frame):
    assert set(frame["memory"]) == {*TOLD.values(), EXCHANGED}
    assert frame.groupby("memory")["question"].nunique().unique().tolist() == [150]
    assert (frame.loc[frame["memory"] == EXCHANGED, "right"] == 0).all()


def test_differences_have_both_intervals(frame):
    table = training_memories(frame).set_index(["memory", "less"])
    told = table.loc[("e2 told", "another's e2 told")]
    assert told["low"] > 0.3 and told["low"] < told["low_90"] < told["difference"]
    assert (
        table.loc[("its own", "another's"), "low"] < 0 < table.loc[("its own", "another's"), "high"]
    )
    assert table.loc[("e2 told", EXCHANGED), "difference"] == pytest.approx(
        frame.loc[frame["memory"] == "e2 told", "right"].mean()
    )


@pytest.mark.parametrize(
    "own, anothers, reads",
    [("1" * 40, "0" * 40, "flow"), ("10" * 20, "10" * 20, "no flow"), ("10" * 20, None, None)],
)
def test_what_an_exchange_in_the_test_costs_is_judged_by_its_interval(own, anothers, reads):
    draw = np.random.default_rng(0)
    runs = [Run("in context, again", "back attention", seed=seed) for seed in range(3)]
    results = {}
    for run in runs:
        other = anothers or "".join(map(str, draw.integers(0, 2, 40)))
        results[run] = {"right": "0" * 40, "right_own": own, "right_exchanged": other}

    class Kept:
        def result(self, run):
            return results[run]

    about = [
        pd.DataFrame(
            {
                "dataset": run.dataset,
                "arm": run.arm,
                "seed": run.seed,
                "question": [f"{run.seed} {k}" for k in range(40)],
                "group": [f"e{k % 8} {run.seed}" for k in range(40)],
                "right": 0.0,
            }
        )
        for run in runs
    ]
    frame = by_test_memory(pd.concat(about, ignore_index=True), runs, Kept())
    assert frame.groupby("memory").size().to_dict() == {OWN: 120, ANOTHERS: 120}
    row = exchanged_in_test(frame).iloc[0]
    assert row["difference"] == pytest.approx(row["own"] - row["anothers"])
    assert row["low"] <= row["low_90"] <= row["high_90"] <= row["high"]
    assert row["reads"] == (reads or "undecided")


def test_costs_of_two_arms_are_compared_question_by_question():
    """One arm loses every second answer with another's memory, the other every fourth."""
    rows = []
    for arm, step in (("back attention", 2), ("same layer", 4)):
        for seed, k in itertools.product(range(3), range(40)):
            about = {"dataset": "in context, again", "arm": arm, "seed": seed, "group": f"e{k % 8}"}
            about["question"] = f"{seed} {k}"
            rows.append({**about, "memory": OWN, "right": 1.0})
            rows.append({**about, "memory": ANOTHERS, "right": float(k // 8 % step > 0)})
    row = costs_more(pd.DataFrame(rows), "back attention", "same layer").iloc[0]
    lost = [np.mean([k // 8 % step == 0 for k in range(40)]) for step in (2, 4)]
    assert row["difference"] == pytest.approx(lost[0] - lost[1]) and row["n"] == 120
    assert row["low"] <= row["low_90"] <= row["difference"] <= row["high_90"] <= row["high"]
