"""From text to token ids: batches, answers, continuations."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tokenised prompts, padded on one side.

    input_ids, attention_mask: [batch, time]; `start` and `last`: [batch], index of each prompt's first and last real token.
    """

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def start(self) -> Tensor:
        return self.attention_mask.int().argmax(-1)

    @property
    def last(self) -> Tensor:
        return self.start + self.lengths - 1

    @property
    def lengths(self) -> Tensor:
        return self.attention_mask.sum(-1)

    @property
    def position_ids(self) -> Tensor:
        """Positions counted from each prompt's own first token, so that padding does not shift them."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def at_last(self, x: Tensor) -> Tensor:
        """x[b, last_b]: [batch, time, ...] -> [batch, ...]."""
        return x[torch.arange(len(x), device=x.device), self.last.to(x.device)]


def encode(
    tokenizer, prompts: Sequence[str], side: str = "right", device: str | torch.device = "cpu"
) -> Batch:
    """Tokenise prompts into a padded `Batch`.

    Raises ValueError for an empty batch, for a prompt that is not text, or for one without tokens.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    prompts = list(prompts)
    if not prompts:
        raise ValueError("The batch is empty: give at least one prompt.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"Prompt {index} is a {type(prompt).__name__}; prompts are strings.")
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for index, row in enumerate(rows):
        if not row or not prompts[index].strip():
            raise ValueError(
                f"Prompt {index} ({prompts[index]!r}) has no words: give at least one."
            )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, where], mask[index, where] = torch.tensor(row), 1
    return Batch(ids.to(device), mask.to(device))


def answer_ids(tokenizer, answers: str | Sequence[str], count: int) -> list[int]:
    """First token of " answer" for each prompt.

    Raises ValueError when the number of answers is wrong, an answer is empty, its first token is no more than one
    letter or a space, or two different answers of the call begin with the same token. Warns once when an
    answer takes several tokens, since then only its beginning is scored.
    """
    answers = [answers] if isinstance(answers, str) else list(answers)
    if len(answers) != count:
        raise ValueError(
            f"There are {count} prompts but {len(answers)} answers: give one answer per prompt."
        )
    ids, owner, long = [], {}, []
    for answer in answers:
        if not isinstance(answer, str | None):
            raise ValueError(f"Answer {answer!r} is no text: give words.")
        word = (answer or "").strip()
        if not word:
            raise ValueError(
                f"Answer {answer!r} is empty: give a word, or answers=None for the model's own next token."
            )
        pieces = continuation_ids(tokenizer, word)
        first = tokenizer.decode([pieces[0]]).strip()
        if len(pieces) > 1 and len(first) < 2 and first.isascii():
            raise ValueError(
                f"{word!r} takes {len(pieces)} tokens and many words share the first, {first!r}: "
                "choose an answer that begins with a longer token, or answers=None."
            )
        if owner.setdefault(pieces[0], word) != word:
            raise ValueError(
                f"{owner[pieces[0]]!r} and {word!r} both begin with the token {first!r}, so their first tokens "
                "cannot tell them apart: drop one of them or score them in separate calls."
            )
        if len(pieces) > 1:
            long.append(f"{word!r} by {first!r}")
        ids.append(pieces[0])
    if long:
        shown = ", ".join(dict.fromkeys(long[:5])) + (" …" if len(long) > 5 else "")
        warnings.warn(
            f"Answers of several tokens are scored on their first token: {shown}.", stacklevel=3
        )
    return ids


def continuation_ids(tokenizer, word: str) -> list[int]:
    """Token ids of " word" as they follow other text, without special tokens."""
    head = tokenizer("is", add_special_tokens=False)["input_ids"]
    both = tokenizer(f"is {word}", add_special_tokens=False)["input_ids"]
    if both[: len(head)] == head and len(both) > len(head):
        return both[len(head) :]
    return tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
