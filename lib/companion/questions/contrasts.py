"""Prompts in pairs that differ in one thing, with a right and a wrong answer: the tasks of notebook
10.

Each task is a frame: prompt, other (the counterfactual prompt, which asks for another answer),
right, wrong (words as they follow the prompt), group (a draw puts it into one part: `drawn`)."""

from collections.abc import Callable
from itertools import permutations, product

import numpy as np
import pandas as pd
import torch
import yaml

from backattn.analysis.circuits import Circuit, Pairs, pair_up
from backattn.models.tokens import continuation_ids, encode
from companion.paths import DATA
from companion.questions.chains import NAMES
from companion.questions.datasets import two_hop
from companion.questions.facts import facts
from companion.questions.prompts import single_hop

WORDS = yaml.safe_load((DATA / "contrasts.yml").read_text(encoding="utf-8"))
SCORING, EVALUATING = 100, 200  # prompts of a draw
ASKED, ENOUGH = 700, 450  # candidates at a time, until so many fit


def indirect_object() -> pd.DataFrame:
    """ "When Ann and Tom went to the park, Tom gave the key to" → Ann, against "… Ann gave …"."""
    words, draw, rows = WORDS["indirect object"], np.random.default_rng(0), []
    for index in range(ASKED):
        a, b = draw.choice(NAMES["people"], 2, replace=False)
        said = {"place": draw.choice(words["places"]), "thing": draw.choice(words["things"])}
        template = words["templates"][index % len(words["templates"])]
        first, _, second = template.partition("{B}")
        if index % 2:  # who is named first tells nothing
            first, second = first.replace("{A}", "{B}"), second
            template = first + "{A}" + second
        before, _, after = template.rpartition("{B}")
        prompt, other = (f"{before}{{{name}}}{after}".format(A=a, B=b, **said) for name in "BA")
        rows.append((prompt, other, f" {a}", f" {b}", "|".join(sorted((a, b)))))
    return _frame(rows)


def greater_than() -> pd.DataFrame:
    """ "The war lasted from the year 1745 to the year 17" → 8, not 1; against "… 1705 …"."""
    words, draw, rows = WORDS["greater than"], np.random.default_rng(0), []
    for template, noun, century in product(
        *(words[k] for k in ("templates", "nouns", "centuries"))
    ):
        for tens in draw.permutation(np.arange(2, 9))[:4]:
            ones, right, wrong = (
                draw.integers(2, 9),
                draw.integers(tens + 1, 10),
                draw.integers(1, tens),
            )
            prompt, other = (
                template.format(noun=noun, century=century, year=f"{digit}{ones}")
                for digit in (tens, 0)
            )
            rows.append((prompt, other, str(right), str(wrong), f"{noun} {century}"))
    return _frame(rows)


def agreement() -> pd.DataFrame:
    """ "The keys near the cabinet" → are, not is; against "The key near the cabinet"."""
    words, rows = WORDS["agreement"], []
    for template, (noun, other) in product(words["templates"], permutations(words["nouns"], 2)):
        for plural in (False, True):
            one, many = (
                template.format(noun=f"{noun}{ending}", other=f"{other}{'' if plural else 's'}")
                for ending in ("", "s")
            )
            pair, verbs = (one, many), (" is", " are")
            order = (1, 0) if plural else (0, 1)
            rows.append((*(pair[i] for i in order), *(verbs[i] for i in order), noun))
    return _frame(rows)


def capitals() -> pd.DataFrame:
    """Notebook 01's prompts about capitals, each against those about another country."""
    asked = single_hop(facts().query("relation == 'capital'"))
    return _against(asked.rename(columns={"subject": "group"}), [])


def two_hops() -> pd.DataFrame:
    """Two-hop questions with known hops, each against the same relations of another e1."""
    asked = two_hop().assign(group=lambda frame: frame["e1"])
    return _against(asked.drop_duplicates(["prompt"]), ["r1", "r2"])


