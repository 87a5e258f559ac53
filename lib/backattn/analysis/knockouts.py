"""Knock-outs: what the answer loses without some components, or without some positions in view.

Mean ablation keeps the model's shape and removes what is specific to the prompt: a component's
contribution is replaced by its mean over other prompts at the same kind of position (`group_means`,
`KnockoutProbe`). `blocked_log_probs` is the attention knock-out (Geva et al. 2023): it hides
positions from the last. What stands before the first changed position is computed once.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backattn.models.activations import capture
from backattn.models.decoder import describe
from backattn.models.hooks import analysis, begin_at, evaluating, hooks
from backattn.models.next_token import cache_prefix, in_window, next_log_probs
from backattn.models.tokens import Batch, check_indices, encode

BATCH = 32


@dataclass(frozen=True)
class Knockout:
    """At the positions of some groups, in some layers: kind "ffn" replaces what the FFN adds there,
    "attention" the values that later positions read there."""

    kind: str
    layers: tuple[int, ...]
    groups: tuple[str, ...]


def _where(groups: Sequence, batch: Batch, wanted: Collection[str]) -> Tensor:
    """Padded mask [B, T] of the positions whose group is wanted."""
    mask = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    for row, (labels, start) in enumerate(zip(groups, batch.start.tolist(), strict=True)):
        mask[row, start : start + len(labels)] = torch.tensor([label in wanted for label in labels])
    return mask


def _check_labels(groups: Sequence, lengths: Sequence[int]) -> None:
    """Raises IndexError where a prompt has not one label per token."""
    for index, (labels, length) in enumerate(zip(groups, lengths, strict=True)):
        if len(labels) != length:
            raise IndexError(f"Prompt {index} has {length} tokens and {len(labels)} labels.")


@analysis
def group_means(
    model, tokenizer, prompts: Sequence[str], groups: Sequence, batch_size: int = 16
) -> dict[str, dict[str, Tensor]]:
    """Mean FFN contribution and mean value over the positions of each group in `prompts`.

    groups: one array of labels per prompt, one label per token.
    Returns {"ffn": group -> [L, D], "attention": group -> [L, key/value heads, d]}. Raises
    IndexError where the labels of a prompt are not as many as its tokens.

    Example:
        >>> labels = ["a"] * len(tokenizer("France is")["input_ids"])
        >>> group_means(model, tokenizer, ["France is"], [labels])["ffn"]["a"].shape
        torch.Size([4, 32])
    """
    _check_labels(groups, encode(tokenizer, prompts).lengths.tolist())
    names = sorted({label for labels in groups for label in labels})
    totals, counts = {"ffn": defaultdict(float), "attention": defaultdict(float)}, defaultdict(int)
    for start in range(0, len(prompts), batch_size):
        batch = encode(tokenizer, prompts[start : start + batch_size], device=model.device)
        stream = capture(model, batch, compare=start == 0)
        parts = {"ffn": stream.ffn, "attention": torch.stack(stream.values)}  # [L, B, T, …]
        for name in names:
            where = _where(groups[start : start + batch_size], batch, [name])
            counts[name] += int(where.sum())
            for kind, part in parts.items():
                totals[kind][name] = totals[kind][name] + part[:, where].sum(1)
    return {kind: {k: total[k] / counts[k] for k in names} for kind, total in totals.items()}


class CachedPrompts:
    """Prompts to ask again and again with something changed inside; what stands before, and with
    `states` what lies below, is kept.

    batches: (rows, the batch padded on the left, its keys and values, or None where a sliding
    window is shorter, the states [B, T, D] that enter each layer, none without a cache). own: how
    many last tokens of each prompt may change, all where it is None; similar ones together. SmolLM2
    takes 46 kB a token for a cache, 70 kB for states.
    """

    def __init__(self, model, tokenizer, prompts: Sequence[str], states: bool = False, own=None):
        self.arch, self.batches = describe(model), []
        self.lengths = encode(tokenizer, prompts).lengths.tolist()
        order = np.argsort(self.lengths if own is None else own, kind="stable").tolist()
        for start in range(0, len(order), BATCH):
            rows, cache, kept = order[start : start + BATCH], None, []
            batch = encode(tokenizer, [prompts[i] for i in rows], "left", model.device)
            if in_window(model, batch):
                taps = [(block.module, "input", kept.append) for block in self.arch.blocks]
                with evaluating(model), hooks(*(taps if states else ())):
                    cache = model(**batch.inputs, use_cache=True, logits_to_keep=1).past_key_values
            self.batches.append((rows, batch, cache, kept))

    def changed(self, edits: Callable) -> Iterator[tuple[list[int], Tensor]]:
        """Per batch its rows and its next-token log-probabilities [B, V] under hooks.

        edits(rows, batch) -> (the first column that changes, the first layer in which something
        does, hooks, which may see no earlier ones).
        """
        for rows, batch, cache, kept in self.batches:
            start, layer, edited = edits(rows, batch)
            cache = None if cache is None else cache_prefix(cache, start)
            with evaluating(self.arch.model), contextlib.ExitStack() as stack:
                if kept:
                    stack.enter_context(begin_at(self.arch.blocks, layer, kept[layer][:, start:]))
                stack.enter_context(hooks(*edited))
                log_probs = next_log_probs(self.arch.model, batch, cache=cache)
            yield rows, log_probs


class KnockoutProbe(CachedPrompts):
    """Prompts with an answer each, to knock something out.

    groups: one array of labels per prompt, one label per token; means: from `group_means`. Raises
    IndexError where the labels of a prompt are not as many as its tokens, and for a layer or an
    answer that is not there.

    Example:
        >>> prompts = ["France is", "Rome is"]
        >>> groups = [["x"] * len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        >>> means = group_means(model, tokenizer, prompts, groups)
        >>> probe = KnockoutProbe(model, tokenizer, prompts, [5, 5], groups, means)
        >>> (probe.log_probs() - probe.log_probs([Knockout("ffn", (0, 1), ("x",))])).shape
        torch.Size([2])
    """

    def __init__(self, model, tokenizer, prompts, answer_ids, groups, means):
        # What stands before the first other group, as worked examples do, is seldom knocked out.
        own = [sum(label not in labels[:1] for label in labels) for labels in groups]
        super().__init__(model, tokenizer, prompts, states=True, own=own)
        self.answer_ids, self.groups, self.means = list(answer_ids), groups, means
        _check_labels(groups, self.lengths)
        vocabulary = [self.arch.model.config.vocab_size] * len(prompts)
        check_indices("Answer", [[answer] for answer in self.answer_ids], vocabulary)

    def log_probs(self, knockouts: Sequence[Knockout] = ()) -> Tensor:
        """The answers' log-probabilities with `knockouts` in force: [n]; ValueError for a kind that
        is none."""
        for kind in {knockout.kind for knockout in knockouts} - {"ffn", "attention"}:
            raise ValueError(f'Cannot knock out {kind!r}; choose "ffn" or "attention".')
        layers = [knockout.layers for knockout in knockouts]
        check_indices("Layer", layers, [len(self.arch.blocks)] * len(layers))
        touched = {group for knockout in knockouts if knockout.layers for group in knockout.groups}

        first = min((layer for some in layers for layer in some), default=len(self.arch.blocks) - 1)

        def edits(rows: list[int], batch: Batch) -> tuple[int, int, list]:
            labels = [self.groups[row] for row in rows]
            reached = _where(labels, batch, touched).any(0).int()
            start = int(reached.argmax()) if reached.any() else batch.input_ids.shape[1] - 1
            edited = [
                self._edit(knockout.kind, layer, group, _where(labels, batch, [group]))
                for knockout in knockouts
                for group in knockout.groups
                for layer in knockout.layers
            ]
            return start, first, edited

        result = torch.empty(len(self.answer_ids), dtype=torch.float32)
        for rows, log_probs in self.changed(edits):
            ids = torch.tensor([self.answer_ids[row] for row in rows], device=log_probs.device)
            result[rows] = log_probs.gather(1, ids[:, None])[:, 0].cpu()
        return result

    def _edit(self, kind: str, layer: int, group: str, where: Tensor) -> tuple:
        """The hook that puts a group's mean at some positions [B, T]."""
        block, mean = self.arch.blocks[layer], self.means[kind][group][layer]

        def replace(output: Tensor) -> Tensor:
            output = output.clone()
            part = output if kind == "ffn" else block.value_part(output)  # a view
            part[where[:, -output.shape[1] :]] = mean.to(output.dtype)
            return output

        return block.result("ffn") if kind == "ffn" else block.get("value"), "output", replace


def blocked_log_probs(
    prompts: CachedPrompts, sources: Sequence[Sequence[int]], layers: Sequence[int]
) -> Tensor:
    """Next-token log-probabilities while, in `layers`, the last position cannot attend to some: per
    prompt those in `sources`, counted from its first token. Returns [n, V]. Raises IndexError or
    TypeError for a position or a layer that is not there.

    Example:
        >>> prompts = CachedPrompts(model, tokenizer, ["Rome is"])
        >>> blocked_log_probs(prompts, [[0]], layers=[2, 3]).exp().sum().round()
        tensor(1.)
    """
    check_indices("Position", sources, prompts.lengths)
    check_indices("Layer", [layers], [len(prompts.arch.blocks)])

    def edits(rows: list[int], batch: Batch) -> tuple[int, int, list]:
        hidden = torch.zeros_like(batch.attention_mask, dtype=torch.bool)  # [B, T]
        for place, row in enumerate(rows):
            hidden[place, [int(batch.start[place]) + int(source) for source in sources[row]]] = True

        def hide(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            mask, time = kwargs.get("attention_mask"), batch.input_ids.shape[1]
            if mask is None:  # the implementation would have masked causally by itself
                queries = (args[0] if args else kwargs["hidden_states"]).shape[1]
                causal = torch.ones(time, time, dtype=torch.bool, device=hidden.device).tril()
                mask = (batch.attention_mask.bool()[:, None, None] & causal)[:, :, -queries:]
            mask = mask.expand(len(hidden), -1, -1, -1).clone()
            never = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask[:, :, -1] = mask[:, :, -1].masked_fill(hidden[:, None], never)
            return args, {**kwargs, "attention_mask": mask}

        attentions = (prompts.arch.blocks[layer].get("attention") for layer in layers)
        last = batch.input_ids.shape[1] - 1  # all that changes
        return last, min(layers, default=0), [(one, "arguments", hide) for one in attentions]

    rows, log_probs = zip(*prompts.changed(edits), strict=True)
    return torch.cat(log_probs).cpu()[np.argsort(np.concatenate(rows))]
