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

from backattn.models.activations import Stream, capture, prove
from backattn.models.decoder import Arch, Block, describe
from backattn.models.families import UnsupportedModelError
from backattn.models.hooks import analysis, hooks
from backattn.models.lens import Lens
from backattn.models.tokens import check_indices, encode
from backattn.runtime import progress


@dataclass
class Patched:
    """What the model says after each patch; -1 and NaN where the source is not above the target."""

    said: Tensor  # [n, targets, sources] token ids
    log_probs: Tensor  # [n, targets, sources, K] of the wanted tokens


@analysis
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

    Returns `Patched` with L targets and L+1 sources. Raises IndexError or TypeError for a position
    or a token that is not there, and UnsupportedModelError where layers that run again, unpatched,
    do not give what the model gave.

    Example:
        >>> patched = back_patch(model, tokenizer, ["France's capital is"], [2], [[5]])
        >>> patched.log_probs.shape  # four layers
        torch.Size([1, 4, 5, 1])
    """
    arch, layers = describe(model), len(describe(model).blocks)
    lens, places = Lens(arch), list(zip(prompts, positions, strict=True))
    _check_places(tokenizer, *places, *(donors or []))
    check_indices("Token id", tokens, [len(lens.weight)] * len(places))
    said = torch.full((len(prompts), layers, layers + 1), -1)
    log_probs = torch.full((*said.shape, len(tokens[0])), float("nan"), dtype=torch.float32)
    target, source = torch.triu_indices(layers, layers + 1, 1)  # in the order in which pairs join
    for index in progress(range(len(prompts)), "back-patching", unit="prompt"):
        (prompt, place), (donor, spot) = places[index], donors[index] if donors else places[index]
        stream, states = _states(model, tokenizer, prompt)  # [L+1, T, D]
        patches = _states(model, tokenizer, donor)[1][:, spot] if donors else states[:, spot]
        entering = states[:, place:]  # [L+1, P, D]
        active, plain = entering[:0], entering[:1]  # [pairs, P, D], and one row without a patch
        arguments = _replay_arguments(arch, stream.batch.input_ids, place)
        for layer, (block, given) in enumerate(zip(arch.blocks, arguments, strict=True)):
            joining = entering[layer].repeat(layers - layer, 1, 1)
            joining[:, 0] = patches[layer + 1 :]
            parts = torch.cat([active, joining]).split(rows)
            active = torch.cat([_run(block, part, *given) for part in parts])
            plain = _run(block, plain, *given)
        prove(arch, "layers that run again", plain[0] - entering[-1], entering[-1], slack=4)
        last, read = (
            lens.cap(arch.unembedding_module(arch.final_norm_module(x)).float())
            for x in (entering[-1, -1:], active[:, -1])
        )
        lens.prove(stream, last)
        read = read.log_softmax(-1)  # [pairs, V]
        said[index, target, source] = read.argmax(-1).cpu()
        log_probs[index, target, source] = read[:, list(tokens[index])].cpu()
    return Patched(said, log_probs)


def _run(block: Block, states: Tensor, args: list, kwargs: dict) -> Tensor:
    out = block.module(states, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _check_places(tokenizer, *places: tuple[str, int]) -> None:
    """Raises IndexError or TypeError unless each position is in its prompt, and not the first."""
    prompts, positions = zip(*places, strict=True)
    lengths = encode(tokenizer, prompts).lengths.tolist()
    check_indices("Position", [[position] for position in positions], lengths, first=1)


def _states(model, tokenizer, prompt: str) -> tuple[Stream, Tensor]:
    """A prompt's stream, and its states [L+1, T, D] in the model's dtype."""
    stream = capture(model, encode(tokenizer, [prompt], device=model.device), detail=False)
    return stream, stream.hidden[:, 0].to(model.dtype)


class _Past:
    """Keys and values of earlier positions, read by every replay and never appended to."""

    def __init__(self, cache):
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        past_keys, past_values = (x.expand(len(keys), -1, -1, -1) for x in self.layers[layer])
        return torch.cat([past_keys, keys], dim=-2), torch.cat([past_values, values], dim=-2)


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
    if len(seen) != len(arch.blocks):
        raise UnsupportedModelError(
            f"{type(arch.model).__name__} runs layers more than once: pass the base model."
        )

    def swap(value):
        return past if value is cache else value

    return [(list(map(swap, args)), {k: swap(v) for k, v in kw.items()}) for args, kw in seen]


@analysis
def back_patch_one(
    model, tokenizer, prompt: str, position: int, source: int, target: int, donor=None
) -> Tensor:
    """One pair of `back_patch` by one plain forward pass, its reference: log-probabilities [V].

    Example:
        >>> back_patch_one(model, tokenizer, "France's capital is", 2, 3, 1).exp().sum().round()
        tensor(1.)
    """
    arch, (given, place) = describe(model), donor or (prompt, position)
    _check_places(tokenizer, (prompt, position), (given, place))
    check_indices("Layer", [[source], [target]], [len(arch.blocks) + 1, len(arch.blocks)])
    patch = _states(model, tokenizer, given)[1][source, place]

    def put(states: Tensor) -> Tensor:
        states = states.clone()
        states[:, position] = patch
        return states

    batch = encode(tokenizer, [prompt], device=model.device)
    with hooks((arch.blocks[target].module, "input", put)):
        logits = model(**batch.inputs, use_cache=False).logits
    return logits[0, -1].float().log_softmax(-1)
