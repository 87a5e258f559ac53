"""One call: arms compared on questions of your own, as on the paper's datasets here."""

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from backattn.files import atomic_file
from backattn.models.load import load_model
from backattn.models.tokens import continuation_ids, tells_little
from companion.measures.training_memory import by_test_memory, exchanged_in_test
from companion.questions.datasets import DATASETS, Dataset, exchange_keys, with_anothers_memory
from companion.questions.facts import read_table
from companion.questions.splits import FOLDS, SPLITS, split
from companion.runs.as_asked import asked
from companion.runs.plans import (
    CORE_ARMS,
    TRIED,
    Planned,
    adapter_runs,
    complete,
    found,
    lead_runs,
    rates_tried,
)
from companion.runs.results import accuracy_table, answers, difference_table
from companion.runs.run import UNTRAINED, Run
from companion.runs.store import Store

COLUMNS = ("prompt", "answer", "group")
KNOWN = (*COLUMNS, "kind")
MOST_TRIED = 7  # learning rates of an arm
LEAST_NAMES = 20  # with fewer, samples of names give intervals that are too narrow
WHOLE, DECIMAL = r"-?\d+", r"-?\d*\.\d+"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. accuracies: a row per arm and kind of answer ("all", "seen" or "unseen"
    in training); differences: of the first arm from each other; memory: what another question's
    memory costs, or empty; control: the same where back attention is known to read its memory, by
    the shipped runs of E4, which shows that the exchange can see flow; dropped: why questions were
    left out, with counts; rates: what was chosen for each arm, and whether it is the lowest or
    highest that was tried."""

    accuracies: pd.DataFrame
    differences: pd.DataFrame
    memory: pd.DataFrame
    control: pd.DataFrame
    dropped: pd.DataFrame
    rates: pd.DataFrame

    def save(self, folder: Path) -> list[Path]:
        """A CSV of each table; returns their paths."""
        paths = []
        for field in dataclasses.fields(self):
            paths.append(Path(folder) / f"{field.name}.csv")
            with atomic_file(paths[-1]) as temporary:
                getattr(self, field.name).to_csv(temporary, index=False)
        return paths


def compare(
    questions: pd.DataFrame | str | Path,
    arms: Sequence[str] = CORE_ARMS,
    memory: bool = True,
    store: Store | None = None,
    device: str = "cpu",
    **sizes,
) -> Comparison:
    """Train arms on questions of your own, three seeds each, and compare them.

    Args:
        questions: a frame, or a CSV in UTF-8, with the columns prompt, answer and, if you like,
            group (what must not be in training and in the test, as a bridge entity; several with
            "|" between; else every prompt by itself) and kind (memories are exchanged within it).
            Other columns are not read, which a warning says.
            Answers that are all whole numbers are judged as written, others by their first token.
        arms: of `backattn.adapters.arms.ARMS`; those that train nothing are always there.
        memory: ask the test again with another question's memory, where back attention is an arm.
        device: to train and test on.
        sizes: fields of `Run` (model, source_layer, dim, steps, batch_size, …).

    Each arm's learning rate is searched on validation questions at half of the steps: three rates,
    and further ones while the best is at an end, up to seven. Finished runs are kept in the store
    and not trained again. Raises ValueError for unknown arms and sizes, missing or misspelt
    columns, answers that cannot be told apart, and too few groups.

    Example:
        >>> compare("my.csv", model="smollm2", steps=100).differences  # doctest: +SKIP
    """
    if len(set(arms)) < len(arms):
        raise ValueError(f"An arm is named twice: {', '.join(arms)}.")
    unknown = [arm for arm in arms if arm not in TRIED]
    if unknown or not arms:
        problem = f"There is no arm {unknown[0]!r}" if unknown else "No arm is given"
        raise ValueError(f"{problem}; choose of {', '.join(TRIED)}.")
    settings = [field.name for field in dataclasses.fields(Run)]
    if other := [name for name in sizes if name not in settings]:
        raise ValueError(f"There is no setting {other[0]!r}; choose of {', '.join(settings)}.")
    store, memory = Store() if store is None else store, memory and "back attention" in arms
    every = dict.fromkeys(("train_items", "validation_items", "test_items"))  # None: all there are
    sizes = {"model": "smollm2", **every, **sizes}
    frame, judge, dropped = prepared(questions, load_model(sizes["model"])[1], memory)
    name = _register(frame, judge, memory)
    control = positive_control() if memory else pd.DataFrame()  # before any training
    plan = adapter_runs(names=[name], arms=list(arms), **sizes)
    plan = [dataclasses.replace(one, most=MOST_TRIED) for one in plan]
    runs = complete(plan, store, device=device)
    answered = pd.concat([_with_seen(run, answers([run], store)) for run in runs])
    return Comparison(
        accuracies=_accuracies(answered),
        differences=difference_table(answered, arms[0], [*arms[1:], *UNTRAINED]),
        memory=_exchanged(runs, store) if memory else pd.DataFrame(),
        control=control,
        dropped=dropped,
        rates=_rates(plan, runs, store),
    )


def _exchanged(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    back = [run for run in runs if run.arm == "back attention"]
    return exchanged_in_test(by_test_memory(answers(back, store), back, store))


def positive_control() -> pd.DataFrame:
    """`exchanged_in_test` of E4's shipped runs: two tasks on which back attention reads its memory
    (`companion.runs.plans.lead_runs`, notebook 07)."""
    store = Store()
    return _exchanged(found(lead_runs(), store), store)


def prepared(
    questions: pd.DataFrame | str | Path, tokenizer, memory: bool = True
) -> tuple[pd.DataFrame, str, pd.DataFrame]:
    """Questions as datasets are here, how they are judged ("number" or "first token"), and what was
    dropped or is not tested: why, questions. memory: leave out questions to which no other's memory
    can be given, as their exchange would show no flow. Raises what `compare` says."""
    if not isinstance(questions, pd.DataFrame):
        questions = read_table(Path(questions), COLUMNS[:2], strip=True)
    if missing := [name for name in COLUMNS[:2] if name not in questions]:
        raise ValueError(f"The questions lack column {missing[0]!r}: give prompt and answer.")
    for name in (name for name in questions if name not in KNOWN):
        meant = [known for known in KNOWN if str(name).strip().lower().rstrip("s") == known]
        if meant and meant[0] not in questions:
            raise ValueError(f"There is a column {name!r} and no {meant[0]!r}: rename it.")
        warnings.warn(f"Column {name!r} is not read; known are {', '.join(KNOWN)}.", stacklevel=3)
    if pd.api.types.is_float_dtype(questions["answer"]):
        raise ValueError("Answers are floats: give them as text, so that 1.50 stays 1.50.")
    given = [name for name in KNOWN if name in questions]
    frame = questions[given].astype("string").apply(lambda column: column.str.strip())
    own = frame["prompt"].str.replace("|", " ")  # a prompt is a group of its own
    frame["group"] = frame["group"].map(_names).fillna(own) if "group" in given else own
    frame = frame.fillna("").reset_index(drop=True)
    full, dropped = frame[["prompt", "answer"]].ne("").all(axis=1), {}
    frame, dropped["no prompt or no answer"] = frame[full], int((~full).sum())
    same = frame.groupby(["prompt", "answer"])["group"]
    frame = frame.assign(group=same.transform(lambda groups: _names("|".join(groups))))
    again = frame.duplicated(["prompt", "answer"])
    frame, dropped["asked twice"] = frame[~again], int(again.sum())
    torn = frame.duplicated("prompt", keep=False)
    frame, dropped["one prompt, several answers"] = frame[~torn], int(torn.sum())
    judge = "number" if frame["answer"].str.fullmatch(WHOLE).all() else "first token"
    if frame["answer"].str.fullmatch(f"{WHOLE}|{DECIMAL}").all() and judge != "number":
        raise ValueError("Decimals cannot be judged: give whole numbers, as 150 cents for 1.50.")
    if judge == "number":  # a test writes eight tokens, of which a digit may be one
        longer = frame["answer"].str.len() > 7
        frame, dropped["number of more than 7 characters"] = frame[~longer], int(longer.sum())
    if judge == "first token":
        pieces = {x: continuation_ids(tokenizer, x) for x in frame["answer"].unique()}
        little = frame["answer"].map(lambda x: tells_little(tokenizer, pieces[x])).astype(bool)
        frame, dropped["answer begins with one letter or a space"] = (
            frame[~little],
            int(little.sum()),
        )
        first = frame["answer"].map(lambda x: pieces[x][0])
        alike = frame["answer"].groupby(first).transform("nunique") > 1
        frame, dropped["answer begins like another"] = frame[~alike], int(alike.sum())
    frame = frame.astype(object).assign(answer=" " + frame["answer"], tested=True)
    if memory:
        alike = exchange_keys(frame).groupby(_alike(frame, judge))["answer"]
        alone = alike.transform("nunique") < 2
        frame, dropped["no other memory to read"] = frame[~alone], int(alone.sum())
    frame = frame.reset_index(drop=True)
    names = {name for label in frame["group"] for name in label.split("|")}
    if len(names) < LEAST_NAMES:
        out = "; ".join(f"{why}: {count}" for why, count in dropped.items() if count)
        raise ValueError(
            f"{len(frame)} questions of {len(names)} names in their groups are too few: their "
            f"intervals would be too narrow. Give more groups, {LEAST_NAMES} names at least. "
            f"Of {len(questions)} questions were left out: {out or 'none'}."
        )
    for fold in range(FOLDS):
        counts = split(frame, fold)["split"].value_counts()
        if short := [part for part in SPLITS if not counts.get(part)]:
            groups = frame["group"].nunique()
            raise ValueError(
                f"{len(frame)} questions in {groups} groups are too few: fold {fold} has none for "
                f"{short[0]}. Give more groups."
            )
    apart = sum(len(frame) - len(split(frame, fold)) for fold in range(FOLDS))
    dropped["names in several splits, all folds"] = apart
    kept = split(frame, 0)["split"]
    dropped["for validation, never tested"] = int((kept == "validation").sum())
    table = pd.DataFrame(dropped.items(), columns=["why", "questions"])
    return frame, judge, table


def _names(label: str | None):
    """The names in a group's label, each once, without spaces around them; missing for none."""
    names = {name.strip() for name in ("" if pd.isna(label) else label).split("|")} - {""}
    return "|".join(sorted(names)) or pd.NA


