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

`_layer_rows` is the definition; `neuron_scores` is (3) for hundreds of thousands of neurons;
`flow_back` goes on from the neurons at the last position to what switched them on.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backattn.analysis.components import Reading, frame, rows
from backattn.analysis.kept_streams import KeptStreams
from backattn.analysis.neuron_scores import exact_rows, screened_rows, sublayers
from backattn.models.activations import Stream, capture, head_contributions, self_check
from backattn.models.lens import Lens
from backattn.models.tokens import answer_ids, encode
from backattn.runtime import progress

LEVELS, NORMS, METHODS = ("layer", "head", "neuron"), ("final", "own"), ("exact", "screen")

CHUNK = 256  # states whose logits are in memory at once


def _layer_rows(reading: Reading) -> list[dict]:
    """The definition, equation by equation, for whole sub-layers."""
    stream, lens, answer = reading.stream, reading.lens, reading.answer
    h, a, f = _last_states(stream)  # [L+1, B, D], [L, B, D], [L, B, D]

    # (1) Running sums, not the captured states: a term that is wrong in any layer spoils the end.
    sums = [(0, "embedding", h[0])]
    for layer in range(stream.layers):
        sums.append((layer, "attention", sums[-1][2] + a[layer]))
        sums.append((layer, "ffn", sums[-1][2] + f[layer]))
        if stream.arch.model.dtype != torch.float32:
            sums.append((layer, "rounding", h[layer + 1]))

    found = []
    before = lens.cap(lens.offset).log_softmax(-1)[answer].double()  # of an empty state
    for layer, kind, state in sums:
        log_probs = lens.log_probs(state, reading.frozen)  # (2) [B, V]
        after = log_probs.gather(1, answer[:, None])[:, 0].double()
        found.append(_at_last(reading, layer, kind, before, after - before))  # (3)
        before = after  # (4) the sum so far is the next term's base
    return found


def _part_rows(reading: Reading, layer: int, kind: str, base: Tensor, part: Tensor) -> dict:
    """Equation 3 for one part [B, D] of the last position and its base [B, D]."""
    before = _log_prob(reading, base)
    return _at_last(reading, layer, kind, before, _log_prob(reading, base + part) - before)


def _head_rows(reading: Reading) -> list[dict]:
    """Equation 3 for each head × source position, and for each FFN as one part."""
    (h, a, f), lens, found = _last_states(reading.stream), reading.lens, []
    for layer in range(reading.stream.layers):
        parts = head_contributions(reading.stream, layer)  # [B, H, T, D]
        before = _log_prob(reading, h[layer])
        for b, real in enumerate(reading.stream.batch.attention_mask.bool()):
            states = h[layer, b] + parts[b, :, real]  # [H, sources, D]
            chunks, scale = states.flatten(0, 1).split(CHUNK), reading.scale(b)
            after = torch.cat([lens.log_probs(x, scale)[:, reading.answer[b]] for x in chunks])
            increase = (after - before[b]).unflatten(0, states.shape[:2])
            head, position = np.arange(len(states))[:, None], np.arange(states.shape[1])
            where = {"layer": layer, "head": head, "position": position, "before": before[b]}
            found.append(rows(increase, "attention", prompt=reading.first + b, **where))
        found.append(_part_rows(reading, layer, "ffn", h[layer] + a[layer], f[layer]))
    return found


def _neuron_rows(reading: Reading, method: str, top_k: int) -> list[dict]:
    """Equation 3 for neurons, and for the biases of sub-layers, which are no neuron's."""
    found = exact_rows(reading) if method == "exact" else screened_rows(reading, top_k)
    for sub in sublayers(reading.stream):
        if sub.bias is not None:
            found.append(_part_rows(reading, sub.layer, f"{sub.kind}_bias", sub.base, sub.bias))
    return found


def _log_prob(reading: Reading, state: Tensor) -> Tensor:
    """Equation 2: log p(answer | state), [B, D] -> [B]."""
    log_probs = reading.lens.log_probs(state, reading.frozen)
    return log_probs.gather(1, reading.answer[:, None])[:, 0]


