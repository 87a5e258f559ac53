"""The reasoning datasets of claim C8, and how each is split so that nothing of the test leaks into training.

Every loader returns one row per question: prompt, answer (as it follows the prompt, its space included), group, and
tested (whether it may be a test question). A group is what must not be in training and in the test: a bridge entity, a
pair of numbers, a kind of animal ("|" between where a question has several). `split` does the rest, by hash of names.
"""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from companion.paths import CACHE, DATA
from companion.questions.compositions import compositions
from companion.questions.facts import fetch, read_table, two_hop_facts
from companion.questions.prompts import TEMPLATES
from companion.questions.splits import FOLDS, _turn, draw, split

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": int.__add__,
    "-": int.__sub__,
    "*": int.__mul__,
}

TWO_HOP_KEYS = ["pair", "e1", "r1", "r2"]  # name a two-hop fact

TWINS = 0.8  # word problems that share this part of their words are one group

NAMES = (  # of people about whom facts are invented, a token each for SmolLM2
    "Adam Alan Alice Amy Ann Anthony Arthur Barbara Ben Bill Bob Brian Bruce Carol Charles Charlie Chris Claire Dan "
    "Daniel Dave Diana Donald Edward Ellen Emily Emma Eric Frank Fred George Grace Greg Hannah Harry Helen Henry "
    "Howard Ian Jack James Jane Jason Jean Jeff Jenny Jim Joan Joe John Jonathan Joseph Joy Julia Julie Karen Kate "
    "Keith Ken Kevin Kim Larry Laura Lee Leo Lewis Lily Linda Lisa Louis Lucy Luke Marco Margaret Maria Marie Mark "
    "Martin Mary Matt Max Miguel Mike Nick Oliver Oscar Paul Phil Rachel Ray Richard Robin Rose Ryan Sam Sandra Sarah "
    "Sean Steve Sue"
)

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


def _questions(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["prompt", "answer", "group"])
    frame["answer"] = " " + frame["answer"]  # "=-8" would begin with a token of its own
    return frame.assign(tested=True)


def two_digit() -> pd.DataFrame:
    """All 20,000 additions and subtractions of numbers below 100, "48+27="; a group is an unordered pair of numbers."""
    rows = []
    for a in range(100):
        for b in range(100):
            for sign in "+-":
                rows.append(
                    (f"{a}{sign}{b}=", str(OPERATIONS[sign](a, b)), f"{min(a, b)},{max(a, b)}")
                )
    return _questions(rows)


def one_digit_composite() -> pd.DataFrame:
    """All 6,561 problems "(a op b) op c =" with digits 1–9 and + − * (1DC of Brown et al. 2020, inner pair first).

    A group is the inner pair of digits in either order, so that no test question's first step was seen in training.
    """
    rows = []
    for a in range(1, 10):
        for b in range(1, 10):
            for first, inner in OPERATIONS.items():
                for second, outer in OPERATIONS.items():
                    for c in range(1, 10):
                        prompt = f"({a}{first}{b}){second}{c}="
                        rows.append(
                            (prompt, str(outer(inner(a, b), c)), f"{min(a, b)},{max(a, b)}")
                        )
    return _questions(rows)


def two_hop(path: Path = DATA / "two_hop_known.csv") -> pd.DataFrame:
    """Two-hop questions both of whose hops SmolLM2 answers; a group is a bridge entity.

    Tested are those whose shortcut ("e1's r2") it does not answer with e3, so that one hop is not enough. Also e1, e2,
    e3 and their aliases; an answer is judged by its first token.
    """
    known = read_table(path, [*TWO_HOP_KEYS, "shortcut_right"])
    facts = two_hop_facts().drop(columns="split").merge(known, on=TWO_HOP_KEYS)
    say = TEMPLATES["possessive"].say
    prompts = [say(row.e1, row.r1, row.r2) for row in facts.itertuples()]
    return facts.assign(
        prompt=prompts, answer=" " + facts["e3"], group=facts["e2"], tested=~facts["shortcut_right"]
    )


def two_hop_unknown() -> pd.DataFrame:
    """Two-hop questions of which SmolLM2 answers a hop wrongly, at most 100 of each pair of relations; else as
    `two_hop`, and tested by the same rule."""
    return two_hop(DATA / "two_hop_unknown.csv")


