"""What the memory said in training, or says in the test: the question's own first pass, another's,
or that of a text that tells e2."""

from collections.abc import Sequence

import pandas as pd

from companion.questions.datasets import PLANTED
from companion.runs.results import paired
from companion.runs.run import Run
from companion.runs.store import Store

TOLD = {
    ("two-hop", "back attention"): "its own",
    ("two-hop", "shuffled memory"): "another's",
    (PLANTED[0], "back attention"): "e2 told",
    (PLANTED[1], "back attention"): "another's e2 told",
}
EXCHANGED = "e2 told, exchanged in the test"
OWN, ANOTHERS = "its own", "another's"  # memory in the test
PLANTED_PAIRS = (("e2 told", "another's e2 told"), ("e2 told", EXCHANGED))  # E3
PAIRS = (("its own", "another's"), *PLANTED_PAIRS, ("e2 told", "its own"))  # and E5


def by_training_memory(answered: pd.DataFrame, runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """`results.answers` of runs of TOLD with a column memory, and the answers with other memories
    in the test (EXCHANGED); questions are named alike, so that they can be compared."""
    keys = zip(answered["dataset"], answered["arm"], strict=True)
    frame = answered.assign(memory=[TOLD[key] for key in keys])
    frame["question"] = frame["question"].str.split(" ").str[-2:].str.join(" ")
    told = frame[frame["memory"] == "e2 told"].copy()
    again = [store.result(run)["right_exchanged"] for run in runs if run.dataset == PLANTED[0]]
    told["right"] = [float(x) for right in again for x in right]
    return pd.concat([frame, told.assign(memory=EXCHANGED)], ignore_index=True)


def training_memories(frame: pd.DataFrame, pairs=PAIRS) -> pd.DataFrame:
    """What E5 and E3 compare: memory, less, difference, low, high, p, n, low_90, high_90 (whether
    they are equivalent)."""
    rows = []
    for one, other in pairs:
        whole, inner = (paired(frame, one, other, "memory", level=x) for x in (0.95, 0.9))
        ends = {f"{name}_90": inner[name] for name in ("low", "high")}
        rows.append({"memory": one, "less": other, **whole, **ends})
    return pd.DataFrame(rows)


def by_test_memory(answered: pd.DataFrame, runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """`results.answers` of runs of a dataset with other memories for the test (E4, E0), once with
    each memory (column memory: OWN, ANOTHERS), judged alike."""
    parts = []
    by = answered.groupby(["dataset", "arm", "seed"], sort=False)
    for run, (_, part) in zip(runs, by, strict=True):
        result = store.result(run)
        right = {OWN: result.get("right_own", result["right"]), ANOTHERS: result["right_exchanged"]}
        parts += [part.assign(memory=m, right=[float(x) for x in r]) for m, r in right.items()]
    return pd.concat(parts, ignore_index=True)


def exchanged_in_test(frame: pd.DataFrame, zone: float = 0.02) -> pd.DataFrame:
    """What another question's memory costs, by dataset and arm: own, anothers (accuracies),
    difference, low, high, p, n, low_90, high_90, and reads: "flow" where the cost is above the zone
    with its whole interval, "no flow" where its 90 % interval lies within it, else "undecided"."""
    rows = []
    for (dataset, arm), part in frame.groupby(["dataset", "arm"], sort=False):
        whole, inner = (paired(part, OWN, ANOTHERS, "memory", level=x) for x in (0.95, 0.9))
        shares = part.groupby("memory")["right"].mean()
        row = {
            "dataset": dataset,
            "arm": arm,
            "own": shares[OWN],
            "anothers": shares[ANOTHERS],
            **whole,
        }
        row |= {"low_90": inner["low"], "high_90": inner["high"], "reads": "undecided"}
        if row["low"] > zone:
            row["reads"] = "flow"
        elif -zone < row["low_90"] and row["high_90"] < zone:
            row["reads"] = "no flow"
        rows.append(row)
    return pd.DataFrame(rows)


def costs_more(frame: pd.DataFrame, arm: str, other: str) -> pd.DataFrame:
    """How much more another question's memory costs one arm than another, by dataset: difference
    (of the costs in accuracy), low, high, p, n, low_90, high_90."""
    keys, rows = ["dataset", "arm", "seed", "group", "question"], []
    wide = frame.pivot(index=keys, columns="memory", values="right")
    cost = (wide[OWN] - wide[ANOTHERS]).rename("right").reset_index()
    for dataset, part in cost.groupby("dataset", sort=False):
        whole, inner = (paired(part, arm, other, level=x) for x in (0.95, 0.9))
        ends = {f"{name}_90": inner[name] for name in ("low", "high")}
        rows.append({"dataset": dataset, "less": other, **whole, **ends})
    return pd.DataFrame(rows)
