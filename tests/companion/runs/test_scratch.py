import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from backattn.adapters.two_pass import TwoPassModel
from backattn.training.loop import train
from companion.runs.as_asked import asked, questions
from companion.runs.perform import with_adapter
from companion.runs.plans import scratch_runs
from companion.runs.run import SCRATCH, Run
from companion.runs.scratch import COMPOSING_ARMS, SCRATCH_ARMS, SIZED, scratch_model

MEMORY = {  # which states an arm reads in a second pass, and the weights that it adds
    "2 layers + back attention": ((0, 1, 2), 4 * 20 * 8),
    "2 layers + same layer": ((0,), 4 * 20 * 8),
    "2 layers + loop": ((2,), 4 * 20 * 8),
    "2 layers + return": ((2,), 1),
}


def weights(run: Run) -> int:
    return sum(p.numel() for p in scratch_model(run)[0].parameters())


@pytest.mark.parametrize("arm", SCRATCH_ARMS)
def test_models_of_sums(arm):
    run = Run("2-digit", arm, 0, 1e-3, 2, SCRATCH, 0, 8, 16, 64, 8, 8, "float32")
    with with_adapter(run, "float32") as (model, tok):
        items = questions(run, tok, "train")
        assert {len(p) for p in items.prompts} == {6} and {len(a) for a in items.answers} == {5}
        asks, says = (tok.decode(x[0]).replace(" ", "") for x in (items.prompts, items.answers))
        assert int(says.rstrip(";")) == eval(re.sub(r"\b0(?=\d)", "", asks.rstrip("=")))
        assert np.isfinite(train(model, items, run.recipe)["loss"]).all()
        assert isinstance(model, TwoPassModel) == (arm == "1 layer + back attention")
        if isinstance(model, TwoPassModel):
            assert model.two_passes and model.memory_layers == (0, 1)


@pytest.mark.parametrize("arm", COMPOSING_ARMS)
def test_models_that_compose(arm):
    sizes = (0, 8, 64, None, None, None, "float32")
    run = Run("compositions", arm, 0, 1e-3, 4, SCRATCH, *sizes, width=20)
    with with_adapter(run, "float32") as (model, tok):
        items = questions(run, tok, "train")
        assert {len(prompt) for prompt in items.prompts} == {2, 3}
        assert {len(answer) for answer in items.answers} == {1}
        text = tok.decode(items.prompts[0] + items.answers[0])
        assert text == "".join(asked(run, "train").iloc[0][:2])
        last = train(model, items, run.recipe, questions(run, tok, "validation")).iloc[-1]
        assert set(last["kinds"]) == {"ID/ID", "ID/OOD", "OOD/ID", "OOD/OOD"}
        assert np.mean(list(last["kinds"].values())) == pytest.approx(last["validation"])
        layers = (model.base_model if isinstance(model, TwoPassModel) else model).model.layers
        assert len(layers) == (4 if "4 layers" in arm or arm == "2 layers, twice" else 2)
        assert (layers[0] is layers[-2]) == ("4 layers" not in arm)
        assert isinstance(model, TwoPassModel) == (arm in MEMORY)
        if arm in MEMORY:
            added = sum(p.numel() for p in model.updates.parameters())
            assert (model.memory_layers, added) == MEMORY[arm]
            assert model.two_passes == (arm != "2 layers + same layer")


def test_every_second_question_skips_the_lower_half_in_training_alone():
    model, _ = scratch_model(Run("compositions", "4 layers, half skipped", model=SCRATCH, width=20))
    ids = torch.tensor([[5, 6, 7]]).expand(4, -1)
    learnt = model(input_ids=ids).logits.detach()
    with torch.no_grad():
        tested = model(input_ids=ids).logits
        model.model.layers = model.model.layers[2:]
        upper = model(input_ids=ids).logits
    for row, other in enumerate((tested, upper, tested, upper)):
        assert torch.allclose(learnt[row], other[row], atol=1e-5)
    assert not torch.allclose(tested, upper, atol=1e-2)


def test_weights_from_scratch():
    """Widened = with back attention, to one part in a thousand; tied = one layer."""
    count = {arm: weights(Run("2-digit", arm, dim=160, model=SCRATCH)) for arm in SCRATCH_ARMS}
    adapted = count["1 layer + back attention"]
    assert count["1 layer, wide"] == pytest.approx(adapted, rel=1e-3)
    assert count["1 layer, twice"] == count["1 layer"] < adapted < count["2 layers"]
    assert adapted / count["2 layers"] == pytest.approx(0.567, abs=0.01)
    with pytest.raises(ValueError, match="Unknown arm '1 layer'"):
        scratch_model(Run("compositions", "1 layer", model=SCRATCH))


def test_widths_and_dims():
    plan = scratch_runs(seeds=(0, 1), widths=(40, 80), dims=(10, 4), tried_for=750)
    assert len(plan) == 2 * 2 * (3 + 2 * 2)  # seeds, widths, arms: each d′ where it counts
    trials = {trial for one in plan for trial in one.trials}
    assert len(trials) == 2 * (3 + 2 * 2)  # every width and d′ has its own
    assert {(trial.steps, trial.test_items) for trial in trials} == {(750, 0)}
    size = {(one.run.width, one.run.arm, one.run.dim): weights(one.run) for one in plan}
    for width, dim in itertools.product((40, 80), (10, 4)):
        adapted, wide = (size[width, arm, dim] - size[width, "1 layer", 160] for arm in SIZED)
        assert adapted == 4 * width * dim and abs(wide - adapted) <= 3 * width


def test_a_run_has_the_arm_of_its_seed():
    run = Run("2-digit", "1 layer", model=SCRATCH, width=40)
    for other, same in ((run, True), (replace(run, seed=1), False)):
        with with_adapter(run, "float32") as (one, _), with_adapter(other, "float32") as (two, _):
            assert bool((one.lm_head.weight == two.lm_head.weight).all()) == same
