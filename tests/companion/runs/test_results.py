"""Results as tidy frames; intervals over groups and seeds, paired differences."""

import numpy as np
import pandas as pd
import pytest

from companion.questions.datasets import DATASETS, Dataset, one_digit_composite
from companion.runs import results
from companion.runs.run import Run
from companion.runs.store import Store


@pytest.fixture
def rows(answers_of):
    """Three arms with three seeds, each with its fold of 300 questions; the first better by a
    fifth."""
    draw = np.random.default_rng(0)
    chances = {"back attention": 0.7, "bias": 0.5, "few-shot": 0.5}
    return pd.concat(
        [answers_of(draw.random((3, 300)) < chance, arm=arm) for arm, chance in chances.items()],
        ignore_index=True,
    )


def test_runs_become_rows(tmp_path, monkeypatch):
    frame = one_digit_composite().assign(group=lambda t: [f"g{i % 300}" for i in range(len(t))])
    monkeypatch.setitem(DATASETS, "made up", Dataset("made up", lambda: frame))
    store, runs = Store(tmp_path, shipped=None), []
    curve = [{"step": 5, "loss": 1.0, "train": 0.1, "validation": 0.5}]
    result = {"run": {}, "right": "01" * 50, "curve": curve, "trained": 4, "seconds": 2.0}
    for seed in range(2):
        runs.append(Run("made up", "bias", seed, test_items=100, memory_layers=(6, 7)))
        store.keep(runs[-1], {**result, "flops": 10}, {})
    table = results.answers(runs, store)
    assert len(table) == 200 and table["question"].is_unique and table["right"].mean() == 0.5
    assert set(table["group"]) <= set(frame["group"]) and table["perplexity"].isna().all()
    assert set(table["memory_layers"]) == {(6, 7)} and set(table["trained"]) == {4}
    points = results.curves(runs, store)
    assert points[["seed", "step", "validation"]].values.tolist() == [[0, 5, 0.5], [1, 5, 0.5]]
    with pytest.raises(ValueError, match=r"seed 9.*is not finished"):
        results.answers([Run("made up", "bias", 9, test_items=100)], store)
    store.keep(runs[0], {"run": {}, "diverged": "the loss is nan"}, {})
    for make in (results.answers, results.curves):
        with pytest.raises(ValueError, match=r"bias, seed 0\) diverged"):
            make(runs, store)
    with pytest.raises(ValueError, match="no runs"):
        results.answers([], store)


def test_from_scratch_all_seeds_answer_the_same_questions(answers_of):
    draw, parts = np.random.default_rng(0), []
    difficulty = draw.random(500)
    for arm, level in (("1 layer", 0.5), ("2 layers", 0.6)):
        right = difficulty < level + draw.normal(0, 0.02, (5, 1))
        parts.append(answers_of(right, arm=arm, folds=False))
    assert results.matrix(parts[0]).shape == (5, 500)
    row = results.difference_table(pd.concat(parts), "2 layers", ["1 layer"]).iloc[0]
    assert row["low"] > 0.03 and row["high"] < 0.17 and row["n"] == 500


def test_several_trainings_of_a_fold_are_averaged_by_question(rows):
    one = rows[rows["arm"] == "back attention"]
    wrong = one.assign(seed=one["seed"] + 3, right=0.0)  # the same folds, trained again
    both = pd.concat([one, wrong], ignore_index=True)
    assert np.allclose(results.matrix(both), results.matrix(one) / 2)
    assert np.allclose(results.resampled(both), results.resampled(one) / 2)
    bias = rows[rows["arm"] == "bias"]  # trained once
    less = results.paired(pd.concat([both, bias]), "back attention", "bias")
    assert less["difference"] == pytest.approx(one["right"].mean() / 2 - bias["right"].mean())
    assert less["n"] == 900


def test_one_name_has_no_interval(answers_of):
    alone = [answers_of(x, groups=["g"] * 9, arm=a) for a, x in (("a", [1] * 9), ("b", [0] * 9))]
    table = results.accuracy_table(pd.concat(alone))
    assert table["accuracy"].tolist() == [1, 0] and table[["low", "high"]].isna().all(axis=None)
    less = results.paired(pd.concat(alone), "a", "b")
    assert less["difference"] == 1 and np.isnan([less["low"], less["high"], less["p"]]).all()


