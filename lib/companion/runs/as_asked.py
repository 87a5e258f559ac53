"""Questions as a run asks them."""

import functools
from dataclasses import replace

import numpy as np
import pandas as pd

from backattn.training.batches import Items, first_tokens, numbers
from companion.questions import splits
from companion.questions.asking import candidates
from companion.questions.datasets import DATASETS, load
from companion.questions.splits import draw
from companion.runs.run import SCRATCH, SHOTS, Run


@functools.cache
def _folded(dataset: str, fold: int | None) -> pd.DataFrame:
    """A dataset with the split of each question; not to be changed."""
    return splits.split(load(dataset), fold)


def _drawn(run: Run, frame: pd.DataFrame, split: str) -> pd.DataFrame:
    counts = {"train": run.train_items, "validation": run.validation_items, "test": run.test_items}
    return draw(frame, split, counts[split])


def asked(run: Run, split: str) -> pd.DataFrame:
    """A split of the run's dataset, in the columns of the dataset."""
    return _drawn(run, _folded(run.dataset, run.fold), split)


def test_groups(run: Run, result: dict) -> np.ndarray:
    """The name or names of each test question of a finished run: [n]."""
    return np.array(result["groups"] if "groups" in result else asked(run, "test")["group"])


def questions(run: Run, tokenizer, split: str) -> Items:
    """A split of the run's dataset, tokenized: after worked examples for "few-shot", sums from
    scratch in fixed width."""
    frame, scratch = _folded(run.dataset, run.fold), run.model == SCRATCH
    by_first_token = DATASETS[run.dataset].judge == "first token"
    if by_first_token and "e3" in frame:
        frame = candidates(tokenizer, frame)
    part = _drawn(run, frame, split)
    if run.arm == "few-shot":
        shown = draw(frame, "train", SHOTS, seed=run.seed)
        part["prompt"] = "".join(shown["prompt"] + shown["answer"] + ". ") + part["prompt"]
    if by_first_token:
        accepted = part["e3_ids"].tolist() if "e3_ids" in part else None
        kinds = part["kind"].tolist() if "kind" in part else None
        return replace(first_tokens(tokenizer, part, accepted), kinds=kinds)
    if scratch:
        part = _fixed_width(part)
    return numbers(tokenizer, part, end=";" if scratch else ".")


def _fixed_width(part: pd.DataFrame) -> pd.DataFrame:
    """Sums as models from scratch read them, "07+83=" and "0090" or "-021": a digit's place tells
    what it is worth."""
    prompts = part["prompt"].str.replace(r"\d+", lambda number: number[0].zfill(2), regex=True)
    return part.assign(prompt=prompts, answer=[f"{int(answer):04d}" for answer in part["answer"]])
