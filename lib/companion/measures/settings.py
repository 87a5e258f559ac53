"""Arms compared, and one setting of a run varied (source layer, d′).

`answered` is a frame of `results.answers`, `points` one of `results.curves`; `setting` names one of
their columns.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from companion.report.intervals import interval
from companion.runs.results import paired, resampled, rows_with, seed_differences


def accuracy_by(answered: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Accuracy in each group of rows: the columns `by`, accuracy, low, high (95 %, samples of names
    and of seeds), worst, best (seed), n (questions), seeds."""
    rows = []
    for key, part in answered.groupby(list(by), sort=False):
        single = part.groupby("seed")["right"].mean()
        row = {**dict(zip(by, key, strict=True)), "accuracy": part["right"].mean()}
        row |= {**interval(resampled(part)), "worst": single.min(), "best": single.max()}
        rows.append({**row, "n": part["question"].nunique(), "seeds": len(single)})
    return pd.DataFrame(rows)


def compare(answered: pd.DataFrame, arm: str, others: Sequence[str]) -> pd.DataFrame:
    """How far `arm` is ahead of each other arm: other, the columns of `results.paired`, worst and
    best (single seeds' differences), seeds."""
    rows = []
    for other in others:
        single = seed_differences(answered, arm, other)
        row = {"other": other, **paired(answered, arm, other), "worst": single.min()}
        rows.append({**row, "best": single.max(), "seeds": len(single)})
    return pd.DataFrame(rows)


def setting_differences(answered: pd.DataFrame, arm: str, setting: str, base) -> pd.DataFrame:
    """How far one arm is ahead, with each value of a setting, of itself with the value `base`: the
    setting, the columns of `results.paired`, seeds."""
    part, rows = rows_with(answered, "arm", arm), []
    for value in part[setting].unique().tolist():
        seeds = rows_with(part, setting, value)["seed"].nunique()
        rows.append({setting: value, **paired(part, value, base, by=setting), "seeds": seeds})
    return pd.DataFrame(rows)


def sum_over(answered: pd.DataFrame, setting: str, weights: Mapping) -> pd.DataFrame:
    """`right` of every arm, seed and question, summed over the values of a setting, each weighted.

    Raises ValueError where a question was not asked at every value.
    """
    weighted = answered.assign(right=answered["right"] * answered[setting].map(weights))
    by = weighted.groupby(["arm", "seed", "question", "group"], sort=False)["right"]
    if (by.size() != len(weights)).any():
        raise ValueError(f"The runs with every {setting} were not tested on the same questions.")
    return by.sum().reset_index()


def over_settings(
    answered: pd.DataFrame, setting: str, arm: str, others: Sequence[str]
) -> pd.DataFrame:
    """`compare` in the mean over all values of a setting, and settings (how many they are): a
    question counts with the share of values at which it was answered right."""
    once = dict.fromkeys(answered[setting].unique().tolist(), 1.0)
    mean = sum_over(answered, setting, once).assign(right=lambda total: total["right"] / len(once))
    return compare(mean, arm, others).assign(settings=len(once))


def at_end(points: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Share of validation questions right at the end of one arm's training: [values of the setting,
    seeds]."""
    last = points.groupby([setting, "seed"], sort=False).tail(1)
    return last.pivot(index=setting, columns="seed", values="validation")


def end_table(points: pd.DataFrame, setting: str, of: str = "validation") -> pd.DataFrame:
    """Share of questions right at the end of training: setting, arm, `of` (mean over seeds), low
    and high (single seeds), seeds. of: "validation", or "train" for the last batches' questions."""
    last = points.groupby(["arm", setting, "seed"]).tail(1).groupby(["arm", setting])[of]
    ends = last.agg(**{of: "mean", "low": "min", "high": "max", "seeds": "count"})
    ends = ends.loc[list(points["arm"].unique())].reset_index()
    return ends[[setting, "arm", of, "low", "high", "seeds"]]


def choose(points: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Which value of a setting does best on the validation questions, per arm: arm, the setting,
    validation (mean over seeds), lowest and highest (single seeds' choices), seeds, settings."""
    rows = []
    for arm, part in points.groupby("arm", sort=False):
        wide = at_end(part, setting)
        mean, single = wide.mean(axis=1), wide.idxmax()
        row = {"arm": arm, setting: mean.idxmax(), "validation": mean.max()}
        row |= {"lowest": single.min(), "highest": single.max()}
        rows.append({**row, "seeds": wide.shape[1], "settings": len(wide)})
    return pd.DataFrame(rows)
