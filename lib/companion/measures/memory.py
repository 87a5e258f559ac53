"""Questions put to a model with trained back attention, its memory hidden or exchanged.

A cell is a pair (memory layer, position of the question) that a query, a position at the source
layer, can read. Places are e1's, r1's and r2's tokens, what stands before e1 (where a tokenizer
puts something there), after e1 and after r1 ("'s"), and the last token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from backattn.adapters.back_attention import BackAttentionModel
from backattn.adapters.call import without_updates
from backattn.adapters.modules import normed
from backattn.models.devices import input_device
from backattn.models.next_token import in_window
from backattn.runtime import progress, release_memory
from backattn.training.batches import Items, Questions, collate
from backattn.training.evaluation import (
    FirstPasses,
    align_to_length,
    answer_logits,
    by_length,
    right_answers,
)
from companion.measures.two_hop import donors, place_labels
from companion.questions.prompts import TEMPLATES, two_hop_spans
from companion.runs.as_asked import asked, questions
from companion.runs.perform import load_trained
from companion.runs.run import Run
from companion.runs.store import Store

PLACES = ("start", "e1", "after e1", "r1", "after r1", "r2", "last")
BATCH = 32


def high_layers(layers: int) -> tuple[int, ...]:
    """The states at the depth of those that C10 names, 27 to 30 of a model of 32 layers."""
    return tuple(range(round(27 / 32 * layers), round(30 / 32 * layers) + 1))


def memory_places(tokenizer, frame: pd.DataFrame) -> list[np.ndarray]:
    """The place of each token of questions in the wording "possessive", [T] per question. frame:
    two_hop (the prompt) and the spans of e1, r1 and r2."""
    labels = place_labels(tokenizer, frame)
    for row in labels:
        between, order = row == "context", np.arange(len(row))
        for place, name in (("e1", "after e1"), ("r1", "after r1")):
            row[between & (order > np.flatnonzero(row == place)[0])] = name
        row[between & (order < np.flatnonzero(row == "e1")[0])] = "start"
    return labels


def question_spans(prompt: str, e1: str, r1: str, r2: str) -> dict[str, tuple[int, int]]:
    """`two_hop_spans` of the question that a prompt ends with; facts may stand before it. Raises
    ValueError unless it is in the wording "possessive"."""
    asks = TEMPLATES["possessive"].say(e1, r1, r2)
    if not prompt.endswith(asks):
        raise ValueError(f"{prompt!r} does not end with {asks!r}: its memory cannot be told apart.")
    return two_hop_spans(prompt, e1, r1, r2, len(prompt) - len(asks))


def mean_of_others(memory: Sequence[Tensor]) -> list[Tensor]:
    """Per question the mean of all others' memory at its positions, aligned: [M, T, D] each."""
    lengths = {states.shape[1] for states in memory}
    sums = {k: torch.stack([align_to_length(x, k) for x in memory]).sum(0) for k in lengths}
    return [(sums[states.shape[1]] - states) / (len(memory) - 1) for states in memory]


@torch.no_grad()
def last_logits(
    model: nn.Module,
    items: Items,
    logits_of: Callable[[list[int], Questions], Tensor] | None = None,
) -> Tensor:
    """The logits after each question, on the CPU: [n, V]. logits_of: what makes those of some rows,
    [B, T, V]; None: the model as it is."""
    parts, order = [], by_length(items, BATCH)
    for rows in order:
        batch = collate(items, rows, input_device(model))
        made = logits_of(rows, batch) if logits_of else answer_logits(model, batch)
        parts.append(made[:, -1].cpu())
    logits = torch.cat(parts)
    logits[[row for rows in order for row in rows]] = logits.clone()
    return logits


@dataclass
class Passes:
    """What a `MemoryProbe` computes once: states of first passes by question, caches of whole
    questions, nothing hidden, by a batch's first one, and what `read` gives and its logits."""

    states: dict[int, Tensor] = field(default_factory=dict)
    caches: dict[int, Cache] = field(default_factory=dict)
    read: tuple[list[np.ndarray], Tensor] | None = None