def test_accuracy_has_its_interval(rows):
    table = results.accuracy_table(rows).set_index("arm")
    for arm, chance in (("back attention", 0.7), ("bias", 0.5)):
        row = table.loc[arm]
        assert row["low"] < chance < row["high"] and row["low"] < row["accuracy"] < row["high"]
        assert 0.02 < row["high"] - row["low"] < 0.2 and row["worst"] <= row["accuracy"]
        assert row["accuracy"] <= row["best"] and row["seeds"] == 3 and row["n"] == 900
    table = results.by_setting(rows.assign(dim=rows["seed"]), "dim", results.accuracy_table)
    assert table["dim"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 and (table["n"] == 300).all()


def test_the_mean_over_datasets_is_a_row_of_its_own(rows):
    more = rows.assign(dataset="other", right=rows["right"].to_numpy()[::-1], flops=30)
    table = results.accuracy_table(pd.concat([rows, more])).set_index(["dataset", "arm"])
    one, mean = table.loc["d"], table.loc["all"]
    alone = (one["accuracy"] + table.loc["other", "accuracy"]) / 2
    assert mean["accuracy"].to_dict() == pytest.approx(alone.to_dict())
    assert (mean["n"] == 1800).all() and (mean["operations"] == 1).all()
    assert (mean["high"] - mean["low"] < one["high"] - one["low"]).all()  # twice as many questions


def test_the_interval_over_datasets_holds_what_another_training_changes(answers_of):
    """Runs that scatter far more than their questions do: only the interval over runs is wide."""
    draw, parts = np.random.default_rng(0), []
    for dataset in ("one", "other"):
        for arm, chances in (("back attention", (0.9, 0.5, 0.5)), ("bias", (0.5, 0.5, 0.5))):
            right = draw.random((3, 300)) < np.array(chances)[:, None]
            parts.append(answers_of(right, arm=arm, dataset=dataset))
    table = results.difference_table(pd.concat(parts), "back attention", ["bias"])
    one, both = (table.set_index("dataset").loc[name] for name in ("one", "all"))
    assert one["low"] > 0 and both["low"] < 0 < both["high"]
    assert both["p"] > 0.05 > one["p"] and both["n"] == 6


def test_intervals_cover_the_truth(answers_of):
    """Effects of groups, of both names of a question, and of seeds: about 95 of 100 intervals hold
    the mean."""
    draw, covered = np.random.default_rng(1), {"one name": 0, "two names": 0, "seeds": 0}
    for _ in range(100):
        effect = draw.normal(0, 0.2, 30)
        for kind in covered:
            first, second = draw.integers(0, 30, (2, 240))
            two = kind == "two names"
            chance = 0.5 + effect[first] + (effect[second] if two else 0)
            names = [f"a{i}|a{j}" if two else f"a{i}" for i, j in zip(first, second, strict=True)]
            seeds = draw.normal(0, 0.05, (5, 1)) if kind == "seeds" else np.zeros((1, 1))
            right = draw.random((len(seeds), 240)) < chance + seeds
            draws = results.resampled(answers_of(right, names, folds=False))
            low, high = np.nanpercentile(draws, [2.5, 97.5])
            covered[kind] += low <= 0.5 <= high
    assert min(covered.values()) >= 82, covered


def test_differences_are_paired_and_signed(rows):
    row = results.difference_table(rows, "back attention", ["bias"]).iloc[0]
    assert row["low"] > 0.05 and row["p"] < 0.01
    assert row["difference"] == pytest.approx(0.2, abs=0.06)
    less = results.difference_table(rows, "bias", ["back attention"]).iloc[0]
    assert less["difference"] == pytest.approx(-row["difference"])
    twins = pd.concat([rows[rows["arm"] == "bias"].assign(arm=arm) for arm in ("a", "b")])
    none = results.difference_table(twins, "a", ["b"]).iloc[0]  # no difference, no interval
    assert none[["difference", "low", "high", "p"]].tolist() == [0, 0, 0, 1]


def test_what_is_missing_or_not_the_same_is_named(rows):
    with pytest.raises(ValueError, match="no runs of 'loop LoRA'"):
        results.difference_table(rows, "back attention", ["loop LoRA"])
    with pytest.raises(ValueError, match="no runs with arm 'loop LoRA'"):
        results.paired(rows, "back attention", "loop LoRA")
    fewer = rows[~((rows["arm"] == "bias") & (rows["seed"] == 2))]
    with pytest.raises(ValueError, match="'bias' were not tested on the same questions"):
        results.paired(fewer, "back attention", "bias")
    with pytest.raises(ValueError, match="several runs of one seed"):
        results.matrix(rows)


def test_arms_tried_on_some_datasets_are_compared_there_only(rows):
    both = pd.concat([rows, rows[rows["arm"] != "bias"].assign(dataset="other")])
    table = results.difference_table(both, "back attention", ["bias", "few-shot"])
    assert table[table["other"] == "bias"]["dataset"].tolist() == ["d"]  # once: no mean
    assert table[table["other"] == "few-shot"]["dataset"].tolist() == ["d", "other", "all"]
    accuracy = results.accuracy_table(both)
    assert set(accuracy[accuracy["dataset"] == "all"]["arm"]) == {"back attention", "few-shot"}
    with pytest.raises(ValueError, match="no runs with arm 'bias'"):
        results.difference_table(both, "bias", ["few-shot"])
