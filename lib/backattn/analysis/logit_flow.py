"""Logit flow: which layers, heads and neurons raise the answer's log-probability.

At the last position of a prompt, with embedding h_0, attention outputs a_l and FFN outputs f_l:

(1) The state is a running sum: h_{l+1} = h_l + a_l + f_l, up to h_L.
(2) The lens reads any part x of it: log p(w | x) = log softmax(W_U (γ ⊙ s·x))_w, with the
    unembedding W_U, the final norm's weight γ and its scale s at h_L (norm="final": parts add up
    in the logits) or at x itself (norm="own": the logit lens); biases and soft caps included.
(3) The importance of a part v whose sub-layer had the residual input b (its base: h_l for
    attention, h_l + a_l for the FFN) is log p(w | b + v) − log p(w | b).
(4) Importances of whole sub-layers telescope: together with log p(w | 0) they add up to
    log p(w | h_L), the model's own. Those of smaller parts do not add up to their sub-layer's.

A part of a_l is a head at a source position, or a neuron of it: a value channel times its attention
weight times a column of W_O. A part of f_l is a neuron: a coefficient times a column of W_down.

`_layers` is the definition; `neuron_scores` is (3) for hundreds of thousands of neurons;
`flow_back` goes on from the neurons at the last position to what switched them on.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from backattn.analysis.neuron_scores import (
    Reading,
    Sublayer,
    every,
    exact,
    heads,
    linear,
    screened,
    sublayers,
)
from backattn.models.activations import Stream, capture
from backattn.models.hooks import analysis
from backattn.models.next_token import next_log_probs
from backattn.models.tokens import Batch, answer_ids, encode, padded
from backattn.runtime import progress

KINDS = ("embedding", "attention", "attention_bias", "ffn", "ffn_bias", "rounding")
LEVELS, NORMS, METHODS = (
    ("layer", "head", "neuron"),
    ("final", "own"),
    ("exact", "screen", "linear"),
)
BATCH = 16
HEADS_BATCH = 64  # heads of all prompts of a batch share what costs most
KEEP_BYTES = 2**29  # a flow keeps its forward passes for `flow_back` where they take no more


def _layers(reading: Reading) -> Iterator[dict]:
    """The definition, equation by equation, for whole sub-layers."""
    stream, at_last = reading.stream, reading.stream.batch.at_last
    terms = stream.hidden, stream.attention, stream.ffn
    h, a, f = ([at_last(x) for x in term] for term in terms)  # of each layer [B, D]

    # (1) Running sums, not the captured states: a term that is wrong in any layer spoils the end.
    sums = [(0, "embedding", h[0])]
    for layer in range(len(a)):
        sums.append((layer, "attention", sums[-1][2] + a[layer]))
        sums.append((layer, "ffn", sums[-1][2] + f[layer]))
        if stream.arch.model.dtype != torch.float32:
            sums.append((layer, "rounding", h[layer + 1]))

    states = torch.stack([torch.zeros_like(h[0]), *(state for *_, state in sums)])
    before, *read = (x for part in states.split(8) for x in reading.log_prob(part))  # (2), [B] each
    for (layer, kind, _), after in zip(sums, read, strict=True):
        yield {"layer": layer, "kind": kind, "before": before, "increase": after - before}  # (3)
        before = after  # (4) the sum so far is the next term's base


def _heads(reading: Reading, layers: list[dict]) -> Iterator[dict]:
    """Equation 3 for each head × source position, and for each FFN as one part."""
    yield from (part for part in layers if part["kind"] == "ffn")
    for sub in sublayers(reading.stream):
        if sub.kind == "attention":
            before, increase = heads(reading, sub)
            yield from _at_sources(reading, sub, before, increase)


def _at_sources(reading: Reading, sub: Sublayer, before, increase: Tensor) -> Iterator[dict]:
    """Heads of an attention, prompt by prompt. before: [B], increase: [B, H, T]."""
    for b, real in enumerate(reading.stream.batch.attention_mask.bool()):
        mine = increase[b][:, real]  # [H, sources]
        head, position = (np.arange(n) for n in mine.shape)
        where = {"prompt": b, "layer": sub.layer, "head": head[:, None], "position": position}
        yield {**where, "kind": "attention", "before": before[b], "increase": mine}


def _linear_layers(reading: Reading) -> Iterator[dict]:
    """Shares of whole sub-layers in the answer's logit: linear, so that they need no base."""
    stream, at_last = reading.stream, reading.stream.batch.at_last
    nan = torch.full(reading.answer.shape, torch.nan)
    terms = [(0, "embedding", stream.hidden[0])]
    for layer, pair in enumerate(zip(stream.attention, stream.ffn, strict=True)):
        terms += zip((layer, layer), ("attention", "ffn"), pair, strict=True)
        if stream.arch.model.dtype != torch.float32:
            rounding = stream.hidden[layer + 1] - stream.hidden[layer] - sum(pair)
            terms.append((layer, "rounding", rounding))
    for layer, kind, x in terms:
        yield {"layer": layer, "kind": kind, "before": nan, "increase": reading.logit(at_last(x))}


