"""Accuracy of arms and differences between them, with intervals over test questions and over seeds.

Questions that belong together (one bridge entity, one inner pair of digits) are resampled together, and so are seeds;
the arms answer the same questions, so their differences are paired.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from . import datasets
from .experiments import Run, Store
from .stages import bootstrap

DRAWS = 2000


def answers(runs: Sequence[Run], store: Store) -> np.ndarray:
    """Which test questions each of the runs (one arm's seeds) answers right: [seeds, questions] of 0 and 1.

    Raises ValueError when a run is not finished.
    """
    rows = []
    for run in runs:
        result = store.result(run)
        if result is None:
            raise ValueError(f"Run {run.key} ({run.dataset}, {run.arm}, seed {run.seed}) is not finished: perform it.")
        rows.append([character == "1" for character in result["right"]])
    return np.array(rows, dtype=float)


def clusters(run: Run) -> np.ndarray:
    """The group of each test question of a run."""
    return datasets.draw(datasets.load(run.dataset), "test", run.test_items)["group"].to_numpy()


def resampled(right: np.ndarray, groups: Sequence, seed: int = 0) -> np.ndarray:
    """Mean of right [seeds, questions] in DRAWS samples of groups and of seeds: [DRAWS].

    The groups drawn depend on `groups` and DRAWS alone, so that samples of two arms are paired.
    """
    by_seed = bootstrap(groups, DRAWS) @ right.T  # [DRAWS, seeds]
    count = len(right)
    seeds = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS) / count
    return (by_seed * seeds).sum(1)


def _by_arm(runs: Sequence[Run]) -> dict[tuple, list[Run]]:
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.model, run.dataset, run.arm), []).append(run)
    return groups


def accuracy_table(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """One row per model, dataset and arm: accuracy with its 95 % interval, worst and best seed, n, seeds, what it cost.

    Returns: model, dataset, arm, accuracy, low, high, worst, best, n, seeds, trained (weights), seconds (of training,
    mean), flops (of a forward pass over one question), perplexity (of held-out text, mean), learning_rate.
    """
    rows = []
    for (model, dataset, arm), mine in _by_arm(runs).items():
        right, kept = answers(mine, store), [store.result(run) for run in mine]
        low, high = np.percentile(resampled(right, clusters(mine[0])), [2.5, 97.5])
        texts = [result["perplexity"] for result in kept if result.get("perplexity") is not None]
        rows.append(
            {
                "model": model,
                "dataset": dataset,
                "arm": arm,
                "accuracy": right.mean(),
                "low": low,
                "high": high,
                "worst": right.mean(1).min(),
                "best": right.mean(1).max(),
                "n": right.shape[1],
                "seeds": len(right),
                "trained": kept[0]["trained"],
                "seconds": float(np.mean([result["seconds"] for result in kept])),
                "flops": kept[0]["flops"],
                "perplexity": float(np.mean(texts)) if texts else float("nan"),
                "learning_rate": mine[0].learning_rate,
            }
        )
    return pd.DataFrame(rows)


def difference_table(runs: Sequence[Run], store: Store, arm: str, others: Sequence[str]) -> pd.DataFrame:
    """How far `arm` is ahead of each other arm, per dataset and over all datasets (each with the same weight).

    Returns: model, dataset ("all" for their mean), other, difference, low, high (95 %), p (two-sided sign flips of
    groups, seeds averaged; NaN for "all"), n.
    """
    by, rows = _by_arm(runs), []
    models = list(dict.fromkeys(run.model for run in runs))
    for model in models:
        for other in others:
            means, draws = [], []
            for (name, dataset, which), mine in by.items():
                if name != model or which != arm or (model, dataset, other) not in by:
                    continue
                groups = clusters(mine[0])
                one, two = answers(mine, store), answers(by[model, dataset, other], store)
                draws.append(resampled(one, groups, seed=1) - resampled(two, groups, seed=2))
                means.append(one.mean() - two.mean())
                rows.append(
                    {
                        "model": model,
                        "dataset": dataset,
                        "other": other,
                        "difference": means[-1],
                        **_interval(draws[-1]),
                        "p": flip_test(one.mean(0) - two.mean(0), groups),
                        "n": one.shape[1],
                    }
                )
            if len(means) > 1:
                whole = {"model": model, "dataset": "all", "other": other, "difference": float(np.mean(means))}
                rows.append({**whole, **_interval(np.mean(draws, 0)), "p": float("nan"), "n": len(means)})
    return pd.DataFrame(rows)


def _interval(draws: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def flip_test(difference: np.ndarray, groups: Sequence) -> float:
    """Two-sided p of a mean difference of zero: the signs of whole groups are flipped at random (scipy)."""
    totals = pd.Series(difference).groupby(np.asarray(groups)).sum().to_numpy()
    if len(totals) < 2 or not totals.any():
        return 1.0

    def total(x: np.ndarray, axis: int) -> np.ndarray:
        return x.sum(axis=axis)

    test = stats.permutation_test(
        (totals,), total, permutation_type="samples", n_resamples=4999, vectorized=True, rng=np.random.default_rng(0)
    )
    return float(test.pvalue)


def learning_curves(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """Validation accuracy and loss by step, mean and range over seeds.

    Returns: model, dataset, arm, step, validation, low, high (worst and best seed), loss.
    """
    rows = []
    for (model, dataset, arm), mine in _by_arm(runs).items():
        curves = pd.concat([pd.DataFrame(store.result(run)["curve"]) for run in mine])
        for step, part in curves.groupby("step"):
            score = part["validation"]
            row = {"model": model, "dataset": dataset, "arm": arm, "step": int(step), "validation": score.mean()}
            rows.append({**row, "low": score.min(), "high": score.max(), "loss": part["loss"].mean()})
    return pd.DataFrame(rows)
