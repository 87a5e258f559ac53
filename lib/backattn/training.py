"""One training loop, for adapters on a frozen model and for small models from scratch.

Under `accelerate launch` each process takes a part of every batch, and gradients are added up over processes.

Batches are padded on the left, so that all answers end in the last column; logits are taken only where answers are.
With a frozen base the states of the first pass are computed once per question and kept (`FirstPasses`).
"""

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup
from transformers.cache_utils import Cache

from . import runtime
from .arch import input_device
from .back_attention import TwoPassModel
from .residual import Batch
from .runtime import atomic_file, progress

IGNORED = -100  # label of positions without a target


@dataclass
class Items:
    """Tokenised questions.

    prompts, answers: token ids; texts: the answers as text. accepted: per question the first tokens that count as
    right, or None where the whole answer must be right. goes_on: tokens that, after an answer, would make it another
    number. kinds: of each question, where the learning curve tells them apart.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    accepted: list[frozenset[int]] | None
    goes_on: frozenset[int]
    kinds: list[str] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each question as the model gets it, the answer but for its last token included: [n]."""
        return np.array([len(p) + len(a) - 1 for p, a in zip(self.prompts, self.answers, strict=True)])


@dataclass(frozen=True)
class Questions(Batch):
    """A batch padded on the left, with labels [B, K], the targets of the last K positions."""

    labels: Tensor


def numbers(tokenizer, frame: pd.DataFrame, end: str = ".") -> Items:
    """Questions (prompt, answer) whose answer is a number, all of whose tokens must be right; `end` is learnt after it.

    Raises ValueError for an empty frame.
    """
    prompts, answers = _tokens(tokenizer, frame, end)
    digits = frozenset(i for word, i in tokenizer.get_vocab().items() if word[:1] in set("0123456789"))
    return Items(prompts, answers, frame["answer"].tolist(), None, digits)


def first_tokens(tokenizer, frame: pd.DataFrame, accepted: Sequence[frozenset[int]] | None = None) -> Items:
    """Questions judged by the first token of the answer, one of `accepted` (None: the answer's own, which is learnt).

    Raises ValueError for an empty frame.
    """
    prompts, answers = _tokens(tokenizer, frame)
    accepted = [frozenset(answer[:1]) for answer in answers] if accepted is None else list(accepted)
    return Items(prompts, [answer[:1] for answer in answers], frame["answer"].tolist(), accepted, frozenset())


def _tokens(tokenizer, frame: pd.DataFrame, end: str = "") -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and of what follows them."""
    if frame.empty:
        raise ValueError("There are no questions: choose another split, or more of them.")
    prompts, answers = [], []
    for prompt, answer in zip(frame["prompt"], frame["answer"], strict=True):
        head, both = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer + end)["input_ids"]
        if both[: len(head)] != head:
            raise ValueError(f"The tokens of {prompt!r} change when {answer!r} follows: word the prompt differently.")
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
                self._compute(self.group_of[row], batch.ids.device)
        first = self.kept[rows[0]]
        out = first.new_zeros(len(first), *batch.ids.shape, first.shape[-1])
        for place, row in enumerate(rows):
            own = self.kept[row]
            out[:, place, -own.shape[1] :] = own
        return out

    def _compute(self, rows: list[int], device: torch.device) -> None:
        in_halves(lambda part: self._pass(part, device), rows)

    def _pass(self, rows: list[int], device: torch.device) -> None:
        batch = collate(self.items, rows, device=device)
        states = self.model.first_pass_states(batch.ids, batch.mask, batch.position_ids)
        for place, row in enumerate(rows):
            self.kept[row] = states[:, place, -int(batch.mask[place].sum()) :].clone()


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


def answer_logits(
    model: nn.Module, batch: Questions, first_pass: Tensor | None = None, cache: Cache | None = None
) -> Tensor:
    """The model's logits where the answers' tokens are predicted: [B, K, V], fp32.

    first_pass, cache: see `TwoPassModel.forward`; with a cache of these questions first_pass is of their last tokens
    only, K or more of them.
    """
    given = {} if first_pass is None else {"first_pass": first_pass}
    given |= {} if cache is None else {"past_key_values": cache}
    width, keep = batch.ids.shape[1] if cache is None else first_pass.shape[2], batch.labels.shape[1]
    # Places, not a count: slicing leaves a view, which torch multiplies by a copy of a frozen unembedding per row.
    places = torch.arange(width - keep, width, device=batch.ids.device)
    out = model(
        input_ids=batch.ids[:, -width:],
        attention_mask=batch.mask,
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
        right = [int(token) in items.accepted[row] for token, row in zip(said[:, -1], rows, strict=True)]
        return torch.tensor(right)
    same = (said == batch.labels) | (batch.labels == IGNORED)
    goes_on = torch.tensor(sorted(items.goes_on), device=said.device)
    same[:, -1] = ~torch.isin(said[:, -1], goes_on)  # the last target only ends the answer
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


NUMBER = re.compile(r"\s*(-?\d+)(?!\d|,\d)")  # a full stop ends it, as in training, whatever follows


@torch.no_grad()
def written(model: nn.Module, tokenizer, items: Items, new_tokens: int = 8, batch_size: int = 64) -> np.ndarray:
    """Which questions greedy generation answers with the right number, however it is spaced and goes on: [n] bool.

    The same rule for arms that were trained on a format and for those that were not; an early end of text is not
    allowed, since models tuned for chat like to say nothing.
    """
    asked = replace(items, answers=[[0]] * len(items))  # prompts alone: a last answer token is never in the batch
    right, order = np.zeros(len(items), dtype=bool), np.argsort(asked.lengths, kind="stable")
    for start in progress(range(0, len(items), batch_size), "writing", unit="batch"):
        rows = order[start : start + batch_size].tolist()
        batch = collate(asked, rows, device=input_device(model))
        made = model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        for row, text in zip(rows, tokenizer.batch_decode(made[:, batch.ids.shape[1] :]), strict=True):
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
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).mean().exp().item()


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train: AdamW, warm-up, then cosine decay; the seed draws the order of the questions."""

    steps: int
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 0.0
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0  # of the gradient's norm
    seed: int = 0
    evaluations: int = 4  # on the validation questions, evenly spaced, the last one at the end
    autocast: bool = False  # matrix products in bf16, weights and sums in fp32


