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

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from backattn.analysis.neuron_scores import Reading, exact, screened, sublayers
from backattn.models.activations import Stream, capture, head_contributions, self_check
from backattn.models.tokens import answer_ids, encode
from backattn.runtime import progress

KINDS = ("embedding", "attention", "attention_bias", "ffn", "ffn_bias", "rounding")
OPTIONS = {
    "level": ("layer", "head", "neuron"),
    "norm": ("final", "own"),
    "method": ("exact", "screen"),
}
CHUNK = 256  # states whose logits are in memory at once
KEEP_BYTES = 2**30  # a flow keeps its forward passes for `flow_back` where they take no more


def _layers(reading: Reading) -> Iterator[dict]:
    """The definition, equation by equation, for whole sub-layers."""
    h, a, f = _last_states(reading.stream)  # [L+1, B, D], [L, B, D], [L, B, D]

    # (1) Running sums, not the captured states: a term that is wrong in any layer spoils the end.
    sums = [(0, "embedding", h[0])]
    for layer in range(len(a)):
        sums.append((layer, "attention", sums[-1][2] + a[layer]))
        sums.append((layer, "ffn", sums[-1][2] + f[layer]))
        if reading.stream.arch.model.dtype != torch.float32:
            sums.append((layer, "rounding", h[layer + 1]))

    before = reading.log_prob(torch.zeros_like(h[0]))  # (2) of an empty state: [B]
    for layer, kind, state in sums:
        after = reading.log_prob(state)  # (2)
        yield {"layer": layer, "kind": kind, "before": before, "increase": after - before}  # (3)
        before = after  # (4) the sum so far is the next term's base


def _heads(reading: Reading) -> Iterator[dict]:
    """Equation 3 for each head × source position, and for each FFN as one part."""
    h, a, f = _last_states(reading.stream)
    for layer in range(len(a)):
        parts = head_contributions(reading.stream, layer)  # [B, H, T, D]
        before = reading.log_prob(h[layer])
        for b, real in enumerate(reading.stream.batch.attention_mask.bool()):
            states = h[layer, b] + parts[b, :, real]  # [H, sources, D]
            chunks = states.flatten(0, 1).split(CHUNK)
            after = torch.cat([reading.log_prob(chunk, b) for chunk in chunks])
            yield {
                "prompt": b,
                "layer": layer,
                "kind": "attention",
                "head": torch.arange(len(states))[:, None],
                "position": torch.arange(states.shape[1]),
                "before": before[b],
                "increase": after.unflatten(0, states.shape[:2]) - before[b],
            }
        yield _part(reading, layer, "ffn", h[layer] + a[layer], f[layer])


def _neurons(reading: Reading, method: str, top_k: int) -> Iterator[dict]:
    """Equation 3 for neurons, and for the biases of sub-layers, which are no neuron's."""
    yield from exact(reading) if method == "exact" else screened(reading, top_k)
    for sub in sublayers(reading.stream):
        if sub.bias is not None:
            yield _part(reading, sub.layer, f"{sub.kind}_bias", sub.base, sub.bias)


def _part(reading: Reading, layer: int, kind: str, base: Tensor, part: Tensor) -> dict:
    """Equation 3 for one part [B, D] of the last position and its base [B, D]."""
    before = reading.log_prob(base)
    increase = reading.log_prob(base + part) - before
    return {"layer": layer, "kind": kind, "before": before, "increase": increase}


