"""Intervals over groups and seeds, paired differences, and the rules of C7, C8 and C11."""

import numpy as np
import pandas as pd
import pytest

from backattn import claims, comparison, datasets
from backattn.experiments import Run, Store


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Two arms with three seeds, one better by a fifth, on 300 questions of 100 groups."""
    frame = datasets.one_digit_composite().assign(split="test")
    frame["group"] = [f"g{i % 100}" for i in range(len(frame))]
    monkeypatch.setitem(datasets.DATASETS, "made up", lambda: frame)
    kept, draw = Store(tmp_path, shipped=None), np.random.default_rng(0)
    runs = []
    for arm, chance in (("back attention", 0.7), ("bias", 0.5)):
        for seed in range(3):
            run = Run("made up", arm, seed, test_items=300)
            right = draw.random(300) < chance
            curve = [{"step": 5, "loss": 1.0, "train": 0.1, "validation": chance + seed / 100}]
            result = {"run": {}, "right": "".join(map(str, right.astype(int))), "curve": curve, "trained": 4}
            kept.keep(run, {**result, "validation": 0, "seconds": 2.0, "flops": 10, "perplexity": 20.0}, {})
            runs.append(run)
    return runs, kept


def test_accuracy_has_its_interval(store):
    runs, kept = store
    table = comparison.accuracy_table(runs, kept).set_index("arm")
    for arm, chance in (("back attention", 0.7), ("bias", 0.5)):
        row = table.loc[arm]
        assert row["low"] < chance < row["high"] and row["low"] < row["accuracy"] < row["high"]
        assert 0.02 < row["high"] - row["low"] < 0.2
        assert row["worst"] <= row["accuracy"] <= row["best"] and row["seeds"] == 3 and row["n"] == 300


def test_intervals_are_wider_for_few_groups_and_for_seeds_that_differ():
    draw = np.random.default_rng(0)
    by_group = np.repeat(draw.random(10) < 0.5, 30).astype(float)[None]

    def width(right, groups):
        return np.ptp(np.percentile(comparison.resampled(right, groups), [2.5, 97.5]))

    assert width(by_group, np.repeat(np.arange(10), 30)) > 2 * width(by_group, np.arange(300))
    same = (draw.random(300) < 0.5).astype(float)
    apart = np.stack([np.ones(300), np.zeros(300)])
    assert width(apart, np.arange(300)) > 5 * width(np.stack([same, same]), np.arange(300))


def test_differences_are_paired_and_signed(store):
    runs, kept = store
    row = comparison.difference_table(runs, kept, "back attention", ["bias"]).iloc[0]
    assert row["low"] > 0.05 and row["p"] < 0.01 and row["difference"] == pytest.approx(0.2, abs=0.06)
    less = comparison.difference_table(runs, kept, "bias", ["back attention"]).iloc[0]
    assert less["difference"] == pytest.approx(-row["difference"])


def test_an_unfinished_run_is_named(store):
    _, kept = store
    with pytest.raises(ValueError, match="seed 9"):
        comparison.answers([Run("made up", "bias", 9, test_items=300)], kept)


def test_flips_of_groups():
    nothing = np.tile([1.0, -1.0], 50)
    assert comparison.flip_test(nothing, np.arange(100)) > 0.5
    assert comparison.flip_test(np.zeros(4), np.arange(4)) == 1.0
    assert comparison.flip_test(np.ones(30), np.arange(30)) < 0.01
    assert comparison.flip_test(np.ones(30), np.zeros(30)) > 0.4  # one group says nothing


def test_learning_curves_give_the_range_over_seeds(store):
    runs, kept = store
    row = comparison.learning_curves(runs, kept).set_index("arm").loc["bias"]
    assert (row["low"], row["validation"], row["high"]) == pytest.approx((0.5, 0.51, 0.52))


# ---------------------------------------------------------------- verdicts


def scratch(ahead, behind):
    accuracy = pd.DataFrame(
        {"arm": ["1 layer"], "accuracy": [0.8], "low": [0.7], "high": [0.9], "n": [9], "seeds": [5]}
    )
    rows = [("1 layer", *ahead), ("2 layers", *behind)]
    return accuracy, pd.DataFrame(rows, columns=["other", "difference", "low", "high"])


@pytest.mark.parametrize(
    "ahead, behind, verdict",
    [
        ((0.2, 0.1, 0.3), (0.0, -0.005, 0.005), "reproduced"),
        ((0.2, 0.1, 0.3), (-0.1, -0.15, -0.05), "partly"),
        ((0.0, -0.1, 0.1), (-0.1, -0.15, -0.05), "not at this scale"),
        ((-0.2, -0.3, -0.1), (-0.1, -0.15, -0.05), "contradicted"),
    ],
)
def test_c7_follows_its_rule(ahead, behind, verdict):
    assert claims.one_layer_matches_two(*scratch(ahead, behind)).verdict == verdict


def differences(untrained, trained):
    rows = [("smollm2", "two-hop", "zero-shot", *untrained), ("smollm2", "all", "zero-shot", *untrained)]
    rows += [("smollm2", "two-hop", "bias", *trained), ("smollm2", "all", "bias", *trained)]
    return pd.DataFrame(rows, columns=["model", "dataset", "other", "difference", "low", "high"])


@pytest.mark.parametrize(
    "untrained, trained, verdict",
    [
        ((0.2, 0.1, 0.3), (0.1, 0.05, 0.2), "reproduced"),
        ((0.2, 0.1, 0.3), (0.0, -0.05, 0.05), "partly"),
        ((0.0, -0.1, 0.1), (0.0, -0.05, 0.05), "not at this scale"),
        ((-0.2, -0.3, -0.1), (-0.1, -0.2, -0.05), "contradicted"),
    ],
)
def test_c8_follows_its_rule(untrained, trained, verdict):
    assert claims.raises_accuracy(differences(untrained, trained), ["bias"]).verdict == verdict


def test_c11_follows_its_rule():
    sizes = pd.DataFrame({"dim": [10, 160], "share": [2.04e-5, 3.26e-4]})
    assert claims.small(sizes).verdict == "partly"
    assert claims.small(sizes.assign(share=2e-5)).verdict == "reproduced"
    assert claims.small(sizes.assign(share=1e-2)).verdict == "contradicted"
