"""Intervals over groups and seeds, paired differences, and the rules of C7, C8 and C11."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from companion.measures.settings import (
    by_setting,
    choose,
    end_table,
    over_settings,
    setting_differences,
)
from companion.questions.datasets import DATASETS, Dataset, one_digit_composite, two_digit
from companion.report import intervals
from companion.runs import as_asked
from companion.runs.results import (
    Answers,
    accuracy_table,
    difference_table,
    learning_curves,
    pooled_answers,
    resampled,
)
from companion.runs.run import Run
from companion.runs.store import Store
from companion.studies import layer_ablation
from companion.studies.back_attention_training import (
    adapter_size,
    names_needed,
    one_layer_matches_two,
    raises_accuracy,
)
from companion.studies.capacity import doubling_table, kept_share, small_keeps_its_gain
from companion.studies.composition import by_kind, kind_curves
from companion.studies.layer_ablation import low_layers_are_best
from companion.studies.other_reasoning_and_cost.prompts import other_prompts_too, pooled_table


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Two arms with three seeds, each with its fold, one better by a fifth; 300 groups of some 20 questions."""
    frame = one_digit_composite()
    frame["group"] = [f"g{i % 300}" for i in range(len(frame))]
    monkeypatch.setitem(DATASETS, "made up", Dataset("made up", lambda: frame))
    kept, draw = Store(tmp_path, shipped=None), np.random.default_rng(0)
    runs = []
    for arm, chance in (("back attention", 0.7), ("bias", 0.5), ("few-shot", 0.5)):
        for seed in range(3):
            run = Run("made up", arm, seed, test_items=300)
            right = draw.random(300) < chance
            curve = [{"step": 5, "loss": 1.0, "train": 0.1, "validation": chance + seed / 100}]
            result = {
                "run": {},
                "right": "".join(map(str, right.astype(int))),
                "curve": curve,
                "trained": 4,
            }
            kept.keep(
                run,
                {**result, "validation": 0, "seconds": 2.0, "flops": 10, "perplexity": 20.0},
                {},
            )
            runs.append(run)
    return runs, kept


def test_accuracy_has_its_interval(store):
    runs, kept = store
    table = accuracy_table(runs, kept).set_index("arm")
    for arm, chance in (("back attention", 0.7), ("bias", 0.5)):
        row = table.loc[arm]
        assert row["low"] < chance < row["high"] and row["low"] < row["accuracy"] < row["high"]
        assert 0.02 < row["high"] - row["low"] < 0.2
        assert (
            row["worst"] <= row["accuracy"] <= row["best"] and row["seeds"] == 3 and row["n"] == 900
        )


def test_the_mean_over_datasets_is_a_row_of_its_own(store, monkeypatch):
    runs, kept = store
    monkeypatch.setitem(DATASETS, "other", DATASETS["made up"])
    more = [Run("other", run.arm, run.seed, test_items=300) for run in runs]
    for run, twin in zip(more, reversed(runs), strict=True):
        kept.keep(run, {**kept.result(twin), "flops": 30}, {})
    table = accuracy_table(runs + more, kept)
    alone = table[table["dataset"] != "all"].groupby("arm")["accuracy"].mean()
    rows = table[table["dataset"] == "all"].set_index("arm")
    assert rows["accuracy"].to_dict() == pytest.approx(alone.to_dict())
    assert (rows["n"] == 1800).all() and (rows["operations"] == 1).all()
    one = table[table["dataset"] == "made up"].set_index("arm")
    assert (rows["high"] - rows["low"] < one["high"] - one["low"]).all()  # twice as many questions


def test_names_needed_follow_the_square_root():
    table = pd.DataFrame(
        {"dataset": ["a", "all"], "other": "bias", "low": -0.04, "high": 0.04, "n": [900, 15]}
    )
    needed = names_needed(table.assign(names=[100, 5]), points=2)
    assert needed["needed"].tolist() == [400, 60] and needed["has"].tolist() == [100, 15]


