"""One training loop, for adapters on a frozen model and for small models from scratch.

Batches are padded on the left; logits are taken only where answers are. With a frozen base the
first pass's states are computed once per question. Under `accelerate launch` each process takes a
part of every batch; gradients are added up.
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from backattn import runtime
from backattn.adapters.saving import sample_weights
from backattn.adapters.two_pass import TwoPassModel
from backattn.files import atomic_file
from backattn.models.devices import input_device
from backattn.training.batches import IGNORED, Items, collate
from backattn.training.evaluation import FirstPasses, answer_logits, evaluate, right_answers


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train: AdamW, warm-up, then cosine decay. The seed draws the order
    of the questions."""

    steps: int
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 0.0
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0  # of the gradient's norm
    seed: int = 0
    evaluations: int = 4  # on the validation questions, evenly spaced, the last one at the end
    autocast: bool = False  # matrix products in bf16 where the device has them, all else in fp32
    kl: float = 0.0  # weight of KL(frozen model || trained one) on ordinary text, nats a token
    windows: int = 4  # of that text, a step


def train(
    model: nn.Module,
    items: Items,
    recipe: Recipe,
    validation: Items | None = None,
    checkpoint: Path | None = None,
    save_every: int = 100,
    keep_first_passes: float | None = None,
    text: Tensor | None = None,
) -> pd.DataFrame:
    """Train whatever of `model` requires gradients.

    text: token ids [N, T] of ordinary text, on which the model shall say what it says without its
    adapter, with weight `recipe.kl` (Jin et al. 2026); the reported loss is that of the questions.

    checkpoint: a file where weights, optimiser and progress are kept every `save_every` steps, and
    stay; where it exists, training goes on from it, to the same result as without the stop.
    keep_first_passes: gibibytes for the first pass's states of a frozen base, None: a quarter of
    what is free on the device; where they would take more, both passes run each time.

    Returns the learning curve: step, loss and train (mean loss, share answered right since the row
    before), validation (share right, or NaN), seconds (of all sittings), losses (of each step since
    the row before); where validation questions have kinds also kinds (kind -> share right).

    A batch that the device's memory does not hold is taken in two parts from then on, then in four,
    and so on; the gradient stays that of the whole batch. All processes of `accelerate launch` must
    call this alike; the first one writes the checkpoint.

    Raises ValueError when nothing is to be trained, a batch has fewer questions than there are
    processes, the checkpoint is of another training, or recipe.kl comes without text or with a
    model that has no adapter; FloatingPointError when the loss is no number any more, and
    torch.OutOfMemoryError when not one question fits.

    Example:
        >>> from backattn.adapters.arms import make_arm
        >>> from backattn.training.batches import first_tokens
        >>> frame = pd.DataFrame({"prompt": ["France's capital is"], "answer": [" Paris"]})
        >>> wrapped = make_arm("bias", model, source_layer=1, dim=8)
        >>> curve = train(wrapped, first_tokens(tokenizer, frame), Recipe(8, 0.1))
        >>> bool(curve["loss"].iloc[-1] < curve["loss"].iloc[0])
        True
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError("No weight of this model requires a gradient: there is nothing to train.")
    if bool(recipe.kl) != (text is not None and len(text) > 0):
        raise ValueError("`recipe.kl` and `text` go together: give both, or neither.")
    if recipe.kl and not hasattr(model, "disable_adapter"):
        raise ValueError("`recipe.kl` compares with the model without its adapter: it has none.")
    rate = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    optimiser, warmup = torch.optim.AdamW(weights.values(), **rate), recipe.warmup * recipe.steps
    schedule = get_cosine_schedule_with_warmup(optimiser, round(warmup), recipe.steps)
    frozen = [x.tolist() for name, x in sample_weights(model).items() if name not in weights]
    configs = [model.config, *getattr(model, "peft_config", {}).values()]
    about = {
        "recipe": asdict(recipe),
        "model": repr(model) + _hash([config.to_dict() for config in configs]),
        "trained weights": {name: [*p.shape, str(p.dtype)] for name, p in weights.items()},
        "frozen weights": _hash([frozen, sorted({str(p.dtype) for p in model.parameters()})]),
        "questions": _hash(items and vars(items)),
        "validation": _hash(validation and vars(validation)),
    }
    if text is not None:
        about["text"] = _hash(text.tolist())
    state = {"step": 0, "losses": [], "right": [], "curve": [], "seconds": 0.0}
    if checkpoint and checkpoint.exists():
        state = _load(checkpoint, about, weights, optimiser, schedule)
    batches = _Batches(model, items, recipe, _first_passes(model, items, keep_first_passes), text)
    begin = time.monotonic() - state["seconds"]
    evaluations = range(1, recipe.evaluations + 1)
    evaluated_after = {round(recipe.steps * k / recipe.evaluations) for k in evaluations}
    model.eval()  # no dropout: two passes of one model must agree
    length = {"total": recipe.steps, "initial": state["step"], "unit": "step"}
    with runtime.progress(description="training", **length) as bar:
        while state["step"] < recipe.steps:
            rows = _rows_of(state["step"], items.lengths, recipe)
            shown = [] if text is None else _windows_of(state["step"], len(text), recipe)
            loss, right = batches.gradients(rows, list(weights.values()), shown)
            if not np.isfinite(loss):
                lower = f"lower the learning rate ({recipe.learning_rate:g})"
                raise FloatingPointError(f"The loss is {loss} at step {state['step']}: {lower}.")
            torch.nn.utils.clip_grad_norm_(weights.values(), recipe.clip)
            optimiser.step()
            schedule.step()
            state["step"] += 1
            state["losses"].append(loss)
            state["right"].append(right)
            bar.update()
            loss, right = (np.mean(state[name][-20:]) for name in ("losses", "right"))
            bar.set_postfix({"loss": f"{loss:.3f}", "right": f"{right:.0%}"})
            evaluated = state["step"] in evaluated_after
            if evaluated:
                row = _curve_row(state, model, validation)
                state["curve"].append({**row, "seconds": time.monotonic() - begin})
                state |= {"losses": [], "right": []}
            if checkpoint and (state["step"] % save_every == 0 or evaluated):
                state["seconds"] = time.monotonic() - begin
                content = {"about": about, "weights": {k: p.detach() for k, p in weights.items()}}
                content |= {"optimiser": optimiser.state_dict(), "state": state}
                content["schedule"] = schedule.state_dict()
                if batches.processes.is_main_process:
                    with atomic_file(checkpoint) as temporary:
                        torch.save(content, temporary)
    columns = ["step", "loss", "train", "validation", "seconds", "losses"]
    columns += ["kinds"] * bool(validation and validation.kinds)
    return pd.DataFrame(state["curve"], columns=columns)


def _curve_row(state: dict, model: nn.Module, validation: Items | None) -> dict:
    right = evaluate(model, validation)[0] if validation else np.array([np.nan])
    row = {"step": float(state["step"]), "losses": [round(loss, 4) for loss in state["losses"]]}
    row |= {"loss": float(np.mean(state["losses"])), "train": float(np.mean(state["right"]))}
    row["validation"] = float(right.mean())
    if validation and validation.kinds:
        row["kinds"] = pd.Series(right).groupby(validation.kinds).mean().to_dict()
    return row


def _hash(parts) -> str:
    text = json.dumps(
        parts, default=lambda x: sorted(x) if isinstance(x, set | frozenset) else str(x)
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _load(path: Path, about: dict, weights: dict[str, Tensor], optimiser, schedule) -> dict:
    """Put back what a checkpoint holds; returns its state. ValueError for another training's."""
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        damage = "is damaged, or holds more than numbers, and was not used: delete it"
        raise OSError(f"{path} {damage}.") from error
    if other := [name for name in about if kept.get("about", {}).get(name) != about[name]]:
        what = f"another training run (other {', '.join(other)})"
        raise ValueError(f"{path} belongs to {what}: delete it, or train into another folder.")
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(kept["weights"][name])
    optimiser.load_state_dict(kept["optimiser"])
    schedule.load_state_dict(kept["schedule"])
    return kept["state"]