def train(
    model: nn.Module,
    items: Items,
    recipe: Recipe,
    validation: Items | None = None,
    checkpoint: Path | None = None,
    save_every: int = 100,
    keep_first_passes: float | None = None,
) -> pd.DataFrame:
    """Train whatever of `model` requires gradients.

    Args:
        checkpoint: a file where weights, optimiser and progress are kept every `save_every` steps; where it exists,
            training goes on from it, to the same result as without the stop. It stays, so that nothing is lost before
            the caller has kept the result.
        keep_first_passes: gibibytes for the first pass's states of a frozen base, None: a quarter of what is free on
            the device; where they would take more, both passes run each time, which is said, to the same result but for
            rounding.

    Returns the learning curve: step, loss (mean since the row before), train (share answered right since then),
    validation (share right; NaN without questions for it), seconds (of all sittings), losses (of each step since the
    row before); where validation questions have kinds also kinds (kind -> share right).

    Where the device's memory does not hold a batch, it is taken in two parts from then on, then in four, and so on,
    which is said; the gradient stays that of the whole batch. Validation is halved likewise. All processes of
    `accelerate launch` must call this alike; each returns the curve of the whole, and the first one writes the
    checkpoint.

    Raises ValueError when nothing is to be trained or a batch has fewer questions than there are processes,
    FloatingPointError when the loss is no number any more, and torch.OutOfMemoryError when not one question fits.
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError("No weight of this model requires a gradient: there is nothing to train.")
    optimiser = torch.optim.AdamW(weights.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimiser, round(recipe.warmup * recipe.steps), recipe.steps)
    state = {"step": 0, "losses": [], "right": [], "curve": [], "seconds": 0.0}
    state |= _load(checkpoint, recipe, weights, optimiser, schedule)
    reuse = isinstance(model, TwoPassModel) and not any(p.requires_grad for p in model.base_model.parameters())
    passes = _first_passes(model, items, keep_first_passes) if reuse else None
    lengths = items.lengths
    marks = {round(recipe.steps * (k + 1) / recipe.evaluations) for k in range(recipe.evaluations)}
    begin, before = time.monotonic(), state["seconds"]
    batches = _Batches(model, items, recipe, passes)
    model.eval()  # no dropout: two passes of one model must agree
    with progress(description="training", total=recipe.steps, initial=state["step"], unit="step") as bar:
        while state["step"] < recipe.steps:
            rows = _rows_of(state["step"], lengths, recipe)
            loss, right = batches.gradients(rows, list(weights.values()))
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"The loss is {loss} at step {state['step']}: lower the learning rate ({recipe.learning_rate:g})."
                )
            torch.nn.utils.clip_grad_norm_(weights.values(), recipe.clip)
            optimiser.step()
            schedule.step()
            state["step"] += 1
            state["losses"].append(loss)
            state["right"].append(right)
            bar.update()
            bar.set_postfix(loss=f"{np.mean(state['losses'][-20:]):.3f}", right=f"{np.mean(state['right'][-20:]):.0%}")
            if state["step"] in marks:
                right = evaluate(model, validation)[0] if validation else np.array([np.nan])
                row = {"loss": np.mean(state["losses"]), "train": np.mean(state["right"]), "validation": right.mean()}
                state["seconds"] = before + time.monotonic() - begin
                row |= {"step": state["step"], "seconds": state["seconds"]}
                losses = [round(loss, 4) for loss in state["losses"]]
                state["curve"].append({**{k: float(v) for k, v in row.items()}, "losses": losses})
                if validation and validation.kinds:
                    state["curve"][-1]["kinds"] = pd.Series(right).groupby(validation.kinds).mean().to_dict()
                state["losses"], state["right"] = [], []
            if checkpoint and (state["step"] % save_every == 0 or state["step"] in marks):
                state["seconds"] = before + time.monotonic() - begin
                if batches.world.is_main_process:
                    _save(checkpoint, recipe, weights, optimiser, schedule, state)
    columns = ["step", "loss", "train", "validation", "seconds", "losses"]
    return pd.DataFrame(state["curve"], columns=columns + ["kinds"] * bool(validation and validation.kinds))


def _first_passes(model: TwoPassModel, items: Items, room: float | None) -> FirstPasses | None:
    """The states of the first pass, where there is room for them."""
    if room is None:
        device = input_device(model)
        sharing = runtime.world().num_processes if device.type == "cpu" else 1
        room = runtime.free_bytes(device) / 2**30 / 4 / sharing
    need = FirstPasses.gigabytes(model, items)
    if need <= room:
        return FirstPasses(model, items)
    print(
        f"The first pass's states would take {need:.1f} GiB, and there is room for {room:.1f}: it runs each time.",
        file=sys.stderr,
    )
    return None


class _Batches:
    """Gradients of whole batches, of which each process takes a part, in as many pieces as its memory asks for."""

    def __init__(self, model: nn.Module, items: Items, recipe: Recipe, passes: FirstPasses | None):
        self.model, self.items, self.passes, self.autocast = model, items, passes, recipe.autocast
        self.world, self.pieces = runtime.world(), 1
        size = min(recipe.batch_size, len(items))
        if size < self.world.num_processes:
            raise ValueError(f"{self.world.num_processes} processes cannot share a batch of {size}.")

    def gradients(self, rows: list[int], weights: Sequence[Tensor]) -> tuple[float, float]:
        """Put the gradient of a batch's mean loss on the weights; returns (loss, share answered right)."""
        mine = rows[self.world.process_index :: self.world.num_processes]
        targets = sum(len(self.items.answers[row]) for row in rows)
        while True:
            for p in weights:
                p.grad = None
            try:
                parts = [self._piece(part.tolist(), targets) for part in np.array_split(mine, self.pieces)]
                break
            except torch.OutOfMemoryError:
                if self.pieces >= len(mine):
                    raise
                self.pieces = min(2 * self.pieces, len(mine))
                print(f"Out of memory: a batch is taken in {self.pieces} pieces from here on.", file=sys.stderr)
            torch.cuda.empty_cache()  # nothing where there is no GPU
        sums = [sum(values) for values in zip(*parts, strict=True)]
        if self.world.num_processes > 1:
            for p in weights:
                p.grad = reduce(p.grad, "sum")
            sums = reduce(torch.tensor(sums, dtype=torch.float64, device=weights[0].device), "sum").tolist()
        return sums[0], sums[1] / len(rows)

    def _piece(self, rows: list[int], targets: int) -> tuple[float, int]:
        """(its part of the loss, questions answered right) of some rows, whose gradient is added."""
        batch = collate(self.items, rows, device=input_device(self.model))
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=self.autocast):
            logits = answer_logits(self.model, batch, self.passes(rows, batch) if self.passes else None)
        labels = batch.labels.flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum") / targets
        loss.backward()
        return loss.item(), int(right_answers(logits.detach(), self.items, rows, batch).sum())


