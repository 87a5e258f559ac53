"""Arms compared, and one setting of a run varied."""

import numpy as np
import pandas as pd
import pytest

from companion.measures import settings

SHARES = {0: (0.4, 0.4), 1: (0.8, 0.8), 2: (0.4, 0.6)}  # by source layer, of two seeds


@pytest.fixture
def rows(answers_of):
    """One arm at three source layers: layer 1 is best, and at layer 2 the seeds differ."""
    draw, parts = np.random.default_rng(0), []
    for layer, shares in SHARES.items():
        right = [draw.permutation(np.arange(100) < round(100 * share)) for share in shares]
        parts.append(answers_of(right, arm="same layer", source_layer=layer))
    return pd.concat(parts, ignore_index=True)


def test_ends_of_training_and_choices():
    runs = [(layer, seed, share) for layer in SHARES for seed, share in enumerate(SHARES[layer])]
    table = pd.DataFrame(runs, columns=["source_layer", "seed", "validation"])
    table = table.assign(arm="same layer", step=2, train=0.25)
    points = pd.concat([table.assign(step=1, validation=0.1), table], ignore_index=True)
    points = pd.concat([points, points.assign(arm="bias")])  # arms keep their order
    seen = settings.end_table(points, "source_layer")
    assert seen["arm"].tolist() == ["same layer"] * 3 + ["bias"] * 3
    assert seen.loc[2, ["validation", "low", "high"]].tolist() == pytest.approx([0.5, 0.4, 0.6])
    train = settings.end_table(points, "source_layer", "train")
    assert train["train"].tolist() == [0.25] * 6 and train["seeds"].tolist() == [2] * 6
    best = settings.choose(points, "source_layer").iloc[0]
    expected = {"source_layer": 1, "validation": 0.8, "lowest": 1, "highest": 1, "settings": 3}
    assert best[list(expected)].to_dict() == expected


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
    for fewer in (pd.concat([rows, bias[bias["source_layer"] == 0]]), both[60:]):
        with pytest.raises(ValueError, match="same questions"):
            settings.over_settings(fewer, "source_layer", "same layer", ["bias"])


def test_the_same_questions_in_other_words_do_not_narrow_the_interval(answers_of):
    draw, chances = np.random.default_rng(0), {"back attention": 0.7, "bias": 0.5}
    right = {arm: draw.random((3, 300)) < chance for arm, chance in chances.items()}
    rows = pd.concat([answers_of(right[arm], arm=arm) for arm in chances])
    twin = rows.assign(dataset="other", question="other " + rows["question"])
    alone, both = (
        settings.compare(part, "back attention", ["bias"]).iloc[0]
        for part in (rows, pd.concat([rows, twin]))
    )
    assert both["n"] == 2 * alone["n"] and both["low"] > 0
    for name in ("difference", "low", "high", "worst", "best"):
        assert both[name] == pytest.approx(alone[name])


def test_weighted_sums_over_a_setting_and_their_accuracies(rows):
    weights = {0: -0.5, 1: 0.0, 2: 0.5}  # half the difference of the outer two
    row = settings.accuracy_by(settings.sum_over(rows, "source_layer", weights), ["arm"]).iloc[0]
    assert row[["accuracy", "worst", "best"]].tolist() == pytest.approx([0.05, 0, 0.1])
    assert row["low"] < 0.05 < row["high"] and (row["n"], row["seeds"]) == (200, 2)
