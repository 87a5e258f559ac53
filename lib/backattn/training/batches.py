"""Questions as token ids, and batches of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backattn.models.tokens import Batch

IGNORED = -100  # label of positions without a target


@dataclass
class Items:
    """Tokenised questions.

    prompts, answers: token ids; texts: the answers as text. accepted: per question the first tokens that count as
    right, or None where the whole answer must be right. number_continuations: tokens that, after an answer, would make it another
    number. kinds: of each question, where the learning curve tells them apart.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    accepted: list[frozenset[int]] | None
    number_continuations: frozenset[int]
    kinds: list[str] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each question as the model gets it, the answer but for its last token included: [n]."""
        return np.array(
            [len(p) + len(a) - 1 for p, a in zip(self.prompts, self.answers, strict=True)]
        )


@dataclass(frozen=True)
class Questions(Batch):
    """A batch padded on the left, with labels [B, K], the targets of the last K positions."""

    labels: Tensor


def numbers(tokenizer, frame: pd.DataFrame, end: str = ".") -> Items:
    """Questions (prompt, answer) whose answer is a number, all of whose tokens must be right; `end` is learnt after it.

    Raises ValueError for an empty frame.
    """
    prompts, answers = _tokens(tokenizer, frame, end)
    digits = frozenset(
        i for word, i in tokenizer.get_vocab().items() if word[:1] in set("0123456789")
    )
    return Items(prompts, answers, frame["answer"].tolist(), None, digits)


def first_tokens(
    tokenizer, frame: pd.DataFrame, accepted: Sequence[frozenset[int]] | None = None
) -> Items:
    """Questions judged by the first token of the answer, one of `accepted` (None: the answer's own, which is learnt).

    Raises ValueError for an empty frame.
    """
    prompts, answers = _tokens(tokenizer, frame)
    accepted = [frozenset(answer[:1]) for answer in answers] if accepted is None else list(accepted)
    return Items(
        prompts, [answer[:1] for answer in answers], frame["answer"].tolist(), accepted, frozenset()
    )


def _tokens(
    tokenizer, frame: pd.DataFrame, end: str = ""
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and of what follows them."""
    if frame.empty:
        raise ValueError("There are no questions: choose another split, or more of them.")
    prompts, answers = [], []
    for prompt, answer in zip(frame["prompt"], frame["answer"], strict=True):
        head, both = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer + end)["input_ids"]
        if both[: len(head)] != head:
            raise ValueError(
                f"The tokens of {prompt!r} change when {answer!r} follows: word the prompt differently."
            )
        prompts.append(head)
        answers.append(both[len(head) :])
    return prompts, answers


def collate(items: Items, rows: Iterable[int], device: str | torch.device = "cpu") -> Questions:
    """A batch of questions with their answers, but for each answer's last token, which is only a target."""
    rows = list(rows)
    texts = [items.prompts[row] + items.answers[row][:-1] for row in rows]
    width, keep = max(map(len, texts)), max(len(items.answers[row]) for row in rows)
    ids, labels = np.zeros((len(rows), width), dtype=np.int64), np.full((len(rows), keep), IGNORED)
    mask = np.zeros_like(ids)
    for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
        ids[place, width - len(text) :] = text
        mask[place, width - len(text) :] = 1
        labels[place, keep - len(items.answers[row]) :] = items.answers[row]
    return Questions(*(torch.from_numpy(x).to(device) for x in (ids, mask, labels)))


def in_halves(do: Callable[[list[int]], object], rows: list[int]) -> list:
    """[do(rows)], or what it returns for halves of them, and so on, where the device's memory is short."""
    try:
        return [do(rows)]
    except torch.OutOfMemoryError:
        if len(rows) < 2:
            raise
    torch.cuda.empty_cache()  # nothing where there is no GPU
    half = len(rows) // 2
    return in_halves(do, rows[:half]) + in_halves(do, rows[half:])
