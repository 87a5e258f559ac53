"""Questions as token ids, and batches of them."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backattn.models.tokens import Batch, prompt_ids

IGNORED = -100  # label of positions without a target


@dataclass
class Items:
    """Tokenised questions. prompts, answers: token ids; texts: the answers as text. accepted: per
    question the first tokens that count as right, or None where the whole answer must be right.
    number_continuations: tokens that, after an answer, would make it another number. kinds: of each
    question, where the learning curve tells them apart. memories: token ids of texts whose first
    pass is read instead of the questions' own, positions counted
    from the end."""

    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    accepted: list[frozenset[int]] | None
    number_continuations: frozenset[int]
    kinds: list[str] | None = None
    memories: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each question as the model gets it, all of the answer but its last: [n]."""
        pairs = zip(self.prompts, self.answers, strict=True)
        return np.array([len(prompt) + len(answer) - 1 for prompt, answer in pairs])


@dataclass(frozen=True)
class Questions(Batch):
    """A batch padded on the left, with labels [B, K], the targets of the last K positions, and the
    texts whose first pass is read, where it is not their own."""

    labels: Tensor
    memories: Batch | None = None


def numbers(tokenizer, frame: pd.DataFrame, end: str = ".") -> Items:
    """Questions (columns prompt, answer) answered by a number, all of whose tokens must be right,
    and after which `end` is learnt. Raises ValueError for an empty frame, and for another answer.

    Example:
        >>> items = numbers(tokenizer, pd.DataFrame({"prompt": ["two is"], "answer": [" 12"]}))
        >>> tokenizer.decode(items.answers[0])
        ' 12.'
    """
    if other := [text for text in frame["answer"] if not re.fullmatch(r"\s*[-+]?\d+", text)]:
        raise ValueError(
            f"The answer {other[0]!r} is no whole number: judge it by its first token."
        )
    prompts, answers = _tokens(tokenizer, frame, end)
    vocabulary = tokenizer.get_vocab().items()
    digits = frozenset(i for word, i in vocabulary if word[:1] in [*"0123456789"])
    return Items(prompts, answers, frame["answer"].tolist(), None, digits)


def first_tokens(
    tokenizer, frame: pd.DataFrame, accepted: Sequence[frozenset[int]] | None = None
) -> Items:
    """Questions judged by the first token of the answer, one of `accepted` (None: its own); its own
    is what is learnt. Raises ValueError for an empty frame.

    Example:
        >>> frame = pd.DataFrame({"prompt": ["France's capital is"], "answer": [" Paris"]})
        >>> [tokenizer.decode(answer) for answer in first_tokens(tokenizer, frame).answers]
        [' Paris']
    """
    prompts, answers = _tokens(tokenizer, frame)
    answers = [answer[:1] for answer in answers]
    accepted = [frozenset(answer) for answer in answers] if accepted is None else list(accepted)
    if len(accepted) != len(prompts):
        raise ValueError(f"There are {len(prompts)} questions, and `accepted` for {len(accepted)}.")
    return Items(prompts, answers, frame["answer"].tolist(), accepted, frozenset())


def _tokens(tokenizer, frame: pd.DataFrame, end: str = "") -> tuple[list, list]:
    """Token ids of prompts, and of what follows each."""
    if frame.empty:
        raise ValueError("There are no questions: choose another split, or more of them.")
    prompts, answers = [], []
    for prompt, answer in zip(frame["prompt"], frame["answer"], strict=True):
        head, both = (prompt_ids(tokenizer, text) for text in (prompt, prompt + answer + end))
        if both[: len(head)] != head:
            change = f"The tokens of {prompt!r} change when {answer!r} follows"
            raise ValueError(f"{change}: word the prompt differently.")
        prompts.append(head)
        answers.append(both[len(head) :])
    return prompts, answers


def collate(items: Items, rows: Iterable[int], device: str | torch.device = "cpu") -> Questions:
    """A batch of questions with their answers, each but for the last token, only a target.

    Example:
        >>> items = Items([[5], [7]], [[8, 9], [10]], ["a", "b"], None, frozenset())
        >>> collate(items, [0, 1]).input_ids.tolist(), collate(items, [0, 1]).labels.tolist()
        ([[5, 8], [0, 7]], [[8, 9], [-100, 10]])
    """
    rows = list(rows)
    texts = [items.prompts[row] + items.answers[row][:-1] for row in rows]
    answers = [items.answers[row] for row in rows]
    padded = []
    for rows_of, filler in ((texts, 0), ([[1] * len(t) for t in texts], 0), (answers, IGNORED)):
        width = max(map(len, rows_of))
        padded.append(torch.tensor([[filler] * (width - len(row)) + row for row in rows_of]))
    memories = None
    if items.memories is not None:
        told = replace(items, prompts=items.memories, answers=[[0]] * len(items), memories=None)
        memories = collate(told, rows, device)
    return Questions(*(x.to(device) for x in padded), memories)


def in_halves(compute: Callable[[list[int]], object], rows: list[int]) -> list:
    """[compute(rows)], or its results for halves of them, and so on, where memory is short."""
    try:
        return [compute(rows)]
    except torch.OutOfMemoryError:
        if len(rows) < 2:
            raise
    torch.cuda.empty_cache()  # nothing where there is no GPU
    half = len(rows) // 2
    return in_halves(compute, rows[:half]) + in_halves(compute, rows[half:])
