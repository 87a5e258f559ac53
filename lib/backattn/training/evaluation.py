"""Which questions a model answers right."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from backattn.adapters.two_pass import TwoPassModel
from backattn.models.devices import input_device
from backattn.runtime import progress
from backattn.training.batches import IGNORED, Items, Questions, collate, in_halves


class FirstPasses:
    """The states of the first pass of each question, computed when first wanted and kept.

    Questions are computed in fixed groups of similar length, so that a resumed run gets the same states to the bit.
    Of use only where the base model is frozen and the adapter takes given states.
    """

    def __init__(self, model: TwoPassModel, items: Items, group: int = 32):
        self.model, self.items = model, items
        order = np.argsort(items.lengths, kind="stable")
        groups = [order[i : i + group].tolist() for i in range(0, len(order), group)]
        self.group_of = {row: rows for rows in groups for row in rows}
        self.kept: dict[int, Tensor] = {}  # row -> [K, T, D]

    @staticmethod
    def gigabytes(model: TwoPassModel, items: Items) -> float:
        """What keeping all states takes."""
        weight = next(model.base_model.parameters())
        width = model.base_model.config.hidden_size
        return len(model.needed) * int(items.lengths.sum()) * width * weight.element_size() / 2**30

    def __call__(self, rows: Sequence[int], batch: Questions) -> Tensor:
        """[K, B, T, D] for a batch made of `rows`; zero where it is padded."""
        for row in rows:
            if row not in self.kept:
                self._compute(self.group_of[row], batch.input_ids.device)
        first = self.kept[rows[0]]
        out = first.new_zeros(len(first), *batch.input_ids.shape, first.shape[-1])
        for place, row in enumerate(rows):
            own = self.kept[row]
            out[:, place, -own.shape[1] :] = own
        return out

    def _compute(self, rows: list[int], device: torch.device) -> None:
        in_halves(lambda part: self._pass(part, device), rows)

    def _pass(self, rows: list[int], device: torch.device) -> None:
        batch = collate(self.items, rows, device=device)
        states = self.model.first_pass_states(
            batch.input_ids, batch.attention_mask, batch.position_ids
        )
        for place, row in enumerate(rows):
            self.kept[row] = states[:, place, -int(batch.attention_mask[place].sum()) :].clone()


def answer_logits(
    model: nn.Module, batch: Questions, first_pass: Tensor | None = None, cache: Cache | None = None
) -> Tensor:
    """The model's logits where the answers' tokens are predicted: [B, K, V], fp32.

    first_pass, cache: see `TwoPassModel.forward`; with a cache of these questions first_pass is of their last tokens
    only, K or more of them.
    """
    given = {} if first_pass is None else {"first_pass": first_pass}
    given |= {} if cache is None else {"past_key_values": cache}
    width, keep = (
        batch.input_ids.shape[1] if cache is None else first_pass.shape[2],
        batch.labels.shape[1],
    )
    # Places, not a count: slicing leaves a view, which torch multiplies by a copy of a frozen unembedding per row.
    places = torch.arange(width - keep, width, device=batch.input_ids.device)
    out = model(
        input_ids=batch.input_ids[:, -width:],
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids[:, -width:],
        logits_to_keep=places,
        use_cache=False,
        **given,
    )
    return out.logits.float()


def right_answers(logits: Tensor, items: Items, rows: Sequence[int], batch: Questions) -> Tensor:
    """Which questions greedy decoding would answer right: [B] bool.

    The whole answer by its own tokens, then anything that does not make it another number; or an accepted first token.
    """
    said = logits.argmax(-1)  # [B, K]
    if items.accepted is not None:
        right = [
            int(token) in items.accepted[row] for token, row in zip(said[:, -1], rows, strict=True)
        ]
        return torch.tensor(right)
    same = (said == batch.labels) | (batch.labels == IGNORED)
    number_continuations = torch.tensor(sorted(items.number_continuations), device=said.device)
    same[:, -1] = ~torch.isin(
        said[:, -1], number_continuations
    )  # the last target only ends the answer
    return same.all(-1).cpu()


@torch.no_grad()
def evaluate(model: nn.Module, items: Items, batch_size: int = 64) -> tuple[np.ndarray, float]:
    """(which questions are answered right [n] bool, mean loss per target token)."""
    right, losses = np.zeros(len(items), dtype=bool), 0.0
    order = np.argsort(items.lengths, kind="stable")

    def ask(rows: list[int]) -> float:
        batch = collate(items, rows, device=input_device(model))
        logits = answer_logits(model, batch)
        right[rows] = right_answers(logits, items, rows, batch).numpy()
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").item()

    for start in progress(range(0, len(items), batch_size), "testing", unit="batch"):
        losses += sum(in_halves(ask, order[start : start + batch_size].tolist()))
    return right, losses / sum(map(len, items.answers))


NUMBER = re.compile(
    r"\s*(-?\d+)(?!\d|,\d)"
)  # a full stop ends it, as in training, whatever follows


@torch.no_grad()
def written(
    model: nn.Module, tokenizer, items: Items, new_tokens: int = 8, batch_size: int = 64
) -> np.ndarray:
    """Which questions greedy generation answers with the right number, however it is spaced and goes on: [n] bool.

    The same rule for arms that were trained on a format and for those that were not; an early end of text is not
    allowed, since models tuned for chat like to say nothing.
    """
    asked = replace(
        items, answers=[[0]] * len(items)
    )  # prompts alone: a last answer token is never in the batch
    right, order = np.zeros(len(items), dtype=bool), np.argsort(asked.lengths, kind="stable")
    for start in progress(range(0, len(items), batch_size), "writing", unit="batch"):
        rows = order[start : start + batch_size].tolist()
        batch = collate(asked, rows, device=input_device(model))
        made = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        for row, text in zip(
            rows, tokenizer.batch_decode(made[:, batch.input_ids.shape[1] :]), strict=True
        ):
            number = NUMBER.match(text)
            right[row] = number is not None and number[1] == items.texts[row].strip()
    return right


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer, text: str, window: int = 96) -> float:
    """exp of the mean loss per token of a text, read in windows of `window` tokens, the rest left out."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    ids = ids[: len(ids) // window * window].view(-1, window).to(input_device(model))
    losses = []
    for part in ids.split(4):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()  # [B, T-1, V]
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        )
    return torch.cat(losses).mean().exp().item()
