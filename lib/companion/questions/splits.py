"""Splits by group, so that no tested name was seen in training."""

import hashlib

import numpy as np
import pandas as pd

SPLITS = ("train", "validation", "test")
FOLDS, VALIDATION = 3, 0.15


def place_of(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def fold_of(name: str) -> int:
    """The fold in which a name is tested; -1 for one that is for validation in all."""
    place = place_of(name)
    return -1 if place < VALIDATION else int((place - VALIDATION) / (1 - VALIDATION) * FOLDS)


def split(frame: pd.DataFrame, fold: int | None = None) -> pd.DataFrame:
    """The questions of `frame` with their split, "train", "validation" or "test"; those whose names
    fall into different splits are left out, and those in the test that are not `tested`.

    fold: None makes one split of eight, one and one tenths of the names. 0, 1 or 2: 15 % of the
    names are for validation in all folds, each other is tested in one and trained on in two.
    Where a column `taught` says so, those questions alone are trained on, and the others judge.
    With a column `answers_apart` no answer of the test is one in training or validation.
    """
    if fold not in (None, *range(FOLDS)):
        raise ValueError(f"There are folds 0 to {FOLDS - 1}, not {fold!r}.")
    if "split" in frame:
        return frame

    def of(name: str) -> str:
        if fold is None:
            return SPLITS[int(np.searchsorted([0.8, 0.9], place_of(name), side="right"))]
        return {-1: "validation", fold: "test"}.get(fold_of(name), "train")

    splits = [{of(name) for name in group.split("|")} for group in frame["group"]]
    frame = frame.assign(split=[min(names) for names in splits])
    fit = np.array([len(names) == 1 for names in splits])
    if "taught" in frame:
        fit &= frame["taught"] == (frame["split"] == "train")
    frame = frame[fit & (frame["tested"] | (frame["split"] != "test"))]
    if "answers_apart" in frame:
        asked = frame["split"] == "test"
        frame = frame[asked | ~frame["answer"].isin(frame.loc[asked, "answer"])]
    return frame.reset_index(drop=True)


def draw(frame: pd.DataFrame, split: str, count: int | None = None, seed: int = 0) -> pd.DataFrame:
    """`count` questions of a split, drawn at random by `seed`, fewer where there are fewer. Raises
    ValueError when the split is empty."""
    part = frame[frame["split"] == split]
    if part.empty:
        raise ValueError(f"There are no questions in split {split!r}.")
    order = np.random.default_rng(seed).permutation(len(part))
    return part.iloc[order[:count]].reset_index(drop=True)