def _linear_parts(reading: Reading, level: str, layers: list[dict]) -> Iterator[dict]:
    """Shares of heads or neurons in the answer's logit."""
    nan = torch.full(reading.answer.shape, torch.nan)
    if level == "head":
        yield from (part for part in layers if part["kind"] == "ffn")
    for sub in sublayers(reading.stream):
        if level == "neuron":
            yield from every(reading, sub, nan, linear(reading, sub).double())
            if sub.bias is not None:
                share = reading.logit(sub.bias.expand_as(sub.base))
                kind = f"{sub.kind}_bias"
                yield {"layer": sub.layer, "kind": kind, "before": nan, "increase": share}
        elif sub.kind == "attention":
            share = linear(reading, sub).unflatten(-1, (-1, sub.head_dim)).sum(-1)  # [B, T, H]
            yield from _at_sources(reading, sub, nan, share.transpose(1, 2).double())


def _neurons(reading: Reading, method: str, top_k: int) -> Iterator[dict]:
    """Equation 3 for neurons, and for the biases of sub-layers, which are no neuron's."""
    yield from exact(reading) if method == "exact" else screened(reading, top_k)
    for sub in sublayers(reading.stream):
        if sub.bias is not None:
            yield _part(reading, sub, f"{sub.kind}_bias", sub.bias)


def _part(reading: Reading, sub: Sublayer, kind: str, part: Tensor) -> dict:
    """Equation 3 for one part [B, D] of a sub-layer at the last position."""
    before, after = reading.log_prob(sub.base), reading.log_prob(sub.base + part)
    return {"layer": sub.layer, "kind": kind, "before": before, "increase": after - before}


def _frame(parts: Iterable[dict], batch: Batch, first: int, tokenizer) -> pd.DataFrame:
    """A batch's parts in the order of the residual sum; first: the index of its first prompt. A
    part may leave out: every prompt, its last position, no head, no neuron."""
    rows, lengths = batch.rows, batch.lengths.cpu().numpy()
    usual = {"prompt": np.arange(len(rows)), "position": lengths - 1, "head": -1, "neuron": -1}
    names = ("prompt", "layer", "kind", "head", "neuron", "position", "before", "increase")
    columns = {name: [] for name in names}
    for part in parts:
        part = {**usual, **part, "kind": KINDS.index(part["kind"])}
        for name, found in columns.items():
            x = part[name].cpu() if isinstance(part[name], Tensor) else part[name]
            found.append(np.broadcast_to(x, tuple(part["increase"].shape)).ravel())
    x = {name: np.concatenate(columns.pop(name)) for name in names}
    order = np.lexsort([x[name] for name in reversed(names[:6])])
    x = {name: column[order] for name, column in x.items()}
    token = np.array([tokenizer.decode([i]) for row in rows for i in row], dtype=object)
    start = lengths.cumsum() - lengths  # each prompt's first token among all
    before, increase = x["before"].astype(np.float64), x["increase"].astype(np.float64)
    return pd.DataFrame(
        {
            "prompt": (x["prompt"] + first).astype(np.int32),
            "layer": x["layer"].astype(np.int16),
            "kind": pd.Categorical.from_codes(x["kind"], KINDS),
            "head": pd.arrays.IntegerArray(x["head"].astype(np.int16), x["head"] < 0),
            "neuron": pd.arrays.IntegerArray(x["neuron"].astype(np.int32), x["neuron"] < 0),
            "position": x["position"].astype(np.int32),
            "token": token[start[x["prompt"]] + x["position"]],
            "log_prob_before": before,
            "log_prob_after": before + increase,
            "increase": increase,
        }
    )