def reworded(say: Callable[[str, str, str], str]) -> pd.DataFrame:
    """The questions of `two_hop` in another wording; say: e1, r1, r2 -> prompt."""
    frame = two_hop()
    return frame.assign(prompt=[say(row.e1, row.r1, row.r2) for row in frame.itertuples()])


def in_context(draws: int = 5, others: int = 2, seed: int = 0) -> pd.DataFrame:
    """Two-hop questions whose first hop is invented and stands in the prompt, among those of `others` people, and whose
    second hop is one of `two_hop`: "Ann's country is Peru. Tom's country is Japan. Tom's country's capital is".

    Each second hop is asked `draws` times, of people drawn anew. The other people's bridge entities have another answer
    and are of the same fold; a second hop without enough of them is left out. Columns as in `two_hop`.
    """
    draw, say, rows = np.random.default_rng(seed), TEMPLATES["possessive"].say, []
    answers: dict[tuple[str, str], set[str]] = {}
    for fact in two_hop_facts().itertuples():
        answers.setdefault((fact.e2, fact.r2), set()).update(
            [fact.e3, *filter(None, fact.e3_aliases.split("|"))]
        )
    facts = two_hop().drop_duplicates(["r1", "e2", "r2"])
    for fact in facts.to_dict("records") * draws:
        alike = facts.loc[
            (facts["r1"] == fact["r1"]) & (facts["e2"].map(_turn) == _turn(fact["e2"])), "e2"
        ].unique()
        unlike = [
            name for name in alike if fact["e3"] not in {name, *answers.get((name, fact["r2"]), ())}
        ]
        unlike = [name for name in unlike if name != fact["e2"]]
        if len(unlike) < others:
            continue
        bridges = [fact["e2"], *draw.permutation(unlike)[:others]]
        people = draw.permutation(NAMES.split())[: len(bridges)]
        said = [f"{say(who, fact['r1'])} {e2}." for who, e2 in zip(people, bridges, strict=True)]
        prompt = " ".join([*draw.permutation(said), say(people[0], fact["r1"], fact["r2"])])
        rows.append({**fact, "e1": people[0], "prompt": prompt, "tested": True})
    return pd.DataFrame(rows)


def legs(animals: int, path: Path = DATA / "legs.csv") -> pd.DataFrame:
    """Word problems about `animals` kinds of animal (1 or 2), made by reasoning-gym: the offline stand-in.

    A group is a kind of animal, or two. Raises ValueError for another number of kinds.
    """
    if animals not in (1, 2):
        raise ValueError(f"There are problems about 1 or 2 kinds of animal, not {animals}.")
    frame = read_table(path, ["prompt", "answer", "animals"]).rename(columns={"animals": "group"})
    frame = frame.assign(answer=" " + frame["answer"].astype(str), tested=True)
    return frame[frame["group"].str.count(r"\|") == animals - 1].reset_index(drop=True)


def svamp(folder: Path | None = None) -> pd.DataFrame:
    """SVAMP (Patel et al. 2021): one-step word problems. A group is a set of texts that say nearly the same.

    folder: where svamp/SVAMP.json lies; None takes the folder named by BACKATTN_DATASETS, else the public home.
    Raises OSError when it cannot be fetched, ValueError for a file with another sha256.
    """
    texts, answers = [], []
    for item in _published("svamp", folder):
        texts.append(" ".join(f"{item['Body']} {item['Question']}".replace(" .", ".").split()))
        answers.append(_whole(item["Answer"]))
    return _word_problems(texts, answers)


def multiarith(folder: Path | None = None) -> pd.DataFrame:
    """MultiArith (Roy and Roth 2015): two-step word problems; see `svamp`."""
    items = _published("multiarith", folder)
    texts = [" ".join(item["sQuestion"].split()) for item in items]
    return _word_problems(texts, [_whole(item["lSolutions"][0]) for item in items])


