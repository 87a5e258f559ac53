"""Is an attribution right? Keep what it ranks first, take everything else from another prompt.

The metric of MIB's circuit track (Mueller et al. 2025), for nodes and for neurons:

1. Nodes are ranked by a score: each head's output and each FFN's output, at all positions; or, for
   units="neurons", each FFN neuron, with all of attention as the prompt makes it.
2. The top k per cent keep their values; every other node takes the value that it has on a
   counterfactual prompt of equal length (or its mean over prompts, or zero).
3. m is the logit of the right answer less that of the wrong one, at the last position, and
   f(k) = (m(circuit) − m(nothing kept)) / (m(model) − m(nothing kept)), of means over prompts.
4. CPR is the area under f over k, CMD that under |1 − f|. A random order gives 0.25 and 0.75.

`Circuit.scores` has the attributions that need no more than the model and its gradients; any other
scores, logit flow's say, are given to `Circuit.curve` as an array in the order of `Circuit.nodes`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from backattn.models.decoder import describe
from backattn.models.families import UnsupportedModelError
from backattn.models.hooks import evaluating, hooks
from backattn.models.tokens import Batch, encode
from backattn.runtime import progress

SIZES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # per cent of the nodes that are kept
BASES = ("counterfactual", "mean", "zero")  # what the others become
METHODS = ("exact", "gradient", "integrated", "activation", "random")

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

    def __len__(self) -> int:
        return len(self.right)

    def part(self, rows: slice) -> "Pairs":
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

    Raises ValueError naming the first pair of unequal length, or whose two answers are the same.

    Example:
        >>> pairs = pair_up(tokenizer, ["France's capital is"], ["Spain's capital is"], [5], [6])
        >>> len(pairs)
        1
    """
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


