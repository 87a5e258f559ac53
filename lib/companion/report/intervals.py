"""Means, shares, differences with 95 % intervals: `mean, low, high, n`; what belongs together
(prompts about one subject, questions with one bridge entity) is resampled together."""

import functools
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

RESAMPLES = 2000


def multinomial_counts(things: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of some things is drawn in samples of as many: [resamples, things]."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(things, np.full(things, 1 / things), size=resamples)


def names_of(label: Hashable) -> list:
    """The names that a cluster label holds: "a|b" holds two."""
    return label.split("|") if isinstance(label, str) else [label]


def bootstrap(clusters: Sequence, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Weights [resamples, n] of bootstrap resamples; each row sums to 1, or is NaN where nothing
    was drawn. Names (a label per value) are resampled, each with all its values; one with two names
    ("a|b") counts as often as the product of their counts. The draws depend on labels and seed
    alone, so that two arms with the same questions get the same samples."""
    return _bootstrap(tuple(clusters), resamples, seed)


@functools.lru_cache(maxsize=4)
def _bootstrap(clusters: tuple, resamples: int, seed: int) -> np.ndarray:
    parts = [names_of(label) for label in clusters]
    names = {name: i for i, name in enumerate(sorted({name for part in parts for name in part}))}
    counts = multinomial_counts(len(names), resamples, seed)  # [resamples, names]
    weights = [counts[:, [names[name] for name in part]].prod(1) for part in parts]
    weights = np.stack(weights, axis=1).astype(float)
    total = weights.sum(1, keepdims=True)
    weights = np.divide(weights, total, out=np.full_like(weights, np.nan), where=total > 0)
    weights.setflags(write=False)  # it is handed out again
    return weights


def interval(draws: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """The middle 95 % (or `level`) of samples, those without a value left out: low, high (NaN where
    none has one)."""
    if np.isnan(draws).all():
        return {"low": float("nan"), "high": float("nan")}
    outside = 50 * (1 - level)
    low, high = np.nanpercentile(draws, [outside, 100 - outside])
    return {"low": float(low), "high": float(high)}


def two_sided(draws: np.ndarray) -> float:
    """Two-sided p of no difference: twice the share of samples beyond zero, never none."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return float("nan")
    beyond = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(draws) + 1)))


def mean_interval(values: np.ndarray, clusters: Sequence) -> tuple[np.ndarray, ...]:
    """Mean over the first axis of [n, ...] and its interval: (mean, low, high); see `bootstrap`."""
    values = np.asarray(values, dtype=float)
    draws = np.tensordot(bootstrap(clusters), values, axes=1)
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    return values.mean(0), low, high


def mean_summary(values: Sequence[float], clusters: Sequence) -> dict[str, float]:
    """`mean_interval` of one number each: mean, low, high, n; one name has no interval (NaN)."""
    low = high = float("nan")
    if len({name for label in clusters for name in names_of(label)}) > 1:
        mean, low, high = map(float, mean_interval(values, clusters))
    else:
        mean = float(np.mean(values)) if len(values) else float("nan")
    return {"mean": mean, "low": low, "high": high, "n": len(values)}


def summary(
    frame: pd.DataFrame, value: str, by: str | Sequence[str] = (), cluster: str = "e2"
) -> pd.DataFrame:
    """The mean of a column in each group of rows, in the order of their first rows: the columns
    `by`, mean, low, high, n. cluster: the column whose names are resampled."""
    by = [by] if isinstance(by, str) else list(by)
    groups = frame.groupby(by, sort=False, observed=True) if by else [((), frame)]
    rows = [
        {**dict(zip(by, key, strict=True)), **mean_summary(part[value].to_numpy(), part[cluster])}
        for key, part in groups
    ]
    return pd.DataFrame(rows)


def paired(
    frame: pd.DataFrame,
    a: Hashable,
    b: Hashable,
    by: str,
    value: str,
    units: Sequence[str] = ("seed", "question"),
    cluster: str = "e2",
) -> dict[str, float]:
    """The mean of `value` where column `by` is a, less where it is b, on the same units: mean, low,
    high, n. Raises ValueError where the two were not measured on the same units."""
    one, other = (frame[frame[by] == which].set_index(list(units)) for which in (a, b))
    if len(one) != len(other) or not one.index.isin(other.index).all():
        raise ValueError(f"{a!r} and {b!r} were not asked the same questions.")
    less = one[value].astype(float) - other[value].reindex(one.index).astype(float)
    return mean_summary(less.to_numpy(), one[cluster])


def wilson(count: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of a share; NaN where there is nothing to count."""
    if not total:
        return float("nan"), float("nan")
    ends = stats.binomtest(int(count), int(total)).proportion_ci(0.95, method="wilson")
    return float(ends.low), float(ends.high)


def holm(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with its column p corrected for all its rows (Holm 1979), as a column `corrected`."""
    order, corrected = np.argsort(table["p"].to_numpy(), kind="stable"), np.empty(len(table))
    steps = table["p"].to_numpy()[order] * np.arange(len(table), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return table.assign(corrected=corrected)
