"""The reasoning datasets of claim C8, and how each is split so that nothing of the test leaks into training.

Every loader returns one row per question: prompt, answer (as it follows the prompt, its space included), group
and split. Questions of one group always share a split, which a hash of the group's name decides.
"""

import hashlib
import inspect
import json
import os
import re
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from . import tasks
from .paths import CACHE, DATA
from .runtime import atomic_file

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
SPLITS = ("train", "validation", "test")

PUBLISHED = {  # file in the folder BACKATTN_DATASETS, public home, sha256
    "svamp": (
        "svamp/SVAMP.json",
        "https://raw.githubusercontent.com/arkilpatel/SVAMP/main/SVAMP.json",
        "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
    ),
    "multiarith": (
        "multiarith/MultiArith.json",
        "https://raw.githubusercontent.com/kojima-takeshi188/zero_shot_cot/main/dataset/MultiArith/MultiArith.json",
        "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4",
    ),
}


def split_of(group: str, shares: tuple[float, float] = (0.7, 0.15)) -> str:
    """The split of a group: by the hash of its name, `shares` to train and validation, the rest to test."""
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return SPLITS[int(np.searchsorted(np.cumsum(shares), place, side="right"))]


def _questions(rows: list[tuple[str, str, str]], shares: tuple[float, float] = (0.7, 0.15)) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["prompt", "answer", "group"])
    frame["answer"] = " " + frame["answer"]  # "=-8" would begin with a token of its own
    return frame.assign(split=[split_of(group, shares) for group in frame["group"]])


def two_digit() -> pd.DataFrame:
    """All 20,000 additions and subtractions of numbers below 100, "48+27="; a group is an unordered pair of numbers."""
    rows = []
    for a in range(100):
        for b in range(100):
            for sign in "+-":
                rows.append((f"{a}{sign}{b}=", str(OPERATIONS[sign](a, b)), f"{min(a, b)},{max(a, b)}"))
    return _questions(rows, (0.8, 0.1))


def one_digit_composite() -> pd.DataFrame:
    """All 6,561 problems "(a op b) op c =" with digits 1–9 and + − * (1DC of Brown et al. 2020, inner pair first).

    A group is the inner (a op b), so that no test question's first step was seen in training.
    """
    rows = []
    for a in range(1, 10):
        for b in range(1, 10):
            for first, inner in OPERATIONS.items():
                for second, outer in OPERATIONS.items():
                    for c in range(1, 10):
                        prompt = f"({a}{first}{b}){second}{c}="
                        rows.append((prompt, str(outer(inner(a, b), c)), f"{a}{first}{b}"))
    return _questions(rows)


def two_hop(path: Path = DATA / "two_hop_known.csv") -> pd.DataFrame:
    """Two-hop questions both of whose hops SmolLM2 answers (`known_two_hop`), split by bridge entity.

    Also e1, e2, e3 and their aliases; the answer is judged by its first token.
    """
    keys = ["pair", "e1", "r1", "r2"]
    known = tasks.read_table(path, keys)[keys]
    facts = tasks.two_hop_facts().merge(known, on=keys)
    say = tasks.TEMPLATES["possessive"].say
    prompts = [say(row.e1, row.r1, row.r2) for row in facts.itertuples()]
    return facts.assign(prompt=prompts, answer=" " + facts["e3"], group=facts["e2"])


def legs(animals: int, path: Path = DATA / "legs.csv") -> pd.DataFrame:
    """Word problems about `animals` kinds of animal (1 or 2), made by reasoning-gym: the offline stand-in.

    A group is a kind of animal; with two kinds, questions whose kinds fall into different splits are left out.
    Raises ValueError for another number of kinds.
    """
    if animals not in (1, 2):
        raise ValueError(f"There are problems about 1 or 2 kinds of animal, not {animals}.")
    frame = tasks.read_table(path, ["prompt", "answer", "animals"])
    frame = frame.assign(answer=" " + frame["answer"].astype(str), group=frame["animals"])
    kinds = [cell.split("|") for cell in frame["animals"]]
    splits = [{split_of(kind, (0.5, 0.2)) for kind in row} for row in kinds]  # few kinds: a larger test
    fits = [len(row) == animals and len(own) == 1 for row, own in zip(kinds, splits, strict=True)]
    return frame.assign(split=[min(own) for own in splits])[fits].reset_index(drop=True)


