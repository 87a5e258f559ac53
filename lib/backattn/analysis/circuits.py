"""Is an attribution right? Keep what it ranks first, take everything else from another prompt.

The metric of MIB's circuit track (Mueller et al. 2025), for nodes and for neurons:

1. Nodes are ranked by a score: each head's output and each FFN's output, at all positions; or, for
   units="neurons", each FFN neuron; attention then reads what the exchanged neurons leave.
2. The top k per cent keep their values; every other node takes the value that it has on a
   counterfactual prompt of equal length (or its mean over prompts and positions, or zero).
3. m is the logit of the right answer less that of the wrong one, at the last position, and
   f(k) = (m(circuit) − m(nothing kept)) / (m(model) − m(nothing kept)), of means over prompts.
4. CPR is the area under f over k, CMD that under |1 − f|. A random order gives about 0.25 and
   0.75.

Scores come from `backattn.analysis.attributions`, or are any array in the order of `Circuit.nodes`.
What stands before the first token that differs is computed once (base "counterfactual").
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from backattn.models.activations import prove
from backattn.models.decoder import Linear, describe
from backattn.models.families import UnsupportedModelError
from backattn.models.hooks import evaluating, hooks, in_place_of
from backattn.models.next_token import cache_prefix, in_window
from backattn.models.tokens import Batch, check_indices, encode
from backattn.runtime import progress

SIZES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # per cent of the nodes that are kept
BASES = ("counterfactual", "mean", "zero")  # what the others become

Values = list[Tensor]  # one per place: what its nodes put out, [B, T, channels]


@dataclass(frozen=True)
class Pairs:
    """Prompts with their counterfactuals, token by token of equal length, and two answers each.

    clean, other: batches padded on the right; right, wrong: token ids [n].
    """

    clean: Batch
    other: Batch
    right: Tensor
    wrong: Tensor

    def __post_init__(self):
        if self.clean.start.any() or self.other.start.any():
            raise ValueError("Pairs are padded on the right: see pair_up.")

    def __len__(self) -> int:
        return len(self.right)

    @property
    def start(self) -> Tensor:
        """The first position at which the prompts of each pair differ, at most the last: [n]."""
        differ = (self.clean.input_ids != self.other.input_ids).int()
        differ[torch.arange(len(differ)), self.clean.last] = 1
        return differ.argmax(-1)

    def part(self, rows: Sequence[int] | slice) -> "Pairs":
        """Some of the pairs, without columns that are padding in all of them."""
        width = int(self.clean.lengths[rows].max())
        clean, other = (
            Batch(x.input_ids[rows, :width], x.attention_mask[rows, :width])
            for x in (self.clean, self.other)
        )
        return Pairs(clean, other, self.right[rows], self.wrong[rows])


def pair_up(
    tokenizer,
    prompts: Sequence[str],
    counterfactuals: Sequence[str],
    right: Sequence[int],
    wrong: Sequence[int],
    device: str | torch.device = "cpu",
) -> Pairs:
    """Tokenise prompts with counterfactuals. right, wrong: token ids.

    Raises ValueError where the lists are not of one length, and naming the first pair of unequal
    length, or whose two answers are the same.

    Example:
        >>> pairs = pair_up(tokenizer, ["France's capital is"], ["Spain's capital is"], [5], [6])
        >>> len(pairs)
        1
    """
    counts = {len(list(x)) for x in (prompts, counterfactuals, right, wrong)}
    if len(counts) > 1:
        raise ValueError(f"Prompts, counterfactuals and answers are not as many: {sorted(counts)}.")
    clean, other = (encode(tokenizer, list(x), device=device) for x in (prompts, counterfactuals))
    for row, (one, two) in enumerate(
        zip(clean.lengths.tolist(), other.lengths.tolist(), strict=True)
    ):
        if one != two:
            raise ValueError(
                f"Prompt {row} has {one} tokens and its counterfactual {two}: values are exchanged "
                "position by position, so choose one of equal length."
            )
    for row, (one, two) in enumerate(zip(right, wrong, strict=True)):
        if one == two:
            raise ValueError(f"Both answers of prompt {row} are token {one}: there is no contrast.")
    return Pairs(clean, other, *(torch.tensor(list(x), device=device) for x in (right, wrong)))


@dataclass
class Part:
    """Some pairs, and what nodes become. Everything concerns the columns from `start` on.

    rows: of all pairs; values: [B, T, channels] per place, or to be broadcast to that; cache: keys
    and values of the columns before, or None where there are none; added: what each layer adds to
    the stream of the counterfactual prompt [B, T, D], or nothing; base: what values are.
    """

    pairs: Pairs
    rows: list[int]
    start: int
    cache: Cache | None
    values: Values
    added: Values
    base: str


class Circuit:
    """A model as nodes that can be kept or exchanged.

    units: "nodes" (heads and FFNs) or "neurons" (of FFNs). nodes: one row per node, in the order of
    every score: layer, kind ("attention" or "ffn"), head, neuron (NA where it does not apply).

    Example:
        >>> circuit = Circuit(model)
        >>> pairs = pair_up(tokenizer, ["France's capital is"], ["Spain's capital is"], [5], [6])
        >>> curve = circuit.curve(pairs, range(len(circuit.nodes)))
        >>> round(float(curve["faithfulness"].iloc[-1]), 4)
        1.0
    """

    def __init__(self, model: nn.Module, units: str = "nodes"):
        if units not in ("nodes", "neurons"):
            raise ValueError(f'units={units!r} is unknown; choose "nodes" or "neurons".')
        self.model, self.arch, self.units = model, describe(model), units
        self._read = Linear.of(self.arch.unembedding_module, "The unembedding", self.arch.width, 1)
        rows, self.places = [], []  # (module, side, channels per node, number of nodes)
        for layer, block in enumerate(self.arch.blocks):
            if units == "neurons":
                count = block.ffn_out.weight.shape[1]
                self.places.append((block.get("ffn_out"), "input", 1, count))
                rows += [(layer, "ffn", pd.NA, neuron) for neuron in range(count)]
                continue
            self.places.append((block.get("attention_out"), "input", block.head_dim, block.heads))
            rows += [(layer, "attention", head, pd.NA) for head in range(block.heads)]
            self.places.append((block.result("ffn"), "output", block.width, 1))
            rows.append((layer, "ffn", pd.NA, pd.NA))
        frame = pd.DataFrame(rows, columns=["layer", "kind", "head", "neuron"])
        self.nodes = frame.astype({"head": "Int64", "neuron": "Int64"})

    # -- one forward pass

    def _run(
        self, batch: Batch, read: Callable, changes: Sequence = (), start=0, cache=None
    ) -> Tensor:
        """One forward pass over the columns from `start` on, while functions change what the places
        put out. read: from the last states before the unembedding [B, D] to some logits [B, K]."""
        hooked = [
            (module, side, change)
            for (module, side, *_), change in zip(self.places, changes, strict=False)
        ]
        inputs, last = batch.inputs, batch.last
        for name in ("input_ids", "position_ids"):
            inputs[name] = inputs[name][:, start:]
        if cache is not None:
            inputs |= {"past_key_values": cache_prefix(cache, start)}
        keep = batch.input_ids.shape[1] - int(last.min())
        rows = torch.arange(len(last), device=last.device)

        def unembed(x: Tensor) -> Tensor:
            return read(x[rows, last - last.min()])[:, None]

        with hooks(*hooked), in_place_of(self.arch.unembedding_module, unembed):
            said = self.model(**inputs, use_cache=cache is not None, logits_to_keep=keep).logits
        return said[:, 0].float()

    def metric(self, part: "Part", changes: Sequence = ()) -> Tensor:
        """m of each pair while functions change what the places put out: [B]. Of the unembedding
        only the two answers' rows are multiplied."""
        wanted = torch.stack([part.pairs.right, part.pairs.wrong], dim=1)  # [B, 2]

        def read(x: Tensor) -> Tensor:
            weight, bias = self._read.weight[wanted], self._read.bias[wanted]  # in fp32
            return torch.einsum("bd,bkd->bk", x.float(), weight) + bias

        said = self._run(part.pairs.clean, read, changes, part.start, part.cache)
        return said[:, 0] - said[:, 1]

    @torch.no_grad()
    def values(self, batch: Batch, start: int = 0, cache=None) -> Values:
        """What the places put out: [B, T, channels] each."""
        return self._values(batch, start, cache)[0]

    def _values(self, batch: Batch, start: int, cache) -> tuple[Values, Values]:
        """`values`, and what each layer adds to the stream [B, T, D]: proved to be what its
        attention and its FFN put out."""
        values, states, attention = [], [], []
        ends = [*(block.module for block in self.arch.blocks), self.arch.final_norm_module]
        taps = [(end, "input", states.append) for end in ends]
        taps += [(x.result("attention"), "output", attention.append) for x in self.arch.blocks]
        with hooks(*taps):
            self._run(batch, lambda x: x, [values.append] * len(self.places), start, cache)
        if len(values) != len(self.places) or len(states) != len(ends):
            raise UnsupportedModelError(
                "Some layers ran twice or not at all, so that a node has no one value: give the "
                "base model, without back attention."
            )
        added = [after.float() - before.float() for before, after in itertools.pairwise(states)]
        real, whole = batch.attention_mask[:, start:].bool(), self.units == "nodes"
        for layer, one in enumerate(added if whole else ()):
            miss = one - attention[layer].float() - values[2 * layer + 1].float()
            prove(self.arch, f"layer {layer}: sum", miss[real], states[layer + 1][real].float())
        return values, added

    def _prove(self, pairs: Pairs) -> None:
        """Raises UnsupportedModelError unless layers run once, add up what their parts put out, and
        the unembedding's rows give the model's logits; IndexError for an answer that is no token.
        """
        batch, vocabulary = pairs.part([0]).clean, len(self._read.weight)
        answers = [x.tolist() for x in (pairs.right, pairs.wrong)]
        check_indices("Answer", answers, [vocabulary] * 2)
        self._values(batch, 0, None)
        some = torch.arange(0, vocabulary, max(1, vocabulary // 64), device=pairs.right.device)
        some = torch.cat([pairs.right[:1], pairs.wrong[:1], some])
        weight, bias = self._read.weight[some], self._read.bias[some]
        read = self._run(batch, lambda x: x.float() @ weight.T + bias)
        said = self.model(**batch.inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        spread = (said - said.mean(-1, keepdim=True))[:, some]
        prove(self.arch, "unembedding", read - said[:, some], spread)

    def per_node(self, products: Values) -> Tensor:
        """Sums over positions and channels: [B, nodes]."""
        sums = (
            x.sum(1).unflatten(-1, (n, -1)).sum(-1)
            for x, (*_, n) in zip(products, self.places, strict=True)
        )
        return torch.cat(list(sums), dim=1)

    @torch.no_grad()
    def parts(self, pairs: Pairs, base: str, size: int) -> Iterator[Part]:
        """The pairs in batches, those that differ from one place on together. `kept` and `curve`
        take a list of them in place of pairs, where the same are asked again and again."""
        if base not in BASES:
            raise ValueError(f"base={base!r} is unknown; choose one of {', '.join(BASES)}.")
        self._prove(pairs)
        starts = pairs.start if base == "counterfactual" else torch.zeros_like(pairs.right)
        batches = starts.argsort(stable=True).split(size)
        sums: Values = [torch.zeros(1, device=pairs.right.device)] * len(self.places)
        for rows in batches if base == "mean" else ():
            batch = pairs.part(rows.tolist()).clean
            values = [x[batch.attention_mask.bool()].sum(0) for x in self.values(batch)]
            sums = [x + y for x, y in zip(sums, values, strict=True)]
        values = [x / pairs.clean.attention_mask.sum() for x in sums]
        for rows in progress(batches, "circuit", unit="batch") if len(batches) > 1 else batches:
            part, start, cache = pairs.part(rows.tolist()), int(starts[rows].min()), None
            if start and in_window(self.model, part.clean):
                ids = part.clean.input_ids[:, :start]
                cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
            start = 0 if cache is None else start
            added: Values = []
            if base == "counterfactual":
                values, added = self._values(part.other, start, cache)
            yield Part(part, rows.tolist(), start, cache, values, added, base)

    # -- evaluation

    @torch.no_grad()
    def kept(
        self,
        pairs: Pairs | list[Part],
        keep: np.ndarray,
        base: str = "counterfactual",
        batch_size: int = 50,
    ) -> np.ndarray:
        """m with only some nodes kept: [..., n]. keep: [..., nodes] bool, one row for each time."""
        keep, ready = torch.from_numpy(np.asarray(keep, dtype=bool)), isinstance(pairs, list)
        if ready and {part.base for part in pairs} != {base}:
            raise ValueError(f"These parts were made with another base than {base!r}.")
        count = sum(len(part.rows) for part in pairs) if ready else len(pairs)
        found = np.empty((*keep.shape[:-1], count), dtype=np.float32)
        with evaluating(self.model):
            for part in pairs if ready else self.parts(pairs, base, batch_size):
                for time in np.ndindex(*keep.shape[:-1]):
                    found[(*time, part.rows)] = self._kept(part, keep[time]).cpu().numpy()
        return found

    def _kept(self, part: Part, keep: Tensor) -> Tensor:
        """A layer of which nothing is kept adds what it adds to the counterfactual prompt."""
        masks = keep.split([n for *_, n in self.places])
        channels = [x for _, _, x, _ in self.places]
        masks = [mask.repeat_interleave(n) for mask, n in zip(masks, channels, strict=True)]
        changes = [exchange(mask, x) for mask, x in zip(masks, part.values, strict=True)]
        with contextlib.ExitStack() as stack:
            layers = enumerate(part.added if self.units == "nodes" else ())
            for layer, added in layers:
                if not (masks[2 * layer].any() or masks[2 * layer + 1].any()):
                    add: Callable = functools.partial(_add, added)
                    stack.enter_context(in_place_of(self.arch.blocks[layer].module, add))
            return self.metric(part, changes)

    def curve(
        self,
        pairs: Pairs | list[Part],
        score: Sequence[float],
        base: str = "counterfactual",
        sizes: Sequence[float] = SIZES,
        remove: bool = False,
    ) -> pd.DataFrame:
        """f by the share of nodes that are kept, highest score first: size (per cent), nodes,
        faithfulness; attrs hold m of every prompt, as lists: "m" at each size, "none", "all", and
        "removed".

        score: [nodes]. remove: keep all but these (completeness). Raises ValueError for another
        number of scores, for one that is not finite, for sizes that do not rise from above 0 to at
        most 100, and where the answer depends on no node.
        """
        count, order = len(self.nodes), np.argsort(-np.asarray(score, dtype=float), kind="stable")
        if order.shape != (count,) or not np.isfinite(score).all():
            raise ValueError(f"A score must be {count} finite numbers, in the order of `nodes`.")
        if list(sizes) != sorted({size for size in sizes if 0 < size <= 100}):
            raise ValueError(f"sizes are {list(sizes)}: per cent that rise, above 0, at most 100.")
        nodes = [round(size / 100 * count) for size in sizes]
        rank = np.argsort(order)  # each node's place
        masks = rank < np.array([0, count, *nodes])[:, None]
        which, where = np.unique(masks, axis=0, return_inverse=True)  # none and all are asked once
        m = self.kept(pairs, ~which if remove else which, base)[where.ravel()]
        none, everything = m[:2][::-1] if remove else m[:2]
        whole = everything.mean() - none.mean()
        if not abs(whole) > 1e-6:
            raise ValueError("All nodes together change nothing in m: there is nothing to find.")
        f = (m[2:].mean(1) - none.mean()) / whole
        frame = pd.DataFrame({"size": sizes, "nodes": nodes, "faithfulness": f})
        m = {"m": m[2:].tolist(), "none": none.tolist(), "all": everything.tolist()}
        frame.attrs |= {**m, "removed": remove}
        return frame


def _add(added: Tensor, hidden_states: Tensor, *_, **__) -> Tensor:
    return (hidden_states + added).to(hidden_states.dtype)


def exchange(keep: Tensor, values: Tensor):
    """A change for `Circuit.metric`: channels that are not kept become values."""
    keep = keep.to(values.device)
    return lambda x: torch.where(keep, x, values.to(x.dtype))


def areas(curve: pd.DataFrame) -> tuple[float, float]:
    """(CPR, CMD) of `Circuit.curve`: areas under f and |1 − f| over the share kept, 0 at none.
    Raises ValueError for sizes that do not end at 100, and where nodes were removed.

    Example:
        >>> areas(pd.DataFrame({"size": [50, 100], "faithfulness": [0.0, 1.0]}))
        (0.25, 0.75)
    """
    if curve.attrs.get("removed") or curve["size"].iloc[-1] != 100:
        raise ValueError("The areas are those of nodes kept, up to all of them (size 100).")
    share = np.array([0.0, *curve["size"] / 100])
    f = np.array([0.0, *curve["faithfulness"]])
    return float(np.trapezoid(f, share)), float(np.trapezoid(np.abs(1 - f), share))
