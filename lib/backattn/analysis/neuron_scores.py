"""Importances of neurons and heads (equation 3 of `logit_flow`) without a forward pass for each.

A neuron adds c·v to its sub-layer's base b: a coefficient times an output vector. With s the final
norm's scale at b and s' that at b + c·v (the same where it is frozen), the uncapped logits
z = W_U (γ ⊙ s·b) become

(5) z' = (s'/s) z + c s' d,  with the neuron's direction d = W_U (γ ⊙ v).

One matrix product gives the directions of many neurons, for all prompts and source positions. Then

"exact"   takes the softmax of z' for every neuron or, where the scale is frozen and logits are not
          capped, the moments of d under the base distribution: no softmax, and a certified error;
"screen"  scores exactly the neurons that are largest to first order,

(6) c v · ∇_b log p(w | b).

A head at a source position is a sum of neurons: d = Σ c d_i, over directions that all prompts and
positions share. With the scale frozen and no cap, log p(w) rises by d_w − log Σ p exp(d), p being
the base distribution; Σ p exp(d) − 1 is summed as Σ p expm1(d), which keeps its digits. So it is
for a single neuron that was screened; else the softmax of z' is taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backattn.models.activations import Stream
from backattn.models.lens import Lens
from backattn.runtime import progress

CHUNK = 256  # neurons whose directions over the vocabulary are in memory at once
SOFTMAXES = 16  # taken at once: what stays in a processor's cache
KEPT_BYTES = 2**28  # of the base distributions of prompts that are screened together
BLOCK = 1024  # tokens of the vocabulary over which heads are summed at once
CERTIFIED = 1e-6  # largest certified error (nats) of `_by_moments`; above it the softmax is taken


class Reading:
    """A batch of B prompts, and the lens that reads the answer to each: token ids, or None for the
    model's own next tokens. Raises UnsupportedModelError unless the residual sums, the output
    weights and the lens are the model's.

    frozen: [B, 1] the final norm's scale at the end, None: recomputed at each state.
    """

    def __init__(self, stream: Stream, norm: str, answers: Sequence[int] | None = None):
        self.stream, self.lens, self.answer = stream, Lens(stream.arch), stream.logits.argmax(-1)
        stream.prove_sums()
        for layer, (values, neurons) in enumerate(zip(stream.values, stream.neurons, strict=True)):
            stream.prove_outputs(layer, values, neurons)
        self.lens.prove(stream)
        if answers is not None:
            self.answer = torch.tensor(answers, device=self.answer.device)
        end = stream.batch.at_last(stream.hidden[-1])
        self.frozen = self.lens.scale(end) if norm == "final" else None

    @property
    def fast(self) -> bool:
        """Whether logits are affine in a state: the scale frozen, no cap."""
        return self.frozen is not None and self.lens.softcap is None

    def scale(self, b: int | slice) -> Tensor | None:
        return None if self.frozen is None else self.frozen[b]

    def log_prob(self, states: Tensor, b: int | slice = slice(None)) -> Tensor:
        """Equation 2 of `logit_flow`: the answer's log-probability in a state of each prompt
        [B, D] or in several [n, B, D], or in some states of prompt b [n, D]."""
        log_probs, answer = self.lens.log_probs(states, self.scale(b)), self.answer[b]
        return log_probs.gather(-1, answer.expand(states.shape[:-1])[..., None])[..., 0].double()

    def logit(self, parts: Tensor) -> Tensor:
        """Share of a part of each prompt's state [..., B, D] in the answer's uncapped logit."""
        read = self.lens.norm.linear(parts, self.frozen)
        return (read * self.lens.weight[self.answer]).sum(-1).double()


@dataclass
class Sublayer:
    """The neurons of one sub-layer at the last position: contribution = coefficient · vector."""

    layer: int
    kind: str
    vectors: Tensor  # [n, D] output vectors, after the sandwich norm's weight; n = F or H·d
    coefficient: Tensor  # [B, P, n] with the sandwich norm's frozen scale; P = 1 or T sources
    base: Tensor  # [B, D] residual input of the sub-layer
    bias: Tensor | None  # [B, D]
    head_dim: int


def sublayers(stream: Stream) -> Iterator[Sublayer]:
    """Attention and FFN of every layer, in the order of the residual sum."""
    at_last = stream.batch.at_last
    for layer, block in enumerate(stream.arch.blocks):
        hidden, attention = at_last(stream.hidden[layer]), at_last(stream.attention[layer])
        alpha = at_last(stream.weights[layer].transpose(1, 2)).transpose(1, 2)  # [B, T, H]
        values = block.per_head(stream.values[layer])  # [B, T, H, d]
        channels = (alpha[..., None] * values).flatten(2)
        units = at_last(stream.neurons[layer])[:, None]  # [B, 1, F]
        for kind, out, coefficient, base in (
            ("attention", block.attention_out, channels, hidden),
            ("ffn", block.ffn_out, units, hidden + attention),
        ):
            post = block.norm(f"{kind}_post")
            scale = at_last(stream.scales[kind][layer])  # [B, 1]
            vectors = post.linear(out.weight.T, out.weight.new_ones(()))
            bias = post.linear(out.bias, scale) if out.bias.any() else None
            coefficient = coefficient * scale[:, None]
            yield Sublayer(layer, kind, vectors, coefficient, base, bias, block.head_dim)


def exact(reading: Reading) -> Iterator[dict]:
    """Every neuron."""
    lens, answer, frozen = reading.lens, reading.answer, reading.frozen
    real, total = reading.stream.batch.attention_mask.bool().cpu(), 2 * reading.stream.layers
    for sub in progress(sublayers(reading.stream), "exact", total=total, unit="sub-layer"):
        scale = lens.scale(sub.base) if frozen is None else frozen
        raw = lens.raw_logits(sub.base, scale) - lens.offset  # [B, V]
        logits = lens.cap(raw + lens.offset)
        partition = _logsumexp(logits)
        before = (logits.gather(1, answer[:, None])[:, 0].double() - partition).cpu()
        base = (logits - partition.float()[:, None]).exp()  # [B, V] the base distribution
        sources = real if sub.kind == "attention" else torch.ones(len(real), 1, dtype=torch.bool)
        increase = torch.empty(sub.coefficient.shape, dtype=torch.float64)  # [B, P, n]
        for which in torch.arange(len(sub.vectors)).split(CHUNK):
            vectors, c = sub.vectors[which], sub.coefficient[..., which]
            directions = lens.directions(vectors)  # [chunk, V]
            certain = torch.zeros(c.shape, dtype=torch.bool)
            if reading.fast:
                scaled = (c * frozen[:, None]).double()
                increase[..., which], certain = _by_moments(directions, scaled, base, answer)
            for b in range(len(answer)):
                place, unit = (~certain[b] & sources[b, :, None]).nonzero(as_tuple=True)
                each = c[b, place, unit]
                p, q = _factors(lens, sub.base[b], vectors[unit], each, reading.scale(b))
                for i in torch.arange(len(unit)).split(SOFTMAXES):
                    after = _after(lens, p[i] * raw[b], q[i], directions[unit[i]], answer[b])
                    increase[b, place[i], which[unit[i]]] = after - before[b]
        yield from every(reading, sub, before, increase)


def every(reading: Reading, sub: Sublayer, before: Tensor, increase: Tensor) -> Iterator[dict]:
    """All neurons of a sub-layer, prompt by prompt. before: [B], increase: [B, P, n]."""
    for b, real in enumerate(reading.stream.batch.attention_mask.bool()):
        mask = real if sub.kind == "attention" else real.new_ones(1)
        place = mask.nonzero().cpu()  # [sources, 1]
        neuron = torch.arange(len(sub.vectors))
        yield _part(reading, sub, b, place, neuron, before[b], increase[b].cpu()[mask.cpu()])


def heads(reading: Reading, sub: Sublayer) -> tuple[Tensor, Tensor]:
    """Every head of an attention × each source position: log p before [B] and increases [B, H, T].

    The vocabulary is taken in blocks, so that what is summed over it stays in the processor.
    """
    lens, answer, frozen = reading.lens, reading.answer, reading.frozen
    log_probs = lens.log_probs(sub.base, frozen)  # [B, V]
    before = log_probs.gather(1, answer[:, None])[:, 0].double()
    c = sub.coefficient.unflatten(-1, (-1, sub.head_dim)).permute(2, 0, 1, 3)  # [H, B, T, d]
    gain = torch.zeros(c.shape[:3], dtype=torch.float64, device=c.device)
    rest = reading.stream.batch.attention_mask.bool().expand(gain.shape).clone()
    if frozen is not None and lens.softcap is None:
        base, scaled = log_probs.exp(), c * frozen[:, None]
        vectors = lens.norm.linear(sub.vectors, frozen.new_ones(()))  # [n, D]
        for rows in map(slice, range(0, len(lens.weight), BLOCK), range(BLOCK, 2**62, BLOCK)):
            directions = (vectors @ lens.weight[rows].T).unflatten(0, (len(c), -1))  # [H, d, block]
            for head, unit in enumerate(directions):
                change = (scaled[head].flatten(0, 1) @ unit).expm1_().unflatten(0, c.shape[1:3])
                gain[head] += (change @ base[:, rows, None])[..., 0]
        rest &= ~((gain > -0.9) & (gain < 1e4))  # digits are lost there
        at_answer = (vectors @ lens.weight[answer].T).unflatten(0, (len(c), -1))  # [H, d, B]
        gain = torch.einsum("hbtd,hdb->hbt", scaled, at_answer).double() - gain.log1p()
    vectors = sub.vectors.unflatten(0, (len(c), -1))  # [H, d, D]
    for b in range(len(answer)):
        for one in rest[:, b].nonzero().split(SOFTMAXES):
            head, place = one.T
            states = sub.base[b] + torch.einsum("kd,kdw->kw", c[head, b, place], vectors[head])
            gain[head, b, place] = reading.log_prob(states, b) - before[b]
    return before, gain.transpose(0, 1)


def linear(reading: Reading, sub: Sublayer) -> Tensor:
    """Share of each neuron in the answer's uncapped logit at the frozen scale: [B, P, n]."""
    lens, one = reading.lens, reading.frozen.new_ones(())
    at_answer = lens.norm.linear(sub.vectors, one) @ lens.weight[reading.answer].T  # [n, B]
    return sub.coefficient * (at_answer.T * reading.frozen)[:, None]


