"""Interventions against plain references, on every family."""

import numpy as np
import pytest
import torch

from backattn.analysis.back_patching import back_patch, back_patch_one
from backattn.analysis.knockouts import CachedPrompts, blocked_log_probs
from backattn.models.next_token import next_log_probs
from backattn.models.tokens import encode

PROMPTS = ["France's capital is", "The mother of Anna was born in Tokyo and lives in the"]


def test_back_patching_all_pairs_equals_one_forward_pass_per_pair(tiny):
    model, tokenizer = tiny
    positions = [2, 4]
    patched = back_patch(model, tokenizer, PROMPTS, positions, [[5, 7]] * 2, rows=3)
    layers = patched.said.shape[1]
    for index, prompt in enumerate(PROMPTS):
        for target in range(layers):
            for source in range(layers + 1):
                if source <= target:
                    assert patched.said[index, target, source] == -1
                    continue
                plain = back_patch_one(model, tokenizer, prompt, positions[index], source, target)
                assert torch.allclose(
                    patched.log_probs[index, target, source], plain[[5, 7]].cpu(), atol=1e-4
                )
                assert patched.said[index, target, source] == plain.argmax()


def test_a_patch_changes_the_answer_and_donors_are_other_prompts(llama):
    model, tokenizer = llama
    own = back_patch(model, tokenizer, PROMPTS[:1], [2], [[5]])
    other = back_patch(model, tokenizer, PROMPTS[:1], [2], [[5]], donors=[(PROMPTS[1], 3)])
    plain = back_patch_one(model, tokenizer, PROMPTS[0], 2, 2, 0, donor=(PROMPTS[1], 3))
    assert torch.allclose(other.log_probs[0, 0, 2], plain[[5]], atol=1e-4)
    assert not torch.allclose(own.log_probs[0, 0, 2], other.log_probs[0, 0, 2], atol=1e-4)
    unpatched = next_log_probs(model, encode(tokenizer, PROMPTS[:1], side="left"))
    assert not torch.allclose(own.log_probs[0, 0, 2], unpatched[0, [5]], atol=1e-4)


def test_a_position_outside_the_prompt_is_named(llama):
    with pytest.raises(ValueError, match="Position 99 cannot be patched"):
        back_patch(*llama, PROMPTS[:1], [99], [[5]])


def blocked(model_and_tokenizer, prompts, sources, layers):
    return blocked_log_probs(CachedPrompts(*model_and_tokenizer, prompts), sources, layers)


def test_hiding_a_position_from_the_last_one(tiny, monkeypatch):
    """Hidden in every layer, a position reaches the last one only through others; hidden nowhere, nothing changes."""
    model, tokenizer = tiny
    if getattr(model.config, "sliding_window", None):
        monkeypatch.setattr(model.config, "sliding_window", 64)  # longer than the prompts
    layers = range(model.config.num_hidden_layers)
    base = next_log_probs(model, encode(tokenizer, PROMPTS, side="left"))
    none = blocked(tiny, PROMPTS, [[], []], layers)
    assert torch.allclose(none, base, atol=1e-4)
    hidden = blocked(tiny, PROMPTS, [[1], [1]], layers)
    assert not torch.allclose(hidden, base, atol=1e-4)
    assert np.isfinite(hidden.numpy()).all()
    alone = [blocked(tiny, [p], [[1]], layers)[0] for p in PROMPTS]
    assert torch.allclose(hidden, torch.stack(alone), atol=1e-4)
    assert all(cache is not None for *_, cache in CachedPrompts(model, tokenizer, PROMPTS).batches)
    monkeypatch.setattr("backattn.analysis.knockouts.whole_cache", lambda *_: None)
    assert torch.allclose(hidden, blocked(tiny, PROMPTS, [[1], [1]], layers), atol=1e-4)


def test_all_but_the_last_hidden_is_as_if_the_last_stood_alone(llama):
    """In a one-layer window over all layers the last position then sees only itself, at its own place."""
    model, tokenizer = llama
    batch = encode(tokenizer, PROMPTS[:1])
    time = batch.input_ids.shape[1]
    hidden = blocked(
        llama, PROMPTS[:1], [list(range(time - 1))], range(model.config.num_hidden_layers)
    )
    with torch.no_grad():
        alone = (
            model(input_ids=batch.input_ids[:, -1:], position_ids=torch.tensor([[time - 1]]))
            .logits[0, -1]
            .log_softmax(-1)
        )
    assert torch.allclose(hidden[0], alone, atol=1e-4)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_shared_beginning_changes_nothing(tiny):
    model, tokenizer = tiny
    prompts = [
        f"Spain's capital is Madrid. {rest}"
        for rest in ("France's capital is", "My old friend Anna's is", "A b")
    ]
    batch = encode(tokenizer, prompts, side="left")
    assert torch.allclose(
        next_log_probs(model, batch), next_log_probs(model, batch, share=True), atol=1e-4
    )