def _last_states(stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """h, a and f at each prompt's last position: [L+1, B, D], [L, B, D], [L, B, D]."""
    parts = stream.hidden, stream.attention, stream.ffn
    return tuple(torch.stack([stream.batch.at_last(x) for x in part]) for part in parts)


def _at_last(reading: Reading, layer: int, kind: str, before: Tensor, increase: Tensor) -> dict:
    """Rows of one part per prompt at the last position."""
    prompt, position = reading.first + np.arange(len(before)), reading.stream.batch.lengths - 1
    where = {"prompt": prompt, "position": position}
    return rows(increase, kind, layer=layer, before=before, **where)


@dataclass
class LogitFlow:
    """Result of `logit_flow`.

    frame: one row per component: prompt, layer, kind, head, neuron, position, token,
        log_prob_before, log_prob_after, increase (nats). `position` is the source position of an
        attention component and the last position of everything else; head and neuron are NA where
        they do not apply.
    layers: the layer-level rows, whatever the level.
    log_prob: the model's own log-probability of each answer, [prompts].
    streams: forward passes kept for `flow_back`, see `keep_bytes` of `logit_flow`.
    """

    frame: pd.DataFrame
    layers: pd.DataFrame
    prompts: list[str]
    answers: list[str]
    answer_ids: list[int]
    log_prob: np.ndarray
    level: str
    norm: str
    method: str
    tolerance: float
    streams: KeptStreams = field(repr=False)

    def errors(self) -> np.ndarray:
        """|log p(w | 0) + sum of layer importances − the model's log-probability| per prompt."""
        grouped = self.layers.groupby("prompt", sort=True)
        total = grouped["log_prob_before"].first() + grouped["increase"].sum()
        return np.abs(total.to_numpy() - self.log_prob)

    def check(self) -> float:
        """Largest of `errors`; raises ValueError above the tolerance of the model's dtype."""
        errors = self.errors()
        worst = int(np.nanargmax(np.where(np.isnan(errors), np.inf, errors)))
        if not errors[worst] <= self.tolerance:
            raise ValueError(
                f"The layer scores of prompt {worst} ({self.prompts[worst]!r}) miss the model's "
                f"log-probability by {errors[worst]:.2e} nats (allowed {self.tolerance:.0e})."
            )
        return float(errors[worst])


def logit_flow(
    model,
    tokenizer,
    prompts: str | Sequence[str],
    answers: str | Sequence[str] | Sequence[int] | Tensor | None = None,
    level: str = "neuron",
    norm: str = "final",
    method: str = "screen",
    top_k: int = 300,
    batch_size: int = 16,
    keep_bytes: int = 2**30,
) -> LogitFlow:
    """Importance of every layer, head or neuron for the answer at the last position.

    Args:
        model, tokenizer: a Hugging Face decoder (see `backattn.models.families`), its tokenizer.
        prompts: one prompt or several.
        answers: one per prompt: words, scored on the first token of " answer", or token ids. None
            takes the model's own next token.
        level: "layer" (embedding, attention and FFN of each layer), "head" (each head × source
            position) or "neuron" (each FFN neuron, each attention channel × source position).
        norm: "final" freezes the final norm's scale of the full pass (logit flow); "own" recomputes
            it (logit lens).
        method: for neurons, "exact" scores all; "screen" scores all to first order and exactly the
            `top_k` with the largest first-order increase, and returns those.
        top_k: neurons returned per prompt by "screen".
        batch_size: prompts per forward pass.
        keep_bytes: the result keeps its forward passes for `flow_back` if no batch takes more than
            its share of this memory; 0 keeps none. Level "layer" records too little to keep.

    Returns a `LogitFlow`; call `.check()` to see that the layer scores telescope.

    Raises ValueError for an empty batch or prompt, an unusable answer or an unknown option, and
    UnsupportedModelError for a model whose parts do not add up (see `activations.self_check`).

    Example:
        >>> from backattn import load_model, logit_flow
        >>> model, tokenizer = load_model("tiny-llama")
        >>> flow = logit_flow(model, tokenizer, "France's capital is", "Paris", top_k=5)
        >>> flow.check() < 1e-4
        True
        >>> len(flow.frame.dropna(subset="neuron"))
        5
    """
    _check_options(level, norm, method, top_k=top_k, batch_size=batch_size)
    if not isinstance(prompts, str | Iterable):
        raise ValueError(f"prompts is {prompts!r}; give one string or several.")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    encode(tokenizer, prompts)  # all input errors before any work
    ids = answers.tolist() if isinstance(answers, Tensor) else answers
    if ids is not None and list(map(type, ids)) != [int] * len(prompts):
        ids = answer_ids(tokenizer, ids, len(prompts))
    if ids is not None and any(prompt[-1].isspace() for prompt in prompts):
        message = "A prompt ends with a space, and answers begin with one: drop the prompt's."
        warnings.warn(message, stacklevel=2)
    self_check(model)

    layer_rows, part_rows, tokens, log_prob, chosen = [], [], [], [], []
    starts = range(0, len(prompts), batch_size)
    kept = KeptStreams(0 if level == "layer" else keep_bytes / len(starts))
    for start in progress(starts, "logit flow", unit="batch") if len(starts) > 1 else starts:
        batch = encode(tokenizer, prompts[start : start + batch_size], device=model.device)
        stream = capture(model, batch, detail=level != "layer")
        answer = stream.logits.argmax(-1)
        if ids is not None:
            answer = torch.tensor(ids[start : start + batch_size], device=model.device)
        lens, h_end = Lens(stream.arch), batch.at_last(stream.hidden[-1])
        frozen = lens.scale(h_end) if norm == "final" else None
        reading = Reading(stream, lens, answer, frozen, start)
        layer_rows += _layer_rows(reading)
        if level == "head":
            part_rows += _head_rows(reading)
        elif level == "neuron":
            part_rows += _neuron_rows(reading, method, top_k)
        for row, real in zip(batch.input_ids, batch.attention_mask.bool(), strict=True):
            tokens.append([tokenizer.decode([i]) for i in row[real].tolist()])
        logs = stream.logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
        log_prob.append(logs.cpu().numpy())
        chosen += answer.tolist()
        kept.add(stream)
    return LogitFlow(
        frame=frame(part_rows or layer_rows, tokens),
        layers=frame(layer_rows, tokens),
        prompts=prompts,
        answers=[tokenizer.decode([i]) for i in chosen],
        answer_ids=chosen,
        log_prob=np.concatenate(log_prob),
        level=level,
        norm=norm,
        method=method,
        tolerance=1e-4 if model.dtype == torch.float32 else 0.1,
        streams=kept,
    )


def _check_options(level: str, norm: str, method: str, **counts: int) -> None:
    choices = (("level", level, LEVELS), ("norm", norm, NORMS), ("method", method, METHODS))
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