class MemoryProbe:
    """Questions asked as they are, with cells hidden or with another memory. The first pass is
    kept, and after `read` hidden cells cost only positions from the first one they change, or from
    the first one that reads something. frame: see `memory_places`, with seed, question, e2; labels:
    the place of each token; passes: of the same questions and weights, to go on from."""

    def __init__(
        self,
        wrapped: BackAttentionModel,
        tokenizer,
        items: Items,
        frame: pd.DataFrame,
        passes: Passes | None = None,
        labels: Sequence[np.ndarray] | None = None,
    ):
        if items.memories is not None:
            raise ValueError("These questions have memories: a probe would read their own.")
        self.wrapped, self.tokenizer, self.items, self.frame = wrapped, tokenizer, items, frame
        self.about = frame[["seed", "question", "e2"]]  # what rows of results are named by
        self.memory_layers = wrapped.memory_layers
        self.labels = memory_places(tokenizer, frame) if labels is None else labels
        self.places = [place for place in PLACES if any(place in row for row in self.labels)]
        self._first, self._kept = FirstPasses(wrapped, items, group=BATCH), passes or Passes()
        self._first.kept = self._kept.states

    def block(self, source: Sequence[str], layers: Sequence[int] | None = None) -> list[np.ndarray]:
        """The cells at some places in some memory layers (None: all): [M, T] bool per question."""
        among = np.isin(self.memory_layers, self.memory_layers if layers is None else layers)
        return [among[:, None] & np.isin(row, source) for row in self.labels]

    def states(self) -> list[Tensor]:
        """What can be read: the memory layers' states of the first pass, [M, T, D] per question."""
        among = [self.wrapped.needed.index(layer) for layer in self.memory_layers]
        for rows in by_length(self.items, BATCH):
            self._first(rows, collate(self.items, rows, input_device(self.wrapped)))
        return [self._first.kept[row][among] for row in range(len(self.items))]

    def exchanged(self, relations: str = "same") -> list[Tensor]:
        """Another question's memory for each (see `donors`), aligned: [M, T, D] each."""
        states = self.states()
        pairs = zip(donors(self.frame, relations=relations), states, strict=True)
        return [align_to_length(states[donor], own.shape[1]) for donor, own in pairs]

    def averaged(self) -> list[Tensor]:
        """The mean of all others' memory for each, at its positions: [M, T, D] each. Where the
        module normalises what it reads, of what it reads, or a mean would be that of a few huge
        states."""
        states = self.states()
        if self.wrapped.back_attention_config.norm:
            states = [normed(x) for x in states]
        return mean_of_others(states)

    def read(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """What queries read (mean over heads), [T, M, T] per question; and what `ask` returns."""
        if self._kept.read is None:
            self._kept.read = self._read()
        weights, logits = self._kept.read
        return weights, *self._outcomes(logits)

    def _read(self) -> tuple[list[np.ndarray], Tensor]:
        weights = [np.empty(0)] * len(self.items)
        source = self.wrapped.back_attention_config.sources[0]

        def whole(rows: list[int], batch: Questions) -> Tensor:
            ids = batch.input_ids
            last = torch.tensor([ids.shape[1] - 1], device=ids.device)
            options = {"position_ids": batch.position_ids, "logits_to_keep": last}
            with self.wrapped.attention_maps() as recorded:
                out = self.wrapped(ids, batch.attention_mask, **options, use_cache=True)
            if in_window(self.wrapped, batch):
                self._kept.caches[rows[0]] = out.past_key_values
            maps = recorded[source].mean(1).float().cpu().numpy()  # [B, T, M, T]
            for read, row in zip(maps, rows, strict=True):
                length = len(self.labels[row])
                weights[row] = read[-length:, :, -length:]
            return out.logits.float()

        return weights, last_logits(self.wrapped, self.items, whole)

    def ask(self, *args, **edit) -> tuple[np.ndarray, np.ndarray]:
        """(log-probability of the answer's first token, whether an accepted one is likeliest): [n];
        arguments of `logits`."""
        return self._outcomes(self.logits(*args, **edit))

    def logits(
        self,
        hidden: Sequence[np.ndarray] | None = None,
        queries: Sequence[str] = ("last",),
        memory: Sequence[Tensor] | None = None,
        silent: bool = False,
    ) -> Tensor:
        """The logits after each question: [n, V].

        hidden: per question [M, T] bool, the cells that queries at the places `queries` may not
        read, or [T, M, T] for each its own; silent: what they say is lost, and the weights of all
        others stay what they are, instead of taking theirs. memory: per question [M, T, D], read
        instead of its.
        """
        if hidden is None and memory is None and self._kept.read is not None:
            return self._kept.read[1]

        def edited(rows: list[int], batch: Questions) -> Tensor:
            first, cells, cache, other = self._first(rows, batch), None, None, None
            count, (size, width) = len(self.memory_layers), batch.input_ids.shape
            if hidden is not None:
                cells = torch.ones(size, width, count, width, dtype=torch.bool)
                for visible, row in zip(cells, rows, strict=True):
                    length = len(self.labels[row])
                    affected = np.isin(self.labels[row], queries)[:, None, None]  # [T, 1, 1]
                    visible[-length:, :, -length:] = torch.from_numpy(~(affected & hidden[row]))
                cells = cells.to(first.device, torch.float32 if silent else torch.bool)
                if memory is None and rows[0] in self._kept.caches:
                    same, cache = self._before(self._kept.caches[rows[0]], cells.cpu(), batch)
            if cache is not None:
                cells, first = cells[:, same:], first[:, :, same:]
            if memory is not None:
                other = first.new_zeros(count, *first.shape[1:])
                for place, row in enumerate(rows):
                    other[:, place, -len(self.labels[row]) :] = memory[row]
            with self.wrapped.edited(cells, other):
                return answer_logits(self.wrapped, batch, first, cache)  # [B, 1, V]

        return last_logits(self.wrapped, self.items, edited)

    def _before(self, cache: Cache, cells: Tensor, batch: Questions) -> tuple[int, Cache]:
        """How many positions need not run again, and a cache that holds them: those before the
        first that sees a hidden cell or, where that is more, before the first that reads one."""
        real = batch.attention_mask.bool().cpu()  # [B, T]
        visible = (real[:, None] & torch.ones(real.shape[1], real.shape[1]).tril().bool())[
            :, :, None
        ]

        def first(changes: Tensor) -> int:
            return int(
                (~(changes & visible).flatten(2).any(-1) | ~real).all(0).long().cumprod(0).sum()
            )

        same, unread = first(cells != 1), first(cells != 0) if self.wrapped.two_passes else 0
        if unread > same:
            same, cache = unread, without_updates(cache, self.wrapped)
        return min(same, real.shape[1] - 1), cache

    def _outcomes(self, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
        batch = collate(self.items, range(len(self.items)))
        log_probs = logits.log_softmax(-1).gather(-1, batch.labels[:, -1:])[:, 0]
        right = right_answers(logits[:, None], self.items, range(len(self.items)), batch)
        return log_probs.numpy().astype(float), right.numpy()


class MemoryProbes:
    """A `MemoryProbe` of each run's first `count` test questions, its weights on the model while it
    is asked. What they compute is kept: gone through again, they go on from there."""

    def __init__(
        self, runs: Sequence[Run], store: Store, count: int | None = None, device: str = "cpu"
    ):
        self.runs, self.store, self.count, self.device = list(runs), store, count, device
        self._passes = [Passes() for _ in self.runs]

    def __iter__(self) -> Iterator[MemoryProbe]:
        for run, passes in zip(
            progress(self.runs, "reading", unit="run"), self._passes, strict=True
        ):
            frame = asked(run, "test").head(self.count)
            spans = [question_spans(x.prompt, x.e1, x.r1, x.r2) for x in frame.itertuples()]
            frame = frame.join(pd.DataFrame(spans)).assign(two_hop=frame["prompt"], seed=run.seed)
            frame["question"] = range(len(frame))
            frame["seen"] = frame["answer"].isin(asked(run, "train")["answer"])
            with load_trained(run, self.store, self.device) as (wrapped, tokenizer):
                items = questions(replace(run, test_items=len(frame)), tokenizer, "test")
                yield MemoryProbe(wrapped, tokenizer, items, frame, passes)
            release_memory()
