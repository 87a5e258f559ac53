"""What is said of the frozen models of the premise."""

import pandas as pd
import pytest

from backattn import load_model
from companion.measures.premise import answers_of, decisions, put_back, readable, standing
from companion.questions.premise import world
from companion.runs.run import OWN


@pytest.fixture(scope="module", params=OWN)
def base(request):
    return request.param, *load_model(OWN[request.param])


@pytest.fixture(scope="module")
def unseen():
    return world().query("kind == 'two-hop' and role == 'adapters' and not shown").head(200)


def test_the_premise_holds_in_the_frozen_models(base, unseen):
    name, model, tokenizer = base
    facts = answers_of(model, tokenizer, world().query("kind == 'fact'").head(300))
    right = (answers_of(model, tokenizer, unseen)["said"] == "e3").mean()
    assert (facts["said"] == "e3").mean() > 0.99
    assert right < 0.05 if name == "premise low" else 0.35 < right < 0.65
    read = (
        readable(model, tokenizer, unseen).set_index(["name", "at", "layer"])["share"].sort_index()
    )
    assert read["e2", "r1", 8] > 0.99 and read["e2", "r1", 0] < 0.05
    assert read["e3", "r2", 8] == pytest.approx(right)
    assert read["e3", "r1"].max() < 0.1  # it cannot know r2
    back = put_back(model, tokenizer, unseen).set_index("layer")["share"]
    assert back[0] > 0.9 and len(back) == 8
    assert all(not block._forward_pre_hooks for block in model.model.layers)


def test_what_is_said_is_told_apart(base, unseen):
    _, model, tokenizer = base
    bridge = unseen.assign(answer=" " + unseen["group"])
    said, other = (answers_of(model, tokenizer, x)["said"] for x in (unseen, bridge))
    assert set(said) <= {"e3", "e2", "other"}
    assert ((said == "e2") <= (other == "e3")).all()


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.06, 0.1, "ahead by more than 5 points"),
        (0.01, 0.1, "ahead"),
        (-0.01, 0.1, "undecided"),
        (-0.01, 0.015, "equal"),
        (0.005, 0.015, "equal"),
        (-0.1, -0.01, "behind"),
    ],
)
def test_a_standing_is_read_off_an_interval(low, high, expected):
    assert standing({"low": low, "high": high}) == expected


@pytest.mark.parametrize(
    "ends, donors_low, expected",
    [
        ([(0.06, 0.1), (0.2, 0.3)], 0.6, "the mechanism works"),
        ([(0.06, 0.1), (0.2, 0.3)], 0.4, "not shown to work"),
        ([(0.04, 0.1), (0.2, 0.3)], 0.6, "not shown to work"),
        ([(-0.01, 0.01), (-0.015, 0.01)], 0.0, "refuted"),
        ([(-0.01, 0.03), (-0.01, 0.01)], 0.0, "not shown to work"),
    ],
)
def test_the_rule_of_the_premise(ends, donors_low, expected):
    others = ["shuffled memory", "same layer", "bias"]
    table = pd.DataFrame([*ends, (-1.0, 1.0)], columns=["low", "high"]).assign(other=others)
    two = pd.concat([table.assign(model="a"), table.assign(model="b")])
    made = decisions(two, {"a": donors_low, "b": donors_low}).set_index("model")["decision"]
    assert made.to_dict() == {"a": expected, "b": expected}
    if expected == "refuted":  # which takes both
        two.loc[two["model"] == "b", ["low", "high"]] += 0.1
        assert set(decisions(two, {"a": 0.0, "b": 0.0})["decision"]) == {"not shown to work"}
