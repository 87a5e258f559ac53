"""Scores of the neurons of one batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backattn.models.activations import Stream, head_contributions
from backattn.models.decoder import Block, Linear
from backattn.models.lens import Lens
from backattn.models.tokens import Batch
from backattn.runtime import progress

KINDS = ("embedding", "attention", "attention_bias", "ffn", "ffn_bias", "rounding")

CHUNK = 256  # neurons whose vocabulary directions are in memory at once

CERTIFIED = 1e-6  # largest certified error (nats) of the moment expansion; above it the softmax itself is taken


def _token_texts(tokenizer, batch: Batch, index: int) -> list[str]:
    return [
        tokenizer.decode([i])
        for i in batch.input_ids[index][batch.attention_mask[index].bool()].tolist()
    ]


@dataclass
class _Rows:
    """Columns of a frame for one batch; arrays are broadcast against `increase`."""

    prompt: np.ndarray
    layer: np.ndarray
    kind: np.ndarray  # index into KINDS
    head: np.ndarray  # -1: none
    neuron: np.ndarray
    position: np.ndarray
    before: np.ndarray
    increase: np.ndarray


def _rows(prompt, layer, kind: str, head, neuron, position, before, increase: Tensor) -> _Rows:
    def column(x):
        array = x.cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
        return np.broadcast_to(array, tuple(increase.shape)).reshape(-1)

    return _Rows(
        column(prompt).astype(np.int32),
        column(layer).astype(np.int16),
        column(KINDS.index(kind)).astype(np.int8),
        column(head).astype(np.int16),
        column(neuron).astype(np.int32),
        column(position).astype(np.int32),
        column(before).astype(np.float64),
        column(increase).astype(np.float64),
    )


def _frame(rows: list[_Rows], tokens: list[list[str]], first_prompt: int) -> pd.DataFrame:
    joined = {
        name: np.concatenate([getattr(r, name) for r in rows])
        for name in _Rows.__dataclass_fields__
    }
    order = np.lexsort(
        [joined[k] for k in ("position", "neuron", "head", "kind", "layer", "prompt")]
    )
    # Layer rows come in the order of the sum, which sorting by (layer, kind) keeps.
    joined = {name: values[order] for name, values in joined.items()}
    table = sorted({text for row in tokens for text in row})
    code = {text: index for index, text in enumerate(table)}
    offsets = np.cumsum([0, *map(len, tokens[:-1])])
    flat = np.array([code[text] for row in tokens for text in row])
    return pd.DataFrame(
        {
            "prompt": joined["prompt"] + first_prompt,
            "layer": joined["layer"],
            "kind": pd.Categorical.from_codes(joined["kind"], KINDS),
            "head": pd.arrays.IntegerArray(joined["head"], joined["head"] < 0),
            "neuron": pd.arrays.IntegerArray(joined["neuron"], joined["neuron"] < 0),
            "position": joined["position"],
            "token": pd.Categorical.from_codes(
                flat[offsets[joined["prompt"]] + joined["position"]], table
            ),
            "log_prob_before": joined["before"],
            "log_prob_after": joined["before"] + joined["increase"],
            "increase": joined["increase"],
        }
    )


def _concat(frames: list[pd.DataFrame]) -> pd.DataFrame:
    if len(frames) == 1:
        return frames[0]
    joint = pd.api.types.union_categoricals(
        [frame["token"] for frame in frames], sort_categories=True
    )
    whole = pd.concat([frame.drop(columns="token") for frame in frames], ignore_index=True)
    whole.insert(6, "token", joint)
    return whole


class _Reader:
    """Scores the components of one batch. B prompts, L layers, D width, V vocabulary."""

    def __init__(self, stream: Stream, answer: Tensor, norm: str):
        self.stream, self.answer, self.norm = stream, answer, norm
        self.lens, self.batch = Lens(stream.arch), stream.batch
        at_last = self.batch.at_last
        self.count = len(answer)
        self.lengths = self.batch.lengths.tolist()
        self.starts = self.batch.start.tolist()
        self.end = np.array(self.lengths) - 1  # position of the last token in each unpadded prompt
        self.hidden = torch.stack([at_last(h) for h in stream.hidden])  # [L+1, B, D]
        self.attention = torch.stack([at_last(a) for a in stream.attention])  # [L, B, D]
        self.ffn = torch.stack([at_last(f) for f in stream.ffn])
        self.middle = self.hidden[:-1] + self.attention
        self.frozen = self.lens.scale(self.hidden[-1])  # [B, 1]

    # -- reading states

    def scale(self, state: Tensor) -> Tensor:
        """The lens' scale for states [..., B, D]."""
        return self.frozen if self.norm == "final" else self.lens.scale(state)

    def log_prob(self, state: Tensor) -> Tensor:
        """Answer's log-probability in states [B, D] -> [B]."""
        logs = self.lens.log_probs(state, self.scale(state))
        return logs.gather(1, self.answer[:, None])[:, 0]

    # -- layers

    def layer_rows(self) -> list[_Rows]:
        rows = []
        rounding = self.stream.arch.model.dtype != torch.float32
        empty = self.lens.cap(self.lens.offset).log_softmax(-1)[
            self.answer
        ]  # the lens on an empty state
        before = empty.double()

        def step(layer: int, kind: str, state: Tensor) -> None:
            nonlocal before
            after = self.log_prob(state).double()
            rows.append(
                _rows(range(self.count), layer, kind, -1, -1, self.end, before, after - before)
            )
            before = after

        # A running sum, not the captured states: a contribution that is wrong in any layer spoils the end.
        state = self.hidden[0]
        step(0, "embedding", state)
        for layer in range(self.stream.layers):
            state = state + self.attention[layer]
            step(layer, "attention", state)
            state = state + self.ffn[layer]
            step(layer, "ffn", state)
            if rounding:
                state = self.hidden[layer + 1]
                step(layer, "rounding", state)
        return rows

    # -- heads

    def head_rows(self) -> list[_Rows]:
        """Each head × source position against the attention base, each FFN as one component."""
        rows = []
        for layer in range(self.stream.layers):
            contributions = head_contributions(self.stream, layer)  # [B, H, T, D]
            heads = np.arange(contributions.shape[1])[:, None]
            base = self.hidden[layer]
            before = self.log_prob(base)
            for b in range(self.count):
                real = slice(self.starts[b], self.starts[b] + self.lengths[b])
                states = base[b] + contributions[b, :, real]  # [H, T, D]
                scale = self.frozen[b] if self.norm == "final" else None
                after = torch.cat(
                    [
                        self.lens.log_probs(s, scale)[:, self.answer[b]]
                        for s in states.flatten(0, 1).split(CHUNK)
                    ]
                )
                increase = (after - before[b]).unflatten(0, states.shape[:2])
                rows.append(
                    _rows(
                        b,
                        layer,
                        "attention",
                        heads,
                        -1,
                        np.arange(self.lengths[b]),
                        before[b],
                        increase,
                    )
                )
            middle = self.log_prob(self.middle[layer])
            increase = self.log_prob(self.middle[layer] + self.ffn[layer]) - middle
            rows.append(_rows(range(self.count), layer, "ffn", -1, -1, self.end, middle, increase))
        return rows

    # -- neurons

    def groups(self) -> Iterator["_Group"]:
        """The sub-layers as groups of neurons, in the order of the residual sum."""
        for layer, block in enumerate(self.stream.arch.blocks):
            alpha = self.batch.at_last(self.stream.weights[layer].transpose(1, 2))  # [B, H, T]
            coefficient = alpha[..., None] * self.stream.expanded_values(layer).transpose(
                1, 2
            )  # [B, H, T, d]
            coefficient = coefficient.permute(0, 2, 1, 3).flatten(2)  # [B, T, H*d]
            yield self._group(
                layer, "attention", block, block.attention_out, coefficient, self.hidden[layer]
            )
            coefficient = self.batch.at_last(self.stream.neurons[layer])[:, None]  # [B, 1, F]
            yield self._group(layer, "ffn", block, block.ffn_out, coefficient, self.middle[layer])

    def _group(
        self, layer, kind, block: Block, out: Linear, coefficient: Tensor, base: Tensor
    ) -> "_Group":
        post = block.norm(f"{kind}_post")
        post_scale = self.batch.at_last(self.stream.post_scale(kind, layer))  # [B, 1]
        vectors = post.linear(out.weight.T, out.weight.new_ones(()))  # [n, D]
        bias = post.linear(out.bias, post_scale) if out.bias.any() else None  # [B, D]
        return _Group(
            layer, kind, vectors, coefficient * post_scale[:, None], base, bias, block.head_dim
        )

    def neuron_rows(self, method: str, top_k: int) -> list[_Rows]:
        rows = self._exact_rows() if method == "exact" else self._screened_rows(top_k)
        for group in self.groups():
            if group.bias is not None:
                before = self.log_prob(group.base)
                increase = self.log_prob(group.base + group.bias) - before
                rows.append(
                    _rows(
                        range(self.count),
                        group.layer,
                        f"{group.kind}_bias",
                        -1,
                        -1,
                        self.end,
                        before,
                        increase,
                    )
                )
        return rows

    def _shift(
        self, vectors: Tensor, base: Tensor, b: int, coefficient: Tensor
    ) -> tuple[Tensor | float, Tensor]:
        """Factors (p, q): the logits of base + coefficient · vector are p · base logits + q · direction.

        vectors: [k, D]; base: [D] or [k, D]; coefficient: [k] -> p: [k, 1] or 1, q: [k, 1].
        """
        if self.norm == "final":
            return 1.0, (coefficient * self.frozen[b])[:, None]
        norm = self.lens.norm
        centred, vectors = norm.centre(base), norm.centre(vectors)
        mixed = 2 * coefficient * (vectors * centred).mean(-1) + coefficient**2 * vectors.pow(
            2
        ).mean(-1)
        own = torch.rsqrt(
            centred.pow(2).mean(-1) + mixed + norm.eps
        )  # scale at base + coefficient · vector  [k]
        return (own / norm.scale(base)[..., 0])[:, None], (coefficient * own)[:, None]

    def _softmax_scores(
        self, b: int, shift: tuple, raw: "Tensor | _Picked", directions: "Tensor | _Picked"
    ) -> Tensor:
        """Answer's log-probability after each neuron, by its own softmax over the vocabulary: [k].

        shift: see `_shift`; raw: [V] or [k, V] uncapped base logits without the offset; directions: [k, V].
        """
        p, q = shift
        scores = torch.empty(len(q), dtype=torch.float64)
        for part in torch.arange(len(q), device=q.device).split(64):
            start = (raw if isinstance(raw, Tensor) and raw.dim() == 1 else raw[part]) * (
                p[part] if isinstance(p, Tensor) else p
            )
            logits = self.lens.cap(
                torch.addcmul(start + self.lens.offset, q[part], directions[part])
            )  # [64, V]
            scores[part.cpu()] = (logits[:, self.answer[b]].double() - _logsumexp(logits)).cpu()
        return scores

    def _base(self, group: "_Group") -> tuple[Tensor, Tensor, Tensor]:
        """(uncapped base logits without offset [B, V], log partition [B], answer's log-probability [B])."""
        raw = self.lens.raw_logits(group.base, self.scale(group.base)) - self.lens.offset
        logits = self.lens.cap(raw + self.lens.offset)
        partition = _logsumexp(logits)
        return raw, partition, logits.gather(1, self.answer[:, None])[:, 0].double() - partition

    def _exact_rows(self) -> list[_Rows]:
        rows = []
        for group in progress(
            self.groups(), "exact", total=2 * self.stream.layers, unit="sub-layer"
        ):
            raw, partition, before = self._base(group)
            probabilities = (
                raw + self.lens.offset - partition.float()[:, None]
            ).exp()  # [B, V], used uncapped only
            increase = torch.empty(group.coefficient.shape, dtype=torch.float64)  # [B, T or 1, n]
            expand = self.norm == "final" and self.lens.softcap is None
            for which in torch.arange(len(group.vectors), device=raw.device).split(CHUNK):
                directions = self.lens.directions(group.vectors[which])  # [n, V]
                coefficient = group.coefficient[..., which]  # [B, T, n]
                if expand:
                    scores, doubtful = self._expansion(directions, coefficient, probabilities)
                else:
                    scores, doubtful = (
                        torch.empty(coefficient.shape, dtype=torch.float64),
                        torch.ones(coefficient.shape, dtype=torch.bool),
                    )
                for b in range(self.count):
                    where = doubtful[b].nonzero(as_tuple=True)  # (position, neuron)
                    if len(where[0]):
                        column = where[1].to(raw.device)
                        shift = self._shift(
                            group.vectors[which[column]], group.base[b], b, coefficient[b][where]
                        )
                        after = self._softmax_scores(b, shift, raw[b], _Picked(directions, column))
                        scores[b][where] = after - before[b].cpu()
                increase[..., which.cpu()] = scores
            rows += self._group_rows(group, increase, before)
        return rows

    def _expansion(
        self, directions: Tensor, coefficient: Tensor, probabilities: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Importances from the moments of each direction under the base distribution, and where they are doubtful.

        With X the direction's entry at a random token of the base distribution, Y = X − E X and c the coefficient,
        log p(answer) rises by c (X_answer − E X) − log E exp(cY). The expectation is expanded to c⁴; since
        E Y = 0 it is at least 1, so the error is at most |c|⁵ max|Y| E Y⁴ exp(|c| max|Y|) / 120.

        directions: [n, V]; coefficient: [B, T, n]; probabilities: [B, V] -> two [B, T, n].
        """
        p = probabilities.T  # [V, B]
        shifted = directions - (directions @ p).mean(1, keepdim=True)  # keeps the powers small
        low, high = shifted.amin(1), shifted.amax(1)  # [n]
        power, raw = shifted.clone(), []
        for _ in range(4):
            raw.append((power @ p).T.double())  # [B, n]
            power *= shifted
        r1, r2, r3, r4 = raw
        m2 = (r2 - r1**2).clamp(min=0)
        m3 = r3 - 3 * r1 * r2 + 2 * r1**3
        m4 = (r4 - 4 * r1 * r3 + 6 * r1**2 * r2 - 3 * r1**4).clamp(min=0)
        widest = torch.maximum(high - r1, r1 - low)  # [B, n]
        c = (coefficient * self.frozen[:, None]).double()  # [B, T, n]
        m2, m3, m4, widest, r1 = (x[:, None] for x in (m2, m3, m4, widest, r1))
        expectation = 1 + c**2 * m2 / 2 + c**3 * m3 / 6 + c**4 * m4 / 24
        bound = c.abs() ** 5 * widest * m4 * (c.abs() * widest).exp() / 120
        own = shifted.T[self.answer].double()[:, None]  # [B, 1, n]
        scores = c * (own - r1) - expectation.clamp(min=1e-30).log()
        return scores.cpu(), ~(bound <= CERTIFIED).cpu()

    def _group_rows(self, group: "_Group", increase: Tensor, before: Tensor) -> list[_Rows]:
        rows, n = [], len(group.vectors)
        before = before.cpu()
        for b in range(self.count):
            if group.kind == "ffn":
                rows.append(
                    _rows(
                        b,
                        group.layer,
                        "ffn",
                        -1,
                        np.arange(n),
                        self.end[b],
                        before[b],
                        increase[b, 0],
                    )
                )
                continue
            real = increase[b, self.starts[b] : self.starts[b] + self.lengths[b]]  # [T, H*d]
            head, channel = np.divmod(np.arange(n), group.head_dim)
            position = np.arange(self.lengths[b])[:, None]
            rows.append(
                _rows(b, group.layer, "attention", head, channel, position, before[b], real)
            )
        return rows

    def _first_order(self, groups: list["_Group"], b: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """First-order importance of every neuron of prompt b: gradient of log p(answer) at the base × contribution.

        Returns (base logits without offset [2L, V], answer's log-probability [2L], per group [T or 1, n]).
        """
        with torch.enable_grad():
            bases = torch.stack([group.base[b] for group in groups]).requires_grad_()  # [2L, D]
            raw = self.lens.raw_logits(bases, self.frozen[b] if self.norm == "final" else None)
            score = self.lens.cap(raw).log_softmax(-1)[:, self.answer[b]].sum()
            (gradients,) = torch.autograd.grad(score, bases)  # [2L, D]
        estimates = [
            group.coefficient[b] * (group.vectors @ g)
            for group, g in zip(groups, gradients, strict=True)
        ]
        logits = self.lens.cap(raw.detach())
        before = logits[:, self.answer[b]].double() - _logsumexp(logits)
        return raw.detach() - self.lens.offset, before, estimates

    def _screened_rows(self, top_k: int) -> list[_Rows]:
        groups = list(self.groups())
        bounds = np.cumsum([0, *(group.coefficient[0].numel() for group in groups)])
        real = torch.stack(
            [torch.cat([self._is_real(group, b) for group in groups]) for b in range(self.count)]
        )
        rows = []
        for b in range(self.count):
            raw, before, estimates = self._first_order(groups, b)
            flat = torch.cat([e.flatten() for e in estimates]).masked_fill(
                ~real[b].to(raw.device), -math.inf
            )
            chosen = flat.topk(min(top_k, int(real[b].sum()))).indices.sort().values.cpu().numpy()
            owner = np.searchsorted(bounds, chosen, side="right") - 1  # group of each chosen neuron
            inside = chosen - bounds[owner]
            width = np.array([len(group.vectors) for group in groups])[owner]
            position, which = inside // width, inside % width
            coefficient = torch.stack(
                [
                    groups[g].coefficient[b, t, n]
                    for g, t, n in zip(owner, position, which, strict=True)
                ]
            )
            vectors = torch.stack(
                [groups[g].vectors[n] for g, n in zip(owner, which, strict=True)]
            )  # [k, D]
            places = torch.from_numpy(owner).to(raw.device)
            bases = torch.stack([group.base[b] for group in groups])[places]  # [k, D]
            shift = self._shift(vectors, bases, b, coefficient)
            after = self._softmax_scores(
                b, shift, _Picked(raw, places), self.lens.directions(vectors)
            )
            increase = after - before[places].cpu()
            for g in np.unique(owner):
                group, mine = groups[g], owner == g
                head, neuron, where = -1, which[mine], self.end[b]
                if group.kind == "attention":
                    head, neuron = np.divmod(neuron, group.head_dim)
                    where = position[mine] - self.starts[b]
                base = before[g].item()
                rows.append(
                    _rows(
                        b,
                        group.layer,
                        group.kind,
                        head,
                        neuron,
                        where,
                        base,
                        increase[torch.from_numpy(mine)],
                    )
                )
        return rows

    def _is_real(self, group: "_Group", b: int) -> Tensor:
        """Which of a group's neurons are no padding, flat: [T * n] or [n]."""
        n = len(group.vectors)
        if group.kind == "ffn":
            return torch.ones(n, dtype=torch.bool)
        return self.batch.attention_mask[b].bool().cpu().repeat_interleave(n)


@dataclass
class _Group:
    """The neurons of one sub-layer at the last position: contribution = coefficient · vector."""

    layer: int
    kind: str
    vectors: Tensor  # [n, D] output vectors, after the sandwich norm's weight
    coefficient: Tensor  # [B, T or 1, n] with the sandwich norm's frozen scale
    base: Tensor  # [B, D] residual input of the sub-layer
    bias: Tensor | None  # [B, D]
    head_dim: int


@dataclass
class _Picked:
    """Rows of `table`, gathered only in the slices that are asked for."""

    table: Tensor
    rows: Tensor

    def __getitem__(self, part: Tensor) -> Tensor:
        return self.table[self.rows[part]]


def _logsumexp(logits: Tensor) -> Tensor:
    """log Σ exp over the last axis in float64: [..., V] -> [...]. The exponentials stay in fp32."""
    top = logits.amax(-1, keepdim=True)
    return (logits - top).exp_().sum(-1).double().log() + top[..., 0].double()
