"""08: two hops learnt from nothing (claim N4)."""

from collections.abc import Sequence

import pandas as pd

from companion.report.intervals import interval
from companion.report.verdicts import claim, points
from companion.runs.results import matrix, paired, resampled

TWO_LAYERS, SAME_LAYER, LOOP = "2 layers", "2 layers + same layer", "2 layers + loop"
UNSEEN = ("ID/ID", "OOD/ID", "ID/OOD")  # kinds of questions that N4 asks about


def accuracy_by_kind(answered: pd.DataFrame) -> pd.DataFrame:
    """Arms on each kind of question; answered: `results.answers` with a column kind, all seeds on
    the same questions.

    Returns: kind, arm, accuracy, low, high (95 %, samples of names and of seeds), worst, best
    (seed), n, seeds, trained, flops, learning_rate.
    """
    rows = []
    for kind in sorted(answered["kind"].unique()):
        for arm, part in answered[answered["kind"] == kind].groupby("arm", sort=False):
            each = matrix(part).mean(1)
            row = {"kind": kind, "arm": arm, "accuracy": each.mean(), **interval(resampled(part))}
            row |= {"worst": each.min(), "best": each.max()}
            row |= {"n": part["question"].nunique(), "seeds": len(each)}
            rows.append({**row, **part.iloc[0][["trained", "flops", "learning_rate"]]})
    return pd.DataFrame(rows)


def differences_by_kind(answered: pd.DataFrame, arm: str, others: Sequence[str]) -> pd.DataFrame:
    """How far `arm` is ahead of others on each kind: kind, other, difference, low, high, p, n."""
    rows = []
    for kind in sorted(answered["kind"].unique()):
        part = answered[answered["kind"] == kind]
        rows += [{"kind": kind, "other": other, **paired(part, arm, other)} for other in others]
    return pd.DataFrame(rows)


def composes(differences: pd.DataFrame) -> dict:
    """N4. differences: `differences_by_kind` of back attention.

    Nine checks, each with its whole interval: on questions whose two facts were composed in
    training, though not with each other (ID/ID), whose first fact never was (OOD/ID), and whose
    second never was (ID/OOD), back attention is ahead of the plain model, of the same module on its
    own layer, and of a loop that hands the final state back with as many weights.
    """
    by = differences.set_index(["kind", "other"])
    rows = by.loc[[(kind, other) for kind in UNSEEN for other in (TWO_LAYERS, SAME_LAYER, LOOP)]]
    each = []
    for kind in UNSEEN:
        less = ", ".join(f"{other} {points(row)}" for other, row in rows.loc[kind].iterrows())
        each.append(f"{kind} (n = {int(rows.loc[kind, 'n'].iloc[0])}): {less}")
    ours = f"two layers with back attention less, points: {'; '.join(each)}"
    return claim("N4", ours, rows["low"] > 0, rows["high"] < 0)