def screened(reading: Reading, top_k: int) -> Iterator[dict]:
    """The `top_k` neurons of each prompt that raise the answer most to first order."""
    stream, lens = reading.stream, reading.lens
    subs = list(sublayers(stream))
    at_once = KEPT_BYTES // (4 * len(subs) * len(lens.weight)) if reading.fast else 1
    for some in torch.arange(len(reading.answer)).split(max(1, at_once)):  # prompts
        found = zip(some.tolist(), *_bases(reading, subs, some), strict=True)
        chosen = [_chosen(reading, subs, top_k, *one) for one in found]
        increases = _increases(reading, subs, chosen)
        for one, increase in zip(chosen, increases, strict=True):
            for i in one.owner.unique().tolist():
                mask = one.owner == i
                scores = one.before[i], increase[mask.cpu()]
                yield _part(reading, subs[i], one.b, one.place[mask], one.neuron[mask], *scores)


@dataclass
class Chosen:
    """The neurons of prompt b that are scored: k of them, in the order of the sub-layers."""

    b: int
    owner: Tensor  # [k] the sub-layer of each
    place: Tensor  # [k] its source position
    neuron: Tensor  # [k]
    c: Tensor  # [k] its coefficient
    before: Tensor  # [2L] log p(answer) of each sub-layer's base, float64
    base: Tensor  # [2L, V] each base's distribution (frozen scale, no cap) or uncapped logits


