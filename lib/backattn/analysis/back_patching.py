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
from backattn.models.lens import Lens
from backattn.models.tokens import encode
from backattn.runtime import progress


@dataclass
class Patched:
    """What the model says after each patch; -1 and NaN where the source is not above the target."""

    said: Tensor  # [n, targets, sources] token ids
    log_probs: Tensor  # [n, targets, sources, K] of the wanted tokens


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
        donors: per prompt another prompt and a position in it, which give the states (control).
        rows: pairs that run at once; fewer need less memory.

    Returns `Patched` with L targets and L+1 sources. Raises ValueError for a position outside its
    prompt.

    Example:
        >>> patched = back_patch(model, tokenizer, ["France's capital is"], [2], [[5]])
        >>> patched.log_probs.shape  # four layers
        torch.Size([1, 4, 5, 1])
    """
    arch, layers = describe(model), len(describe(model).blocks)
    said = torch.full((len(prompts), layers, layers + 1), -1)
    log_probs = torch.full((*said.shape, len(tokens[0])), float("nan"))
    target, source = torch.triu_indices(layers, layers + 1, 1)  # in the order in which pairs join
    for index in progress(range(len(prompts)), "back-patching", unit="prompt"):
        place = prompts[index], positions[index]
        donor, spot = donors[index] if donors else place
        ids, states = _states(model, tokenizer, *place)  # [L+1, T, D]
        patches = _states(model, tokenizer, donor, spot)[1][:, spot] if donors else states[:, spot]
        entering = states[:, place[1] :]  # [L+1, P, D]
        active = entering[:0]  # [pairs, P, D]
        with torch.no_grad():
            for layer, (args, kwargs) in enumerate(_replay_arguments(arch, ids, place[1])):
                joining = entering[layer].repeat(layers - layer, 1, 1)
                joining[:, 0] = patches[layer + 1 :]
                parts = torch.cat([active, joining]).split(rows)
                outputs = [arch.blocks[layer].module(part, *args, **kwargs) for part in parts]
                active = torch.cat([x[0] if isinstance(x, tuple) else x for x in outputs])
            raw = arch.unembedding_module(arch.final_norm_module(active[:, -1])).float()
            read = Lens(arch).cap(raw).log_softmax(-1)  # [pairs, V]
        said[index, target, source] = read.argmax(-1).cpu()
        log_probs[index, target, source] = read[:, list(tokens[index])].cpu()
    return Patched(said, log_probs)


def _states(model, tokenizer, prompt: str, position: int) -> tuple[Tensor, Tensor]:
    """A prompt's token ids [1, T] and states [L+1, T, D], in the model's dtype."""
    batch = encode(tokenizer, [prompt], device=model.device)
    last = batch.input_ids.shape[1] - 1
    if not 0 < position <= last:
        raise ValueError(
            f"Position {position} cannot be patched: {prompt!r} has positions 1 to {last}."
        )
    states = capture(model, batch, detail=False).hidden[:, 0].to(model.dtype)
    return batch.input_ids, states


class _Past:
    """Keys and values of earlier positions, read by every replay and never appended to."""

    def __init__(self, cache):
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        past_keys, past_values = (x.expand(len(keys), -1, -1, -1) for x in self.layers[layer])
        return torch.cat([past_keys, keys], dim=-2), torch.cat([past_values, values], dim=-2)


@torch.no_grad()
def _replay_arguments(arch: Arch, ids: Tensor, position: int) -> list[tuple[list, dict]]:
    """Per layer the arguments beside the states with which it runs from `position` on."""
    seen: list[tuple[tuple, dict]] = []

    def note(args: tuple, kwargs: dict) -> None:
        seen.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    options = {"use_cache": True, "logits_to_keep": 1}
    cache = arch.model(input_ids=ids[:, :position], **options).past_key_values
    past = _Past(cache)  # before it grows
    with hooks(*((block.module, "arguments", note) for block in arch.blocks)):
        arch.model(input_ids=ids[:, position:], past_key_values=cache, **options)

    def swap(value):
        return past if value is cache else value

    return [(list(map(swap, args)), {k: swap(v) for k, v in kw.items()}) for args, kw in seen]


def back_patch_one(
    model, tokenizer, prompt: str, position: int, source: int, target: int, donor=None
) -> Tensor:
    """One pair of `back_patch` by one plain forward pass, its reference: log-probabilities [V].

    Example:
        >>> back_patch_one(model, tokenizer, "France's capital is", 2, 3, 1).exp().sum().round()
        tensor(1.)
    """
    given, place = donor or (prompt, position)
    patch = _states(model, tokenizer, given, place)[1][source, place]
    ids, _ = _states(model, tokenizer, prompt, position)

    def put(states: Tensor) -> Tensor:
        states = states.clone()
        states[:, position] = patch
        return states

    with torch.no_grad(), hooks((describe(model).blocks[target].module, "input", put)):
        logits = model(input_ids=ids, use_cache=False).logits
    return logits[0, -1].float().log_softmax(-1)
