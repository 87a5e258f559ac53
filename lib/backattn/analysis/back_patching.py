"""Back-patching: a high layer's state put into a lower layer, which runs on from there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backattn.models.activations import capture
from backattn.models.decoder import describe
from backattn.models.hooks import hooks
from backattn.models.tokens import Batch, encode
from backattn.runtime import progress


@dataclass
class Patched:
    """Result of `back_patch`: what the model says after each patch.

    said: [n, targets, sources] token ids, -1 where the source does not lie above the target; log_probs: [n, targets,
    sources, K] of the wanted tokens.
    """

    said: Tensor
    log_probs: Tensor


class _Past:
    """Keys and values of earlier positions, read by every replay and never appended to."""

    def __init__(self, cache):
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        past_keys, past_values = (x.expand(len(keys), -1, -1, -1) for x in self.layers[layer])
        return torch.cat([past_keys, keys], dim=-2), torch.cat([past_values, values], dim=-2)


def back_patch(
    model,
    tokenizer,
    prompts: Sequence[str],
    positions: Sequence[int],
    tokens: Sequence[Sequence[int]],
    donors: Sequence[tuple[str, int]] | None = None,
    rows: int = 512,
) -> Patched:
    """Back-patching (Biran et al. 2024) over every pair of a source layer above a target layer.

    The state that enters layer t at a position is replaced by the state that enters a higher layer s there (s = L: the
    state that leaves the model), and layers t and above run again. All pairs of a prompt go in one staircase: layer t
    runs the pairs with targets up to t, from cached states, at the patched and later positions only.

    Args:
        positions: per prompt the patched position, counted from its first token, and not the first.
        tokens: per prompt the K token ids whose log-probabilities are wanted.
        donors: per prompt another prompt and a position in it, whence the states are taken instead (control).
        rows: pairs that run at once; fewer need less memory.

    Returns `Patched` with L targets and L+1 sources. Raises ValueError for a position outside its prompt.
    """
    arch, last = describe(model), len(describe(model).blocks)
    wanted = len(tokens[0])
    said = torch.full((len(prompts), last, last + 1), -1)
    log_probs = torch.full((len(prompts), last, last + 1, wanted), float("nan"))
    for index in progress(range(len(prompts)), "back-patching", unit="prompt"):
        position, donor = (
            positions[index],
            donors[index] if donors else (prompts[index], positions[index]),
        )
        hidden = capture(
            model, _one(model, tokenizer, prompts[index], position), detail=False
        ).hidden[:, 0]  # [L+1, T, D]
        given = hidden[:, position]
        if donors:
            given = capture(model, _one(model, tokenizer, *donor), detail=False).hidden[
                :, 0, donor[1]
            ]  # [L+1, D]
        ids = _one(model, tokenizer, prompts[index], position).input_ids
        settings = _replay_settings(model, arch, ids, position)
        here = hidden[:, position:].to(model.dtype)  # [L+1, P, D]
        active = here[:0]  # [pairs, P, D]
        with torch.no_grad():
            for layer, block in enumerate(arch.blocks):
                fresh = here[layer].repeat(last - layer, 1, 1)
                fresh[:, 0] = given[layer + 1 :].to(model.dtype)
                active = torch.cat([active, fresh])
                args, kwargs = settings[layer]
                parts = [block.module(part, *args, **kwargs) for part in active.split(rows)]
                active = torch.cat([part[0] if isinstance(part, tuple) else part for part in parts])
            logs = _read(arch, active[:, -1])  # [pairs, V]
        target, source = torch.triu_indices(
            last, last + 1, 1
        )  # the order in which the pairs joined
        said[index, target, source] = logs.argmax(-1).cpu()
        log_probs[index, target, source] = logs[:, list(tokens[index])].cpu()
    return Patched(said, log_probs)


def _one(model, tokenizer, prompt: str, position: int) -> Batch:
    batch = encode(tokenizer, [prompt], device=model.device)
    if not 0 < position < batch.input_ids.shape[1]:
        raise ValueError(
            f"Position {position} cannot be patched: {prompt!r} has positions 1 to {batch.input_ids.shape[1] - 1}."
        )
    return batch


def _replay_settings(model, arch, ids: Tensor, position: int) -> list[tuple[tuple, dict]]:
    """Per layer the arguments with which it sees positions from `position` on, the earlier ones as read-only past."""
    seen: list[tuple[tuple, dict]] = []

    def keep(module, args, kwargs):
        seen.append(
            (args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"})
        )

    with torch.no_grad():
        cache = model(input_ids=ids[:, :position], use_cache=True, logits_to_keep=1).past_key_values
        past = _Past(cache)
        handles = [
            block.module.register_forward_pre_hook(keep, with_kwargs=True) for block in arch.blocks
        ]
        try:
            model(
                input_ids=ids[:, position:], past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        finally:
            for handle in handles:
                handle.remove()

    def swap(value):
        return past if value is cache else value

    return [
        (tuple(map(swap, args)), {k: swap(v) for k, v in kwargs.items()}) for args, kwargs in seen
    ]


def _read(arch, states: Tensor) -> Tensor:
    """The model's own log-probabilities from states before the final norm: [n, D] -> [n, V] in fp32."""
    logits = arch.unembedding_module(arch.final_norm_module(states)).float()
    if arch.softcap is not None:
        logits = arch.softcap * torch.tanh(logits / arch.softcap)
    return logits.log_softmax(-1)


def back_patch_one(
    model,
    tokenizer,
    prompt: str,
    position: int,
    source: int,
    target: int,
    donor: tuple[str, int] | None = None,
) -> Tensor:
    """One pair of `back_patch` by one plain forward pass: next-token log-probabilities [V]. The reference."""
    arch = describe(model)
    given, place = donor or (prompt, position)
    state = capture(model, _one(model, tokenizer, given, place), detail=False).hidden[
        source, 0, place
    ]

    def put(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, position] = state.to(x.dtype)
        return x

    batch = _one(model, tokenizer, prompt, position)
    with torch.no_grad(), hooks((arch.blocks[target].module, "input", put)):
        return (
            model(input_ids=batch.input_ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
        )
