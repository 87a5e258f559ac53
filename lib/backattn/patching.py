"""Interventions on the forward pass: knock-outs by mean ablation.

A knocked-out component keeps the model's shape but loses what is specific to the prompt: its contribution is
replaced by the mean over other prompts at the same kind of position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arch import describe
from .residual import Batch, capture, encode, hooks, next_log_probs


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


def _where(groups: Sequence, batch: Batch, wanted: Sequence[str]) -> Tensor:
    """Padded mask [B, T] of the positions whose group is wanted."""
    mask = torch.zeros_like(batch.mask, dtype=torch.bool)
    for row, (labels, start) in enumerate(zip(groups, batch.start.tolist(), strict=True)):
        mask[row, start : start + len(labels)] = torch.tensor([label in wanted for label in labels])
    return mask


def group_means(model, tokenizer, prompts: Sequence[str], groups: Sequence, batch_size: int = 16) -> Means:
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
    return Means(*({name: totals[kind, name] / counts[name] for name in names} for kind in ("ffn", "attention")))


def knocked_out_log_probs(
    model,
    tokenizer,
    prompts: Sequence[str],
    answer_ids: Sequence[int],
    groups: Sequence,
    knockouts: Sequence[Knockout],
    means: Means,
    batch_size: int = 16,
) -> Tensor:
    """Answer's log-probability at the last position with `knockouts` in force (none: the model's own): [prompts].

    Raises ValueError for an unknown kind.
    """
    arch, result = describe(model), torch.empty(len(prompts))
    by_length = sorted(range(len(prompts)), key=lambda index: len(groups[index]))  # little padding in a batch
    for knockout in knockouts:
        if knockout.kind not in ("ffn", "attention"):
            raise ValueError(f'Cannot knock out {knockout.kind!r}; choose "ffn" or "attention".')
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        batch = encode(tokenizer, [prompts[row] for row in rows], side="left", device=model.device)
        edits = []
        for knockout in knockouts:
            for group in knockout.groups:
                where = _where([groups[row] for row in rows], batch, [group])
                for layer in knockout.layers:
                    block, mean = arch.blocks[layer], getattr(means, knockout.kind)[group][layer]
                    if knockout.kind == "ffn":
                        edits.append((block.ffn_result, "output", _replace(where, mean)))
                    else:
                        edits.append((block.get(block.family.value), "output", _replace(where, mean, block.value_part)))
        with hooks(*edits):
            log_probs = next_log_probs(model, batch)  # [B, V]
        ids = torch.tensor([answer_ids[row] for row in rows], device=model.device)
        result[rows] = log_probs.gather(1, ids[:, None])[:, 0].cpu()
    return result


def _replace(where: Tensor, mean: Tensor, part: Callable[[Tensor], Tensor] = lambda x: x) -> Callable:
    def edit(output: Tensor) -> Tensor:
        output = output.clone()
        part(output)[where] = mean.to(output.dtype)  # `part` is a view of the clone
        return output

    return edit
