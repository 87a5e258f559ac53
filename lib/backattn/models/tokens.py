"""From text to token ids: batches, answers, continuations."""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Batch:
    """Tokenised prompts, padded on one side. input_ids, attention_mask: [batch, time]."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def start(self) -> Tensor:
        """Index of each prompt's first token: [batch]."""
        return self.attention_mask.int().argmax(-1)

    @property
    def lengths(self) -> Tensor:
        return self.attention_mask.sum(-1)

    @property
    def last(self) -> Tensor:
        """Index of each prompt's last token: [batch]."""
        return self.start + self.lengths - 1

    @property
    def rows(self) -> list[list[int]]:
        """Each prompt's token ids without the padding."""
        pairs = zip(self.input_ids, self.attention_mask.bool(), strict=True)
        return [ids[real].tolist() for ids, real in pairs]

    @property
    def position_ids(self) -> Tensor:
        """Positions counted from each prompt's first token, so that padding does not shift them."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with: model(**batch.inputs)."""
        names = ("input_ids", "attention_mask", "position_ids")
        return {name: getattr(self, name) for name in names}

    def at_last(self, x: Tensor) -> Tensor:
        """x[b, last_b]: [batch, time, ...] -> [batch, ...]."""
        return x[torch.arange(len(x), device=x.device), self.last.to(x.device)]


def encode(
    tokenizer, prompts: Sequence[str], side: str = "right", device: str | torch.device = "cpu"
) -> Batch:
    """Tokenise prompts (see `prompt_ids`) into a `Batch`, padded on the right or on the left.

    Raises ValueError for an empty batch, for a prompt that is not text, or for one without tokens.

    Example:
        >>> encode(tokenizer, ["the capital of Spain", "Spain"], side="left").attention_mask
        tensor([[1, 1, 1, 1],
                [0, 0, 0, 1]])
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("The batch is empty: give at least one prompt.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"Prompt {index} is a {type(prompt).__name__}; prompts are strings.")
    rows = _rows(tokenizer, prompts)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        if not row or not prompt.strip():
            raise ValueError(f"Prompt {index} ({prompt!r}) has no words: give at least one.")
    return padded(rows, tokenizer.pad_token_id or 0, side, device)


def padded(rows: Sequence[Sequence[int]], pad=0, side="left", device="cpu") -> Batch:
    """A batch of token ids, padded on one side."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([row * 0 + 1 for row in tensors], batch_first=True, padding_side=side)
    return Batch(ids.to(device), mask.to(device))


