"""The arms that back attention must beat."""

import pytest
import torch

from backattn import load_model
from backattn.adapters.arms import ARMS, make_arm
from backattn.adapters.config import BackAttentionConfig
from backattn.adapters.modules import BackAttention, PreviousToken, ShuffledMemory
from backattn.training.batches import collate
from backattn.training.evaluation import answer_logits
from backattn.training.loop import Recipe, train


@pytest.mark.parametrize("arm", ARMS)
def test_untrained_arms_change_nothing_and_learn(arm, items):
    model, _ = load_model("tiny-llama")
    batch = collate(items, range(3))
    with torch.no_grad():
        before = answer_logits(model, batch)
        wrapped = make_arm(arm, model, 1, 4)
        assert torch.equal(answer_logits(wrapped, batch), before)
    assert getattr(wrapped, "two_passes", False) == ARMS[arm].two_passes
    curve = train(wrapped, items, Recipe(steps=30, learning_rate=0.03, evaluations=3))
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0] - 0.1
    assert torch.equal(answer_logits(wrapped.unload(), batch).detach(), before)


def test_arms_have_equal_weights():
    wrapped = {arm: make_arm(arm, load_model("tiny-llama")[0], 1, 8) for arm in ARMS}
    sizes = {
        arm: sum(p.numel() for p in model.parameters() if p.requires_grad)
        for arm, model in wrapped.items()
    }
    lora, whole = sizes.pop("LoRA q,v"), 4 * 32 * 8
    assert sizes.pop("bias") == 32 and set(sizes.values()) == {whole} and len(sizes) == 6
    assert abs(lora - whole) / whole < 0.5
    assert wrapped["same layer"].memory_layers == (1,)
    assert wrapped["back attention"].memory_layers == (1, 2, 3, 4)
    assert wrapped["loop LoRA"].memory_layers == (4,)


@pytest.mark.parametrize(
    "arm, model, options, message",
    [
        ("magic", "tiny-llama", {}, "Unknown arm"),
        ("LoRA q,v", "tiny-gpt2", {}, "q_proj"),
        ("same layer", "tiny-llama", {"source_layer": (1, 2)}, "one source layer"),
        ("bias", "tiny-llama", {"memory_layers": (3,)}, "no memory"),
    ],
)
def test_what_an_arm_cannot_have_is_refused(arm, model, options, message):
    with pytest.raises(ValueError, match=message):
        make_arm(arm, load_model(model)[0], **{"source_layer": 1, "dim": 8, **options})


def test_the_loop_reads_its_own_position_only():
    wrapped, seen = make_arm("loop LoRA", load_model("tiny-llama")[0], 1, 4), []
    update, ids = wrapped.updates["1"], torch.tensor([[5, 6, 7, 8]])
    torch.nn.init.normal_(update.up.weight)
    update.up.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        wrapped(ids, use_cache=False)
        places = torch.arange(4)[None]
        final = wrapped.first_pass_states(ids, torch.ones_like(ids), places)[-1]  # h_L [B, T, D]
    expected = update.up(update.down(final / (final.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()))
    assert torch.allclose(seen[0], expected, atol=1e-5)


def test_shuffled_memory_is_never_a_rows_own():
    config = BackAttentionConfig(source_layer=1, dim=8)
    update, memory = ShuffledMemory(32, config), torch.randn(3, 4, 5, 32)
    plain = BackAttention(32, config)
    plain.load_state_dict(update.state_dict())
    keys, values = update.remember(memory)
    expected = plain.remember(memory)
    assert torch.equal(keys[1:], expected[0][:-1]) and torch.equal(values[0], expected[1][-1])
    assert not update.remember(memory[:, :1])[1].any()


@pytest.mark.parametrize("cells", ["positions", "cells", "weights"])
def test_the_previous_token_is_all_that_is_read(cells):
    config = BackAttentionConfig(source_layer=1, dim=8)
    update, h = PreviousToken(32, config), torch.randn(2, 5, 32)
    plain = BackAttention(32, config)
    plain.load_state_dict(update.state_dict())
    memory, visible = torch.randn(3, 2, 5, 32), torch.ones(2, 5, 5, dtype=torch.bool).tril()
    visible[1, :, :2] = False  # padding
    if cells != "positions":
        visible = visible[:, :, None].repeat(1, 1, 3, 1)
    if cells == "weights":
        visible = torch.where(visible, 1.0, -1.0)
    query, (keys, values) = update.query(h), update.remember(memory)
    mixed = update.mix(query, keys, values, visible)
    assert not mixed[0, 0].any() and not mixed[1, :3].any()
    for place in (1, 4):  # against back attention over that position's states alone
        there = [x[:, :, place - 1, None] for x in (keys, values)]
        seen = torch.ones(2, 1, 1, dtype=torch.bool)
        expected = plain.mix(query[:, :, place, None], *there, seen)[0, 0]
        assert torch.allclose(mixed[0, place], expected, atol=1e-6)
    last = update.mix(query[:, :, -1:], keys, values, visible[:, -1:])  # with a cache
    assert torch.allclose(last, mixed[:, -1:], atol=1e-6)


def test_the_previous_token_trains_where_nothing_stands_before():
    wrapped = make_arm("previous token", load_model("tiny-llama")[0], 1, 4)
    torch.nn.init.normal_(wrapped.updates["1"].o_proj.weight)
    wrapped(torch.tensor([[5, 6, 7]]), use_cache=False).logits.logsumexp(-1).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in wrapped.updates.parameters())
