"""The reasoning datasets of claim C8, one record each, without leakage from training into the test.

A row per question: prompt, answer (as it follows the prompt, its space included), group, tested
(whether it may be a test question). A group must not be in training and in the test, a bridge
entity, a pair of numbers, a kind of animal ("|" between several): `splits.split` sees to it."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from companion.paths import DATA
from companion.questions import premise
from companion.questions.chains import NAMES, chains
from companion.questions.compositions import WORDS, compositions
from companion.questions.facts import Published, published, read_table, two_hop_facts
from companion.questions.prompts import TEMPLATES
from companion.questions.splits import FOLDS, fold_of, place_of, split

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
TWO_HOP_KEYS = ["pair", "e1", "r1", "r2"]  # name a two-hop fact
TWINS = 0.8  # word problems that share this part of their words are one group


@dataclass(frozen=True)
class Dataset:
    """What the project has to know of a dataset, all in one place. load: makes the frame described
    above; its column `split`, if any, keeps every question in one split, `kind` tells kinds of
    question apart in the learning curve, r2 is for `majority_baseline`."""

    name: str
    load: Callable[[], pd.DataFrame]
    judge: str = "number"  # as written; or "first token", of any of e3's names if it has such
    tuned_on: str = ""  # whose validation questions choose learning rates of adapters; "": its own
    longer: int = 1  # so many times the steps of the others (digits are learnt slowly)
    published: Published | None = None  # where it is not part of this repository
    words: tuple[str, ...] | None = None  # of models from scratch; None: digits and signs
    columns: tuple[str, ...] = ("prompt", "answer", "group", "tested")  # that enter `Run.key`
    exchanged: str | None = None  # the same questions with other memories, for the test

    def __post_init__(self):
        object.__setattr__(self, "tuned_on", self.tuned_on or self.name)


def _questions(rows: Sequence[tuple[str, object, str]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["prompt", "answer", "group"])
    frame["answer"] = " " + frame["answer"].astype(str)  # "=-8" would begin with a token of its own
    return frame.assign(tested=True)


def two_digit() -> pd.DataFrame:
    """All 20,000 additions and subtractions of numbers below 100, "48+27="; a group is an unordered
    pair of numbers."""
    rows = [
        (f"{a}{sign}{b}=", OPERATIONS[sign](a, b), f"{min(a, b)},{max(a, b)}")
        for a, b, sign in product(range(100), range(100), "+-")
    ]
    return _questions(rows)


def one_digit_composite() -> pd.DataFrame:
    """All 6,561 problems "(a op b) op c =" with digits 1–9 and + − * (1DC of Brown et al. 2020,
    inner pair first); a group is the inner pair in either order: no first step was seen before."""
    digits, of = range(1, 10), OPERATIONS
    rows = [
        (f"({a}{x}{b}){y}{c}=", of[y](of[x](a, b), c), f"{min(a, b)},{max(a, b)}")
        for a, b, x, y, c in product(digits, digits, OPERATIONS, OPERATIONS, digits)
    ]
    return _questions(rows)


def two_hop(
    table: str = "two_hop_known.csv",
    say: Callable[[str, str, str], str] = TEMPLATES["possessive"].say,
) -> pd.DataFrame:
    """Two-hop questions both of whose hops SmolLM2 answers, with their facts; a group is a bridge
    entity. Tested are those whose shortcut ("e1's r2") it does not answer with e3. table: another
    list of facts, in data/; say: another wording, e1, r1, r2 -> prompt."""
    listed = read_table(DATA / table, [*TWO_HOP_KEYS, "shortcut_right"])
    facts = two_hop_facts().drop(columns="split").merge(listed, on=TWO_HOP_KEYS)
    prompts = [say(*row) for row in facts[["e1", "r1", "r2"]].to_numpy()]
    facts = facts.assign(prompt=prompts, answer=" " + facts["e3"], group=facts["e2"])
    return facts.assign(tested=facts["shortcut_right"] == "False")


def two_hop_wide() -> pd.DataFrame:
    """Two-hop questions of many first relations whose hops SmolLM2 knows; no answer of the test is
    shown in training (E8)."""
    frame = read_table(DATA / "two_hop_wide.csv", [*TWO_HOP_KEYS, "e2", "e3", "tested"])
    said = [TEMPLATES["possessive"].say(*row) for row in frame[["e1", "r1", "r2"]].to_numpy()]
    frame = frame.assign(prompt=said, answer=" " + frame["e3"], group=frame["e2"])
    return frame.assign(tested=frame["tested"] == "True", answers_apart=True)


def one_hop_taught() -> pd.DataFrame:
    """The two-hop questions, for judging, and the single hops of each, for training ("Shanghai's
    country is", "China's capital is"): what is learnt by those who never see two hops asked. A
    single hop of several questions belongs to all of their groups."""
    frame, say = two_hop(), TEMPLATES["possessive"].say
    first = frame.assign(prompt=list(map(say, frame["e1"], frame["r1"])), answer=" " + frame["e2"])
    second = frame.assign(prompt=list(map(say, frame["e2"], frame["r2"])))
    first[["e3", "e3_aliases"]], first["r2"] = frame[["e2", "e2_aliases"]], frame["r1"]
    hops, same = pd.concat([first, second]), ["prompt", "answer"]
    hops["group"] = hops.groupby(same)["group"].transform(lambda of: "|".join(sorted(set(of))))
    hops = hops.drop_duplicates(same)
    return pd.concat([frame.assign(taught=False), hops.assign(taught=True)], ignore_index=True)


def planted(shuffled: bool) -> pd.DataFrame:
    """The two-hop questions, with what back attention reads instead of their own first pass: that
    of "e1's r1 is e2", told in column `memory`; shuffled: with the e2 of another question that has
    the same r1."""
    frame, say = two_hop(), TEMPLATES["possessive"].say
    told = frame["e2"]
    if shuffled:  # the next one in the order of a hash, so that it is not a row that stands near
        order = frame.assign(place=frame["prompt"].map(place_of)).sort_values("place")
        told = order.groupby("r1")["e2"].transform(_another)
    pairs = zip(frame["e1"], frame["r1"], told[frame.index], strict=True)
    return frame.assign(memory=[f"{say(e1, r1)} {e2}" for e1, r1, e2 in pairs])


def _another(names: pd.Series) -> np.ndarray:
    """For each name the next that differs from it, around the end; itself where all are alike."""
    values = names.tolist()
    both = values + values
    return np.array(
        [
            next((other for other in both[k + 1 :] if other != name), name)
            for k, name in enumerate(values)
        ]
    )


def in_context() -> pd.DataFrame:
    """Two-hop questions whose first hop is invented and stands in the prompt, among those of two
    other people: "Ann's country is Peru. Tom's country is Japan. Tom's country's capital is". Each
    second hop is asked five times; the others' bridge entities have another answer and are of the
    same fold (without enough of them it is left out)."""
    draw, say, rows = np.random.default_rng(0), TEMPLATES["possessive"].say, []
    answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in two_hop_facts().itertuples():
        answers[fact.e2, fact.r2].update([fact.e3, *fact.e3_aliases.split("|")])
    facts = two_hop().drop_duplicates(["r1", "e2", "r2"])
    bridges_of = facts.groupby(["r1", facts["e2"].map(fold_of)])["e2"].unique()
    for fact in facts.to_dict("records") * 5:
        e2, e3, r1, r2 = (fact[name] for name in ("e2", "e3", "r1", "r2"))
        unlike = [
            name
            for name in bridges_of[r1, fold_of(e2)]
            if name not in (e2, e3) and e3 not in answers[name, r2]
        ]
        if len(unlike) < 2:
            continue
        bridges = [e2, *draw.permutation(unlike)[:2]]
        people = draw.permutation(NAMES["people"])[:3]
        said = [f"{say(who, r1)} {bridge}." for who, bridge in zip(people, bridges, strict=True)]
        prompt = " ".join([*draw.permutation(said), say(people[0], r1, r2)])
        rows.append({**fact, "e1": people[0], "prompt": prompt, "tested": True})
    return pd.DataFrame(rows)


def with_anothers_memory(
    load: Callable[[], pd.DataFrame], alike: Sequence[str], answers: bool = False
) -> pd.DataFrame:
    """A dataset's questions, each with another one in column `memory`: the next, by a hash, of
    those that have the same in some columns (see `exchange_keys`)
    and another answer; itself where there is none. answers: the memory holds the answer, too, which
    numbers need, since what is read at each of its tokens is counted from the end."""
    frame = load()
    told = frame["prompt"] + frame["answer"]
    order = exchange_keys(frame).assign(place=frame["prompt"].map(place_of)).sort_values("place")
    chosen = pd.Series(frame.index, index=frame.index)
    for _, part in order.groupby(list(alike), sort=False):
        for k, row in enumerate(part.index):
            following = np.roll(part["answer"].to_numpy(), -k)
            other = np.flatnonzero(following != following[0])
            chosen[row] = part.index[(k + other[0]) % len(part)] if len(other) else row
    said = told if answers else frame["prompt"]
    return frame.assign(memory=said.loc[chosen].to_numpy())


def exchange_keys(frame: pd.DataFrame) -> pd.DataFrame:
    """The questions with fold, in which folds the names of their groups are, and length, of their
    answers: memories are counted from the end, and hold numbers."""
    folds = [
        "|".join(sorted({str(fold_of(name)) for name in label.split("|")}))
        for label in frame["group"]
    ]
    return frame.assign(fold=folds, length=frame["answer"].str.len())


def legs(kinds: int) -> pd.DataFrame:
    """Word problems about one or two kinds of animal (reasoning-gym), the offline stand-in for
    SVAMP and MultiArith; a group is a kind of animal, or two."""
    frame = read_table(DATA / "legs.csv", ["prompt", "answer", "animals"])
    frame = frame[frame["animals"].str.count(r"\|") == kinds - 1]
    return _questions(frame[["prompt", "answer", "animals"]].to_numpy().tolist())


def word_problems(name: str, read: Callable[[dict], tuple[str, float]]) -> pd.DataFrame:
    """A published dataset of word problems; read: an item -> text, answer. A group is a set of
    texts that say nearly the same. Raises what `published` does."""
    items = json.loads(published(DATASETS[name].published).read_bytes())
    rows = [(" ".join(text.split()), answer) for text, answer in map(read, items)]
    groups = near_duplicate_groups([re.findall(r"[a-z]+", text.lower()) for text, _ in rows])
    return _questions(
        [
            (f"{text} Answer:", int(n) if float(n).is_integer() else n, f"text {group}")
            for (text, n), group in zip(rows, groups, strict=True)
        ]
    )


def svamp(item: dict) -> tuple[str, float]:
    """SVAMP (Patel et al. 2021): one-step word problems."""
    return f"{item['Body']} {item['Question']}".replace(" .", "."), item["Answer"]


def multiarith(item: dict) -> tuple[str, float]:
    """MultiArith (Roy and Roth 2015): two-step word problems."""
    return item["sQuestion"], item["lSolutions"][0]


def near_duplicate_groups(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """A number per text, the same for texts linked by pairs that share TWINS of their words."""
    vocabulary = sorted({word for text in texts for word in text})
    has = np.array([[word in text for word in vocabulary] for text in map(set, texts)], np.float32)
    both = has @ has.T
    either = has.sum(1)[:, None] + has.sum(1) - both
    return connected_components(both >= TWINS * either)[1]


class _Named(dict):
    def __missing__(self, name: str):
        raise ValueError(f"Unknown dataset {name!r}; choose one of {', '.join(self)}.")


_number = partial(Dataset, tuned_on="1DC")
_first = partial(Dataset, judge="first token")
_two_hop = partial(_first, columns=(*Dataset.columns, "e3_aliases"))
AGAIN = ("in context, again", "1DC, again")
ONE_HOP = "two-hop, one hop taught"
WIDE = "two-hop, wide"
PLANTED = ("two-hop, planted", "two-hop, planted shuffled")
_told = partial(_first, columns=(*Dataset.columns, "e3_aliases", "memory"))
_question = partial(two_hop, say=TEMPLATES["question"].say)
_code = partial(two_hop, say="{2}({1}({0})) =".format)
_SVAMP = Published(
    "svamp/SVAMP.json",
    "https://raw.githubusercontent.com/arkilpatel/SVAMP/main/SVAMP.json",
    "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
)
_MULTIARITH = Published(
    "multiarith/MultiArith.json",
    "https://raw.githubusercontent.com/kojima-takeshi188/zero_shot_cot/main/dataset/MultiArith/"
    "MultiArith.json",
    "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4",
)
CHAINS_EXCHANGED, WIDE_EXCHANGED = "chains, another's memory", f"{WIDE}, another's memory"
_CHAINED = (*Dataset.columns, "e3_aliases", "split")
_APART = (*Dataset.columns, "e3_aliases", "answers_apart")
_own_split = (*Dataset.columns, "split")
_RECORDS = (
    _number("2-digit", two_digit, longer=3),
    _number("1DC", one_digit_composite, longer=3),
    _two_hop("two-hop", two_hop),
    # SmolLM2 answers one of their hops wrongly; at most 100 of each pair of relations.
    _two_hop("two-hop, unknown", partial(two_hop, "two_hop_unknown.csv")),
    # The facts of "two-hop", asked in other ways.
    _two_hop("question", _question),
    _two_hop("code", _code),
    _two_hop("in context", in_context),
    # Trained again, to be asked with another's memory: see E4.
    _two_hop(
        AGAIN[0], in_context, tuned_on="in context", exchanged=f"{AGAIN[0]}, another's memory"
    ),
    _number(AGAIN[1], one_digit_composite, longer=3, exchanged=f"{AGAIN[1]}, another's memory"),
    _told(
        f"{AGAIN[0]}, another's memory",
        partial(with_anothers_memory, in_context, ["r1", "r2", "fold"]),
        tuned_on="in context",
    ),
    _number(
        f"{AGAIN[1]}, another's memory",
        partial(with_anothers_memory, one_digit_composite, ["length"], answers=True),
        columns=(*Dataset.columns, "memory"),
    ),
    # Trained on their single hops alone, see E7.
    _first(
        ONE_HOP,
        one_hop_taught,
        columns=(*Dataset.columns, "e3_aliases", "taught"),
    ),
    # Many first relations, no answer shared: the rates are those of "two-hop", see E8.
    _first(WIDE, two_hop_wide, tuned_on="two-hop", columns=_APART, exchanged=WIDE_EXCHANGED),
    _first(
        WIDE_EXCHANGED,
        partial(with_anothers_memory, two_hop_wide, ["r1", "fold"]),
        tuned_on="two-hop",
        columns=(*_APART, "memory"),
    ),
    # What back attention reads holds e2, or another's.
    _told(PLANTED[0], partial(planted, False), exchanged=PLANTED[1]),
    _told(PLANTED[1], partial(planted, True)),
    # Both hops invented and told: flow is needed, knowledge is not.
    _first("chains", chains, columns=_CHAINED, exchanged=CHAINS_EXCHANGED),
    _first(
        CHAINS_EXCHANGED,
        partial(with_anothers_memory, chains, ["split", "kind"]),
        columns=(*_CHAINED, "memory"),
    ),
    # Of invented words.
    _first("compositions", compositions, words=WORDS, columns=_own_split),
    _first("premise", premise.premise, words=premise.WORDS, columns=_own_split),
    _number("legs, one kind", partial(legs, 1)),
    _number("legs, two kinds", partial(legs, 2)),
    _number("SVAMP", partial(word_problems, "SVAMP", svamp), published=_SVAMP),
    _number("MultiArith", partial(word_problems, "MultiArith", multiarith), published=_MULTIARITH),
)
DATASETS: dict[str, Dataset] = _Named((record.name, record) for record in _RECORDS)
OTHER_PROMPTS = ("question", "code", "in context")


def load(name: str) -> pd.DataFrame:
    """A dataset by its name in DATASETS; raises ValueError naming those that there are."""
    return DATASETS[name].load()


def majority_baseline(name: str, by: str | None = None) -> float | pd.Series:
    """Share of a dataset's test questions, over all folds, that are right when each gets the answer
    that training has most often for its second relation (column r2); by: for each value of a column
    """
    frame, tests = load(name), []
    for fold in range(FOLDS):
        parts = dict(list(split(frame, fold).groupby("split")))
        best = parts["train"].groupby("r2")["answer"].agg(lambda answers: answers.mode()[0])
        right = parts["test"]["r2"].map(best) == parts["test"]["answer"]
        tests.append(parts["test"].assign(right=right))
    test = pd.concat(tests)
    return float(test["right"].mean()) if by is None else test.groupby(by)["right"].mean()


def held_out_text() -> str:
    """English prose that none of the tasks resembles (see data/README.md)."""
    return (DATA / "held_out.txt").read_text(encoding="utf-8")