def _against(asked: pd.DataFrame, same: list[str]) -> pd.DataFrame:
    """Each prompt with up to 12 others of the same relations and another answer."""
    draw, rows = np.random.default_rng(0), []
    for _, part in asked.groupby(same) if same else [((), asked)]:
        for row in part.itertuples():
            others = part[(part["group"] != row.group) & (part["answer"] != row.answer)]
            for other in others.iloc[draw.permutation(len(others))[:12]].itertuples():
                answers = (f" {x.answer.strip()}" for x in (row, other))
                rows.append((row.prompt, other.prompt, *answers, row.group))
    return _frame(rows)


def _frame(rows: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["prompt", "other", "right", "wrong", "group"])


TASKS: dict[str, Callable[[], pd.DataFrame]] = {
    "indirect object": indirect_object,
    "greater than": greater_than,
    "agreement": agreement,
    "capitals": capitals,
    "two-hop": two_hops,
}


def fit(model, tokenizer, task: str) -> pd.DataFrame:
    """The pairs of a task that can be used with a model: of equal length, answers that begin with
    different tokens, the right one preferred, and on the counterfactual prompt less so; candidates
    are tried until there are ENOUGH. Adds right_id, wrong_id."""
    frame = TASKS[task]().drop_duplicates(["prompt", "other"]).sample(frac=1, random_state=0)
    found, count = [], 0
    for start in range(0, len(frame), 2 * ASKED):
        part = _fit(model, tokenizer, frame.iloc[start : start + 2 * ASKED].copy())
        found.append(part)
        count += len(part)
        if count >= ENOUGH:
            break
    return pd.concat(found, ignore_index=True)


def _fit(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Those of some candidates that can be used, of at most ASKED that the model is asked."""
    for name in ("right", "wrong"):
        first = {word: _first_id(tokenizer, word) for word in frame[name].unique()}
        frame[f"{name}_id"] = frame[name].map(first)
    lengths = [
        encode(tokenizer, frame[name].tolist()).lengths.numpy() for name in ("prompt", "other")
    ]
    frame = frame[(lengths[0] == lengths[1]) & (frame["right_id"] != frame["wrong_id"])].head(ASKED)
    if frame.empty:
        return frame
    pairs, circuit = pairs_of(tokenizer, frame, model.device), Circuit(model)
    turned = Pairs(pairs.other, pairs.clean, pairs.right, pairs.wrong)
    every = np.ones(len(circuit.nodes), dtype=bool)
    m, other = (circuit.kept(x, every, base="zero") for x in (pairs, turned))
    return frame[(m > 0) & (m > other)]


def _first_id(tokenizer, word: str) -> int:
    if word.startswith(" "):
        return continuation_ids(tokenizer, word.strip())[0]
    return tokenizer(word, add_special_tokens=False)["input_ids"][-1]


def pairs_of(tokenizer, frame: pd.DataFrame, device: str | torch.device = "cpu") -> Pairs:
    """The rows of `fit` as pairs."""
    columns = (frame[name].tolist() for name in ("prompt", "other", "right_id", "wrong_id"))
    return pair_up(tokenizer, *columns, device=device)


def drawn(frame: pd.DataFrame, seed: int) -> dict[str, pd.DataFrame]:
    """ "score" and "evaluate": SCORING and EVALUATING rows of `fit` without a common group, in an
    order in which the first rows are of many groups. Raises ValueError where there are too few."""
    order = np.random.default_rng(seed).permutation(frame["group"].unique())
    rank = frame["group"].map({group: place for place, group in enumerate(order)})
    frame = frame.iloc[np.argsort(rank, kind="stable")]
    groups = frame["group"].to_numpy()
    last = groups[min(SCORING, len(frame)) - 1]
    rest = frame[(groups != last) & (np.arange(len(frame)) >= SCORING)]
    if len(rest) < EVALUATING:
        raise ValueError(
            f"There are {len(frame)} usable pairs: too few for {EVALUATING} to evaluate."
        )
    parts = {"score": frame.head(SCORING), "evaluate": rest.head(EVALUATING)}
    return {name: part.sample(frac=1, random_state=seed) for name, part in parts.items()}
