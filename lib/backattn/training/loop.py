"""One training loop, for adapters on a frozen model and for small models from scratch.

Under `accelerate launch` each process takes a part of every batch, and gradients are added up over processes.

Batches are padded on the left, so that all answers end in the last column; logits are taken only where answers are.
With a frozen base the states of the first pass are computed once per question and kept (`FirstPasses`).
"""

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
from backattn.adapters.two_pass import TwoPassModel
from backattn.files import atomic_file
from backattn.models.devices import input_device
from backattn.runtime import progress
from backattn.training.batches import IGNORED, Items, collate
from backattn.training.evaluation import FirstPasses, answer_logits, evaluate, right_answers


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
    optimiser = torch.optim.AdamW(
        weights.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(
        optimiser, round(recipe.warmup * recipe.steps), recipe.steps
    )
    state = {"step": 0, "losses": [], "right": [], "curve": [], "seconds": 0.0}
    state |= _load(checkpoint, recipe, weights, optimiser, schedule)
    reuse = isinstance(model, TwoPassModel) and not any(
        p.requires_grad for p in model.base_model.parameters()
    )
    passes = _first_passes(model, items, keep_first_passes) if reuse else None
    lengths = items.lengths
    marks = {round(recipe.steps * (k + 1) / recipe.evaluations) for k in range(recipe.evaluations)}
    begin, before = time.monotonic(), state["seconds"]
    batches = _Batches(model, items, recipe, passes)
    model.eval()  # no dropout: two passes of one model must agree
    with progress(
        description="training", total=recipe.steps, initial=state["step"], unit="step"
    ) as bar:
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
            bar.set_postfix(
                loss=f"{np.mean(state['losses'][-20:]):.3f}",
                right=f"{np.mean(state['right'][-20:]):.0%}",
            )
            if state["step"] in marks:
                right = evaluate(model, validation)[0] if validation else np.array([np.nan])
                row = {
                    "loss": np.mean(state["losses"]),
                    "train": np.mean(state["right"]),
                    "validation": right.mean(),
                }
                state["seconds"] = before + time.monotonic() - begin
                row |= {"step": state["step"], "seconds": state["seconds"]}
                losses = [round(loss, 4) for loss in state["losses"]]
                state["curve"].append({**{k: float(v) for k, v in row.items()}, "losses": losses})
                if validation and validation.kinds:
                    state["curve"][-1]["kinds"] = (
                        pd.Series(right).groupby(validation.kinds).mean().to_dict()
                    )
                state["losses"], state["right"] = [], []
            if checkpoint and (state["step"] % save_every == 0 or state["step"] in marks):
                state["seconds"] = before + time.monotonic() - begin
                if batches.world.is_main_process:
                    _save(checkpoint, recipe, weights, optimiser, schedule, state)
    columns = ["step", "loss", "train", "validation", "seconds", "losses"]
    return pd.DataFrame(
        state["curve"], columns=columns + ["kinds"] * bool(validation and validation.kinds)
    )


def _first_passes(model: TwoPassModel, items: Items, room: float | None) -> FirstPasses | None:
    """The states of the first pass, where there is room for them."""
    if room is None:
        device = input_device(model)
        sharing = runtime.process_state().num_processes if device.type == "cpu" else 1
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
        self.world, self.pieces = runtime.process_state(), 1
        size = min(recipe.batch_size, len(items))
        if size < self.world.num_processes:
            raise ValueError(
                f"{self.world.num_processes} processes cannot share a batch of {size}."
            )

    def gradients(self, rows: list[int], weights: Sequence[Tensor]) -> tuple[float, float]:
        """Put the gradient of a batch's mean loss on the weights; returns (loss, share answered right)."""
        mine = rows[self.world.process_index :: self.world.num_processes]
        targets = sum(len(self.items.answers[row]) for row in rows)
        while True:
            for p in weights:
                p.grad = None
            try:
                parts = [
                    self._piece(part.tolist(), targets)
                    for part in np.array_split(mine, self.pieces)
                ]
                break
            except torch.OutOfMemoryError:
                if self.pieces >= len(mine):
                    raise
                self.pieces = min(2 * self.pieces, len(mine))
                print(
                    f"Out of memory: a batch is taken in {self.pieces} pieces from here on.",
                    file=sys.stderr,
                )
            torch.cuda.empty_cache()  # nothing where there is no GPU
        sums = [sum(values) for values in zip(*parts, strict=True)]
        if self.world.num_processes > 1:
            for p in weights:
                p.grad = reduce(p.grad, "sum")
            sums = reduce(
                torch.tensor(sums, dtype=torch.float64, device=weights[0].device), "sum"
            ).tolist()
        return sums[0], sums[1] / len(rows)

    def _piece(self, rows: list[int], targets: int) -> tuple[float, int]:
        """(its part of the loss, questions answered right) of some rows, whose gradient is added."""
        batch = collate(self.items, rows, device=input_device(self.model))
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            logits = answer_logits(
                self.model, batch, self.passes(rows, batch) if self.passes else None
            )
        labels = batch.labels.flatten()
        loss = (
            F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
            / targets
        )
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
        raise OSError(
            f"{path} is damaged, or holds more than numbers, and was not used: delete it."
        ) from error
    if kept["recipe"] != asdict(recipe) or kept["weights"].keys() != weights.keys():
        raise ValueError(
            f"{path} belongs to another training run: delete it, or train into another folder."
        )
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(kept["weights"][name])
    optimiser.load_state_dict(kept["optimiser"])
    schedule.load_state_dict(kept["schedule"])
    return kept["state"]