@dataclass
class LogitFlow:
    """Result of `logit_flow`.

    Attributes:
        frame: one row per component: prompt, layer, kind, head, neuron, position, token,
            log_prob_before, log_prob_after, increase (nats). `position` is the source position of
            an attention component and the last position of everything else; head and neuron are NA
            where they do not apply.
        layers: the layer-level rows, whatever the level.
        log_prob: the model's own log-probability of each answer, [prompts].
        total: what the layer scores add up to, [prompts]: log_prob or, for method="linear", the
            answer's uncapped logit without the lens's offset.
        streams: forward passes kept for `flow_back`, without what it makes again from the states;
            none where they would take more than KEEP_BYTES, or at level "layer".
    """

    model: nn.Module = field(repr=False)
    prompts: list[str]
    level: str
    tolerance: float
    input_ids: list[list[int]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)
    log_prob: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    total: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)
    streams: list[Stream] = field(default_factory=list, repr=False)

    def check(self) -> float:
        """How far log p(w | 0) + Σ layer importances is from the model's log-probability, at most.

        Raises ValueError where that exceeds the tolerance of the dtype, and where the model as it
        is, without hooks, gives an answer another log-probability.
        """
        grouped = self.layers.groupby("prompt", sort=True)
        total = grouped["log_prob_before"].first().fillna(0) + grouped["increase"].sum()
        errors = np.abs(total.to_numpy() - self.total)
        worst = int(np.nanargmax(np.where(np.isnan(errors), np.inf, errors)))
        if not errors[worst] <= self.tolerance:
            raise ValueError(
                f"The layer scores of prompt {worst} ({self.prompts[worst]!r}) miss the model's "
                f"log-probability (linear: its logit) by {errors[worst]:.2e} nats "
                f"(allowed {self.tolerance:.0e})."
            )
        for start in range(0, len(self.prompts), BATCH):
            part = slice(start, start + BATCH)
            batch = padded(self.input_ids[part], device=self.model.device)
            log_probs = next_log_probs(self.model, batch, share=True).cpu().numpy()
            plain = log_probs[range(len(log_probs)), self.answer_ids[part]]
            miss = np.abs(plain - self.log_prob[part]).max()
            if not miss <= 10 * self.tolerance:
                raise ValueError(
                    f"The model by itself gives an answer a log-probability that is {miss:.2e} "
                    "nats off the one scored: it was changed since, or hooks change its passes."
                )
        return float(errors[worst])


