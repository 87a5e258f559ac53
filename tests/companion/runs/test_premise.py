"""Making the frozen models of the premise."""

from dataclasses import replace

import pytest

from backattn import load_model
from companion.questions.premise import world
from companion.runs import premise
from companion.runs.run import OWN, Run


@pytest.mark.parametrize("name", OWN)
def test_a_base_is_made_and_read_again(name, tmp_path, monkeypatch):
    for recipe in ("_facts", "_natural"):
        few = replace(getattr(premise, recipe), steps=3, batch_size=8)
        monkeypatch.setattr(premise, recipe, few)
    premise.make_base(name, tmp_path / "base")
    model, tokenizer = load_model(tmp_path / "base")
    assert len(model.model.layers) == premise.LAYERS
    assert len(tokenizer("e3 r7 r12")["input_ids"]) == 3
    upper = model.model.layers[-1].mlp.down_proj.weight
    assert upper.abs().mean() < 5e-3 if name == "premise low" else upper.abs().mean() > 5e-3


def test_facts_after_another_entity_keep_their_answer():
    facts = world().query("kind == 'fact'").head(50)
    told = premise.after_another(facts, 1)
    assert (told["prompt"].str.split(n=1).str[1] == facts["prompt"]).all()
    assert told["answer"].equals(facts["answer"]) and told["prompt"].str[0].eq("e").all()


def test_all_arms_are_tested_on_the_same_questions():
    plan = premise.premise_runs("premise low")
    trained = [one for one in plan if one.trials]
    assert {one.run.arm for one in trained} == {*premise.ARMS} and len(plan) == 7 * 3
    assert {one.run.fold for one in plan} == {None}
    assert all(one.trials[0].steps == one.run.steps for one in trained)
    assert Run("premise", "bias", model="premise").key != Run("premise", "bias").key