def _rows_of(step: int, lengths: np.ndarray, recipe: Recipe) -> list[int]:
    """The questions of a step: each once per epoch, in an order drawn from seed and epoch, so that no state is kept.

    Questions of similar length share a batch: of every eight batches' worth the shorter ones go together.
    """
    size = min(recipe.batch_size, len(lengths))
    per_epoch = len(lengths) // size
    epoch, place = divmod(step, per_epoch)
    draw = np.random.default_rng([recipe.seed, epoch])
    order = draw.permutation(len(lengths))[: per_epoch * size]
    parts = [order[i : i + 8 * size] for i in range(0, len(order), 8 * size)]
    order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    return order.reshape(per_epoch, size)[draw.permutation(per_epoch)[place]].tolist()


def _save(path: Path, recipe: Recipe, weights: dict, optimiser, schedule, state: dict) -> None:
    with atomic_file(path) as temporary:
        torch.save(
            {
                "recipe": asdict(recipe),
                "weights": {name: p.detach() for name, p in weights.items()},
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "state": state,
            },
            temporary,
        )


def _load(path: Path | None, recipe: Recipe, weights: dict, optimiser, schedule) -> dict:
    """The progress kept in `path`, with weights, optimiser and schedule put back; empty where there is none."""
    if path is None or not path.exists():
        return {}
    try:
        kept = torch.load(path, map_location=next(iter(weights.values())).device, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise OSError(f"{path} is damaged, or holds more than numbers, and was not used: delete it.") from error
    if kept["recipe"] != asdict(recipe) or kept["weights"].keys() != weights.keys():
        raise ValueError(f"{path} belongs to another training run: delete it, or train into another folder.")
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(kept["weights"][name])
    optimiser.load_state_dict(kept["optimiser"])
    schedule.load_state_dict(kept["schedule"])
    return kept["state"]