def svamp(folder: Path | None = None) -> pd.DataFrame:
    """SVAMP (Patel et al. 2021): one-step word problems. A group is a text without its numbers.

    folder: where svamp/SVAMP.json lies; see `_published`.
    """
    rows = []
    for item in _published("svamp", folder):
        text = " ".join(f"{item['Body']} {item['Question']}".replace(" .", ".").split())
        rows.append((f"{text} Answer:", _whole(item["Answer"]), _without_numbers(item["Body"])))
    return _questions(rows)


def multiarith(folder: Path | None = None) -> pd.DataFrame:
    """MultiArith (Roy and Roth 2015): two-step word problems. A group is a text without its numbers."""
    rows = []
    for item in _published("multiarith", folder):
        text = " ".join(item["sQuestion"].split())
        rows.append((f"{text} Answer:", _whole(item["lSolutions"][0]), _without_numbers(text)))
    return _questions(rows)


def _whole(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def _without_numbers(text: str) -> str:
    return re.sub(r"[\d.,]+", "N", " ".join(text.lower().split()))


DATASETS: dict[str, Callable[[], pd.DataFrame]] = {
    "2-digit": two_digit,
    "1DC": one_digit_composite,
    "two-hop": two_hop,
    "legs, one kind": lambda: legs(1),
    "legs, two kinds": lambda: legs(2),
    "SVAMP": svamp,
    "MultiArith": multiarith,
}


def load(name: str) -> pd.DataFrame:
    """A dataset by its name in DATASETS; raises ValueError naming those that there are."""
    if name not in DATASETS:
        raise ValueError(f"Unknown dataset {name!r}; choose one of {', '.join(DATASETS)}.")
    return DATASETS[name]()


def overview(names: Sequence[str]) -> pd.DataFrame:
    """What the datasets hold: dataset, questions and groups in each split, and one test question with its answer."""
    rows = []
    for name in names:
        frame = load(name)
        row: dict[str, object] = {"dataset": name}
        for split in SPLITS:
            part = frame[frame["split"] == split]
            row |= {split: len(part), f"{split} groups": part["group"].nunique()}
        first = draw(frame, "test", 1).iloc[0]
        rows.append({**row, "question": first["prompt"], "answer": first["answer"].strip()})
    return pd.DataFrame(rows)


def held_out_text(characters: int = 6000) -> str:
    """English prose that none of the tasks resembles, to see what training spoils: how scipy describes its tests.

    It comes with the pinned scipy, so that nothing has to be fetched.
    """
    from scipy import stats

    names = ("ttest_ind", "ks_2samp", "permutation_test", "anderson", "bootstrap", "fisher_exact")
    return "\n\n".join(inspect.getdoc(getattr(stats, name)) for name in names)[:characters]


def draw(frame: pd.DataFrame, split: str, count: int | None = None, seed: int = 0) -> pd.DataFrame:
    """`count` questions of a split, drawn at random, fewer where there are fewer; the same for the same seed.

    Raises ValueError when the split is empty.
    """
    part = frame[frame["split"] == split]
    if part.empty:
        raise ValueError(f"There are no questions in split {split!r}.")
    order = np.random.default_rng(seed).permutation(len(part))
    return part.iloc[order[:count]].reset_index(drop=True)


def _published(name: str, folder: Path | None) -> list[dict]:
    """The items of a published dataset: from `folder`, the folder named by BACKATTN_DATASETS, or its public home.

    Raises OSError when it cannot be fetched, ValueError for a file with another sha256.
    """
    place, url, sha256 = PUBLISHED[name]
    named = folder or os.environ.get("BACKATTN_DATASETS")
    path = (Path(named) if named else CACHE / "datasets") / place
    if path.exists():
        content = path.read_bytes()
    elif named:
        raise FileNotFoundError(f"{path} is missing. Put it there, or unset BACKATTN_DATASETS to fetch it from {url}.")
    else:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                content = answer.read()
        except OSError as error:
            raise OSError(
                f"Cannot fetch {url} ({error}). Put the file into <folder>/{place} and set BACKATTN_DATASETS to that "
                "folder."
            ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} has another sha256 than the published file: delete it and it is fetched again.")
    if not path.exists():
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
    return json.loads(content)