def _first_passes(model: nn.Module, items: Items, room: float | None) -> FirstPasses | None:
    """The states of the first pass, where the base is frozen and there is room (GiB) for them."""
    if not isinstance(model, TwoPassModel) or not model.frozen:
        return None
    if room is None:
        device = input_device(model)
        sharing = runtime.process_state().num_processes if device.type == "cpu" else 1
        room = runtime.free_bytes(device) / 2**30 / 4 / sharing
    need = FirstPasses.gigabytes(model, items)
    if need <= room:
        return FirstPasses(model, items)
    finding = f"The first pass's states would take {need:.1f} GiB, and there is room for {room:.1f}"
    print(f"{finding}: it runs each time.", file=sys.stderr)
    return None


class _Batches:
    """Gradients of whole batches, of which each process takes a part, in pieces if need be."""

    def __init__(self, model, items: Items, recipe: Recipe, passes: FirstPasses | None, text=None):
        self.model, self.items, self.passes = model, items, passes
        self.text, self.kl = text, recipe.kl
        self.autocast = recipe.autocast and runtime.multiplies_bf16(input_device(model))
        self.processes, self.pieces = runtime.process_state(), 1
        count, size = self.processes.num_processes, min(recipe.batch_size, len(items))
        if size < count:
            raise ValueError(f"{count} processes cannot share a batch of {size}.")

    def gradients(
        self, rows: list[int], weights: Sequence[Tensor], windows: Sequence[int] = ()
    ) -> tuple[float, float]:
        """Put the gradient of a batch's mean loss, and of the divergence on windows of text, on the
        weights: (loss, share answered right)."""
        part, texts = (
            x[self.processes.process_index :: self.processes.num_processes] for x in (rows, windows)
        )
        targets = sum(len(self.items.answers[row]) for row in rows)
        sums = None
        while sums is None:
            for p in weights:
                p.grad = None
            try:
                pieces = np.array_split(part, self.pieces)
                sums = np.sum([self._piece(piece.tolist(), targets) for piece in pieces], axis=0)
                for piece in np.array_split(texts, min(self.pieces, len(texts)) or 1):
                    self._diverge(piece, len(windows))
            except torch.OutOfMemoryError:
                if self.pieces >= len(part):
                    raise
                self.pieces = min(2 * self.pieces, len(part))
                finding = f"Out of memory: a batch is taken in {self.pieces} pieces from here on."
                print(finding, file=sys.stderr)
                torch.cuda.empty_cache()  # nothing where there is no GPU
        if self.processes.num_processes > 1:
            for p in weights:
                p.grad = reduce(p.grad, "sum")
            sums = reduce(torch.tensor(sums, device=weights[0].device), "sum")
        return float(sums[0]), float(sums[1]) / len(rows)

    def _piece(self, rows: list[int], targets: int) -> tuple[float, int]:
        """(part of the loss, questions answered right) of some rows, whose gradient is added."""
        batch = collate(self.items, rows, input_device(self.model))
        first_pass = self.passes(rows, batch) if self.passes else None
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            logits = answer_logits(self.model, batch, first_pass)
        labels = batch.labels.flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
        loss = loss / targets
        loss.backward()
        return loss.item(), int(right_answers(logits.detach(), self.items, rows, batch).sum())

    def _diverge(self, windows: np.ndarray, of: int) -> None:
        """Add the gradient of the weighted mean KL(frozen || trained) of some windows, of all."""
        if not len(windows):
            return
        ids = self.text[windows.astype(int)].to(input_device(self.model))
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad(), self.model.disable_adapter():
                before = self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            after = self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        summed = F.kl_div(after, before, reduction="sum", log_target=True)
        (self.kl * summed / (of * ids.shape[1])).backward()


def _windows_of(step: int, count: int, recipe: Recipe) -> list[int]:
    """The windows of text of a step: each once per epoch, in an order drawn from seed and epoch."""
    size = min(recipe.windows, count)
    epoch, place = divmod(step, count // size)
    order = np.random.default_rng([recipe.seed, epoch, 1]).permutation(count)
    return order[place * size : (place + 1) * size].tolist()


def _rows_of(step: int, lengths: np.ndarray, recipe: Recipe) -> list[int]:
    """The questions of a step: each once per epoch, in an order drawn from seed and epoch (no state
    is kept). Of every eight batches' worth the shorter questions go together."""
    size = min(recipe.batch_size, len(lengths))
    per_epoch = len(lengths) // size
    epoch, place = divmod(step, per_epoch)
    draw = np.random.default_rng([recipe.seed, epoch])
    order = draw.permutation(len(lengths))[: per_epoch * size]
    parts = [order[i : i + 8 * size] for i in range(0, len(order), 8 * size)]
    order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    return order.reshape(per_epoch, size)[draw.permutation(per_epoch)[place]].tolist()