def _alike(frame: pd.DataFrame, judge: str) -> list[str]:
    """What two questions have in common that may read each other's memory."""
    kind = ["kind"] if "kind" in frame else []
    return ["fold", *kind, *(["length"] if judge == "number" else [])]


def _register(frame: pd.DataFrame, judge: str, memory: bool) -> str:
    """Puts the questions where runs look for them; returns their name, one for each content."""
    digest = hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()[:8]
    name = f"own {digest}" if memory else f"own {digest}, its own memory alone"
    other = f"{name}, another's memory" if memory else None
    columns = tuple(c for c in (*Dataset.columns, "kind") if c in frame)
    load = partial(pd.DataFrame.copy, frame)
    DATASETS[name] = Dataset(name, load, judge, name, exchanged=other, columns=columns)
    if other:
        alike = _alike(frame, judge)
        told = partial(with_anothers_memory, load, alike, answers=judge == "number")
        DATASETS[other] = Dataset(other, told, judge, other, columns=(*columns, "memory"))
    return name


def _with_seen(run: Run, answered: pd.DataFrame) -> pd.DataFrame:
    """Whether each test question's answer was one of those in training."""
    trained = set(asked(run, "train")["answer"])
    seen = asked(run, "test")["answer"].isin(trained)
    return answered.assign(answers=np.where(seen, "seen", "unseen"))


def _accuracies(answered: pd.DataFrame) -> pd.DataFrame:
    parts = {"all": answered, **dict(list(answered.groupby("answers")))}
    columns = ["arm", "answers", "accuracy", "low", "high", "n", "groups", "seeds", "perplexity"]
    tables = [accuracy_table(part).assign(answers=name) for name, part in parts.items()]
    return pd.concat(tables, ignore_index=True)[columns]


def _rates(plan: Sequence[Planned], runs: Sequence[Run], store: Store) -> pd.DataFrame:
    rows = {}
    for one, run in zip(plan, runs, strict=True):
        for trial in one.trials:
            tried = sorted(x.learning_rate for x in rates_tried(trial, store, one.most))
            edge = run.learning_rate in (tried[0], tried[-1])
            rows[run.arm] = {"learning_rate": run.learning_rate, "tried": tried, "at_edge": edge}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm").reset_index()