def test_the_interval_over_datasets_holds_what_another_training_changes(store, monkeypatch):
    """Runs that scatter far more than their questions do: only the interval over runs is wide."""
    runs, kept = store
    monkeypatch.setitem(DATASETS, "other", DATASETS["made up"])
    draw, mine = np.random.default_rng(0), []
    for dataset in ("made up", "other"):
        for arm, chances in (("back attention", (0.9, 0.5, 0.5)), ("bias", (0.5, 0.5, 0.5))):
            for seed, chance in enumerate(chances):
                run = Run(dataset, arm, seed, test_items=300)
                right = "".join(map(str, (draw.random(300) < chance).astype(int)))
                kept.keep(run, {**kept.result(runs[0]), "right": right}, {})
                mine.append(run)
    rows = difference_table(mine, kept, "back attention", ["bias"]).set_index("dataset")
    assert rows.loc["made up", "low"] > 0 and rows.loc["all", "low"] < 0 < rows.loc["all", "high"]
    assert rows.loc["all", "p"] > 0.05 > rows.loc["made up", "p"] and rows.loc["all", "n"] == 6


def test_the_same_questions_in_other_words_do_not_narrow_the_interval(store, monkeypatch):
    runs, kept = store
    monkeypatch.setitem(DATASETS, "other", DATASETS["made up"])
    twins = [replace(run, dataset="other") for run in runs]
    for run, twin in zip(runs, twins, strict=True):
        kept.keep(twin, kept.result(run), {})
    alone, both = (
        pooled_table(own, kept, "back attention", ["bias"]).iloc[0] for own in (runs, runs + twins)
    )
    assert both["n"] == 2 * alone["n"] and both["names"] == alone["names"]
    for name in ("difference", "low", "high", "worst", "best"):
        assert both[name] == pytest.approx(alone[name])
    assert both["worst"] <= both["difference"] <= both["best"] and both["low"] > 0


