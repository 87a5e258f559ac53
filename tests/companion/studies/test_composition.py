"""Kinds of compositions told apart, and the rule of N4."""

import numpy as np
import pandas as pd
import pytest

from companion.studies import composition
from companion.studies.composition import LOOP, SAME_LAYER, TWO_LAYERS, UNSEEN


@pytest.fixture
def answered():
    """One arm that has all ID/ID, another that has none of it; both half of everything else."""
    draw, kinds = np.random.default_rng(0), np.repeat(["ID/ID", "OOD/ID"], 60)
    parts = []
    for arm, share in (("2 layers + back attention", 1.0), ("2 layers", 0.0)):
        for seed in range(3):
            right = np.where(kinds == "ID/ID", share, draw.integers(2, size=120))
            about = {"arm": arm, "seed": seed, "kind": kinds, "right": right.astype(float)}
            about |= {"question": range(120), "group": [f"e{k % 20}" for k in range(120)]}
            parts.append(pd.DataFrame({**about, "trained": 4, "flops": 9, "learning_rate": 1e-3}))
    return pd.concat(parts, ignore_index=True)


def test_kinds_of_questions_are_told_apart(answered):
    table = composition.accuracy_by_kind(answered).set_index(["kind", "arm"])
    assert table["accuracy"].loc["ID/ID"].tolist() == [1, 0]
    assert table["n"].tolist() == [60] * 4 and set(table["seeds"]) == {3}
    rest = table.loc["OOD/ID"]
    assert rest["accuracy"].between(0.3, 0.7).all()
    assert (rest["low"] < rest["accuracy"]).all() and (rest["accuracy"] < rest["high"]).all()
    less = composition.differences_by_kind(answered, "2 layers + back attention", ["2 layers"])
    by = less.set_index("kind")
    assert by.loc["ID/ID", ["difference", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    assert by.loc["OOD/ID", "low"] < 0.05 and by.loc["OOD/ID", "p"] > 0.05 > by.loc["ID/ID", "p"]


@pytest.mark.parametrize(
    "behind, ahead, verdict",
    [
        (0, 9, "reproduced"),
        (2, 7, "partly"),
        (9, 0, "contradicted"),
        (8, 0, "not at this scale"),
    ],
)
def test_n4_follows_its_rule(behind, ahead, verdict):
    pairs = [(kind, other) for kind in UNSEEN for other in (TWO_LAYERS, SAME_LAYER, LOOP)]
    table = pd.DataFrame(pairs, columns=["kind", "other"]).assign(difference=0.0, n=200)
    place = np.arange(9)
    table["low"] = np.where(place < ahead, 0.01, -0.1)
    table["high"] = np.where(place >= 9 - behind, -0.01, 0.1)
    row = composition.composes(table)
    assert row["verdict"] == verdict and row["id"] == "N4" and "n = 200" in row["ours"]