def _bases(reading: Reading, subs: list[Sublayer], some: Tensor) -> tuple[Tensor, ...]:
    """Of the sub-layers' bases of n prompts: `before` and `base` of `Chosen`, [n, 2L] and [n, 2L,
    V], and the gradients of log p(w) in them, [n, 2L, D].

    A gradient is W_U^T (onehot(w) − p) read backwards through the frozen norm; where the scale
    moves, or logits are capped, autograd has it."""
    lens, fast, answer = reading.lens, reading.fast, reading.answer[some]
    scale = None if reading.frozen is None else reading.frozen[some, None]
    with torch.set_grad_enabled(not fast):
        bases = torch.stack([sub.base[some] for sub in subs], 1).requires_grad_(not fast)
        raw = lens.raw_logits(bases, scale)
        if not fast:
            score = lens.cap(raw).log_softmax(-1)[torch.arange(len(some)), :, answer].sum()
            (gradients,) = torch.autograd.grad(score, bases)
    raw = raw.detach()
    logits = lens.cap(raw)
    partition = torch.stack([_logsumexp(each) for each in logits])
    before = logits[torch.arange(len(some)), :, answer].double() - partition
    if fast:
        raw.sub_(partition.float()[..., None]).exp_()
        direction = lens.weight[answer][:, None] - raw @ lens.weight  # [n, 2L, D]
        return before, raw, lens.norm.adjoint(direction, scale)
    return before, raw - lens.offset, gradients


