"""A second turn of layers without any training: the bridge realigned, and damped loops.

Realigned (DiscoLoop, 2026): a high layer may name the bridge entity in a form that low layers
cannot read. So the state of a source layer s at one position is read by the lens, and the embedding
of what it says, E[argmax p] or Σ_v p(v) E[v], enters a target layer t at this position, scaled to
the norm of the state that it replaces. Layers t and above run again.

Damped loop (training-free looped transformers, 2026): a block of layers F runs once more, as
x + a (F(x) − x), where a = 0 is the model as it is.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from backattn.models.activations import capture
from backattn.models.decoder import check_unshared, describe
from backattn.models.hooks import analysis, begin_at, hooks
from backattn.models.lens import Lens
from backattn.models.tokens import check_indices, encode
from backattn.runtime import progress


@analysis
def realign(
    model,
    tokenizer,
    prompts: Sequence[str],
    positions: Sequence[int],
    source: int,
    targets: Sequence[int],
    mean: bool = False,
    batch_size: int = 32,
) -> Tensor:
    """The next tokens after a realigned second turn: ids [targets, n].

    Args:
        positions: per prompt the realigned position, counted from its first token.
        source: the state that is read, t for the one that enters layer t, L for the last.
        targets: layers whose input is replaced, each in a turn of its own.
        mean: put back the mean of embeddings by probability, not that of the likeliest token.

    Raises IndexError or TypeError for a position or a layer that is not there, and
    UnsupportedModelError where the model does not read its last state by the lens.

    Example:
        >>> realign(model, tokenizer, ["France's capital is"], [2], source=3, targets=[0, 1]).shape
        torch.Size([2, 1])
    """
    arch, prompts, positions = describe(model), list(prompts), list(positions)
    lens, embed, layers = Lens(arch), model.get_input_embeddings(), len(arch.blocks)
    check_indices("Layer", [[source], list(targets)], [layers + 1, layers])
    lengths = encode(tokenizer, prompts).lengths.tolist()
    check_indices("Position", [[place] for place in positions], lengths)
    said = torch.empty(len(targets), len(prompts), dtype=torch.long)
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    starts = range(0, len(prompts), batch_size)
    for rows in progress([order[start : start + batch_size] for start in starts], "realigned"):
        batch = encode(tokenizer, [prompts[row] for row in rows], device=model.device)
        stream = capture(model, batch, detail=False)
        lens.prove(stream)
        place = batch.start + torch.tensor([positions[row] for row in rows], device=model.device)
        among = torch.arange(len(rows), device=model.device)
        read = lens.log_probs(stream.hidden[source, among, place])  # [B, V]
        if mean:
            decoded = read.exp() @ embed.weight.to(read)
        else:
            decoded = embed.weight[read.argmax(-1).to(embed.weight.device)].to(read)
        for k, target in enumerate(targets):
            states = stream.hidden[target].clone()
            norm = states[among, place].norm(dim=-1, keepdim=True)
            states[among, place] = decoded * norm / decoded.norm(dim=-1, keepdim=True)
            with begin_at(arch.blocks, target, states.to(model.dtype)):
                logits = model(**batch.inputs, use_cache=False).logits
            said[k, rows] = batch.at_last(logits).argmax(-1).cpu()
    return said


@contextlib.contextmanager
def damped_loop(model, first: int, last: int, step: float) -> Iterator[None]:
    """While the block runs, layers first … last of a model run once more: x + step · (F(x) − x).

    Without a cache of keys and values, which would hold those of both turns. Raises IndexError for
    layers that are not there, ValueError for a first above the last, and, in a forward pass, for a
    cache.

    Example:
        >>> ids = tokenizer("France's capital is", return_tensors="pt").input_ids
        >>> before = model(ids, use_cache=False).logits
        >>> with damped_loop(model, 1, 2, step=0.0):
        ...     torch.equal(model(ids, use_cache=False).logits, before)
        True
    """
    blocks = describe(model).blocks
    check_indices("Layer", [[first, last]], [len(blocks)])
    if first > last:
        raise ValueError(f"A loop runs from a layer to one above it, not from {first} to {last}.")
    check_unshared(blocks)
    looped = [block.module for block in blocks[first : last + 1]]
    given: dict[int, tuple] = {}
    again = False

    def note(layer: int, args: tuple, kwargs: dict) -> None:
        cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        if cached or kwargs.get("use_cache"):
            raise ValueError("A looped model keeps no cache: call it with use_cache=False.")
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        given[layer] = args[1:], rest

    def turn(x: Tensor) -> Tensor | None:
        nonlocal again
        if again:
            return None
        again, state = True, x
        try:
            for layer, module in enumerate(looped):
                args, kwargs = given[layer]
                out = module(state, *args, **kwargs)
                state = out[0] if isinstance(out, tuple) else out
        finally:
            again = False
        return x + step * (state - x)

    notes = [
        (module, "arguments", lambda args, kwargs, layer=layer: note(layer, args, kwargs))
        for layer, module in enumerate(looped)
    ]
    with hooks(*notes, (looped[-1], "output", turn)):
        yield
