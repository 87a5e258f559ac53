"""One setting of a run varied."""

import numpy as np
import pandas as pd
import pytest

from companion.measures import settings

SHARES = {0: (0.4, 0.4), 1: (0.8, 0.8), 2: (0.4, 0.6)}  # by source layer, of two seeds


@pytest.fixture
def rows(answers_of):
    """One arm at three source layers: layer 1 is best, and at layer 2 the seeds differ."""
    draw = np.random.default_rng(0)
    parts = []
    for layer, shares in SHARES.items():
        right = [draw.permutation(np.arange(100) < round(100 * share)) for share in shares]
        parts.append(answers_of(right, arm="same layer", source_layer=layer))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def points():
    """Two evaluations of each run, the last with the shares."""
    runs = [(layer, seed, share) for layer in SHARES for seed, share in enumerate(SHARES[layer])]
    table = pd.DataFrame(runs, columns=["source_layer", "seed", "validation"])
    table = table.assign(model="m", dataset="d", arm="same layer", step=2, train=0.25, loss=1.0)
    return pd.concat([table.assign(step=1, validation=0.1), table], ignore_index=True)


def test_ends_of_training_and_choices(points):
    seen = settings.end_table(points, "source_layer").set_index("source_layer")
    assert seen.loc[2, ["validation", "low", "high"]].tolist() == pytest.approx([0.5, 0.4, 0.6])
    train = settings.end_table(points, "source_layer", "train")
    assert train["train"].tolist() == [0.25] * 3 and train["seeds"].tolist() == [2] * 3
    best = settings.choose(points, "source_layer").iloc[0]
    expected = {"source_layer": 1, "validation": 0.8, "lowest": 1, "highest": 1, "settings": 3}
    assert best[list(expected)].to_dict() == expected


def test_learning_curves_give_the_range_over_seeds(points):
    table = settings.learning_curves(points[points["source_layer"] == 2]).set_index("step")
    assert table.loc[2, ["validation", "low", "high"]].tolist() == pytest.approx([0.5, 0.4, 0.6])
    assert table.loc[1, "validation"] == pytest.approx(0.1) and (table["loss"] == 1).all()


def test_a_setting_is_compared_with_another_question_by_question(rows):
    table = settings.setting_differences(rows, "same layer", "source_layer", 0)
    table = table.set_index("source_layer")
    assert table.loc[0, ["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert table.loc[1, "difference"] == pytest.approx(0.4) and table.loc[1, "low"] > 0
    names = rows["source_layer"].map({0: None, 1: (6, 7), 2: (6,)})  # tuples, or none
    named = rows.assign(memory_layers=names.astype(object).where(names.notna(), None))
    less = settings.setting_differences(named, "same layer", "memory_layers", None)
    assert less["memory_layers"].tolist() == [None, (6, 7), (6,)]
    assert less["difference"].tolist() == table["difference"].tolist()
    fewer = rows[(rows["source_layer"] != 1) | (rows["seed"] == 0)]
    with pytest.raises(ValueError, match="same questions"):
        settings.setting_differences(fewer, "same layer", "source_layer", 0)


def test_arms_are_compared_over_all_settings(rows):
    where = rows[rows["right"] == 1].groupby(["source_layer", "seed"]).head(10).index
    bias = rows.assign(arm="bias")  # ten right answers fewer at each layer
    bias.loc[where, "right"] = 0.0
    both = pd.concat([rows, bias], ignore_index=True)
    row = settings.over_settings(both, "source_layer", "same layer", ["bias"]).iloc[0]
    assert row["difference"] == pytest.approx(0.1) and row["low"] > 0 and row["settings"] == 3
    assert row["worst"] == pytest.approx(0.1) == row["best"] and row["seeds"] == 2
    fewer = pd.concat([rows, bias[bias["source_layer"] == 0]])
    with pytest.raises(ValueError, match="no runs with source_layer 1"):
        settings.over_settings(fewer, "source_layer", "same layer", ["bias"])
    with pytest.raises(ValueError, match="same questions"):
        settings.sum_over(rows[60:], "source_layer", dict.fromkeys(SHARES, 1.0))


def test_what_a_doubling_does(rows):
    sized = rows.assign(dim=rows["source_layer"].map({0: 1, 1: 2, 2: 8}))
    row = settings.doubling_table(sized, "dim").iloc[0]
    slope, *single = (np.polyfit([0, 1, 3], [0.4, 0.8, y], 1)[0] for y in (0.5, 0.4, 0.6))
    assert row["slope"] == pytest.approx(slope) and row["low"] < slope < row["high"]
    assert [row["worst"], row["best"]] == pytest.approx(single) and row["settings"] == 3
