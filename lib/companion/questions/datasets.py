"""The reasoning datasets of claim C8, one record each, without leakage from training into the test.

Every dataset has one row per question: prompt, answer (as it follows the prompt, its space
included), group, and tested (whether it may be a test question). A group is what must not be in
training and in the test: a bridge entity, a pair of numbers, a kind of animal ("|" between where a
question has several). `splits.split` does the rest, by hash of names.
"""

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
from companion.questions.chains import chains
from companion.questions.compositions import WORDS, compositions
from companion.questions.facts import read_table, two_hop_facts
from companion.questions.prompts import TEMPLATES
from companion.questions.published import Published, published
from companion.questions.splits import FOLDS, draw, fold_of, split

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": int.__add__,
    "-": int.__sub__,
    "*": int.__mul__,
}

TWO_HOP_KEYS = ["pair", "e1", "r1", "r2"]  # name a two-hop fact

TWINS = 0.8  # word problems that share this part of their words are one group

NAMES = """
Adam Alan Alice Amy Ann Anthony Arthur Barbara Ben Bill Bob Brian Bruce Carol Charles Charlie Chris
Claire Dan Daniel Dave Diana Donald Edward Ellen Emily Emma Eric Frank Fred George Grace Greg Hannah
Harry Helen Henry Howard Ian Jack James Jane Jason Jean Jeff Jenny Jim Joan Joe John Jonathan Joseph
Joy Julia Julie Karen Kate Keith Ken Kevin Kim Larry Laura Lee Leo Lewis Lily Linda Lisa Louis Lucy
Luke Marco Margaret Maria Marie Mark Martin Mary Matt Max Miguel Mike Nick Oliver Oscar Paul Phil
Rachel Ray Richard Robin Rose Ryan Sam Sandra Sarah Sean Steve Sue
"""  # of people about whom facts are invented, a token each for SmolLM2


@dataclass(frozen=True)
class Dataset:
    """What the project has to know of a dataset, all in one place.

    name: as in DATASETS and in every `Run`.
    load: makes the frame described above. Its column `split`, if any, keeps every question in one
        split; `kind` tells kinds of question apart in the learning curve; r2 is the relation whose
        most frequent answer `majority_baseline` gives.
    judge: "number", the whole answer, as written; or "first token", of the answer or, where the
        frame has the columns of `two_hop_facts`, of any of e3's names (see `candidates`).
    tuned_on: the dataset on whose validation questions learning rates of adapters are chosen.
    longer: so many times the steps of the others (digits are learnt slowly).
    published: where it is, if it is not part of this repository.
    words: the vocabulary of models from scratch; None: digits and signs, each a token.
    columns: those of the frame that enter `Run.key`.
    """

    name: str
    load: Callable[[], pd.DataFrame]
    judge: str = "number"
    tuned_on: str = "1DC"
    longer: int = 1
    published: Published | None = None
    words: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ("prompt", "answer", "group", "tested")


