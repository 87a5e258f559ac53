"""The one training loop: stopped and resumed, in pieces, with and without kept first passes."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from backattn import load_model, runtime
from backattn.adapters.arms import make_arm
from backattn.training.batches import collate
from backattn.training.evaluation import FirstPasses, answer_logits, right_answers
from backattn.training.loop import Recipe, _Batches, _rows_of, _windows_of, train

RECIPE = Recipe(steps=12, learning_rate=0.01, batch_size=6, evaluations=3)
USERS = ("backattn.training.loop", "backattn.training.evaluation")


@pytest.fixture
def learnt(items):
    """Trains a fresh arm; returns (curve, weights)."""

    def learn(arm="back attention", recipe=RECIPE, questions=items, validation=items, **options):
        torch.manual_seed(0)
        wrapped = make_arm(arm, load_model("tiny-llama")[0], 1, 4)
        curve = train(wrapped, questions, recipe, validation, **options)
        return curve, {name: p for name, p in wrapped.named_parameters() if p.requires_grad}

    return learn


def same(one, other, atol=1e-3) -> bool:
    columns = ["step", "loss", "train", "validation"] + ["losses"] * (atol == 0)
    pd.testing.assert_frame_equal(one[0][columns], other[0][columns], atol=atol / 10, rtol=atol)
    weights = one[1].keys() | other[1].keys()
    return all(torch.allclose(one[1][n], other[1][n], atol=atol, rtol=0) for n in weights)


@pytest.mark.parametrize("arm", ["back attention", "LoRA q,v"])
def test_a_stopped_run_goes_on_to_the_same_result(arm, items, learnt, tmp_path, monkeypatch):
    whole, path, calls = learnt(arm), tmp_path / "training.pt", iter(range(100))

    def failing(*args):
        if next(calls) == 10:
            raise InterruptedError
        return right_answers(*args)

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        for user in USERS:
            patched.setattr(f"{user}.right_answers", failing)
        learnt(arm, checkpoint=path, save_every=2)
    assert path.exists() and same(learnt(arm, checkpoint=path, save_every=2), whole, atol=0)
    others = {
        "recipe": {"recipe": replace(RECIPE, seed=3)},
        "model, trained weights": {"arm": "bias"},
        "questions": {"questions": replace(items, answers=items.answers[::-1])},
        "validation": {"validation": None},
    }
    for what, changed in others.items():
        with pytest.raises(ValueError, match=rf"another training run \(other {what}\)"):
            learnt(**{"arm": arm, **changed}, checkpoint=path)


def test_kept_first_passes_give_the_same_training(learnt, monkeypatch, capsys):
    counted, ordinary = [], FirstPasses._compute
    monkeypatch.setattr(FirstPasses, "_compute", lambda *a: (counted.append(1), ordinary(*a)))
    roomy = learnt(keep_first_passes=1.0)
    assert len(counted) == 1 and same(learnt(keep_first_passes=1e-6), roomy)
    monkeypatch.setattr(runtime, "free_bytes", lambda device="cpu": 1000)
    assert "it runs each time" in capsys.readouterr().err and same(learnt(), roomy)
    assert len(counted) == 1 and "it runs each time" in capsys.readouterr().err


def test_every_question_is_seen_once_per_epoch_among_its_like():
    lengths = np.arange(24) % 5
    seen = [_rows_of(step, lengths, RECIPE) for step in range(4)]
    assert sorted(row for rows in seen for row in rows) == list(range(24))
    assert max(np.ptp(lengths[rows]) for rows in seen) <= 2
    assert seen[0] != _rows_of(4, lengths, RECIPE)
    assert seen[0] != _rows_of(0, lengths, replace(RECIPE, seed=1))
    assert len(_rows_of(3, lengths[:4], RECIPE)) == 4  # fewer questions than a batch


def test_training_says_what_is_wrong(items, learnt, monkeypatch):
    model, _ = load_model("tiny-llama")
    with pytest.raises(ValueError, match="nothing to train"):
        train(model.requires_grad_(False), items, RECIPE)
    wrapped = make_arm("bias", model, 1, 4)
    torch.nn.init.constant_(wrapped.updates["1"].bias, float("nan"))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(wrapped, items, RECIPE)

    class Many:
        num_processes, process_index, is_main_process = 7, 0, True

    monkeypatch.setattr(runtime, "process_state", Many)
    with pytest.raises(ValueError, match="7 processes cannot share a batch of 6"):
        learnt()


# ------------------------------------------------------- the model as it is on ordinary text

TEXT = torch.randint(3, 40, (6, 9), generator=torch.Generator().manual_seed(1))


def divergence(arm, learnt, kl: float) -> float:
    """KL(model || adapter) a token on TEXT, nats, after training with so much weight on it."""
    options = {"text": TEXT} if kl else {}
    _, weights = learnt(arm, replace(RECIPE, steps=40, kl=kl), **options)
    wrapped = make_arm(arm, load_model("tiny-llama")[0], 1, 4)
    with torch.no_grad():
        before = wrapped(TEXT, use_cache=False).logits.log_softmax(-1)
        for name, p in wrapped.named_parameters():
            if name in weights:
                p.copy_(weights[name])
        after = wrapped(TEXT, use_cache=False).logits.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("arm", ["back attention", "LoRA q,v"])
def test_training_keeps_what_is_said_of_ordinary_text(arm, learnt):
    free, kept = (divergence(arm, learnt, kl) for kl in (0.0, 100.0))
    assert 0 <= kept < free / 4


@pytest.mark.parametrize("pieces", [1, 4])
def test_the_gradient_of_the_divergence_is_that_of_its_definition(pieces, items):
    recipe, chosen = replace(RECIPE, kl=0.5), [0, 2, 3, 5]
    wrapped = make_arm("LoRA q,v", load_model("tiny-llama")[0], 1, 4)
    weights = [p for p in wrapped.parameters() if p.requires_grad]
    for p in weights:
        torch.nn.init.normal_(p, std=0.3)
    batches = _Batches(wrapped, items, recipe, None, TEXT)
    batches.pieces = pieces
    batches.gradients([0, 3, 4, 5], weights)
    without = [p.grad.clone() for p in weights]
    batches.gradients([0, 3, 4, 5], weights, chosen)
    after = wrapped(TEXT[chosen], use_cache=False).logits.log_softmax(-1)
    with torch.no_grad(), wrapped.disable_adapter():
        before = wrapped(TEXT[chosen], use_cache=False).logits.log_softmax(-1)
    mean = (before.exp() * (before - after)).sum(-1).mean()
    for p, plain, g in zip(weights, without, torch.autograd.grad(mean, weights), strict=True):
        assert torch.allclose(p.grad - plain, 0.5 * g, atol=1e-5)
    assert mean > 0.01


def test_every_window_is_read_once_per_epoch():
    recipe = replace(RECIPE, windows=2)
    drawn = np.array([_windows_of(step, 6, recipe) for step in range(6)]).reshape(2, 6)
    assert (np.sort(drawn) == np.arange(6)).all() and (drawn[0] != drawn[1]).any()


def test_text_and_its_weight_go_together(items, learnt):
    for options in ({"text": TEXT}, {"recipe": replace(RECIPE, kl=1.0)}):
        with pytest.raises(ValueError, match="give both, or neither"):
            learnt(**options)
    with pytest.raises(ValueError, match="it has none"):
        train(load_model("tiny-llama")[0], items, replace(RECIPE, kl=1.0), text=TEXT)


# ---------------------------------------------------------------- a batch in pieces


@pytest.fixture
def memory(monkeypatch):
    """Lets the model take so many questions at once; returns the sizes that were tried."""

    def limit(most: int) -> list[int]:
        sizes = []

        def tight(model, batch, *args):
            if torch.is_grad_enabled():
                sizes.append(len(batch.input_ids))
            if len(batch.input_ids) > most:
                raise torch.OutOfMemoryError("no room")
            return answer_logits(model, batch, *args)

        for user in USERS:
            monkeypatch.setattr(f"{user}.answer_logits", tight)
        return sizes

    return limit


def test_a_batch_that_does_not_fit_is_taken_in_pieces(learnt, memory, capsys):
    whole, sizes = learnt(), memory(2)
    assert same(learnt(), whole)
    assert sizes[:3] == [6, 3, 2] and set(sizes[3:]) == {1, 2}  # tried once, then in four pieces
    assert "4 pieces" in capsys.readouterr().err
    memory(0)
    with pytest.raises(torch.OutOfMemoryError):
        learnt()


@pytest.mark.parametrize("pieces", [1, 4, 6])
def test_pieces_add_up_to_the_gradient_of_the_mean_loss(pieces, items):
    rows = [0, 3, 4, 5, 8, 9]
    wrapped = make_arm("LoRA q,v", load_model("tiny-llama")[0], 1, 4)
    weights = [p for p in wrapped.parameters() if p.requires_grad]
    batches = _Batches(wrapped, items, RECIPE, None)
    batches.pieces = pieces
    loss, _ = batches.gradients(rows, weights)
    batch = collate(items, rows)
    logits = answer_logits(wrapped, batch)
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert loss == pytest.approx(mean.item(), abs=1e-5)
    whole = torch.autograd.grad(mean, weights)
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(weights, whole, strict=True))
    assert max(g.abs().max() for g in whole) > 1e-3
