"""The rules of C7, C8 and C11, and what E7 reports."""

import numpy as np
import pandas as pd
import pytest
from ledger_rows import held

from companion.measures.gains import gain_claim
from companion.questions.datasets import ONE_HOP
from companion.runs.run import Run
from companion.runs.store import Store
from companion.studies.back_attention_training import (
    RIVALS,
    WIDER,
    gain_kept,
    gains_beside,
    is_small,
    one_layer_matches_two,
    pair_differences,
    rival_answers,
)

AHEAD, LEVEL, BEHIND = (0.2, 0.1, 0.3), (0.0, -0.05, 0.05), (-0.2, -0.3, -0.1)
ENDS = ["difference", "low", "high"]


@pytest.mark.parametrize(
    "one, two, level, verdict",
    [
        (AHEAD, (0.0, -0.005, 0.005), 0.95, "all"),
        (AHEAD, BEHIND, 0.95, "some"),
        (LEVEL, BEHIND, 0.95, "none"),
        (BEHIND, BEHIND, 0.95, "none"),
        (AHEAD, (0.0, -0.005, 0.005), 0.81, "all"),  # not testable: two layers as good as one
    ],
)
def test_c7_follows_its_rule(one, two, level, verdict):
    """one, two: back attention less one layer, and less two; level: of two layers."""
    rows = [("1 layer", 0.8), ("1 layer + back attention", 0.9), ("2 layers", level)]
    accuracy = pd.DataFrame(rows, columns=["arm", "accuracy"]).assign(n=9, seeds=5)
    accuracy = accuracy.assign(low=accuracy["accuracy"] - 0.01, high=accuracy["accuracy"] + 0.01)
    rows = [("1 layer", *one), ("2 layers", *two), ("1 layer, twice", *LEVEL)]
    less = pd.DataFrame(rows, columns=["other", *ENDS])
    row = one_layer_matches_two(accuracy, less)
    assert held(row) == verdict and row["control"] == "undecided"
    said = (
        "toy"
        if two != BEHIND and level == 0.95
        else "inconclusive"
        if two != BEHIND
        else "falsified"
    )
    assert row["verdict"] == said


def differences(untrained, trained):
    others = {"zero-shot": untrained, "few-shot": untrained, "bias": trained}
    rows = [(data, *row) for data in ("two-hop", "all") for row in others.items()]
    return pd.DataFrame([(*row[:2], *row[2]) for row in rows], columns=["dataset", "other", *ENDS])


@pytest.mark.parametrize(
    "untrained, trained, verdict",
    [
        (AHEAD, AHEAD, "all"),
        (AHEAD, LEVEL, "some"),
        (LEVEL, LEVEL, "none"),
        (BEHIND, BEHIND, "none"),
    ],
)
def test_c8_follows_its_rule(untrained, trained, verdict):
    row = gain_claim("C8", differences(untrained, trained), ["bias"])
    words = {AHEAD: "ahead", LEVEL: "undecided", BEHIND: "behind"}
    assert held(row) == verdict and row["control"] == words[trained]
    expected = {AHEAD: "verified", LEVEL: "inconclusive", BEHIND: "falsified"}
    assert row["verdict"] == expected[untrained]


def test_c8_needs_every_control_but_checks_only_those_of_all_datasets():
    table = differences(AHEAD, AHEAD)
    loop = table[table["other"] == "bias"].head(1).assign(other="loop LoRA")
    loop[ENDS] = BEHIND
    row = gain_claim("C8", pd.concat([table, loop]), ["bias", "loop LoRA"])
    assert held(row) == "all" and "on two-hop less loop LoRA -20.0" in row["ours"]
    with pytest.raises(ValueError, match="same layer"):
        gain_claim("C8", table, ["bias", "same layer"])


def test_c11_follows_its_rule():
    table = pd.DataFrame({"dim": [10, 160], "share": [2.04e-5, 3.26e-4]})
    assert held(is_small(table)) == "all" and is_small(table)["verdict"] == "verified"
    assert is_small(table.assign(share=1e-2))["verdict"] == "falsified"


def chances(answers_of, **shares) -> pd.DataFrame:
    """Answers of arms, of which each has exactly this share right in each of three folds."""
    right = {arm: np.arange(200) < round(200 * share) for arm, share in shares.items()}
    return pd.concat(answers_of([x] * 3, arm=arm.replace("_", " ")) for arm, x in right.items())


def test_rivals_are_compared_in_pairs_and_corrected_together(answers_of):
    answered = chances(answers_of, new=0.6, old=0.5, zero_shot=0.5)
    table = pair_differences(answered, [("new", "old"), ("old", "zero shot")])
    assert table["difference"].round(6).tolist() == [0.1, 0.0]
    first, second = table.iloc[0], table.iloc[1]
    assert 0 < first["low"] < first["low_90"] < 0.1 < first["high_90"] < first["high"]
    assert first["corrected"] == pytest.approx(2 * first["p"]) and second["corrected"] == 1.0


def test_rivals_are_named_by_how_they_were_trained(tmp_path):
    store, about = Store(tmp_path, shipped=None), {"test_items": 9, "learning_rate": 1e-3}
    runs = [Run("two-hop", "same layer", kl=kl, **about) for kl in (0.0, 1.0)]
    runs.append(Run(ONE_HOP, "same layer", **about))
    for run in runs:
        store.keep(run, {"run": {}, "right": "010101010", "trained": 4, "seconds": 2.0}, {})
    named = rival_answers(runs, store)
    assert named["arm"].unique().tolist() == ["same layer", "same layer, KL", "same layer, one hop"]
    assert set(named["dataset"]) == {"two-hop"}
    assert {"same layer, KL", "same layer, one hop"} < {arm for pair in RIVALS for arm in pair}


def test_what_is_kept_of_a_gain(answers_of):
    answered = chances(answers_of, whole=0.5, half=0.3, zero_shot=0.1)
    answered["arm"] = answered["arm"].replace("zero shot", "zero-shot")
    kept = gain_kept(answered, {"whole": "half"}).iloc[0]
    assert kept["kept"] == pytest.approx(0.5) and kept["low"] < 0.5 < kept["high"]
    none = gain_kept(answered.replace({"right": {1.0: 0.0}}), {"whole": "half"}).iloc[0]
    assert none[["kept", "low", "high"]].isna().all()


def test_gains_on_other_questions_are_shares_of_the_usual_ones(answers_of):
    usual = chances(answers_of, whole=0.5, zero_shot=0.1)
    wider = chances(answers_of, whole=0.2, zero_shot=0.1).assign(dataset="wider")
    usual["arm"], wider["arm"] = (
        x["arm"].replace("zero shot", "zero-shot") for x in (usual, wider)
    )
    row = gains_beside(wider, usual, ["whole"]).iloc[0]
    assert row[["gain", "usual", "share"]].tolist() == pytest.approx([0.1, 0.4, 0.25])
    assert row["low"] < 0.25 < row["high"]
    back = gains_beside(usual, wider.replace({"right": {1.0: 0.0}}), ["whole"]).iloc[0]
    assert back["usual"] == 0.0 and back[["share", "low", "high"]].isna().all()


def test_wider_questions_compare_each_pair_once():
    assert len({frozenset(pair) for pair in WIDER}) == len(WIDER)