def test_kinds_of_questions_are_told_apart(tmp_path):
    """An arm that has all ID/ID and another that has none of it, and both half of everything else."""
    kept, kinds = Store(tmp_path, shipped=None), ["ID/ID", "ID/OOD", "OOD/ID", "OOD/OOD"]
    arms, draw = {"2 layers + back attention": 1, "2 layers": 0}, np.random.default_rng(0)
    shape = dict(model="scratch", train_items=None, validation_items=None, test_items=None)
    runs = [Run("compositions", arm, seed, 1e-3, 4, **shape) for arm in arms for seed in range(3)]
    asked = as_asked.asked(runs[0], "test")
    for run in runs:
        right = np.where(asked["kind"] == "ID/ID", arms[run.arm], draw.integers(2, size=len(asked)))
        point = {"loss": 1.0, "train": 0.1, "validation": 0.5}
        curve = [
            {**point, "step": k, "kinds": dict.fromkeys(kinds, k / 4 + run.seed / 10)}
            for k in (2, 4)
        ]
        result = {
            "run": {},
            "right": "".join(map(str, right)),
            "curve": curve,
            "trained": 4,
            "flops": 8,
        }
        kept.keep(run, result, {})
    accuracy, less = by_kind(runs, kept, "2 layers + back attention", ["2 layers"])
    whole = accuracy.set_index(["kind", "arm"])
    assert (
        whole.loc["ID/ID", "accuracy"].to_dict() == arms
        and (whole["n"] == 200).all()
        and (whole["seeds"] == 3).all()
    )
    others = whole.drop(index="ID/ID")
    assert ((others["low"] < 0.5) & (others["high"] > 0.5)).all()
    rows = less.set_index("kind")
    assert rows.loc["ID/ID", ["difference", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    assert (rows["low"] <= 0).sum() == 3
    curves = kind_curves(runs, kept)
    assert len(curves) == len(arms) * len(kinds) * 2
    assert curves.loc[curves["step"] == 4, ["validation", "low", "high"]].round(
        9
    ).drop_duplicates().values.tolist() == [[1.1, 1.0, 1.2]]


def test_from_scratch_all_seeds_answer_the_same_questions(tmp_path, monkeypatch):
    frame = two_digit()
    monkeypatch.setitem(DATASETS, "sums", Dataset("sums", lambda: frame))
    kept, draw = Store(tmp_path, shipped=None), np.random.default_rng(0)
    questions, runs = draw.random(500), []  # how hard each is
    for arm, level in (("1 layer", 0.5), ("2 layers", 0.6)):
        for seed in range(5):
            run = Run("sums", arm, seed, model="scratch", test_items=500)
            right = questions < level + draw.normal(0, 0.02)
            text = "".join(map(str, right.astype(int)))
            kept.keep(run, {"run": {}, "right": text, "trained": 1, "seconds": 1, "flops": 1}, {})
            runs.append(run)
    answered = pooled_answers(runs[:5], kept)
    assert answered.right.shape == (5, 500) and len(answered.groups) == 500
    row = difference_table(runs, kept, "2 layers", ["1 layer"]).iloc[0]
    assert row["low"] > 0.03 and row["high"] < 0.17 and row["n"] == 500
    kept.keep(runs[0], {"run": {}, "diverged": "the loss is nan"}, {})
    with pytest.raises(ValueError, match=r"1 layer, seed 0\) diverged"):
        pooled_answers(runs[:5], kept)


def width(right, groups):
    answered = Answers(np.atleast_2d(right), np.asarray(groups))
    return np.ptp(np.nanpercentile(resampled(answered), [2.5, 97.5]))


def test_intervals_are_wider_for_few_groups_and_for_seeds_that_differ():
    draw = np.random.default_rng(0)
    by_group = np.repeat(draw.random(10) < 0.5, 30).astype(float)
    assert width(by_group, np.repeat(np.arange(10), 30)) > 2 * width(by_group, np.arange(300))
    same = (draw.random(300) < 0.5).astype(float)
    apart = np.stack([np.ones(300), np.zeros(300)])
    assert width(apart, np.arange(300)) > 5 * width(np.stack([same, same]), np.arange(300))


def test_intervals_cover_the_truth():
    """Effects of groups, of both names of a question, and of seeds: about 95 of 100 intervals hold the mean."""
    draw, covered = np.random.default_rng(1), {"one name": 0, "two names": 0, "seeds": 0}
    for _ in range(100):
        effect = draw.normal(0, 0.2, 30)
        for kind in covered:
            first, second = draw.integers(0, 30, (2, 240))
            chance = 0.5 + effect[first] + (effect[second] if kind == "two names" else 0)
            names = [
                f"a{i}|a{j}" if kind == "two names" else f"a{i}"
                for i, j in zip(first, second, strict=True)
            ]
            seeds = draw.normal(0, 0.05, (5, 1)) if kind == "seeds" else np.zeros((1, 1))
            right = (draw.random((len(seeds), 240)) < chance + seeds).astype(float)
            low, high = np.nanpercentile(resampled(Answers(right, np.array(names))), [2.5, 97.5])
            covered[kind] += low <= 0.5 <= high
    assert min(covered.values()) >= 82, covered


def test_differences_are_paired_and_signed(store):
    runs, kept = store
    row = difference_table(runs, kept, "back attention", ["bias"]).iloc[0]
    assert (
        row["low"] > 0.05 and row["p"] < 0.01 and row["difference"] == pytest.approx(0.2, abs=0.06)
    )
    less = difference_table(runs, kept, "bias", ["back attention"]).iloc[0]
    assert less["difference"] == pytest.approx(-row["difference"])
    for run in [
        run for run in runs if run.arm == "few-shot"
    ]:  # the same answers: no difference, no interval
        twin = Run("made up", "back attention", run.seed, test_items=300)
        kept.keep(run, kept.result(twin), {})
    none = difference_table(runs, kept, "back attention", ["few-shot"]).iloc[0]
    assert (none["difference"], none["low"], none["high"], none["p"]) == (0, 0, 0, 1)


def test_what_is_missing_is_named(store):
    runs, kept = store
    with pytest.raises(ValueError, match="seed 9"):
        pooled_answers([Run("made up", "bias", 9, test_items=300)], kept)
    with pytest.raises(ValueError, match="no runs of 'loop LoRA' on 'made up'"):
        difference_table(runs, kept, "back attention", ["loop LoRA"])


def test_arms_tried_on_some_datasets_are_compared_there_only(store, monkeypatch):
    runs, kept = store
    monkeypatch.setitem(DATASETS, "other", DATASETS["made up"])
    more = [Run("other", run.arm, run.seed, test_items=300) for run in runs if run.arm != "bias"]
    for run in more:
        kept.keep(run, kept.result(Run("made up", run.arm, run.seed, test_items=300)), {})
    table = difference_table(runs + more, kept, "back attention", ["bias", "few-shot"])
    assert table[table["other"] == "bias"]["dataset"].tolist() == ["made up"]  # once: no mean
    assert table[table["other"] == "few-shot"]["dataset"].tolist() == ["made up", "other", "all"]
    accuracy = accuracy_table(runs + more, kept)
    assert set(accuracy[accuracy["dataset"] == "all"]["arm"]) == {"back attention", "few-shot"}
    with pytest.raises(ValueError, match="no runs of 'bias' on 'other'"):
        difference_table(runs + more, kept, "bias", ["few-shot"])


def laid_out(tmp_path, monkeypatch):
    """One arm at three source layers with two seeds: layer 1 is best, layer 2 jumps and differs from seed to seed."""
    frame = one_digit_composite()
    monkeypatch.setitem(DATASETS, "made up", Dataset("made up", lambda: frame))
    kept, runs, rng = Store(tmp_path, shipped=None), [], np.random.default_rng(0)
    for layer, share, apart in ((0, 0.4, 0), (1, 0.8, 0), (2, 0.5, 0.2)):
        for seed in (0, 1):
            right = np.arange(100) < round(100 * (share + apart * (seed - 0.5)))
            losses = np.full(30, 1.0)
            losses[20] = 3.0 if layer == 2 else 1.0
            curve = [{"validation": 0.1, "losses": losses[:15].tolist()}]
            curve.append(
                {
                    "train": 0.25,
                    "validation": share + apart * (seed - 0.5),
                    "losses": losses[15:].tolist(),
                }
            )
            run = Run("made up", "same layer", seed, source_layer=layer, test_items=100)
            result = {
                "run": {},
                "right": "".join(map(str, rng.permutation(right.astype(int)))),
                "curve": curve,
            }
            kept.keep(
                run, {**result, "trained": 4, "seconds": 1.0, "flops": 1, "perplexity": 2.0}, {}
            )
            runs.append(run)
    return runs, kept


def test_settings_are_laid_side_by_side(tmp_path, monkeypatch):
    runs, kept = laid_out(tmp_path, monkeypatch)
    table = by_setting(runs, "source_layer", lambda part: accuracy_table(part, kept))
    assert table["source_layer"].tolist() == [0, 1, 2]
    assert table["accuracy"].to_list() == pytest.approx([0.4, 0.8, 0.5])
    seen = end_table(runs, kept, "source_layer").set_index("source_layer")
    assert seen.loc[2, ["validation", "low", "high"]].tolist() == pytest.approx([0.5, 0.4, 0.6])
    assert end_table(runs, kept, "source_layer", "train")["train"].tolist() == [0.25, 0.25, 0.25]
    best = choose(runs, kept, "source_layer").iloc[0]
    assert (best["source_layer"], best["validation"], best["lowest"], best["highest"]) == (
        1,
        0.8,
        1,
        1,
    )


def test_a_setting_is_compared_with_another_question_by_question(tmp_path, monkeypatch):
    runs, kept = laid_out(tmp_path, monkeypatch)
    table = setting_differences(runs, kept, "same layer", "source_layer", 0).set_index(
        "source_layer"
    )
    assert table.loc[0, ["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert table.loc[1, "difference"] == pytest.approx(0.4) and table.loc[1, "low"] > 0


def test_arms_are_compared_over_all_settings(tmp_path, monkeypatch):
    runs, kept = laid_out(tmp_path, monkeypatch)
    others = [replace(run, arm="bias") for run in runs]
    for run, other in zip(runs, others, strict=True):  # ten right answers fewer at each layer
        result = kept.result(run)
        where = [at for at, digit in enumerate(result["right"]) if digit == "1"][:10]
        right = "".join("0" if at in where else digit for at, digit in enumerate(result["right"]))
        kept.keep(other, {**result, "right": right}, {})
    row = over_settings(runs + others, kept, "source_layer", "same layer", ["bias"]).iloc[0]
    assert row["difference"] == pytest.approx(0.1) and row["low"] > 0 and row["settings"] == 3
    assert row["worst"] == pytest.approx(0.1) == row["best"] and row["seeds"] == 2
    with pytest.raises(ValueError, match="not finished"):
        over_settings(
            [*runs, *others, replace(runs[0], source_layer=9)],
            kept,
            "source_layer",
            "same layer",
            ["bias"],
        )
    with pytest.raises(ValueError, match="no runs"):
        over_settings(runs + others[:2], kept, "source_layer", "same layer", ["bias"])


def test_unrest_is_measured(tmp_path, monkeypatch):
    runs, kept = laid_out(tmp_path, monkeypatch)
    table = layer_ablation.training_instability(runs, kept).set_index("source_layer")
    assert table["jump"].tolist() == pytest.approx([0, 0, 2])
    own = np.array([[0.4, 0.4], [0.8, 0.8], [0.4, 0.6]]) * 100  # validation by layer and seed
    assert table["spread"].tolist() == pytest.approx((own - own.mean(0)).std(1, ddof=1))
    for run in runs:  # a batch that is hard at every layer is no jump
        result = kept.result(run)
        result["curve"][0]["losses"][10] += 5
        kept.keep(run, result, {})
    assert layer_ablation.training_instability(runs, kept)["jump"].tolist() == pytest.approx(
        [0, 0, 2]
    )
    kept.keep(runs[0], {"run": {}, "diverged": "the loss is nan"}, {})
    with pytest.raises(ValueError, match="diverged"):
        layer_ablation.training_instability(runs, kept)


def test_what_is_compared_must_be_the_same_questions(tmp_path, monkeypatch):
    runs, kept = laid_out(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="same questions"):
        setting_differences([*runs[:2], runs[2]], kept, "same layer", "source_layer", 0)


def test_learning_curves_give_the_range_over_seeds(store):
    runs, kept = store
    row = learning_curves(runs, kept).set_index("arm").loc["bias"]
    assert (row["low"], row["validation"], row["high"]) == pytest.approx((0.5, 0.51, 0.52))


# ---------------------------------------------------------------- verdicts


def scratch(ahead, behind, two=0.95):
    rows = [("1 layer", 0.8), ("1 layer + back attention", 0.9), ("2 layers", two)]
    accuracy = pd.DataFrame(rows, columns=["arm", "accuracy"]).assign(n=9, seeds=5)
    accuracy = accuracy.assign(low=accuracy["accuracy"] - 0.01, high=accuracy["accuracy"] + 0.01)
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
    assert one_layer_matches_two(*scratch(ahead, behind)).verdict == verdict


def test_c7_needs_two_layers_to_be_better_than_one():
    claim = one_layer_matches_two(*scratch((0.2, 0.1, 0.3), (0.0, -0.005, 0.005), two=0.81))
    assert claim.verdict == "not testable here"


def differences(untrained, trained):
    rows = []
    for dataset in ("two-hop", "all"):
        rows += [("smollm2", dataset, other, *untrained) for other in ("zero-shot", "few-shot")]
        rows.append(("smollm2", dataset, "bias", *trained))
    return pd.DataFrame(
        rows, columns=["model", "dataset", "other", "difference", "low", "high"]
    ).assign(names=2)


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
    table = differences(untrained, trained)
    assert raises_accuracy(table, ["bias"]).verdict == verdict
    claim = other_prompts_too(table.assign(n=50), ["bias"])
    assert (claim.id, claim.verdict) == ("N1", verdict) and "n = 50 (two-hop)" in claim.ours


def test_c8_does_not_check_what_was_not_tried_on_all_datasets():
    table = differences((0.2, 0.1, 0.3), (0.1, 0.05, 0.2))
    behind = (
        table[table["other"] == "bias"]
        .head(1)
        .assign(other="loop LoRA", difference=-0.2, low=-0.3, high=-0.1)
    )
    claim = raises_accuracy(pd.concat([table, behind]), ["bias", "loop LoRA"])
    assert claim.verdict == "reproduced" and "on two-hop less loop LoRA -20.0" in claim.ours


def test_c8_needs_every_control():
    table = differences((0.2, 0.1, 0.3), (0.1, 0.05, 0.2))
    with pytest.raises(ValueError, match="same layer"):
        raises_accuracy(table, ["bias", "same layer"])


@pytest.mark.parametrize(
    "best, seeds, ahead, spread, jump, slope, same, verdict",
    [
        (6, (5, 7), -0.01, 3.0, 3.0, -0.01, 0.02, "reproduced"),
        (6, (5, 7), -0.01, 3.0, 3.0, -0.01, 0.0, "partly"),
        (6, (5, 20), -0.01, 3.0, 1.0, 0.0, 0.0, "partly"),
        (6, (5, 20), -0.01, 1.0, 3.0, 0.0, 0.0, "partly"),
        (20, (20, 20), -0.05, 1.0, 1.0, 0.0, 0.0, "not at this scale"),
        (20, (20, 20), 0.05, 0.3, 0.3, 0.01, -0.02, "contradicted"),
    ],
)
def test_c9_follows_its_rule(best, seeds, ahead, spread, jump, slope, same, verdict):
    layers, noise = np.arange(30), np.arange(30) * 7 % 5
    arms = ["back attention", "same layer"]
    about = {"source_layer": best, "lowest": seeds[0], "highest": seeds[1], "seeds": 3}
    chosen = pd.DataFrame({"arm": arms, **about})
    six = pd.DataFrame(
        {"source_layer": layers, "difference": ahead, "low": ahead - 0.01, "high": ahead + 0.01}
    )
    sizes = {
        name: np.where(layers < 6, size, 1) + noise / 100
        for name, size in (("spread", spread), ("jump", jump))
    }
    mine = pd.concat([pd.DataFrame({"arm": arm, "source_layer": layers, **sizes}) for arm in arms])
    accuracy = mine.assign(
        accuracy=lambda t: 0.5 + slope * t["source_layer"] + np.tile(noise, 2) / 1000
    )
    less = pd.DataFrame(
        {"other": "same layer", "source_layer": layers, "difference": same, "n": 436}
    )
    less = less.assign(low=less["difference"] - 0.01, high=less["difference"] + 0.01)
    claim = low_layers_are_best(chosen, six, mine, accuracy, less, (chosen, six, less))
    assert claim.verdict == verdict and f"layer {best}" in claim.ours and "n = 436" in claim.ours
    assert f"same layer at {30 * (same > 0)} (behind at {30 * (same < 0)}) of 30" in claim.ours
    assert (
        f"validation chooses layer {best} ({min(best, *seeds)} to {max(best, *seeds)} by seed)"
        in claim.ours
    )


def test_c11_follows_its_rule():
    sizes = pd.DataFrame({"dim": [10, 160], "share": [2.04e-5, 3.26e-4]})
    assert adapter_size(sizes).verdict == "partly"
    assert adapter_size(sizes.assign(share=2e-5)).verdict == "reproduced"
    assert adapter_size(sizes.assign(share=1e-2)).verdict == "contradicted"


def test_what_a_doubling_does(tmp_path, monkeypatch):
    runs, kept = laid_out(tmp_path, monkeypatch)
    sizes = {0: 1, 1: 2, 2: 8}
    sized = [replace(run, dim=sizes[run.source_layer]) for run in runs]
    for run, one in zip(runs, sized, strict=True):
        kept.keep(one, kept.result(run), {})
    slope = np.polyfit([0, 1, 3], [0.4, 0.8, 0.5], 1)[0]
    row = doubling_table(sized, kept, "dim").iloc[0]
    assert (
        row["slope"] == pytest.approx(slope)
        and row["low"] < slope < row["high"]
        and row["settings"] == 3
    )
    assert [row["worst"], row["best"]] == pytest.approx(
        [np.polyfit([0, 1, 3], [0.4, 0.8, last], 1)[0] for last in (0.4, 0.6)]
    )


def test_the_share_of_a_gain_that_is_kept(tmp_path, monkeypatch):
    runs, kept = laid_out(tmp_path, monkeypatch)
    at = {layer: [run for run in runs if run.source_layer == layer] for layer in (0, 1, 2)}
    share = kept_share(at[2], at[1], at[0], kept)
    assert (
        share["kept"] == pytest.approx(0.25)
        and share["low"] < 0.25 < share["high"]
        and share["n"] == 200
    )
    with pytest.raises(ValueError, match="too small"):
        kept_share(at[2], at[0], at[1], kept)


@pytest.mark.parametrize(
    "low, high, less, verdict",
    [
        (0.6, 0.9, (0.05, 0.05, 0.05), "reproduced"),
        (0.6, 0.9, (0.05, -0.01, 0.0), "partly"),
        (0.4, 0.7, (0.05, 0.0, 0.0), "partly"),
        (0.4, 0.7, (0.0, 0.0, -0.1), "not at this scale"),
        (0.1, 0.4, (-0.1, -0.1, -0.1), "contradicted"),
    ],
)
def test_c11_asks_whether_so_little_is_enough(low, high, less, verdict):
    rivals = ["same layer", "residual LoRA", "bias"]
    gain = pd.DataFrame({"other": [*rivals, "zero-shot"], "difference": [*less, 0.2]})
    gain = gain.assign(low=gain["difference"] - 0.02, high=gain["difference"] + 0.02)
    share = pd.Series({"dim": 1, "share": 1.7e-5})
    kept = pd.DataFrame(
        {"arm": ["back attention", *rivals], "kept": (low + high) / 2, "low": low, "high": high}
    )
    claim = small_keeps_its_gain(share, kept.assign(n=436), gain)
    assert (
        claim.verdict == verdict
        and "0.0017 %" in claim.ours
        and f"[{low:.0%}, {high:.0%}]" in claim.ours
    )
    assert claim.ours.count("more than half") == 3 * (low > 0.5)


def test_p_is_corrected_for_all_rows():
    table = intervals.holm(pd.DataFrame({"p": [0.01, 0.04, 0.03, 0.5]}))
    assert table["corrected"].to_list() == pytest.approx([0.04, 0.09, 0.09, 0.5])


@pytest.mark.parametrize(
    "layer, own, verdict", [(6, -0.02, "partly"), (20, 0.02, "partly"), (20, -0.02, "contradicted")]
)
def test_c9_asks_arithmetic_too(layer, own, verdict):
    """Everything about two-hop questions speaks against the claim; arithmetic decides."""
    layers = np.arange(30)
    chosen = pd.DataFrame(
        {"arm": ["back attention", "same layer"], "source_layer": 20, "lowest": 20, "highest": 20}
    )
    chosen = chosen.assign(seeds=3)
    six = pd.DataFrame(
        {"source_layer": layers, "difference": 0.05, "low": 0.04, "high": 0.06, "n": 9}
    )
    unrest = pd.DataFrame(
        {"arm": "back attention", "source_layer": layers, "spread": layers, "jump": layers}
    )
    accuracy = unrest.assign(accuracy=layers / 30)
    both = [pd.concat([t, t.assign(arm="same layer")]) for t in (unrest, accuracy)]
    less = pd.DataFrame(
        {
            "other": "same layer",
            "source_layer": layers,
            "difference": -0.02,
            "low": -0.03,
            "high": -0.01,
        }
    )
    less = less.assign(n=9)
    there = chosen.assign(source_layer=layer, lowest=layer, highest=layer)
    digits = less.assign(difference=own, low=own - 0.01, high=own + 0.01)
    assert low_layers_are_best(chosen, six, *both, less, (there, six, digits)).verdict == verdict
