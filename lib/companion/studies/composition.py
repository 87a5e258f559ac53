"""08: two hops learnt from nothing (claim N4)."""

import pandas as pd

from companion.report.verdicts import Effect, claim, points

TWO_LAYERS, SAME_LAYER, LOOP = "2 layers", "2 layers + same layer", "2 layers + loop"
UNSEEN = ("ID/ID", "OOD/ID", "ID/OOD")  # kinds of questions that N4 asks about


def composes(differences: pd.DataFrame) -> dict:
    """N4. differences: of back attention, by kind of question and other arm.

    Nine checks, each with its whole interval: on questions whose two facts were composed in
    training, though not with each other (ID/ID), whose first fact never was (OOD/ID), and whose
    second never was (ID/OOD), back attention is ahead of the plain model, of the same module on its
    own layer, and of a loop that hands the final state back with as many weights. The comparison is
    ID/ID with the plain model; the strictest control, the loop where back attention does worst.
    """
    by = differences.set_index(["kind", "other"])
    rows = by.loc[[(kind, other) for kind in UNSEEN for other in (TWO_LAYERS, SAME_LAYER, LOOP)]]
    each = []
    for kind in UNSEEN:
        less = ", ".join(f"{other} {points(row)}" for other, row in rows.loc[kind].iterrows())
        each.append(f"{kind} (n = {int(rows.loc[kind, 'n'].iloc[0])}): {less}")
    ours = f"two layers with back attention less, points: {'; '.join(each)}"
    passed = {f"{kind}, less {other}": row["low"] > 0 for (kind, other), row in rows.iterrows()}
    plain = Effect.of("ID/ID, less two layers", rows.loc["ID/ID", TWO_LAYERS])
    kind, other = rows["difference"].idxmin()
    return claim(
        "N4", ours, passed, plain, Effect.of(f"{kind}, less {other}", rows.loc[kind, other])
    )
