"""Means, shares and differences with their 95 % intervals.

What belongs together (prompts about one subject, questions with one bridge entity) is resampled together.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

RESAMPLES = 2000


def multinomial_counts(things: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of some things is drawn in samples of as many, with replacement: [resamples, things]."""
    return np.random.default_rng(seed).multinomial(
        things, np.full(things, 1 / things), size=resamples
    )


def bootstrap(clusters: Sequence, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Weights [resamples, prompts] of bootstrap resamples; each row sums to 1.

    clusters: one label per prompt. Prompts with the same label are not independent, so labels are resampled, each with
    all its prompts.
    """
    labels, member = np.unique(np.asarray(clusters), return_inverse=True)
    weights = multinomial_counts(len(labels), resamples, seed)[:, member].astype(float)
    return weights / weights.sum(1, keepdims=True)


def group_weights(groups: Sequence[str], seed: int = 0) -> np.ndarray:
    """`bootstrap` for questions that may have several names each ("|" between): [RESAMPLES, questions].

    A question with two names counts as often as the product of their counts. The draws depend on `groups` and `seed`
    alone, so that two arms with the same questions get the same samples.
    """
    parts = [str(group).split("|") for group in groups]
    names = {name: i for i, name in enumerate(sorted({name for part in parts for name in part}))}
    counts = multinomial_counts(len(names), RESAMPLES, seed)  # [RESAMPLES, names]
    weights = np.stack(
        [counts[:, [names[name] for name in part]].prod(1) for part in parts], axis=1
    ).astype(float)
    total = weights.sum(1, keepdims=True)
    return np.divide(weights, total, out=np.full_like(weights, np.nan), where=total > 0)


def interval(draws: np.ndarray) -> dict[str, float]:
    """The middle 95 % of samples, those without a value left out: low, high."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def two_sided(draws: np.ndarray) -> float:
    """Two-sided p of no difference: twice the share of samples on the other side of zero, never none."""
    draws = draws[~np.isnan(draws)]
    beyond = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(draws) + 1)))


def mean_interval(
    values: np.ndarray, clusters: Sequence
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis (prompts) and its 95 % interval: (mean, low, high). clusters: see `bootstrap`."""
    values = np.asarray(values, dtype=float)
    low, high = np.percentile(
        np.tensordot(bootstrap(clusters), values, axes=1), [2.5, 97.5], axis=0
    )
    return values.mean(0), low, high


def mean_summary(values: np.ndarray, clusters: Sequence) -> dict[str, float]:
    """`mean_interval` of one value per prompt as columns of a table: mean, low, high, n."""
    mean, low, high = mean_interval(values, clusters)
    return {"mean": float(mean), "low": float(low), "high": float(high), "n": len(values)}


def wilson(count: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of a share; NaN where there is nothing to count."""
    if not total:
        return float("nan"), float("nan")
    ends = stats.binomtest(int(count), int(total)).proportion_ci(0.95, method="wilson")
    return float(ends.low), float(ends.high)


def holm(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with its column p corrected for all its rows (Holm), as a column `corrected`."""
    from statsmodels.stats.multitest import multipletests  # slow to import, and needed here only

    return table.assign(corrected=multipletests(table["p"], method="holm")[1])
