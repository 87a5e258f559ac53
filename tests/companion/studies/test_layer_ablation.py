"""How unsteady training is, and the rule of C9."""

import numpy as np
import pandas as pd
import pytest
from ledger_rows import held

from companion.studies.layer_ablation import low_layers_are_best, training_instability

LAYERS = np.arange(30)
NOISE = LAYERS * 7 % 5
ARMS = ["back attention", "same layer"]


def test_instability_is_measured():
    rows, shares = [], np.array([[0.4, 0.4], [0.8, 0.8], [0.4, 0.6]])  # by layer and seed
    for (layer, seed), share in np.ndenumerate(shares):
        losses = np.full(30, 1.0)
        losses[10] += 5  # a batch that is hard at every layer is no jump
        losses[20] += 2 * (layer == 2)
        for step, validation in ((15, 0.1), (30, share)):
            row = {"arm": "same layer", "source_layer": layer, "seed": seed, "step": step}
            row |= {"losses": losses[step - 15 : step].tolist(), "validation": validation}
            rows.append(row)
    table = training_instability(pd.DataFrame(rows)).set_index("source_layer")
    assert table["jump"].tolist() == pytest.approx([0, 0, 2])
    assert table["spread"].tolist() == pytest.approx(100 * (shares - shares.mean(0)).std(1, ddof=1))


def ends(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(low=table["difference"] - 0.01, high=table["difference"] + 0.01, n=436)


def tables_of(best, seeds, ahead, spread, jump, slope, same) -> dict[str, pd.DataFrame]:
    """Both arms alike; ahead: of layer 6; spread, jump: at layers below 6, above they are 1; slope:
    of accuracy; same: the lead over the same module on its own layer."""
    about = {"source_layer": best, "lowest": seeds[0], "highest": seeds[1], "seeds": 3}
    by_arm = pd.concat([pd.DataFrame({"arm": arm, "source_layer": LAYERS}) for arm in ARMS])
    low, noise = by_arm["source_layer"] < 6, np.tile(NOISE, 2)
    sizes = {"spread": np.where(low, spread, 1), "jump": np.where(low, jump, 1)}
    less = {"other": "same layer", "source_layer": LAYERS, "difference": same}
    return {
        "chosen": pd.DataFrame({"arm": ARMS, **about}),
        "against six": ends(pd.DataFrame({"source_layer": LAYERS, "difference": ahead})),
        "instability": by_arm.assign(**{name: x + noise / 100 for name, x in sizes.items()}),
        "accuracy": by_arm.assign(accuracy=0.5 + slope * by_arm["source_layer"] + noise / 1000),
        "differences": ends(pd.DataFrame(less)),
    }


@pytest.mark.parametrize(
    "best, seeds, ahead, spread, jump, slope, same, verdict",
    [
        (6, (5, 7), -0.02, 3.0, 3.0, -0.01, 0.02, "all"),
        (6, (5, 7), -0.02, 3.0, 3.0, -0.01, 0.0, "some"),
        (6, (5, 20), -0.02, 3.0, 1.0, 0.0, 0.0, "some"),
        (6, (5, 20), -0.02, 1.0, 3.0, 0.0, 0.0, "some"),
        (20, (20, 20), -0.05, 1.0, 1.0, 0.0, 0.0, "none"),
        (20, (20, 20), 0.05, 0.3, 0.3, 0.01, -0.02, "none"),
    ],
)
def test_c9_follows_its_rule(best, seeds, ahead, spread, jump, slope, same, verdict):
    tables = tables_of(best, seeds, ahead, spread, jump, slope, same)
    row = low_layers_are_best(tables, tables)
    assert row["id"] == "C9" and held(row) == verdict and "n = 436" in row["ours"]
    wins, behind = 30 * (same > 0.01), 30 * (same < -0.01)
    assert f"same layer at {wins} (behind at {behind}) of 30 layers" in row["ours"]
    choice = f"layer {best} ({min(best, *seeds)} to {max(best, *seeds)} by seed)"
    assert f"on validation is {choice}" in row["ours"]
    assert f"validation chooses {choice}, points: layer 0 " in row["ours"]


@pytest.mark.parametrize(
    "layer, same, verdict",
    [(6, -0.02, "some"), (20, 0.02, "some"), (20, -0.02, "none")],
)
def test_c9_asks_arithmetic_too(layer, same, verdict):
    """Everything about two-hop questions speaks against the claim; arithmetic decides."""
    against = tables_of(20, (20, 20), 0.05, 0.3, 0.3, 0.01, -0.02)
    digits = tables_of(layer, (layer, layer), 0.05, 1.0, 1.0, 0.0, same)
    assert held(low_layers_are_best(against, digits)) == verdict
