"""The rule of N4."""

import numpy as np
import pandas as pd
import pytest
from ledger_rows import held

from companion.studies.composition import LOOP, SAME_LAYER, TWO_LAYERS, UNSEEN, composes


@pytest.mark.parametrize(
    "behind, ahead, verdict",
    [(0, 9, "all"), (2, 7, "some"), (9, 0, "none"), (8, 0, "none")],
)
def test_n4_follows_its_rule(behind, ahead, verdict):
    pairs = [(kind, other) for kind in UNSEEN for other in (TWO_LAYERS, SAME_LAYER, LOOP)]
    table = pd.DataFrame(pairs, columns=["kind", "other"]).assign(difference=0.0, n=200)
    place = np.arange(9)
    table["low"] = np.where(place < ahead, 0.01, -0.1)
    table["high"] = np.where(place >= 9 - behind, -0.01, 0.1)
    row = composes(table)
    assert held(row) == verdict and row["id"] == "N4" and "n = 200" in row["ours"]
