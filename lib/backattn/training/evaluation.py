"""Which questions a model answers right."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from backattn.adapters.two_pass import TwoPassModel
from backattn.models.decoder import check_length
from backattn.models.devices import input_device
from backattn.models.tokens import prompt_ids
from backattn.runtime import progress
from backattn.training.batches import IGNORED, Items, Questions, collate, in_halves

# What a model's generation config may ask for besides; here its own next token counts.
AS_IT_IS = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
AS_IT_IS |= dict.fromkeys(
    ("sequence_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "guidance_scale")
)


def by_length(items: Items, size: int) -> list[list[int]]:
    """All questions in groups of similar length, the shortest first."""
    order = np.argsort(items.lengths, kind="stable").tolist()
    return [order[start : start + size] for start in range(0, len(order), size)]


class FirstPasses:
    """The states of the first pass of each question, for a base model that is frozen: computed when
    first wanted, in fixed groups of similar length, so that a resumed run gets the same bits."""

    def __init__(self, model: TwoPassModel, items: Items, group: int = 32):
        self.model, self.items = model, items
        self.group_of = {row: rows for rows in by_length(items, group) for row in rows}
        self.kept: dict[int, Tensor] = {}  # row -> [K, T, D]

    @staticmethod
    def gigabytes(model: TwoPassModel, items: Items) -> float:
        """What keeping all states takes, in GiB."""
        size = model.config.hidden_size * next(model.base_model.parameters()).element_size()
        return len(model.needed) * int(items.lengths.sum()) * size / 2**30

    def __call__(self, rows: Sequence[int], batch: Questions) -> Tensor:
        """[K, B, T, D] for a batch made of `rows`; zero where it is padded."""
        for row in rows:
            if row not in self.kept:
                self._compute(self.group_of[row], batch.input_ids.device)
        states = [self.kept[row].transpose(0, 1) for row in rows]  # [T, K, D] each
        return pad_sequence(states, padding_side="left").permute(2, 1, 0, 3).contiguous()

    def _compute(self, group: list[int], device: torch.device) -> None:
        def keep(rows: list[int]) -> None:
            batch = collate(self.items, rows, device)
            states = self.model.first_pass_states(**batch.inputs)
            for place, (row, length) in enumerate(zip(rows, batch.lengths.tolist(), strict=True)):
                self.kept[row] = states[:, place, -length:].clone()

        in_halves(keep, group)


def align_to_length(memory: Tensor, length: int) -> Tensor:
    """One question's memory [M, S, D] for another length: positions are counted from the end, where
    the words that ask stand; where there are too few, the first is repeated.

    Example:
        >>> align_to_length(torch.arange(3.0).view(1, 3, 1), 4).flatten().tolist()
        [0.0, 0.0, 1.0, 2.0]
    """
    return memory[:, (torch.arange(length) - length + memory.shape[1]).clamp(min=0)]


@contextlib.contextmanager
def _reading(model: nn.Module, batch: Questions) -> Iterator[None]:
    """While the block runs, `batch` reads the memory of its `memories`, if it has any."""
    if batch.memories is None:
        yield
        return
    if not getattr(model, "memory_layers", ()):
        raise ValueError("These questions have memories, and this model reads none.")
    if any(model.request.get(name) is not None for name in ("cells", "memory")):
        raise ValueError("These questions have memories: exchange those, or leave edited() out.")
    among = [model.needed.index(layer) for layer in model.memory_layers]
    states = model.first_pass_states(**batch.memories.inputs)[among]  # [M, B, S, D]
    lengths = zip(batch.memories.lengths.tolist(), batch.lengths.tolist(), strict=True)
    aligned = [align_to_length(states[:, k, -n:], to) for k, (n, to) in enumerate(lengths)]
    memory = pad_sequence([x.transpose(0, 1) for x in aligned], padding_side="left")
    with model.edited(memory=memory.permute(2, 1, 0, 3).contiguous()):
        yield


def answer_logits(
    model: nn.Module, batch: Questions, first_pass: Tensor | None = None, cache: Cache | None = None
) -> Tensor:
    """The model's logits where the answers' tokens are predicted: [B, K, V], fp32. first_pass and
    cache: see `TwoPassModel.forward`; with a cache first_pass is of the last tokens, K or more.
    Raises ValueError for questions with memories where the model reads none, or within `edited`,
    and for questions that are longer than the model takes.

    Example:
        >>> batch = collate(Items([[5, 6]], [[8, 9]], ["a"], None, frozenset()), [0])
        >>> answer_logits(model, batch).shape == (1, 2, len(tokenizer))
        True
    """
    check_length(model, batch.input_ids.shape[1])
    width = batch.input_ids.shape[1] if cache is None else first_pass.shape[2]
    # Places, not a count: slicing leaves a view, which torch multiplies by a copy of a frozen
    # unembedding per row.
    places = torch.arange(width - batch.labels.shape[1], width, device=batch.input_ids.device)
    inputs = {"input_ids": batch.input_ids[:, -width:], "attention_mask": batch.attention_mask}
    inputs |= {"position_ids": batch.position_ids[:, -width:], "logits_to_keep": places}
    inputs |= {"use_cache": False, "return_dict": True}  # whatever the config says
    if first_pass is not None:
        inputs |= {"first_pass": first_pass, "past_key_values": cache}
    with _reading(model, batch):
        return model(**inputs).logits.float()


def right_answers(logits: Tensor, items: Items, rows: Sequence[int], batch: Questions) -> Tensor:
    """Which questions greedy decoding would answer right: [B] bool. The whole answer by its own
    tokens, then anything that does not make it another number; or an accepted first token."""
    predicted = logits.argmax(-1)  # [B, K]
    if items.accepted is not None:
        last = zip(predicted[:, -1].tolist(), rows, strict=True)
        return torch.tensor([token in items.accepted[row] for token, row in last])
    right = (predicted == batch.labels) | (batch.labels == IGNORED)
    continuations = torch.tensor(sorted(items.number_continuations), device=predicted.device)
    right[:, -1] = ~torch.isin(predicted[:, -1], continuations)  # it only ends the answer
    return right.all(-1).cpu()


@torch.no_grad()
def evaluate(model: nn.Module, items: Items, batch_size: int = 64) -> tuple[np.ndarray, float]:
    """(which questions are answered right [n] bool, mean loss per target token)."""
    right, total = np.zeros(len(items), dtype=bool), 0.0

    def summed_loss(rows: list[int]) -> float:
        batch = collate(items, rows, input_device(model))
        logits = answer_logits(model, batch)
        right[rows] = right_answers(logits, items, rows, batch).numpy()
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").item()

    for rows in progress(by_length(items, batch_size), "testing", unit="batch"):
        total += sum(in_halves(summed_loss, rows))
    return right, total / sum(map(len, items.answers))


# A full stop ends it, as in training, whatever follows.
NUMBER = re.compile(r"\s*(-?\d+)(?!\d|,\d)")


@torch.no_grad()
def written(
    model: nn.Module, tokenizer, items: Items, new_tokens: int = 8, batch_size: int = 64
) -> np.ndarray:
    """Which questions greedy generation answers with the right number, however spaced, whatever
    follows: [n] bool. The text may not end early: models tuned for chat like to say nothing."""
    if items.memories is not None:
        raise ValueError("What is generated reads its own memory: judge by the first token.")
    # Prompts alone: the last token of an answer is never in the batch.
    prompts, right = replace(items, answers=[[0]] * len(items)), np.zeros(len(items), dtype=bool)
    for rows in progress(by_length(prompts, batch_size), "writing", unit="batch"):
        batch = collate(prompts, rows, input_device(model))
        check_length(model, batch.input_ids.shape[1] + new_tokens)
        count = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        output = model.generate(**inputs, **count, **AS_IT_IS, do_sample=False, pad_token_id=0)
        texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :])
        for row, text in zip(rows, texts, strict=True):
            number = NUMBER.match(text)
            right[row] = number is not None and number[1] == items.texts[row].strip()
    return right


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer, text: str, window: int = 96) -> float:
    """exp of the mean loss per token of a text, in windows of `window` tokens, the rest left out;
    each begins with the tokenizer's beginning of text, where it puts one before a prompt.

    Example:
        >>> perplexity(model, tokenizer, "one two three four " * 20, window=8) > 1
        True
    """
    ids = torch.tensor(prompt_ids(tokenizer, text))
    begins = ids[:1] if ids[0] == tokenizer.bos_token_id else ids[:0]
    ids = ids[len(begins) :]
    if len(ids) < window:
        raise ValueError(f"The text has {len(ids)} tokens, less than a window of {window}.")
    windows = ids[: len(ids) // window * window].view(-1, window)
    windows, losses = torch.cat([begins.expand(len(windows), -1), windows], dim=1), []
    for part in windows.to(input_device(model)).split(4):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        losses.append(F.cross_entropy(logits, part[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).mean().exp().item()
