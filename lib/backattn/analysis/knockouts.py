"""Knock-outs: what the answer loses without some components, or without some positions in view.

Mean ablation keeps the model's shape and removes what is specific to the prompt: a component's
contribution is replaced by its mean over other prompts at the same kind of position.

1. `group_means`: the mean FFN output and attention value per layer and position group.
2. `CachedPrompts`: what stands before the first changed position is computed once.
3. `KnockoutProbe.log_probs`: the rest runs with the means in place, for each set of `Knockout`s.

`blocked_log_probs` is the attention knock-out (Geva et al. 2023): it hides positions from the last.
"""

from collections import defaultdict
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
    """What to knock out: `kind` at the position groups `groups` in `layers`.

    kind: "ffn" replaces what the FFN adds at those positions; "attention" replaces the values that
    later positions read there (an attention neuron is "at" its source position).
    """

    kind: str
    layers: tuple[int, ...]
    groups: tuple[str, ...]


@dataclass
class Means:
    """Mean FFN contribution and mean value per layer: group -> [L, D], group -> [L, G, d]."""

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

    groups: one array of labels per prompt, one label per token.

    Example:
        >>> from backattn import load_model
        >>> model, tokenizer = load_model("tiny-llama")
        >>> labels = ["a"] * len(tokenizer("France is")["input_ids"])
        >>> group_means(model, tokenizer, ["France is"], [labels]).ffn["a"].shape
        torch.Size([4, 32])
    """
    names = sorted({label for labels in groups for label in labels})
    ffn, attention, counts = defaultdict(float), defaultdict(float), defaultdict(int)
    for start in range(0, len(prompts), batch_size):
        batch = encode(tokenizer, prompts[start : start + batch_size], device=model.device)
        stream = capture(model, batch)
        values = torch.stack(stream.values)  # [L, B, T, G, d]
        for name in names:
            where = _where(groups[start : start + batch_size], batch, [name])
            counts[name] += int(where.sum())
            ffn[name] = ffn[name] + stream.ffn[:, where].sum(1)
            attention[name] = attention[name] + values[:, where].sum(1)
    return Means(*({k: total[k] / counts[k] for k in names} for total in (ffn, attention)))


class CachedPrompts:
    """Prompts to ask again and again with something changed inside; what stands before is cached.

    batches: (rows, the batch padded on the left, keys and values of it unchanged or None); similar
    lengths together. Keys and values of all prompts are held: 46 kB a token for SmolLM2.
    """

    def __init__(self, model, tokenizer, prompts: Sequence[str]):
        self.arch = describe(model)
        self.batches: list[tuple[list[int], Batch, Cache | None]] = []
        lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        order = np.argsort(lengths, kind="stable").tolist()
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = encode(tokenizer, [prompts[i] for i in rows], "left", model.device)
            self.batches.append((rows, batch, whole_cache(model, batch)))


class KnockoutProbe(CachedPrompts):
    """Prompts with an answer each, to knock something out.

    groups: one array of labels per prompt, one label per token; means: from `group_means`.

    Example:
        >>> from backattn import load_model
        >>> model, tokenizer = load_model("tiny-llama")
        >>> prompts = ["France is", "Rome is"]
        >>> groups = [["x"] * len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        >>> means = group_means(model, tokenizer, prompts, groups)
        >>> probe = KnockoutProbe(model, tokenizer, prompts, [5, 5], groups, means)
        >>> (probe.log_probs() - probe.log_probs([Knockout("ffn", (0, 1), ("x",))])).shape
        torch.Size([2])
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
        """The answers' log-probabilities with `knockouts` in force (none: the model's own): [n].

        Raises ValueError for an unknown kind.
        """
        for kind in {knockout.kind for knockout in knockouts} - {"ffn", "attention"}:
            raise ValueError(f'Cannot knock out {kind!r}; choose "ffn" or "attention".')
        touched = {group for knockout in knockouts if knockout.layers for group in knockout.groups}
        result = torch.empty(len(self.answer_ids))
        for rows, batch, cache in self.batches:
            labels, start = [self.groups[row] for row in rows], 0
            if cache is not None:  # begin at the first position that is knocked out in some prompt
                reached = _where(labels, batch, touched).any(0).int()
                last = batch.input_ids.shape[1] - 1
                start = int(reached.argmax()) if reached.any() else last
                cache = cache_prefix(cache, start)
            edits = [
                self._edit(knockout.kind, layer, group, _where(labels, batch, [group])[:, start:])
                for knockout in knockouts
                for group in knockout.groups
                for layer in knockout.layers
            ]
            with hooks(*edits):
                log_probs = next_log_probs(self.arch.model, batch, cache=cache)  # [B, V]
            ids = torch.tensor([self.answer_ids[row] for row in rows], device=log_probs.device)
            result[rows] = log_probs.gather(1, ids[:, None])[:, 0].cpu()
        return result

    def _edit(self, kind: str, layer: int, group: str, where: Tensor) -> tuple:
        """The hook that puts a group's mean at some positions [B, T']."""
        block, mean = self.arch.blocks[layer], getattr(self.means, kind)[group][layer]
        module = block.ffn_result if kind == "ffn" else block.get(block.family.value)

        def replace(output: Tensor) -> Tensor:
            output = output.clone()
            part = output if kind == "ffn" else block.value_part(output)  # a view
            part[where] = mean.to(output.dtype)
            return output

        return module, "output", replace


def blocked_log_probs(
    prompts: CachedPrompts, sources: Sequence[Sequence[int]], layers: Sequence[int]
) -> Tensor:
    """Next-token log-probabilities while the last position cannot attend to some: [n, V].

    sources: per prompt the positions, counted from its first token, that are hidden from the last;
    layers: in which.

    Example:
        >>> from backattn import load_model
        >>> prompts = CachedPrompts(*load_model("tiny-llama"), ["Rome is"])
        >>> blocked_log_probs(prompts, [[0]], layers=[2, 3]).exp().sum().round()
        tensor(1.)
    """
    result: list[Tensor] = [torch.empty(0)] * len(sources)
    for rows, batch, cache in prompts.batches:
        hidden = torch.zeros_like(batch.attention_mask, dtype=torch.bool)  # [B, T]
        for place, row in enumerate(rows):
            hidden[place, [int(batch.start[place]) + int(source) for source in sources[row]]] = True
        if cache is not None:  # only the last position changes
            cache = cache_prefix(cache, batch.input_ids.shape[1] - 1)
        hide, handles = _hide(batch, hidden), []
        try:
            for layer in layers:
                attention = prompts.arch.blocks[layer].attention
                handles.append(attention.register_forward_pre_hook(hide, with_kwargs=True))
            log_probs = next_log_probs(prompts.arch.model, batch, cache=cache).cpu()
        finally:
            for handle in handles:
                handle.remove()
        for row, found in zip(rows, log_probs, strict=True):
            result[row] = found
    return torch.stack(result)


def _hide(batch: Batch, hidden: Tensor) -> Callable:
    """Pre-hook of an attention module that hides positions [B, T] from the last query."""

    def hook(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is None:  # the implementation would have masked causally by itself
            queries = (args[0] if args else kwargs["hidden_states"]).shape[1]
            time = batch.input_ids.shape[1]
            causal = torch.ones(time, time, dtype=torch.bool, device=hidden.device).tril()
            mask = (batch.attention_mask.bool()[:, None, None] & causal)[:, :, -queries:]
        mask = mask.expand(len(hidden), -1, -1, -1).clone()
        never = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask[:, :, -1] = mask[:, :, -1].masked_fill(hidden[:, None], never)
        return args, {**kwargs, "attention_mask": mask}

    return hook
