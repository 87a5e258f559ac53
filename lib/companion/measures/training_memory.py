"""What the memory said in training: its own first pass, another's, or a text that tells e2."""

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


def training_memories(frame: pd.DataFrame) -> pd.DataFrame:
    """What E5 and E3 compare: memory, less, difference, low, high, p, n, low_90, high_90 (whether
    they are equivalent)."""
    pairs = [("its own", "another's"), ("e2 told", "another's e2 told"), ("e2 told", EXCHANGED)]
    rows = []
    for one, other in [*pairs, ("e2 told", "its own")]:
        whole, inner = (paired(frame, one, other, "memory", level=x) for x in (0.95, 0.9))
        ends = {f"{name}_90": inner[name] for name in ("low", "high")}
        rows.append({"memory": one, "less": other, **whole, **ends})
    return pd.DataFrame(rows)
