"""Interventions on the forward pass: mean ablation, attention knock-out, back-patching.

A component knocked out by mean ablation keeps the model's shape but loses what is specific to the prompt: its
contribution is replaced by the mean over other prompts at the same kind of position. An attention knock-out hides
positions from the last one. Back-patching puts a high layer's state into a lower layer and runs on from there.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from backattn.models.activations import capture
from backattn.models.decoder import describe
from backattn.models.hooks import hooks
from backattn.models.next_token import cache_prefix, next_log_probs, whole_cache
from backattn.models.tokens import Batch, encode

BATCH = 16


@dataclass(frozen=True)
class Knockout:
    """What to knock out: `kind` at `groups` in `layers`.

    kind: "ffn" replaces what the FFN adds at those positions; "attention" replaces the values that later positions
    read there (an attention neuron is "at" its source position).
    """

    kind: str
    layers: tuple[int, ...]
    groups: tuple[str, ...]


@dataclass
class Means:
    """Mean FFN contribution and mean value per layer and position group.

    ffn: group -> [L, D]; attention: group -> [L, G, d].
    """

    ffn: dict[str, Tensor]
    attention: dict[str, Tensor]


def _where(groups: Sequence, batch: Batch, wanted: Collection[str]) -> Tensor:
    """Padded mask [B, T] of the positions whose group is wanted."""
    mask = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    for row, (labels, start) in enumerate(zip(groups, batch.start.tolist(), strict=True)):
        mask[row, start : start + len(labels)] = torch.tensor([label in wanted for label in labels])
    return mask


def group_means(
    model, tokenizer, prompts: Sequence[str], groups: Sequence, batch_size: int = 16
) -> Means:
    """Means over the positions of each group in `prompts`.

    groups: one array of labels per prompt, one label per token (see `tasks.position_groups`).
    """
    names = sorted({label for labels in groups for label in labels})
    totals: dict[tuple[str, str], Tensor | float] = {}
    counts = dict.fromkeys(names, 0)
    for start in range(0, len(prompts), batch_size):
        batch = encode(tokenizer, prompts[start : start + batch_size], device=model.device)
        stream = capture(model, batch)
        values = torch.stack(stream.values)  # [L, B, T, G, d]
        for name in names:
            where = _where(groups[start : start + batch_size], batch, [name])
            counts[name] += int(where.sum())
            totals["ffn", name] = totals.get(("ffn", name), 0) + stream.ffn[:, where].sum(1)
            totals["attention", name] = totals.get(("attention", name), 0) + values[:, where].sum(1)
    return Means(
        *(
            {name: totals[kind, name] / counts[name] for name in names}
            for kind in ("ffn", "attention")
        )
    )


class CachedPrompts:
    """Prompts to ask again and again with something changed inside: what stands before the change is computed once.

    batches: (rows, the batch padded on the left, keys and values of it unchanged or None); similar lengths together.
    Keys and values of all prompts are held: 46 kB a token for SmolLM2.
    """

    def __init__(self, model, tokenizer, prompts: Sequence[str]):
        self.arch = describe(model)
        self.batches: list[tuple[list[int], Batch, Cache | None]] = []
        order = np.argsort(
            [len(tokenizer(prompt)["input_ids"]) for prompt in prompts], kind="stable"
        ).tolist()
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = encode(
                tokenizer, [prompts[row] for row in rows], side="left", device=model.device
            )
            self.batches.append((rows, batch, whole_cache(model, batch)))


class KnockoutProbe(CachedPrompts):
    """Prompts with an answer each, to knock something out.

    groups: one array of labels per prompt, one label per token (see `tasks.position_groups`).
    """

    def __init__(
        self,
        model,
        tokenizer,
        prompts: Sequence[str],
        answer_ids: Sequence[int],
        groups: Sequence,
        means: Means,
    ):
        super().__init__(model, tokenizer, prompts)
        self.answer_ids, self.groups, self.means = list(answer_ids), groups, means

    def log_probs(self, knockouts: Sequence[Knockout] = ()) -> Tensor:
        """Answer's log-probability at the last position with `knockouts` in force (none: the model's own): [prompts].

        Raises ValueError for an unknown kind.
        """
        for knockout in knockouts:
            if knockout.kind not in ("ffn", "attention"):
                raise ValueError(
                    f'Cannot knock out {knockout.kind!r}; choose "ffn" or "attention".'
                )
        touched = {group for knockout in knockouts if knockout.layers for group in knockout.groups}
        result = torch.empty(len(self.answer_ids))
        for rows, batch, cache in self.batches:
            labels, same = [self.groups[row] for row in rows], 0
            if cache is not None:  # begin at the first position that is knocked out in some prompt
                reached = _where(labels, batch, touched).any(0).int()
                same = int(reached.argmax()) if reached.any() else batch.input_ids.shape[1] - 1
                cache = cache_prefix(cache, same)
            edits = []
            for knockout in knockouts:
                for group in knockout.groups:
                    where = _where(labels, batch, [group])[:, same:]
                    for layer in knockout.layers:
                        block, mean = (
                            self.arch.blocks[layer],
                            getattr(self.means, knockout.kind)[group][layer],
                        )
                        if knockout.kind == "ffn":
                            edits.append((block.ffn_result, "output", _replace(where, mean)))
                        else:
                            value = block.get(block.family.value)
                            edits.append((value, "output", _replace(where, mean, block.value_part)))
            with hooks(*edits):
                log_probs = next_log_probs(self.arch.model, batch, cache=cache)  # [B, V]
            ids = torch.tensor([self.answer_ids[row] for row in rows], device=log_probs.device)
            result[rows] = log_probs.gather(1, ids[:, None])[:, 0].cpu()
        return result


def _replace(
    where: Tensor, mean: Tensor, part: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable:
    def edit(output: Tensor) -> Tensor:
        output = output.clone()
        part(output)[where] = mean.to(output.dtype)  # `part` is a view of the clone
        return output

    return edit


def blocked_log_probs(
    prompts: CachedPrompts, sources: Sequence[Sequence[int]], layers: Sequence[int]
) -> Tensor:
    """Next-token log-probabilities while the last position cannot attend to some positions in some layers: [n, V].

    sources: per prompt the positions, counted from its first token, that are hidden from the last one.
    """
    result: list[Tensor] = [torch.empty(0)] * len(sources)
    for rows, batch, cache in prompts.batches:
        hidden = torch.zeros_like(batch.attention_mask, dtype=torch.bool)  # [B, T]
        for place, row in enumerate(rows):
            hidden[place, [int(batch.start[place]) + int(source) for source in sources[row]]] = True
        handles = [
            prompts.arch.blocks[layer].attention.register_forward_pre_hook(
                _hide(batch, hidden), with_kwargs=True
            )
            for layer in layers
        ]
        if cache is not None:  # only the last position changes
            cache = cache_prefix(cache, batch.input_ids.shape[1] - 1)
        try:
            log_probs = next_log_probs(prompts.arch.model, batch, cache=cache).cpu()
        finally:
            for handle in handles:
                handle.remove()
        for row, own in zip(rows, log_probs, strict=True):
            result[row] = own
    return torch.stack(result)


def _hide(batch: Batch, hidden: Tensor) -> Callable:
    """Pre-hook of an attention module that hides positions [B, T] from the last query."""

    def hook(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is None:  # the implementation would have masked causally by itself
            queries = (args[0] if args else kwargs["hidden_states"]).shape[1]
            time = batch.input_ids.shape[1]
            causal = torch.ones(time, time, dtype=torch.bool, device=hidden.device).tril()
            mask = (causal & batch.attention_mask.bool()[:, None]).unsqueeze(1)[
                :, :, -queries:
            ]  # [B, 1, queries, T]
        mask = mask.expand(len(hidden), -1, -1, -1).clone()
        last = mask[:, :, -1]
        mask[:, :, -1] = last.masked_fill(
            hidden[:, None], False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        )
        return args, {**kwargs, "attention_mask": mask}

    return hook