def _whole(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def _word_problems(texts: list[str], answers: list[str]) -> pd.DataFrame:
    names = near_duplicate_groups([re.findall(r"[a-z]+", text.lower()) for text in texts])
    return _questions(
        [(f"{t} Answer:", a, f"text {g}") for t, a, g in zip(texts, answers, names, strict=True)]
    )


def near_duplicate_groups(texts: Sequence[Sequence[str]], least: float = TWINS) -> np.ndarray:
    """A number per text, the same for texts linked by pairs that share `least` of the words of both: [n]."""
    vocabulary = {
        word: i for i, word in enumerate(sorted({word for text in texts for word in text}))
    }
    has = np.zeros((len(texts), len(vocabulary)), dtype=np.float32)
    for row, text in enumerate(texts):
        has[row, [vocabulary[word] for word in text]] = 1
    both = has @ has.T
    either = has.sum(1)[:, None] + has.sum(1) - both
    return connected_components(both >= least * either)[1]


DATASETS: dict[str, Callable[[], pd.DataFrame]] = {
    "2-digit": two_digit,
    "1DC": one_digit_composite,
    "two-hop": two_hop,
    "two-hop, unknown": two_hop_unknown,
    "question": lambda: reworded(TEMPLATES["question"].say),
    "code": lambda: reworded("{2}({1}({0})) =".format),
    "in context": in_context,
    "compositions": compositions,
    "legs, one kind": lambda: legs(1),
    "legs, two kinds": lambda: legs(2),
    "SVAMP": svamp,
    "MultiArith": multiarith,
}

OTHER_PROMPTS = ("question", "code", "in context")  # the same facts, asked in another way

BY_FIRST_TOKEN = {"two-hop", "two-hop, unknown", *OTHER_PROMPTS}  # all others ask for a number


def load(name: str) -> pd.DataFrame:
    """A dataset by its name in DATASETS; raises ValueError naming those that there are."""
    if name not in DATASETS:
        raise ValueError(f"Unknown dataset {name!r}; choose one of {', '.join(DATASETS)}.")
    return DATASETS[name]()


def overview(names: Sequence[str]) -> pd.DataFrame:
    """What the datasets hold: questions, those that may be tested, names; one question with its answer."""
    rows = []
    for name in names:
        frame = load(name)
        row = {"dataset": name, "questions": len(frame), "tested": int(frame["tested"].sum())}
        row["names"] = frame["group"].str.split("|").explode().nunique()
        first = draw(split(frame, 0), "test", 1).iloc[0]
        rows.append({**row, "question": first["prompt"], "answer": first["answer"].strip()})
    return pd.DataFrame(rows)


def majority_baseline(name: str) -> float:
    """Share of a dataset's test questions, over all folds, that are right when each gets the answer that training has
    most often for its second relation (column r2)."""
    frame, right = load(name), []
    for fold in range(FOLDS):
        parts = dict(list(split(frame, fold).groupby("split")))
        best = parts["train"].groupby("r2")["answer"].agg(lambda answers: answers.mode()[0])
        right += (parts["test"]["r2"].map(best) == parts["test"]["answer"]).tolist()
    return float(np.mean(right))


def majority_baseline_by_kind(name: str = "compositions") -> pd.Series:
    """`guessed` for each kind of question of a dataset that brings its own split: kind -> share."""
    parts = dict(list(split(load(name)).groupby("split")))
    best = parts["train"].groupby("r2")["answer"].agg(lambda answers: answers.mode()[0])
    test = parts["test"]
    return (test["r2"].map(best) == test["answer"]).groupby(test["kind"]).mean()


def held_out_text(characters: int = 6000) -> str:
    """English prose that none of the tasks resembles, to see what training spoils: how scipy describes its tests.

    It comes with the pinned scipy, so that nothing has to be fetched.
    """
    from scipy import stats

    names = ("ttest_ind", "ks_2samp", "permutation_test", "anderson", "bootstrap", "fisher_exact")
    return "\n\n".join(inspect.getdoc(getattr(stats, name)) for name in names)[:characters]


def _published(name: str, folder: Path | None) -> list[dict]:
    """The items of a published dataset; see `svamp`."""
    place, url, sha256 = PUBLISHED[name]
    named = folder or os.environ.get("BACKATTN_DATASETS")
    path = (Path(named) if named else CACHE / "datasets") / place
    if not path.exists():
        if named:
            raise FileNotFoundError(
                f"{path} is missing. Put it there, or unset BACKATTN_DATASETS to fetch {url}."
            )
        fetch(url, path)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        if not named:
            path.unlink()
        raise ValueError(f"{path} has another sha256 than the published file. It was not used.")
    return json.loads(content)
