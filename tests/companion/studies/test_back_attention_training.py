"""The rules of C7, C8 and C11."""

import pandas as pd
import pytest

from companion.studies.back_attention_training import (
    is_small,
    one_layer_matches_two,
    raises_accuracy,
    sizes,
)

CONTROLS = ["same layer", "residual LoRA", "loop LoRA", "LoRA q,v", "bias"]


def scratch(ahead, behind, two=0.95):
    rows = [("1 layer", 0.8), ("1 layer + back attention", 0.9), ("2 layers", two)]
    accuracy = pd.DataFrame(rows, columns=["arm", "accuracy"]).assign(n=9, seeds=5)
    accuracy = accuracy.assign(low=accuracy["accuracy"] - 0.01, high=accuracy["accuracy"] + 0.01)
    rows = [("1 layer", *ahead), ("2 layers", *behind)]
    return accuracy, pd.DataFrame(rows, columns=["other", "difference", "low", "high"])


@pytest.mark.parametrize(
    "ahead, behind, two, verdict",
    [
        ((0.2, 0.1, 0.3), (0.0, -0.005, 0.005), 0.95, "reproduced"),
        ((0.2, 0.1, 0.3), (-0.1, -0.15, -0.05), 0.95, "partly"),
        ((0.0, -0.1, 0.1), (-0.1, -0.15, -0.05), 0.95, "not at this scale"),
        ((-0.2, -0.3, -0.1), (-0.1, -0.15, -0.05), 0.95, "contradicted"),
        ((0.2, 0.1, 0.3), (0.0, -0.005, 0.005), 0.81, "not testable here"),  # no better than one
    ],
)
def test_c7_follows_its_rule(ahead, behind, two, verdict):
    assert one_layer_matches_two(*scratch(ahead, behind, two))["verdict"] == verdict


def differences(untrained, trained):
    rows = []
    for dataset in ("two-hop", "all"):
        rows += [("smollm2", dataset, other, *untrained) for other in ("zero-shot", "few-shot")]
        rows.append(("smollm2", dataset, "bias", *trained))
    columns = ["model", "dataset", "other", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns).assign(names=2)


AHEAD, BEHIND = differences((0.2, 0.1, 0.3), (0.1, 0.05, 0.2)), (-0.2, -0.3, -0.1)


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
    assert raises_accuracy(differences(untrained, trained), ["bias"])["verdict"] == verdict


def test_c8_does_not_check_what_was_not_tried_on_all_datasets():
    loop = AHEAD[AHEAD["other"] == "bias"].head(1).assign(other="loop LoRA")
    loop[["difference", "low", "high"]] = BEHIND
    row = raises_accuracy(pd.concat([AHEAD, loop]), ["bias", "loop LoRA"])
    assert row["verdict"] == "reproduced" and "on two-hop less loop LoRA -20.0" in row["ours"]


def test_c8_needs_every_control():
    with pytest.raises(ValueError, match="same layer"):
        raises_accuracy(AHEAD, ["bias", "same layer"])


def test_c11_follows_its_rule():
    table = pd.DataFrame({"dim": [10, 160], "share": [2.04e-5, 3.26e-4]})
    assert is_small(table)["verdict"] == "partly"
    assert is_small(table.assign(share=2e-5))["verdict"] == "reproduced"
    assert is_small(table.assign(share=1e-2))["verdict"] == "contradicted"


def test_sizes_follow_from_the_widths(llama):
    model = llama[0]
    width, total = model.config.hidden_size, sum(p.numel() for p in model.parameters())
    table = sizes(model, dims=[1, 4], source_layer=1)
    assert table["weights"].tolist() == [4 * width, 16 * width]
    assert table["share"].tolist() == [4 * width / total, 16 * width / total]


def test_verdicts_are_what_the_tables_say(committed):
    rows = [
        one_layer_matches_two(committed("03_scratch"), committed("03_scratch_differences")),
        raises_accuracy(committed("03_differences"), CONTROLS),
        is_small(committed("03_sizes")),
    ]
    assert [row["verdict"] for row in rows] == committed("03_claims")["verdict"].tolist()
    assert rows[2]["ours"] == committed("03_claims")["ours"][2]
