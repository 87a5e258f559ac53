"""Mean ablation and attention knock-outs against plain references."""

import numpy as np
import pytest
import torch
from conftest import PROMPTS

from backattn.analysis.knockouts import (
    CachedPrompts,
    Knockout,
    KnockoutProbe,
    blocked_log_probs,
    group_means,
)
from backattn.models.activations import capture
from backattn.models.hooks import hooks
from backattn.models.next_token import next_log_probs
from backattn.models.tokens import encode


@pytest.fixture
def wide(tiny, monkeypatch):
    """(model, tokenizer) of every family; sliding windows are longer than the prompts."""
    if getattr(tiny[0].config, "sliding_window", None):
        monkeypatch.setattr(tiny[0].config, "sliding_window", 64)
    return tiny


def labelled(tokenizer, prompts) -> list[np.ndarray]:
    """A label per token: entity, entity, relation, …, last."""
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    return [np.array(["entity"] * 2 + ["relation"] * (n - 3) + ["last"]) for n in lengths]


def probed(model, tokenizer, prompts=PROMPTS, means=None) -> KnockoutProbe:
    groups = labelled(tokenizer, prompts)
    means = means or group_means(model, tokenizer, prompts, groups, batch_size=2)
    return KnockoutProbe(model, tokenizer, prompts, [1] * len(prompts), groups, means)


def test_knocking_out_nothing_changes_nothing(tiny):
    probe = probed(*tiny)
    plain = probe.log_probs()
    stream = capture(tiny[0], encode(tiny[1], PROMPTS))
    assert torch.allclose(plain, stream.logits.log_softmax(-1)[:, 1], atol=1e-4)
    with pytest.raises(ValueError, match="Cannot knock out"):
        probe.log_probs([Knockout("norm", (0,), ("entity",))])
    for kind in ("ffn", "attention"):
        assert torch.equal(probe.log_probs([Knockout(kind, (), ("entity",))]), plain)
        some = Knockout(kind, (1, 2), ("entity", "relation", "last"))
        assert (probe.log_probs([some]) - plain).abs().max() > 1e-4


def test_a_prompt_that_is_its_own_mean_is_not_changed(tiny):
    """With one prompt and one token per group the mean is the component itself: an exact null."""
    count = len(tiny[1]("France is")["input_ids"])
    groups = [np.array([f"p{i}" for i in range(count)])]
    means = group_means(*tiny, ["France is"], groups)
    probe = KnockoutProbe(*tiny, ["France is"], [1], groups, means)
    for kind in ("ffn", "attention"):
        same = probe.log_probs([Knockout(kind, (0, 1, 2, 3), tuple(groups[0]))])
        assert torch.allclose(same, probe.log_probs(), atol=1e-4)


def test_what_stands_before_a_knockout_is_computed_once(wide, monkeypatch):
    """Beginning at the first position that is knocked out gives what whole prompts give."""
    some = [Knockout(kind, (1, 2), ("relation", "last")) for kind in ("ffn", "attention")]
    seen = []

    def noted(*args, cache):
        seen.append(cache)
        return next_log_probs(*args, cache=cache)

    monkeypatch.setattr("backattn.analysis.knockouts.next_log_probs", noted)
    quick = probed(*wide).log_probs(some)
    assert len(seen) == 1  # a batch
    monkeypatch.setattr("backattn.analysis.knockouts.in_window", lambda *_: False)
    probe = probed(*wide)
    whole = probe.log_probs(some)
    assert seen[0].get_seq_length() > 0 and seen[-1] is None
    assert torch.allclose(quick, whole, atol=1e-4)
    assert (whole - probe.log_probs()).abs().max() > 1e-3


def test_layers_below_a_knockout_run_once(wide, monkeypatch):
    """Beginning at the lowest layer that is knocked out gives what all layers give, of this model
    and these prompts."""
    probe, ran = probed(*wide), []
    some = [Knockout(kind, (3, 2), ("relation",)) for kind in ("ffn", "attention")]
    blocks = probe.arch.blocks
    taps = (
        (block.get("ffn"), "input", lambda x, k=k: ran.append(k)) for k, block in enumerate(blocks)
    )
    with hooks(*taps):
        quick = probe.log_probs(some)
        assert ran == [2, 3]
        ran.clear()
        probe.log_probs()
        assert ran == [3]
    turned = PROMPTS[::-1]
    assert torch.allclose(
        quick.flip(0), probed(*wide, turned, probe.means).log_probs(some), atol=1e-4
    )
    monkeypatch.setattr("backattn.analysis.knockouts.in_window", lambda *_: False)
    assert torch.allclose(quick, probed(*wide, PROMPTS, probe.means).log_probs(some), atol=1e-4)
    assert (quick - probe.log_probs()).abs().max() > 1e-3


def test_padding_does_not_leak_into_knockouts(llama):
    together = probed(*llama)
    some = [Knockout(kind, (1, 2), ("last",)) for kind in ("ffn", "attention")]
    found = together.log_probs(some)
    for index, prompt in enumerate(PROMPTS):
        alone = probed(*llama, [prompt], together.means).log_probs(some)
        assert torch.allclose(found[index], alone[0], atol=1e-4)


def blocked(model_and_tokenizer, prompts, sources):
    layers = range(model_and_tokenizer[0].config.num_hidden_layers)
    return blocked_log_probs(CachedPrompts(*model_and_tokenizer, prompts), sources, layers)


def test_hiding_a_position_from_the_last_one(wide, monkeypatch):
    """Hidden in every layer, it reaches the last only through others; hidden nowhere: no change."""
    base = next_log_probs(wide[0], encode(wide[1], PROMPTS, side="left"))
    assert torch.allclose(blocked(wide, PROMPTS, [[]] * 3), base, atol=1e-4)
    hidden = blocked(wide, PROMPTS, [[1]] * 3)
    assert not torch.allclose(hidden, base, atol=1e-4)
    assert hidden.isfinite().all()
    alone = [blocked(wide, [prompt], [[1]])[0] for prompt in PROMPTS]
    assert torch.allclose(hidden, torch.stack(alone), atol=1e-4)
    assert all(cache is not None for _, _, cache, _ in CachedPrompts(*wide, PROMPTS).batches)
    monkeypatch.setattr("backattn.analysis.knockouts.in_window", lambda *_: False)
    assert torch.allclose(hidden, blocked(wide, PROMPTS, [[1]] * 3), atol=1e-4)


def test_all_but_the_last_hidden_is_as_if_the_last_stood_alone(llama):
    """With all layers blocked the last position sees only itself, at its own place."""
    model, tokenizer = llama
    ids = encode(tokenizer, PROMPTS[:1]).input_ids
    last = ids.shape[1] - 1
    hidden = blocked(llama, PROMPTS[:1], [list(range(last))])
    with torch.no_grad():
        alone = model(input_ids=ids[:, -1:], position_ids=torch.tensor([[last]])).logits[0, -1]
    assert torch.allclose(hidden[0], alone.log_softmax(-1), atol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())
