"""Two-hop questions answered by a second turn of layers that nobody trained (E7)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

from backattn.analysis.training_free import damped_loop, realign
from backattn.models.decoder import describe
from backattn.models.hooks import evaluating
from backattn.training.batches import Items
from backattn.training.evaluation import evaluate
from companion.measures.memory import question_spans
from companion.paths import DATA
from companion.questions.prompts import label_tokens, last_token_positions
from companion.runs.as_asked import asked, questions
from companion.runs.plans import SEEDS
from companion.runs.run import Run


@dataclass(frozen=True)
class Turn:
    """One way to turn twice. arm: "realigned" or "damped loop"; begin, end: of the realigned, the
    target and the source layer, of a loop, its first and last layer; how: of the realigned, 1.0 for
    the mean embedding, 0.0 for the likeliest token's; of a loop, its step."""

    arm: str
    begin: int
    end: int
    how: float


def turns_for(layers: int) -> tuple[Turn, ...]:
    """The settings that are tried on a model of so many layers; of 30, those of E7."""
    low, middle, high, top = (round(layers * share) for share in (0.2, 0.4, 0.6, 0.8))
    realigned = product((high, top, layers), (0, low), (0, 1))
    looped = product((low, middle, high), (0.25, 0.5, 1))
    turns = [Turn("realigned", target, source, how) for source, target, how in realigned]
    turns += [Turn("damped loop", n, min(n + 3, layers - 1), how) for n, how in looped]
    return tuple(dict.fromkeys(turns))  # of few layers, some are the same


def right_after(turn: Turn, model, tokenizer, frame: pd.DataFrame, items: Items) -> np.ndarray:
    """Which questions of a split are answered right with a second turn: [n] bool. frame: prompt,
    e1, r1, r2 of `asked`; items: the same of `questions`."""
    if turn.arm == "damped loop":
        with evaluating(model), damped_loop(model, turn.begin, turn.end, turn.how):
            return evaluate(model, items)[0]
    spans = [question_spans(x.prompt, x.e1, x.r1, x.r2) for x in frame.itertuples()]
    among = {"r1": [span["r1_span"] for span in spans]}
    places = last_token_positions(label_tokens(tokenizer, frame["prompt"], among), ["r1"])
    where = {"positions": [place for (place,) in places], "source": turn.end}
    where |= {"targets": [turn.begin], "mean": bool(turn.how)}
    said = realign(model, tokenizer, frame["prompt"].tolist(), **where)[0].tolist()
    return np.array([token in ok for token, ok in zip(said, items.accepted, strict=True)])


def second_turns(model, tokenizer, run: Run, split: str, turns: Sequence[Turn]) -> pd.DataFrame:
    """A row for each turn on a split of a run: the turn's fields, seed, split, right (a character,
    0 or 1, for each question), accuracy. Raises ValueError for another arm than zero-shot, whose
    questions stand behind examples or are asked of an adapter."""
    if run.arm != "zero-shot":
        raise ValueError(f"Second turns are of the model as it is, zero-shot, and not {run.arm!r}.")
    frame, items = asked(run, split), questions(run, tokenizer, split)
    rows = []
    for turn in turns:
        right = right_after(turn, model, tokenizer, frame, items)
        about = {**vars(turn), "seed": run.seed, "split": split}
        about["right"] = "".join(map(str, right.astype(int)))
        rows.append({**about, "accuracy": right.mean()})
    return pd.DataFrame(rows)


def all_turns(model, tokenizer, name: str) -> pd.DataFrame:
    """`second_turns` of `turns_for` the model of a name, on the validation questions of "two-hop"
    and on the test questions of all seeds; SmolLM2's come with the repository (`kept_turns`)."""
    run, turns = Run("two-hop", "zero-shot", model=name), turns_for(len(describe(model).blocks))
    parts = [second_turns(model, tokenizer, run, "validation", turns)]
    for seed in SEEDS:
        parts.append(second_turns(model, tokenizer, replace(run, seed=seed), "test", turns))
    return pd.concat(parts, ignore_index=True)


def kept_turns() -> pd.DataFrame:
    """`second_turns` of SmolLM2 as they come with the repository, with accuracy."""
    table = pd.read_csv(DATA / "03_second_turns.csv", dtype={"right": str})
    return table.assign(accuracy=[right.count("1") / len(right) for right in table["right"]])


def best_turns(turns: pd.DataFrame) -> dict[str, Turn]:
    """Of each arm the turn that does best on the validation questions, the first of equals."""
    tried = turns[turns["split"] == "validation"].reset_index(drop=True)
    best = tried.loc[tried.groupby("arm", sort=False)["accuracy"].idxmax()]
    return {x.arm: Turn(x.arm, x.begin, x.end, x.how) for x in best.itertuples()}


def turn_answers(turns: pd.DataFrame, answered: pd.DataFrame) -> pd.DataFrame:
    """The test answers of `best_turns` as arms of `answered` (`results.answers`, of which the rows
    of "zero-shot" say which questions were asked). Raises ValueError where the numbers differ."""
    usual, parts = answered[answered["arm"] == "zero-shot"], []
    for arm, turn in best_turns(turns).items():
        fits = (turns[list(vars(turn))] == pd.Series(vars(turn))).all(axis=1)
        tested = turns[fits & (turns["split"] == "test")].set_index("seed")["right"]
        right = [float(x) for seed in usual["seed"].unique() for x in tested[seed]]
        if len(right) != len(usual):
            raise ValueError(f"{len(right)} answers were kept for {len(usual)} questions.")
        costs = {"seconds": np.nan, "flops": np.nan, "perplexity": np.nan}
        parts.append(usual.assign(arm=arm, right=right, **costs))
    return pd.concat(parts, ignore_index=True)