def _last_states(stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """h, a and f at each prompt's last position: [L+1, B, D], [L, B, D], [L, B, D]."""
    parts = stream.hidden, stream.attention, stream.ffn
    return tuple(torch.stack([stream.batch.at_last(x) for x in part]) for part in parts)


def _frame(parts: Iterable[dict], lengths: np.ndarray, tokens: list[list[str]]) -> pd.DataFrame:
    """A batch's parts in the order of the residual sum. Left out: every prompt, its last position,
    no head, no neuron. Each entry of a part is broadcast against its increase."""
    names = ("prompt", "layer", "kind", "head", "neuron", "position", "before", "increase")
    columns = {name: [] for name in names}
    usual = {"prompt": np.arange(len(lengths)), "position": lengths - 1, "head": -1, "neuron": -1}
    for part in parts:
        part = {**usual, **part, "kind": KINDS.index(part["kind"])}
        for name, found in columns.items():
            x = part[name]
            x = np.asarray(x.cpu() if isinstance(x, Tensor) else x)
            found.append(np.broadcast_to(x, tuple(part["increase"].shape)).ravel())
    joined = {name: np.concatenate(found) for name, found in columns.items()}
    order = np.lexsort([joined[name] for name in reversed(names[:6])])
    prompt, layer, kind, head, neuron, position, before, increase = (
        joined[name][order] for name in names
    )
    token = np.array([text for row in tokens for text in row], dtype=object)
    first = lengths.cumsum() - lengths  # each prompt's first token among all
    return pd.DataFrame(
        {
            "prompt": prompt.astype(np.int32),
            "layer": layer.astype(np.int16),
            "kind": pd.Categorical.from_codes(kind, KINDS),
            "head": pd.arrays.IntegerArray(head.astype(np.int16), head < 0),
            "neuron": pd.arrays.IntegerArray(neuron.astype(np.int32), neuron < 0),
            "position": position.astype(np.int32),
            "token": token[first[prompt] + position],
            "log_prob_before": before.astype(np.float64),
            "log_prob_after": before + increase.astype(np.float64),
            "increase": increase.astype(np.float64),
        }
    )


def fingerprint(model: nn.Module) -> str:
    """Hash of the sums of all weights' bits by column and by row, in which the change of any entry
    shows. It reads every weight twice, which is quicker by far than a forward pass.

    Example:
        >>> fingerprint(model) == fingerprint(model)
        True
    """
    digest, integers = hashlib.sha256(), {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    for weight in model.parameters():
        bits = weight.detach().view(integers.get(weight.element_size(), torch.int64))
        for dim in () if bits.is_meta else (0, -1):
            digest.update(bits.sum(dim, dtype=torch.int32).cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class LogitFlow:
    """Result of `logit_flow`.

    frame: one row per component: prompt, layer, kind, head, neuron, position, token,
        log_prob_before, log_prob_after, increase (nats). `position` is the source position of an
        attention component and the last position of everything else; head and neuron are NA where
        they do not apply.
    layers: the layer-level rows, whatever the level.
    log_prob: the model's own log-probability of each answer, [prompts].
    streams: forward passes kept for `flow_back`, without what it makes again from the states; none
        where they would take more than KEEP_BYTES, or at level "layer".
    """

    frame: pd.DataFrame
    layers: pd.DataFrame
    prompts: list[str]
    input_ids: list[list[int]]
    answers: list[str]
    answer_ids: list[int]
    log_prob: np.ndarray
    level: str
    tolerance: float
    weights: str  # the model's `fingerprint`
    streams: list[Stream] = field(repr=False)

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
            `top_k` with the largest first-order increase, and returns those.

    Returns a `LogitFlow`; call `.check()` to see that the layer scores telescope.

    Raises ValueError for an empty batch or prompt, an unusable answer or an unknown option, and
    UnsupportedModelError for a model whose parts do not add up (see `activations.self_check`).

    Example:
        >>> from backattn import logit_flow
        >>> flow = logit_flow(model, tokenizer, "France's capital is", "Paris", top_k=5)
        >>> flow.check() < 1e-4, len(flow.frame.dropna(subset="neuron"))
        (True, 5)
    """
    for name, value in (("level", level), ("norm", norm), ("method", method)):
        if value not in OPTIONS[name]:
            known = ", ".join(OPTIONS[name])
            raise ValueError(f"{name}={value!r} is unknown; choose one of {known}.")
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    prompts, chosen = _checked(tokenizer, prompts, answers)
    self_check(model)

    room, streams = KEEP_BYTES if level != "layer" else 0, []
    layers, frames, input_ids, ids, log_prob = [], [], [], [], []
    starts = range(0, len(prompts), batch_size)
    for start in progress(starts, "logit flow", unit="batch") if len(starts) > 1 else starts:
        part = slice(start, start + batch_size)
        batch = encode(tokenizer, prompts[part], device=model.device)
        stream = capture(model, batch, detail=level != "layer")
        answer = stream.logits.argmax(-1)
        if chosen is not None:
            answer = torch.tensor(chosen[part], device=model.device)
        reading = Reading(stream, answer, norm)
        tokens = [[tokenizer.decode([i]) for i in row] for row in batch.rows]
        lengths = batch.lengths.cpu().numpy()
        layers.append(_frame(_layers(reading), lengths, tokens))
        if level == "neuron":
            frames.append(_frame(_neurons(reading, method, top_k), lengths, tokens))
        elif level == "head":
            frames.append(_frame(_heads(reading), lengths, tokens))
        for table in (*layers[-1:], *frames[-1:]):
            table["prompt"] += start
        logs = stream.logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
        log_prob.append(logs.cpu().numpy())
        input_ids += batch.rows
        ids += answer.tolist()
        empty = stream.logits.new_empty(0)
        slim = replace(stream, logits=empty, ffn=empty, values=(), neurons=())
        room -= sum(x.nbytes for x in (slim.hidden, slim.attention, *slim.weights))
        streams = [*streams, slim] if room >= 0 else []
    return LogitFlow(
        frame=_joined(frames or layers),
        layers=_joined(layers),
        prompts=prompts,
        input_ids=input_ids,
        answers=[tokenizer.decode([i]) for i in ids],
        answer_ids=ids,
        log_prob=np.concatenate(log_prob),
        level=level,
        tolerance=1e-4 if model.dtype == torch.float32 else 0.1,
        weights=fingerprint(model),
        streams=streams,
    )


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True).astype({"token": "category"})


def _checked(tokenizer, prompts, answers) -> tuple[list[str], list[int] | None]:
    """Prompts as a list and answers as ids: all input errors before any work."""
    if not isinstance(prompts, str | Iterable):
        raise ValueError(f"prompts is {prompts!r}; give one string or several.")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    encode(tokenizer, prompts)
    ids = answers.tolist() if isinstance(answers, Tensor) else answers
    if ids is not None and list(map(type, ids)) != [int] * len(prompts):
        ids = answer_ids(tokenizer, ids, len(prompts))
    if ids is not None and any(prompt[-1].isspace() for prompt in prompts):
        message = "A prompt ends with a space, and answers begin with one: drop the prompt's."
        warnings.warn(message, stacklevel=3)
    return prompts, ids