def _chosen(
    reading: Reading, subs: list[Sublayer], top_k: int, b: int, before, base, gradients
) -> Chosen:
    """By equation 6, from what `_bases` found of prompt b."""
    real = reading.stream.batch.attention_mask[b].bool()
    estimates, count = [], 0  # equation 6, per sub-layer [P, n]
    for sub, gradient in zip(subs, gradients, strict=True):
        sources = real if sub.kind == "attention" else real.new_ones(1)
        estimates.append(sub.coefficient[b] * (sub.vectors @ gradient))
        estimates[-1][~sources] = -torch.inf
        count += int(sources.sum()) * len(sub.vectors)
    flat = torch.cat([estimate.flatten() for estimate in estimates])
    chosen = flat.topk(min(top_k, count)).indices.sort().values  # [k]
    width = torch.tensor([len(sub.vectors) for sub in subs], device=flat.device)
    size = torch.tensor([estimate.numel() for estimate in estimates], device=flat.device)
    owner = torch.searchsorted(size.cumsum(0), chosen, right=True)  # sub-layer of each
    inside = chosen - (size.cumsum(0) - size)[owner]
    c = torch.cat([sub.coefficient[b].flatten() for sub in subs])[chosen]
    return Chosen(b, owner, inside // width[owner], inside % width[owner], c, before.cpu(), base)


def _increases(reading: Reading, subs: list[Sublayer], chosen: list[Chosen]) -> list[Tensor]:
    """What each chosen neuron adds, [k] float64 per prompt. A neuron's direction is computed once
    for all prompts and source positions at which it was chosen."""
    starts = np.cumsum([0, *(len(sub.vectors) for sub in subs)])
    firsts = torch.tensor(starts[:-1], device=reading.answer.device)
    numbers = torch.cat([firsts[one.owner] + one.neuron for one in chosen])  # among all neurons
    unique, which = numbers.unique(return_inverse=True)
    owner = torch.searchsorted(firsts, unique, right=True) - 1
    vectors = torch.cat(
        [sub.vectors[(unique - starts[i])[owner == i]] for i, sub in enumerate(subs)]
    )
    increases = [torch.empty(len(one.owner), dtype=torch.float64) for one in chosen]
    uses = which.split([len(one.owner) for one in chosen])
    for first in range(0, len(unique), CHUNK):
        directions = reading.lens.directions(vectors[first : first + CHUNK])  # [chunk, V]
        for one, mine, increase in zip(chosen, uses, increases, strict=True):
            rows = ((mine >= first) & (mine < first + CHUNK)).nonzero()[:, 0]
            for some in rows.split(SOFTMAXES) if len(rows) else ():
                added = vectors[mine[some]], directions[mine[some] - first]
                increase[some.cpu()] = _increase(reading, subs, one, some, *added)
    return increases


def _increase(
    reading: Reading, subs: list[Sublayer], one: Chosen, rows: Tensor, vectors, directions
) -> Tensor:
    """Equation 3 for some of the chosen neurons of a prompt; their directions are overwritten."""
    lens, b, owner, c = reading.lens, one.b, one.owner[rows], one.c[rows]
    states, answer = torch.stack([subs[i].base[b] for i in owner.tolist()]), reading.answer[b]
    before = one.before[owner.cpu()]
    if not reading.fast:
        p, q = _factors(lens, states, vectors, c, reading.scale(b))
        return _after(lens, p * one.base[owner], q, directions, answer) - before
    directions *= (c * reading.scale(b))[:, None]
    gain = directions[:, answer].double()
    change = torch.stack(
        [torch.dot(d, one.base[i]) for d, i in zip(directions.expm1_(), owner, strict=True)]
    )
    gain, sure = (gain - change.double().log1p()).cpu(), (change > -0.9) & (change < 1e4)
    if not sure.all():  # digits are lost
        states = states[~sure] + c[~sure, None] * vectors[~sure]
        sure = sure.cpu()
        gain[~sure] = reading.log_prob(states, b).cpu() - before[~sure]
    return gain


def _part(reading: Reading, sub: Sublayer, b: int, place, neuron, before, increase) -> dict:
    """Some neurons of prompt b. place: index into the P source positions."""
    batch, head = reading.stream.batch, -1
    position = batch.lengths[b] - 1
    if sub.kind == "attention":
        position = place - batch.start[b].to(place.device)
        head, neuron = neuron // sub.head_dim, neuron % sub.head_dim
    where = {"prompt": b, "layer": sub.layer, "kind": sub.kind, "head": head, "neuron": neuron}
    return {**where, "position": position, "before": before, "increase": increase}


def _factors(lens: Lens, base: Tensor, vectors: Tensor, c: Tensor, frozen: Tensor | None):
    """s'/s and c·s' of equation 5: base [D] or [k, D], vectors [k, D], c [k] -> two [k, 1]."""
    if frozen is not None:
        return torch.ones_like(c)[:, None], (c * frozen)[:, None]
    norm, scale = lens.norm, lens.scale(base)[..., 0]
    base, vectors = norm.centre(base), norm.centre(vectors)
    change = 2 * c * (vectors * base).mean(-1) + c**2 * vectors.pow(2).mean(-1)
    after = torch.rsqrt(base.pow(2).mean(-1) + change + norm.eps)
    return (after / scale)[:, None], (c * after)[:, None]


def _after(lens: Lens, raw: Tensor, q: Tensor, directions: Tensor, answer: Tensor) -> Tensor:
    """The answer's log-probability after some neurons: raw [k, V], which is (s'/s) z -> [k]."""
    logits = lens.cap(torch.addcmul(raw + lens.offset, q, directions))
    return (logits[:, answer].double() - _logsumexp(logits)).cpu()


def _by_moments(directions: Tensor, c: Tensor, base: Tensor, answer: Tensor):
    """Importances from the moments of each direction, and whether their error is certified.

    With X the direction's entry at a random token of the base distribution and Y = X − E X,
    log p(answer) rises by c (X_answer − E X) − log E exp(cY). The expectation is expanded to c⁴;
    since E Y = 0 it is at least 1, so the error is at most
    |c|⁵ max|Y| E Y⁴ exp(|c| max|Y|) / 120.

    directions: [n, V]; c: [B, P, n] with the scale, float64; base: [B, V] -> two [B, P, n].
    """
    p = base.T  # [V, B]
    shifted = directions - (directions @ p).mean(1, keepdim=True)  # keeps the powers small
    low, high = shifted.amin(1), shifted.amax(1)  # [n]
    power, raw = shifted.clone(), []
    for _ in range(4):
        raw.append((power @ p).T.double()[:, None])  # [B, 1, n]
        power *= shifted
    r1, r2, r3, r4 = raw
    m2 = (r2 - r1**2).clamp(min=0)
    m3 = r3 - 3 * r1 * r2 + 2 * r1**3
    m4 = (r4 - 4 * r1 * r3 + 6 * r1**2 * r2 - 3 * r1**4).clamp(min=0)
    widest = torch.maximum(high - r1, r1 - low)
    expectation = 1 + c**2 * m2 / 2 + c**3 * m3 / 6 + c**4 * m4 / 24
    bound = c.abs() ** 5 * widest * m4 * (c.abs() * widest).exp() / 120
    gain = c * (shifted.T[answer].double()[:, None] - r1) - expectation.clamp(min=1e-30).log()
    return gain.cpu(), (bound <= CERTIFIED).cpu()


def _logsumexp(logits: Tensor) -> Tensor:
    """log Σ exp over the last axis in float64: [..., V] -> [...]. The exponentials stay in fp32."""
    top = logits.amax(-1, keepdim=True)
    return (logits - top).exp_().sum(-1).double().log() + top[..., 0].double()
