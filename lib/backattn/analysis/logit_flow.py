"""Logit flow: which layers, heads and neurons raise the answer's log-probability, and what switched them on.

Importance of a component v whose sub-layer had the residual input b (paper, section 3.1):
log p(answer | b + v) − log p(answer | b), read by the lens. Layer importances telescope from the embedding to
the model's own log-probability; head and neuron importances do not add up to their layer's.

`flow_back` then hands the importance of the value neurons at the last position to the residual parts that
switched them on, layer by layer down to the embedding.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from backattn.analysis.neuron_scores import _concat, _frame, _Reader, _token_texts
from backattn.models.activations import capture, self_check
from backattn.models.tokens import answer_ids, encode
from backattn.runtime import progress

LEVELS, NORMS, METHODS = ("layer", "head", "neuron"), ("final", "own"), ("exact", "screen")


@dataclass
class LogitFlow:
    """Result of `logit_flow`.

    frame: one row per component: prompt, layer, kind, head, neuron, position, token, log_prob_before,
        log_prob_after, increase (nats). `position` is the source position of an attention component and the
        last position of everything else; head and neuron are missing (NA) where they do not apply.
    layers: the layer-level rows, whatever the level.
    """

    frame: pd.DataFrame
    layers: pd.DataFrame
    prompts: list[str]
    answers: list[str]
    answer_ids: list[int]
    log_prob: np.ndarray  # the model's own log-probability of each answer
    level: str
    norm: str
    method: str
    tolerance: float

    def errors(self) -> np.ndarray:
        """|start + sum of layer importances − the model's own log-probability| per prompt, in nats."""
        grouped = self.layers.groupby("prompt", sort=True)
        total = grouped["log_prob_before"].first() + grouped["increase"].sum()
        return np.abs(total.to_numpy() - self.log_prob)

    def check(self) -> float:
        """Largest telescoping error; raises ValueError with it when it exceeds the tolerance of the model's dtype."""
        errors = self.errors()
        worst = int(np.nanargmax(np.where(np.isnan(errors), np.inf, errors)))
        if not errors[worst] <= self.tolerance:
            raise ValueError(
                f"The layer scores of prompt {worst} ({self.prompts[worst]!r}) miss the model's log-probability by "
                f"{errors[worst]:.2e} nats (allowed {self.tolerance:.0e})."
            )
        return float(errors[worst])


def logit_flow(
    model,
    tokenizer,
    prompts: str | Sequence[str],
    answers: str | Sequence[str] | None = None,
    level: str = "neuron",
    norm: str = "final",
    method: str = "screen",
    top_k: int = 300,
    batch_size: int = 16,
) -> LogitFlow:
    """Importance of every layer, head or neuron for the answer's log-probability at the last position.

    Args:
        model, tokenizer: a supported Hugging Face decoder (see `backattn.arch`) and its tokenizer.
        prompts: one prompt or several.
        answers: one word per prompt, scored on the first token of " answer"; None takes the model's own next token.
        level: "layer" (embedding, attention, FFN of each layer), "head" (each head × source position) or
            "neuron" (each FFN neuron at the last position, each attention channel × source position).
        norm: "final" freezes the final norm's scale of the full pass (logit flow); "own" recomputes it (logit lens).
        method: for neurons, "exact" scores every neuron; "screen" scores all to first order and the `top_k` with
            the largest first-order increase exactly, and returns those.
        top_k: neurons kept per prompt by "screen".
        batch_size: prompts per forward pass.

    Returns a `LogitFlow`; call `.check()` to see that the layer scores telescope.

    Raises ValueError for an empty batch or prompt, an unusable answer or an unknown option, and
    UnsupportedModelError for a model whose parts do not add up (see `residual.self_check`).
    """
    _known("level", level, LEVELS)
    _known("norm", norm, NORMS)
    _known("method", method, METHODS)
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if not isinstance(prompts, str | Iterable):
        raise ValueError(f"prompts is {prompts!r}; give one string or several.")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    encode(tokenizer, prompts)  # all input errors before any work
    ids = None if answers is None else answer_ids(tokenizer, answers, len(prompts))
    if ids is not None and any(prompt[-1].isspace() for prompt in prompts):
        warnings.warn(
            "A prompt ends with a space, and answers begin with one: drop the prompt's.",
            stacklevel=2,
        )
    self_check(model)

    frames, layer_frames, own, chosen = [], [], [], []
    starts = range(0, len(prompts), batch_size)
    for start in progress(starts, "logit flow", unit="batch") if len(starts) > 1 else starts:
        batch = encode(tokenizer, prompts[start : start + batch_size], device=model.device)
        stream = capture(model, batch, detail=level != "layer")
        targets = (
            stream.logits.argmax(-1)
            if ids is None
            else torch.tensor(ids[start : start + batch_size])
        )
        reader = _Reader(stream, targets.to(model.device), norm)
        layers = reader.layer_rows()
        tokens = [_token_texts(tokenizer, batch, index) for index in range(len(batch.input_ids))]
        layer_frames.append(_frame(layers, tokens, start))
        if level == "head":
            frames.append(_frame(reader.head_rows(), tokens, start))
        elif level == "neuron":
            frames.append(_frame(reader.neuron_rows(method, top_k), tokens, start))
        own.append(
            stream.logits.log_softmax(-1).gather(1, reader.answer[:, None])[:, 0].cpu().numpy()
        )
        chosen += targets.tolist()
    return LogitFlow(
        frame=_concat(frames or layer_frames),
        layers=_concat(layer_frames),
        prompts=prompts,
        answers=[tokenizer.decode([i]) for i in chosen],
        answer_ids=chosen,
        log_prob=np.concatenate(own),
        level=level,
        norm=norm,
        method=method,
        tolerance=1e-4 if model.dtype == torch.float32 else 0.1,
    )


def _known(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}.")