def prompt_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on: what the tokenizer puts before it, and the text.

    What it cuts, pads, or puts behind is left out, and what it puts before a text that begins with
    it. Warns of that; raises ValueError where special tokens change how the text is cut.

    Example:
        >>> len(prompt_ids(tokenizer, "the capital of Spain"))
        4
    """
    return _rows(tokenizer, [text])[0]


def _rows(tokenizer, texts: list[str]) -> list[list[int]]:
    """`prompt_ids` of many texts."""
    whole, bare = (
        tokenizer(texts, add_special_tokens=x, padding=False, truncation=False)["input_ids"]
        for x in (True, False)
    )
    if whole == bare:
        return bare
    rows, left_out = [], set()
    for full, text in zip(whole, bare, strict=True):
        places = range(len(full) - len(text) + 1)
        start = next((i for i in places if full[i : i + len(text)] == text), None)
        if start is None:
            raise ValueError("This tokenizer cuts texts otherwise where it adds special tokens.")
        before, behind = full[:start], full[start + len(text) :]
        # A text may begin with what the tokenizer puts before it, or with the end of that.
        twice = next(i for i in range(start, -1, -1) if before[start - i :] == text[:i])
        rows.append(before + text[twice:])
        left_out |= {f"{tokenizer.decode([i])!r} behind" for i in behind}
        left_out |= {f"a second {tokenizer.decode([i])!r} before" for i in text[:twice]}
    if left_out:
        _say(f"The tokenizer puts {', '.join(sorted(left_out))} a prompt: it is left out.")
    return rows


@functools.cache
def _say(message: str) -> None:
    """Warn once."""
    warnings.warn(message, stacklevel=6)


def check_indices(
    what: str, wanted: Sequence[Sequence[int]], sizes: Sequence[int], first: int = 0
) -> None:
    """Raises TypeError or IndexError unless wanted[i] are whole numbers from `first` to below
    sizes[i], and ValueError where it is not one list for each."""
    if len(wanted) != len(sizes):
        raise ValueError(f"{what}: give {len(sizes)} lists of them, not {len(wanted)}.")
    for index, (values, size) in enumerate(zip(wanted, sizes, strict=True)):
        for value in values:
            number = value.item() if hasattr(value, "item") else value
            if type(number) is not int:
                raise TypeError(f"{what} {value!r} of prompt {index} is no whole number.")
            if not first <= number < size:
                end = f"there are {size}, and the first is {first}."
                raise IndexError(f"{what} {number} of prompt {index} is not in range: {end}")


def tells_little(tokenizer, pieces: Sequence[int]) -> bool:
    """Whether a word of several tokens begins with one that many words share, one letter or a
    space: it cannot be judged by its first token.

    Example:
        >>> tells_little(tokenizer, [5])
        False
    """
    first = tokenizer.decode([pieces[0]]).strip()
    return len(pieces) > 1 and len(first) < 2 and first.isascii()


def answer_ids(tokenizer, answers: str | Sequence[str | int] | Tensor, count: int) -> list[int]:
    """The token by which each prompt's answer is scored: an id as it is, the first of " word".

    Raises ValueError when the number of answers is wrong, an id is not in the vocabulary, a word is
    empty, its first token is one letter or a space, or two words begin with the same token. Warns
    when a word takes several tokens, since only its beginning is scored.

    Example:
        >>> paris = answer_ids(tokenizer, ["Paris", "Rome"], 2)[0]
        >>> answer_ids(tokenizer, [paris], 1) == [paris]
        True
    """
    answers = answers.tolist() if isinstance(answers, Tensor) else answers
    answers = [answers] if isinstance(answers, str | Integral) else list(answers)
    if len(answers) != count:
        raise ValueError(
            f"There are {count} prompts but {len(answers)} answers: give one answer per prompt."
        )
    ids, words, long = [], {}, []
    for answer in answers:
        if isinstance(answer, Integral) and not isinstance(answer, bool):
            if not 0 <= answer < len(tokenizer):
                raise ValueError(
                    f"Answer {answer} is no token id: this tokenizer has 0 to {len(tokenizer) - 1}."
                )
            ids.append(int(answer))
            continue
        if not isinstance(answer, str) or not (word := answer.strip()):
            raise ValueError(
                f"Answer {answer!r} is empty or no text: give words or token ids, or answers=None "
                "for the model's own next token."
            )
        pieces = continuation_ids(tokenizer, word)
        first = tokenizer.decode([pieces[0]]).strip()
        if tells_little(tokenizer, pieces):
            raise ValueError(
                f"{word!r} takes {len(pieces)} tokens and many words share the first, {first!r}: "
                "choose an answer that begins with a longer token, or answers=None."
            )
        if words.setdefault(pieces[0], word) != word:
            raise ValueError(
                f"{words[pieces[0]]!r} and {word!r} both begin with the token {first!r}, which "
                "cannot tell them apart: drop one of them or score them in separate calls."
            )
        long += [f"{word!r} by {first!r}"] * (len(pieces) > 1)
        ids.append(pieces[0])
    if long:
        shown = ", ".join(dict.fromkeys(long[:5])) + (" …" if len(long) > 5 else "")
        message = f"Answers of several tokens are scored on their first token: {shown}."
        warnings.warn(message, stacklevel=5)
    return ids


def continuation_ids(tokenizer, word: str) -> list[int]:
    """Token ids of " word" as they follow other text, without special tokens.

    Example:
        >>> [tokenizer.decode(i) for i in continuation_ids(tokenizer, "Paris")]
        [' Paris']
    """
    head = tokenizer("is", add_special_tokens=False)["input_ids"]
    both = tokenizer(f"is {word}", add_special_tokens=False)["input_ids"]
    if both[: len(head)] == head and len(both) > len(head):
        return both[len(head) :]
    return tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