class Circuit:
    """A model as nodes that can be kept or exchanged.

    units: "nodes" (heads and FFNs) or "neurons" (of FFNs). nodes: one row per node, in the order of
    every score: layer, kind ("attention" or "ffn"), head, neuron (NA where it does not apply).

    Example:
        >>> circuit = Circuit(model)
        >>> pairs = pair_up(tokenizer, ["France's capital is"], ["Spain's capital is"], [5], [6])
        >>> scores = circuit.scores(pairs, "gradient")
        >>> scores.shape == (1, len(circuit.nodes))
        True
        >>> round(float(circuit.curve(pairs, scores.mean(0))["faithfulness"].iloc[-1]), 4)
        1.0
    """

    def __init__(self, model: nn.Module, units: str = "nodes"):
        if units not in ("nodes", "neurons"):
            raise ValueError(f'units={units!r} is unknown; choose "nodes" or "neurons".')
        self.model, arch = model, describe(model)
        rows, self._places = [], []  # (module, side, channels per node, number of nodes)
        for layer, block in enumerate(arch.blocks):
            if units == "neurons":
                count = block.ffn_out.weight.shape[1]
                self._places.append((block.get("ffn_out"), "input", 1, count))
                rows += [(layer, "ffn", pd.NA, neuron) for neuron in range(count)]
                continue
            self._places.append((block.get("attention_out"), "input", block.head_dim, block.heads))
            rows += [(layer, "attention", head, pd.NA) for head in range(block.heads)]
            self._places.append((block.result("ffn"), "output", block.width, 1))
            rows.append((layer, "ffn", pd.NA, pd.NA))
        frame = pd.DataFrame(rows, columns=["layer", "kind", "head", "neuron"])
        self.nodes = frame.astype({"head": "Int64", "neuron": "Int64"})

    # -- one forward pass

    def _logits(self, batch: Batch, changes: Sequence = ()) -> Tensor:
        """The model's logits at the last positions, [B, V], while functions change what the places
        put out."""
        hooked = [
            (module, side, change)
            for (module, side, _, _), change in zip(self._places, changes, strict=False)
        ]
        with hooks(*hooked):
            return batch.at_last(self.model(**batch.inputs, use_cache=False).logits).float()

    def _metric(self, pairs: Pairs, changes: Sequence = ()) -> Tensor:
        logits = self._logits(pairs.clean, changes)  # [B, V]
        right, wrong = (logits.gather(1, x[:, None])[:, 0] for x in (pairs.right, pairs.wrong))
        return right - wrong  # [B]

    @torch.no_grad()
    def _values(self, batch: Batch) -> Values:
        values: Values = []
        self._logits(batch, [values.append] * len(self._places))
        if len(values) != len(self._places):
            raise UnsupportedModelError(
                "Some layers ran twice or not at all, so that a node has no one value: give the "
                "base model, without back attention."
            )
        return values

    def _per_node(self, products: Values) -> Tensor:
        """Sums over positions and channels: [B, nodes]."""
        sums = (
            x.sum(1).unflatten(-1, (n, -1)).sum(-1)
            for x, (*_, n) in zip(products, self._places, strict=True)
        )
        return torch.cat(list(sums), dim=1)

    def _parts(self, pairs: Pairs, base: str, size: int) -> Iterator[tuple[Pairs, Values]]:
        """Batches of pairs, each with what nodes become: [B, T, channels] per place, or to be
        broadcast to that."""
        if base not in BASES:
            raise ValueError(f"base={base!r} is unknown; choose one of {', '.join(BASES)}.")
        parts = [pairs.part(slice(k, k + size)) for k in range(0, len(pairs), size)]
        sums: Values = [torch.zeros(1, device=pairs.right.device)] * len(self._places)
        for part in parts if base == "mean" else ():
            real = part.clean.attention_mask.bool()
            values = [x[real].sum(0) for x in self._values(part.clean)]
            sums = [x + y for x, y in zip(sums, values, strict=True)]
        fixed = [x / pairs.clean.attention_mask.sum() for x in sums]
        for part in progress(parts, "circuit", unit="batch") if len(parts) > 1 else parts:
            yield part, self._values(part.other) if base == "counterfactual" else fixed

    # -- evaluation

    @torch.no_grad()
    def kept(
        self, pairs: Pairs, keep: np.ndarray, base: str = "counterfactual", batch_size: int = 50
    ) -> np.ndarray:
        """m with only some nodes kept, [n]. keep: [nodes] bool."""
        keep, found = torch.from_numpy(np.asarray(keep, dtype=bool)), []
        masks = keep.split([n for *_, n in self._places])
        masks = [m.repeat_interleave(c) for m, (*_, c, _) in zip(masks, self._places, strict=True)]
        with evaluating(self.model):
            for part, values in self._parts(pairs, base, batch_size):
                changes = map(self._exchange, masks, values)
                found.append(self._metric(part, list(changes)))
        return torch.cat(found).cpu().numpy()

    @staticmethod
    def _exchange(keep: Tensor, values: Tensor):
        keep = keep.to(values.device)
        return lambda x: torch.where(keep, x, values.to(x.dtype))

    def curve(
        self,
        pairs: Pairs,
        score: np.ndarray,
        base: str = "counterfactual",
        sizes: Sequence[float] = SIZES,
        remove: bool = False,
    ) -> pd.DataFrame:
        """f by the share of nodes that are kept, highest score first: size (per cent), nodes,
        faithfulness; attrs hold m of every prompt at each size, at none and at all.

        score: [nodes]. remove: keep all but these (completeness).
        """
        count, order = len(self.nodes), np.argsort(-np.asarray(score, dtype=float), kind="stable")
        if order.shape != (count,) or not np.isfinite(score).all():
            raise ValueError(f"A score must be {count} finite numbers, in the order of `nodes`.")
        none, everything = (self.kept(pairs, np.full(count, x), base) for x in (False, True))
        rows, found = [], []
        for size in sizes:
            chosen = np.zeros(count, dtype=bool)
            chosen[order[: round(size / 100 * count)]] = True
            m = self.kept(pairs, ~chosen if remove else chosen, base)
            whole = everything.mean() - none.mean()
            rows.append(
                {
                    "size": size,
                    "nodes": int(chosen.sum()),
                    "faithfulness": (m.mean() - none.mean()) / whole,
                }
            )
            found.append(m)
        frame = pd.DataFrame(rows)
        frame.attrs |= {"m": np.stack(found), "none": none, "all": everything}
        return frame

    # -- attributions

    def scores(
        self,
        pairs: Pairs,
        method: str,
        base: str = "counterfactual",
        steps: int = 5,
        seed: int = 0,
        batch_size: int = 20,
    ) -> np.ndarray:
        """What each node does for m, by prompt: [n, nodes].

        method: "exact", m less m with this node alone exchanged (one pass per node); "gradient",
        attribution patching, (value − base) · ∂m/∂value; "integrated", the same with the gradient's
        mean over `steps` inputs between the base's embeddings and the prompt's (NAP-IG; Hanna et
        al. 2024); "activation", the size of what the node writes; "random".
        """
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
        if method == "random":
            return np.random.default_rng(seed).random((len(pairs), len(self.nodes)))
        score, found = getattr(self, f"_{method}"), []
        with evaluating(self.model):
            for part, values in self._parts(pairs, base, batch_size):
                found.append(score(part, values, base, steps).detach().cpu().numpy())
        return np.concatenate(found)

    @torch.no_grad()
    def _exact(self, pairs: Pairs, values: Values, *_) -> Tensor:
        whole, found = self._metric(pairs), []
        changes: list = [lambda x: None] * len(self._places)
        for place, (_, _, channels, count) in enumerate(self._places):
            for node in range(count):
                keep = (torch.arange(count) != node).repeat_interleave(channels)
                one = self._exchange(keep, values[place])
                found.append(whole - self._metric(pairs, [*changes[:place], one]))
        return torch.stack(found, dim=1)

    def _gradients(self, pairs: Pairs, towards: Tensor | None = None, share: float = 1.0) -> Values:
        """∂m/∂value at each place; with embeddings `share` of the way from `towards`."""
        added: Values = []

        def change(x: Tensor) -> Tensor:
            added.append(torch.zeros_like(x, requires_grad=True))
            return x + added[-1]

        embed = self.model.get_input_embeddings()
        moved = (
            embed,
            "output",
            lambda x: None if towards is None else torch.lerp(towards, x, share),
        )
        with torch.enable_grad(), hooks(moved):
            m = self._metric(pairs, [change] * len(self._places)).sum()
            return list(torch.autograd.grad(m, added))

    def _weighted(self, pairs: Pairs, values: Values, gradients: Values) -> Tensor:
        own = self._values(pairs.clean)
        less = zip(own, values, gradients, strict=True)
        return self._per_node([(value - other) * gradient for value, other, gradient in less])

    def _gradient(self, pairs: Pairs, values: Values, *_) -> Tensor:
        return self._weighted(pairs, values, self._gradients(pairs))

    def _integrated(self, pairs: Pairs, values: Values, base: str, steps: int) -> Tensor:
        with torch.no_grad():
            towards = self.model.get_input_embeddings()(pairs.other.input_ids)
        towards = towards if base == "counterfactual" else torch.zeros_like(towards)
        each = [self._gradients(pairs, towards, (k + 1) / steps) for k in range(steps)]
        mean = [sum(gradients) / steps for gradients in zip(*each, strict=True)]
        return self._weighted(pairs, values, mean)

    def _activation(self, pairs: Pairs, *_) -> Tensor:
        real = pairs.clean.attention_mask[..., None]
        return self._per_node([x.abs() * real for x in self._values(pairs.clean)])


def areas(curve: pd.DataFrame) -> tuple[float, float]:
    """(CPR, CMD) of `Circuit.curve`: areas under f and |1 − f| over the share kept, 0 at none.

    Example:
        >>> areas(pd.DataFrame({"size": [50, 100], "faithfulness": [0.0, 1.0]}))
        (0.25, 0.75)
    """
    share = np.array([0.0, *curve["size"] / 100])
    f = np.array([0.0, *curve["faithfulness"]])
    return float(np.trapezoid(f, share)), float(np.trapezoid(np.abs(1 - f), share))