@analysis
def logit_flow(
    model,
    tokenizer,
    prompts: str | Sequence[str],
    answers: str | Sequence[str] | Sequence[int] | Tensor | None = None,
    level: str = "neuron",
    norm: str = "final",
    method: str = "screen",
    top_k: int = 300,
    batch_size: int | None = None,
) -> LogitFlow:
    """Importance of every layer, head or neuron for the answer at the last position.

    Args:
        answers: one per prompt: words, scored on the first token of " answer", or token ids. None
            takes the model's own next token.
        level: "layer" (embedding, attention and FFN of each layer), "head" (each head × source
            position) or "neuron" (each FFN neuron, each attention channel × source position).
        norm: "final" freezes the final norm's scale of the full pass (logit flow); "own" recomputes
            it (logit lens).
        method: for neurons, "exact" scores all; "screen" scores all to first order and exactly the
            `top_k` with the largest first-order increase, and returns those. "linear", at every
            level, is direct logit attribution: `increase` is the component's share of the answer's
            raw (uncapped) logit at the frozen final scale. It needs no base and no softmax, so
            log_prob_before and log_prob_after are NaN; needs norm="final".
        batch_size: prompts at once; None: 16, or 64 for heads.

    Returns a `LogitFlow`; call `.check()` to see that the layer scores telescope.

    Raises ValueError for an empty batch or prompt, an unusable answer or an unknown option, and
    UnsupportedModelError where the weights that are read are not what the model computes with, or
    its parts do not add up (proved on each forward pass; see `capture`).

    Example:
        >>> from backattn import logit_flow
        >>> flow = logit_flow(model, tokenizer, "France's capital is", "Paris", top_k=5)
        >>> flow.check() < 1e-4, len(flow.frame.dropna(subset="neuron"))
        (True, 5)
    """
    choices = (("level", level, LEVELS), ("norm", norm, NORMS), ("method", method, METHODS))
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if method == "linear" and norm != "final":
        raise ValueError('method="linear" adds up only at a frozen scale: use norm="final".')
    if batch_size is None:
        batch_size = HEADS_BATCH if level == "head" else BATCH
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    prompts, ids = _checked(tokenizer, prompts, answers)
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    flow = LogitFlow(model, prompts, level, tolerance)
    taken, kept, layers, parts = 0, [], [], []
    starts = range(0, len(prompts), batch_size)
    for start in progress(starts, "logit flow", unit="batch") if len(starts) > 1 else starts:
        part = slice(start, start + batch_size)
        batch = encode(tokenizer, prompts[part], device=model.device)
        reading = Reading(capture(model, batch, level != "layer"), norm, ids and ids[part])
        whole = list(_linear_layers(reading) if method == "linear" else _layers(reading))
        layers.append(_frame(whole, batch, start, tokenizer))
        if level != "layer":
            if method == "linear":
                found = _linear_parts(reading, level, whole)
            elif level == "head":
                found = _heads(reading, whole)
            else:
                found = _neurons(reading, method, top_k)
            parts.append(_frame(found, batch, start, tokenizer))
        logs = reading.stream.logits.log_softmax(-1).gather(1, reading.answer[:, None])[:, 0]
        flow.log_prob = np.append(flow.log_prob, logs.cpu().numpy())
        total = logs
        if method == "linear":
            lens, end = reading.lens, batch.at_last(reading.stream.hidden[-1])
            total = (lens.raw_logits(end) - lens.offset).gather(1, reading.answer[:, None])[:, 0]
        flow.total = np.append(flow.total, total.cpu().numpy())
        flow.input_ids += batch.rows
        flow.answer_ids += reading.answer.tolist()
        slim = replace(reading.stream, values=(), neurons=())
        tensors = slim.logits, slim.hidden, slim.attention, slim.ffn, *slim.weights
        taken += sum(x.nbytes for x in tensors)
        fits = taken * len(prompts) <= KEEP_BYTES * len(flow.input_ids)  # all, if they go on so
        kept = [*kept, slim] if level != "layer" and fits and kept is not None else None
        del reading, slim, tensors  # before the next batch needs its memory
    flow.streams = kept or []
    flow.answers = [tokenizer.decode([i]) for i in flow.answer_ids]
    flow.layers, flow.frame = (
        pd.concat(tables, ignore_index=True).astype({"token": "category"})
        for tables in (layers, parts or layers)
    )
    return flow


def _checked(tokenizer, prompts, answers) -> tuple[list[str], list[int] | None]:
    """Prompts as a list and answers as ids: all input errors before any work."""
    if not isinstance(prompts, str | Iterable):
        raise ValueError(f"prompts is {prompts!r}; give one string or several.")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    encode(tokenizer, prompts)
    if answers is None:
        return prompts, None
    if any(prompt[-1].isspace() for prompt in prompts):
        message = "A prompt ends with a space, and answers begin with one: drop the prompt's."
        warnings.warn(message, stacklevel=4)
    return prompts, answer_ids(tokenizer, answers, len(prompts))
