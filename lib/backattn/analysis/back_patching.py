"""Back-patching (Biran et al. 2024): a high layer's state put into a lower layer, which runs on.

For a source s above a target t (s = L: the state that leaves the model):

1. One pass gives the states h_0 … h_L of the prompt, and of a donor prompt if there is one.
2. The state that enters layer t at the patched position is replaced by h_s there.
3. Layers t and above run again, on the patched and later positions; earlier ones stay as they were.
4. The next token is read at the last position.

`back_patch` runs all pairs of a prompt in one staircase: the pairs with target t join at layer t.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backattn.models.activations import capture
from backattn.models.decoder import Arch, describe
from backattn.models.hooks import hooks
from backattn.models.tokens import Batch, encode
from backattn.runtime import progress


@dataclass
class Patched:
    """Result of `back_patch`: what the model says after each patch.

    said: [n, targets, sources] token ids, -1 where the source does not lie above the target.
    log_probs: [n, targets, sources, K] of the wanted tokens, NaN there.
    """

    said: Tensor
    log_probs: Tensor


def back_patch(
    model,
    tokenizer,
    prompts: Sequence[str],
    positions: Sequence[int],
    tokens: Sequence[Sequence[int]],
    donors: Sequence[tuple[str, int]] | None = None,
    rows: int = 512,
) -> Patched:
    """Back-patching over every pair of a source layer above a target layer.

    Args:
        positions: per prompt the patched position, counted from its first token, not the first.
        tokens: per prompt the K token ids whose log-probabilities are wanted.
        donors: per prompt another prompt and a position in it, whence the states are taken instead
            (control).
        rows: pairs that run at once; fewer need less memory.

    Returns `Patched` with L targets and L+1 sources. Raises ValueError for a position outside its
    prompt.

    Example:
        >>> from backattn import load_model
        >>> model, tokenizer = load_model("tiny-llama")
        >>> patched = back_patch(model, tokenizer, ["France's capital is"], [2], [[5]])
        >>> patched.log_probs.shape  # four layers
        torch.Size([1, 4, 5, 1])
    """
    arch = describe(model)
    layers = len(arch.blocks)
    said = torch.full((len(prompts), layers, layers + 1), -1)
    log_probs = torch.full((*said.shape, len(tokens[0])), float("nan"))
    target, source = torch.triu_indices(layers, layers + 1, 1)  # in the order in which pairs join
    for index in progress(range(len(prompts)), "back-patching", unit="prompt"):
        prompt, position = prompts[index], positions[index]
        batch, states = _states(model, tokenizer, prompt, position)  # [L+1, T, D]
        donor = _states(model, tokenizer, *donors[index])[1] if donors else states
        patches = donor[:, donors[index][1] if donors else position]  # [L+1, D]
        entering = states[:, position:]  # [L+1, P, D]
        active = entering[:0]  # [pairs, P, D]
        arguments = _replay_arguments(arch, batch.input_ids, position)
        with torch.no_grad():
            for layer, (block, (args, kwargs)) in enumerate(
                zip(arch.blocks, arguments, strict=True)
            ):
                joining = entering[layer].repeat(layers - layer, 1, 1)
                joining[:, 0] = patches[layer + 1 :]
                parts = torch.cat([active, joining]).split(rows)
                outputs = [block.module(part, *args, **kwargs) for part in parts]
                active = torch.cat([x[0] if isinstance(x, tuple) else x for x in outputs])
            read = _read(arch, active[:, -1])  # [pairs, V]
        said[index, target, source] = read.argmax(-1).cpu()
        log_probs[index, target, source] = read[:, list(tokens[index])].cpu()
    return Patched(said, log_probs)


def _states(model, tokenizer, prompt: str, position: int) -> tuple[Batch, Tensor]:
    """A prompt and the states that enter its layers and leave the model, in the model's dtype."""
    batch = encode(tokenizer, [prompt], device=model.device)
    last = batch.input_ids.shape[1] - 1
    if not 0 < position <= last:
        raise ValueError(
            f"Position {position} cannot be patched: {prompt!r} has positions 1 to {last}."
        )
    return batch, capture(model, batch, detail=False).hidden[:, 0].to(model.dtype)


class _Past:
    """Keys and values of earlier positions, read by every replay and never appended to."""

    def __init__(self, cache):
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        past_keys, past_values = (x.expand(len(keys), -1, -1, -1) for x in self.layers[layer])
        return torch.cat([past_keys, keys], dim=-2), torch.cat([past_values, values], dim=-2)


def _replay_arguments(arch: Arch, ids: Tensor, position: int) -> list[tuple[tuple, dict]]:
    """Per layer the arguments beside the states with which it runs from `position` on."""
    seen: list[tuple[tuple, dict]] = []

    def note(module, args, kwargs):
        seen.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    handles = []
    with torch.no_grad():
        options = {"use_cache": True, "logits_to_keep": 1}
        cache = arch.model(input_ids=ids[:, :position], **options).past_key_values
        past = _Past(cache)
        try:
            for block in arch.blocks:
                hook = block.module.register_forward_pre_hook(note, with_kwargs=True)
                handles.append(hook)
            arch.model(input_ids=ids[:, position:], past_key_values=cache, **options)
        finally:
            for handle in handles:
                handle.remove()

    def swap(value):
        return past if value is cache else value

    return [(tuple(map(swap, args)), {k: swap(v) for k, v in kw.items()}) for args, kw in seen]


def _read(arch: Arch, states: Tensor) -> Tensor:
    """The model's log-probabilities from states before the final norm: [n, D] -> [n, V]."""
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
    """One pair of `back_patch` by one plain forward pass, its reference: log-probabilities [V].

    Example:
        >>> from backattn import load_model
        >>> model, tokenizer = load_model("tiny-llama")
        >>> back_patch_one(model, tokenizer, "France's capital is", 2, 3, 1).exp().sum().round()
        tensor(1.)
    """
    given, place = donor or (prompt, position)
    patch = _states(model, tokenizer, given, place)[1][source, place]
    batch = _states(model, tokenizer, prompt, position)[0]

    def put(states: Tensor) -> Tensor:
        states = states.clone()
        states[:, position] = patch
        return states

    with torch.no_grad(), hooks((describe(model).blocks[target].module, "input", put)):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    return logits[0, -1].float().log_softmax(-1)