def _questions(rows: Sequence[tuple[str, object, str]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["prompt", "answer", "group"])
    frame["answer"] = " " + frame["answer"].astype(str)  # "=-8" would begin with a token of its own
    return frame.assign(tested=True)


def two_digit() -> pd.DataFrame:
    """All 20,000 additions and subtractions of numbers below 100, "48+27="; a group is an unordered
    pair of numbers."""
    return _questions(
        [
            (f"{a}{sign}{b}=", OPERATIONS[sign](a, b), f"{min(a, b)},{max(a, b)}")
            for a, b, sign in product(range(100), range(100), "+-")
        ]
    )


def one_digit_composite() -> pd.DataFrame:
    """All 6,561 problems "(a op b) op c =" with digits 1–9 and + − * (1DC of Brown et al. 2020,
    inner pair first).

    A group is the inner pair of digits in either order, so that no test question's first step was
    seen in training.
    """
    digits, rows = range(1, 10), []
    for a, b, first, second, c in product(digits, digits, OPERATIONS, OPERATIONS, digits):
        answer = OPERATIONS[second](OPERATIONS[first](a, b), c)
        rows.append((f"({a}{first}{b}){second}{c}=", answer, f"{min(a, b)},{max(a, b)}"))
    return _questions(rows)


def two_hop(
    table: str = "two_hop_known.csv",
    say: Callable[[str, str, str], str] = TEMPLATES["possessive"].say,
) -> pd.DataFrame:
    """Two-hop questions both of whose hops SmolLM2 answers; a group is a bridge entity.

    Tested are those whose shortcut ("e1's r2") it does not answer with e3, so that one hop is not
    enough. Also e1, e2, e3 and their aliases; an answer is judged by its first token.

    table: another list of facts, in data/. say: another wording: e1, r1, r2 -> prompt.
    """
    listed = read_table(DATA / table, [*TWO_HOP_KEYS, "shortcut_right"])
    facts = two_hop_facts().drop(columns="split").merge(listed, on=TWO_HOP_KEYS)
    return facts.assign(
        prompt=[say(row.e1, row.r1, row.r2) for row in facts.itertuples()],
        answer=" " + facts["e3"],
        group=facts["e2"],
        tested=~facts["shortcut_right"],
    )


def in_context() -> pd.DataFrame:
    """Two-hop questions whose first hop is invented and stands in the prompt, among those of two
    other people, and whose second hop is one of `two_hop`: "Ann's country is Peru. Tom's country is
    Japan. Tom's country's capital is".

    Each second hop is asked five times, of people drawn anew. The other people's bridge entities
    have another answer and are of the same fold; a second hop without enough of them is left out.
    Columns as in `two_hop`.
    """
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
        people = draw.permutation(NAMES.split())[:3]
        told = [f"{say(who, r1)} {bridge}." for who, bridge in zip(people, bridges, strict=True)]
        prompt = " ".join([*draw.permutation(told), say(people[0], r1, r2)])
        rows.append({**fact, "e1": people[0], "prompt": prompt, "tested": True})
    return pd.DataFrame(rows)


def legs(kinds: int) -> pd.DataFrame:
    """Word problems about one or two kinds of animal, made by reasoning-gym: the offline stand-in
    for SVAMP and MultiArith. A group is a kind of animal, or two."""
    frame = read_table(DATA / "legs.csv", ["prompt", "answer", "animals"])
    frame = frame[frame["animals"].str.count(r"\|") == kinds - 1]
    return _questions(frame[["prompt", "answer", "animals"]].to_numpy().tolist())


def svamp() -> pd.DataFrame:
    """SVAMP (Patel et al. 2021): one-step word problems. A group is a set of texts that say nearly
    the same. Raises what `published` raises."""
    items = json.loads(published(DATASETS["SVAMP"].published).read_bytes())
    texts = [f"{item['Body']} {item['Question']}".replace(" .", ".") for item in items]
    return _word_problems(texts, [item["Answer"] for item in items])


def multiarith() -> pd.DataFrame:
    """MultiArith (Roy and Roth 2015): two-step word problems; see `svamp`."""
    items = json.loads(published(DATASETS["MultiArith"].published).read_bytes())
    return _word_problems(
        [item["sQuestion"] for item in items], [item["lSolutions"][0] for item in items]
    )


def _word_problems(texts: Sequence[str], answers: Sequence[float]) -> pd.DataFrame:
    texts = [" ".join(text.split()) for text in texts]
    numbers = [int(n) if float(n).is_integer() else n for n in answers]
    groups = near_duplicate_groups([re.findall(r"[a-z]+", text.lower()) for text in texts])
    return _questions(
        [(f"{t} Answer:", n, f"text {g}") for t, n, g in zip(texts, numbers, groups, strict=True)]
    )


def near_duplicate_groups(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """A number per text, the same for texts linked by pairs that share TWINS of the words of both:
    [n]."""
    vocabulary = sorted({word for text in texts for word in text})
    has = np.array([[word in text for word in vocabulary] for text in map(set, texts)], np.float32)
    both = has @ has.T
    either = has.sum(1)[:, None] + has.sum(1) - both
    return connected_components(both >= TWINS * either)[1]


class _Named(dict):
    def __missing__(self, name: str):
        raise ValueError(f"Unknown dataset {name!r}; choose one of {', '.join(self)}.")


_two_hop = partial(Dataset, judge="first token", columns=(*Dataset.columns, "e3_aliases"))

_question = partial(two_hop, say=TEMPLATES["question"].say)

_RECORDS = (
    Dataset("2-digit", two_digit, longer=3),
    Dataset("1DC", one_digit_composite, longer=3),
    _two_hop("two-hop", two_hop, tuned_on="two-hop"),
    # SmolLM2 answers one of their hops wrongly; at most 100 of each pair of relations.
    _two_hop("two-hop, unknown", partial(two_hop, "two_hop_unknown.csv")),
    # The facts of "two-hop", asked in other ways.
    _two_hop("question", _question, tuned_on="question"),
    _two_hop("code", partial(two_hop, say="{2}({1}({0})) =".format), tuned_on="code"),
    _two_hop("in context", in_context, tuned_on="in context"),
    # Both hops invented and told: flow is needed, knowledge is not.
    Dataset(
        "chains",
        partial(chains, NAMES),
        judge="first token",
        tuned_on="chains",
        columns=(*Dataset.columns, "e3_aliases", "split"),
    ),
    Dataset(
        "compositions",
        compositions,
        judge="first token",
        tuned_on="compositions",
        words=WORDS,
        columns=(*Dataset.columns, "split"),
    ),
    Dataset("legs, one kind", partial(legs, 1)),
    Dataset("legs, two kinds", partial(legs, 2)),
    Dataset(
        "SVAMP",
        svamp,
        published=Published(
            "svamp/SVAMP.json",
            "https://raw.githubusercontent.com/arkilpatel/SVAMP/main/SVAMP.json",
            "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
        ),
    ),
    Dataset(
        "MultiArith",
        multiarith,
        published=Published(
            "multiarith/MultiArith.json",
            "https://raw.githubusercontent.com/kojima-takeshi188/zero_shot_cot/main/dataset/"
            "MultiArith/MultiArith.json",
            "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4",
        ),
    ),
)

DATASETS: dict[str, Dataset] = _Named((record.name, record) for record in _RECORDS)

OTHER_PROMPTS = ("question", "code", "in context")


def load(name: str) -> pd.DataFrame:
    """A dataset by its name in DATASETS; raises ValueError naming those that there are."""
    return DATASETS[name].load()


def overview(names: Sequence[str]) -> pd.DataFrame:
    """What the datasets hold: questions, those that may be tested, names; one question with its
    answer."""
    rows = []
    for name in names:
        frame = load(name)
        first = draw(split(frame, 0), "test", 1).iloc[0]
        rows.append(
            {
                "dataset": name,
                "questions": len(frame),
                "tested": int(frame["tested"].sum()),
                "names": frame["group"].str.split("|").explode().nunique(),
                "question": first["prompt"],
                "answer": first["answer"].strip(),
            }
        )
    return pd.DataFrame(rows)


def majority_baseline(name: str, by: str | None = None) -> float | pd.Series:
    """Share of a dataset's test questions, over all folds, that are right when each gets the answer
    that training has most often for its second relation (column r2).

    by: a column, for whose values the share is returned apart: value -> share.
    """
    frame, tests = load(name), []
    for fold in range(FOLDS):
        parts = dict(list(split(frame, fold).groupby("split")))
        best = parts["train"].groupby("r2")["answer"].agg(lambda answers: answers.mode()[0])
        test = parts["test"]
        tests.append(test.assign(right=test["r2"].map(best) == test["answer"]))
    test = pd.concat(tests)
    return float(test["right"].mean()) if by is None else test.groupby(by)["right"].mean()


def held_out_text() -> str:
    """English prose that none of the tasks resembles, to see what training spoils: how scipy
    describes its t-test (see data/README.md)."""
    return (DATA / "held_out.txt").read_text(encoding="utf-8")
