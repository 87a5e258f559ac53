"""One setting of a run varied (source layer, d′): differences, choices, ends of training.

`answered` is a frame of `results.answers`, `points` one of `results.curves`; `setting` names one of
their columns.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd

from companion.report.intervals import interval
from companion.runs.results import (
    by_setting,
    matrix,
    paired,
    resampled,
    rows_with,
    same_questions,
    seed_differences,
)


def setting_differences(
    answered: pd.DataFrame, arm: str, setting: str, base: Hashable
) -> pd.DataFrame:
    """How far one arm is ahead with each value of a setting of itself with the value `base`,
    paired.

    Returns: the setting, difference, low, high (95 %, samples of names), p, n, seeds. Raises
    ValueError when the tests differ.
    """
    part = rows_with(answered, "arm", arm)
    rows = []
    for value in part[setting].unique().tolist():
        seeds = rows_with(part, setting, value)["seed"].nunique()
        rows.append({setting: value, **paired(part, value, base, by=setting), "seeds": seeds})
    return pd.DataFrame(rows)


def sum_over(part: pd.DataFrame, setting: str, weights: Mapping[Hashable, float]) -> pd.DataFrame:
    """One arm's rows at one value of a setting, with `right` summed over several, each weighted.

    Raises ValueError when there are no runs at one, or the tests differ.
    """
    parts = [rows_with(part, setting, value) for value in weights]
    same_questions(parts, f"The runs with every {setting}")
    pairs = zip(weights.values(), parts, strict=True)
    # Not a matrix product: its rounding depends on the processor, and with it on which side of
    # zero a tie falls.
    return parts[0].assign(right=sum(weight * rows["right"].to_numpy() for weight, rows in pairs))


def over_settings(
    answered: pd.DataFrame, setting: str, arm: str, others: Sequence[str]
) -> pd.DataFrame:
    """How far `arm` is ahead of each other arm in the mean over all values of a setting, paired.

    A question counts with the share of values at which it was answered right. Returns: other,
    difference, low, high (95 %, samples of names), p, n (questions), worst, best (single seeds'
    differences), seeds, settings (values). Raises ValueError when the tests differ.
    """
    once = dict.fromkeys(answered[setting].unique().tolist(), 1.0)
    totals = [sum_over(rows_with(answered, "arm", name), setting, once) for name in (arm, *others)]
    mean = pd.concat(totals).assign(right=lambda total: total["right"] / len(once))
    rows = []
    for other in others:
        single = seed_differences(mean, arm, other)
        row = {"other": other, **paired(mean, arm, other), "worst": single.min()}
        rows.append({**row, "best": single.max(), "seeds": len(single), "settings": len(once)})
    return pd.DataFrame(rows)


def doubling_table(answered: pd.DataFrame, setting: str) -> pd.DataFrame:
    """What one doubling of a setting does to accuracy, per arm: the least-squares slope over log2
    of its values.

    Returns: arm, slope, low, high (95 %, samples of names), worst, best (single seeds' slopes), n
    (questions), seeds, settings (values). Raises ValueError when the tests differ.
    """
    values, rows = answered[setting].unique().tolist(), []
    away = np.log2(values) - np.log2(values).mean()
    weights = dict(zip(values, away / (away**2).sum(), strict=True))
    for arm, part in answered.groupby("arm", sort=False):
        slope = sum_over(part, setting, weights)
        single = slope.groupby("seed")["right"].mean()
        row = {"arm": arm, "slope": matrix(slope).mean(), **interval(resampled(slope))}
        row |= {"worst": single.min(), "best": single.max(), "n": slope["question"].nunique()}
        rows.append({**row, "seeds": len(single), "settings": len(values)})
    return pd.DataFrame(rows)


def learning_curves(points: pd.DataFrame) -> pd.DataFrame:
    """Validation accuracy and loss by step: model, dataset, arm, step, validation (mean over
    seeds), low, high (worst and best seed), loss."""
    by = points.groupby(["model", "dataset", "arm", "step"], sort=False)
    score = by["validation"].agg(validation="mean", low="min", high="max")
    return score.assign(loss=by["loss"].mean()).reset_index()


def at_end(points: pd.DataFrame, setting: str, of: str = "validation") -> pd.DataFrame:
    """Share of questions right at the end of one arm's training: a row per value of the setting, a
    column per seed."""
    last = points.groupby([setting, "seed"], sort=False).tail(1)
    return last.pivot(index=setting, columns="seed", values=of)


def end_table(points: pd.DataFrame, setting: str, of: str = "validation") -> pd.DataFrame:
    """Share of questions right at the end of training: setting, arm, `of` (mean over seeds), low
    and high (single seeds), seeds.

    of: "validation", or "train" for the training questions, as their batches came since the
    evaluation before the last.
    """

    def ends(part: pd.DataFrame) -> pd.DataFrame:
        wide = at_end(part, setting, of)
        row = {of: wide.mean(axis=1), "low": wide.min(axis=1), "high": wide.max(axis=1)}
        return pd.DataFrame({**row, "seeds": wide.shape[1]}).reset_index()

    return by_setting(points, "arm", ends)[[setting, "arm", of, "low", "high", "seeds"]]


def choose(points: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Which value of a setting does best on the validation questions, per arm.

    Returns: arm, the setting (the best value), validation (mean over seeds), lowest and highest (of
    the choices that single seeds would make), seeds, settings (values to choose from).
    """
    rows = []
    for arm, part in points.groupby("arm", sort=False):
        wide = at_end(part, setting)
        mean, single = wide.mean(axis=1), wide.idxmax()
        row = {"arm": arm, setting: mean.idxmax(), "validation": mean.max()}
        row |= {"lowest": single.min(), "highest": single.max()}
        rows.append({**row, "seeds": wide.shape[1], "settings": len(wide)})
    return pd.DataFrame(rows)
