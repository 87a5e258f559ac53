"""Questions as a run asks them."""

import functools
from dataclasses import replace

import numpy as np
import pandas as pd

from backattn.models.tokens import prompt_ids
from backattn.training.batches import Items, first_tokens, numbers
from companion.questions import splits
from companion.questions.asking import candidates
from companion.questions.datasets import DATASETS, load
from companion.questions.splits import draw
from companion.runs.run import READS_MEMORY, SCRATCH, SHOTS, Run


@functools.cache
def _folded(dataset: str, fold: int | None) -> pd.DataFrame:
    """A dataset with the split of each question; not to be changed."""
    return splits.split(load(dataset), fold)


def asked(run: Run, split: str, frame: pd.DataFrame | None = None) -> pd.DataFrame:
    """A split of the run's dataset, in the columns of the dataset (or of `frame`)."""
    counts = {"train": run.train_items, "validation": run.validation_items, "test": run.test_items}
    return draw(_folded(run.dataset, run.fold) if frame is None else frame, split, counts[split])


def test_groups(run: Run, result: dict) -> np.ndarray:
    """The name or names of each test question of a finished run: [n]."""
    return np.array(result["groups"] if "groups" in result else asked(run, "test")["group"])


def _with_memories(run: Run, tokenizer, items: Items, part: pd.DataFrame) -> Items:
    if "memory" in part and run.arm in READS_MEMORY:
        items.memories = [prompt_ids(tokenizer, text) for text in part["memory"]]
    return items


def questions(run: Run, tokenizer, split: str) -> Items:
    """A split of the run's dataset, tokenized: after worked examples for "few-shot"; sums from
    scratch in fixed width, "07+83=" and "0090" or "-021"."""
    frame = _folded(run.dataset, run.fold)
    by_first_token = DATASETS[run.dataset].judge == "first token"
    if by_first_token and "e3" in frame:
        frame = candidates(tokenizer, frame)
    part = asked(run, split, frame)
    if DATASETS[run.dataset].words is None and not part["answer"].str.startswith(" ").all():
        raise ValueError(
            f"An answer of {run.dataset!r} does not begin with a space: another token would be "
            "learnt than follows the prompt."
        )
    if run.arm == "few-shot":
        shown = draw(frame, "train", SHOTS, seed=run.seed)
        part["prompt"] = "".join(shown["prompt"] + shown["answer"] + ". ") + part["prompt"]
    if by_first_token:
        accepted, kinds = (part[n].tolist() if n in part else None for n in ("e3_ids", "kind"))
        items = replace(first_tokens(tokenizer, part, accepted), kinds=kinds)
        return _with_memories(run, tokenizer, items, part)
    if run.model != SCRATCH:
        return _with_memories(run, tokenizer, numbers(tokenizer, part, end="."), part)
    part["prompt"] = part["prompt"].str.replace(r"\d+", lambda n: n[0].zfill(2), regex=True)
    part["answer"] = [f"{int(answer):04d}" for answer in part["answer"]]
    return numbers(tokenizer, part, end=";")
