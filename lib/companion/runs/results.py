"""Accuracy of arms and differences between them, with 95 % intervals by resampling.

Questions that belong together (one bridge entity, one pair of digits, one kind of animal) are resampled together. The
arms answer the same questions, so their differences are paired. Where all seeds answer the same questions (from
scratch), seeds are resampled too. Where each seed answers its own fold, a question was answered by one trained model,
and what another training would have changed is not in the interval of one dataset; the interval over several datasets
comes from how far the paired differences of single runs scatter, which holds all of it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from companion.report.intervals import (
    RESAMPLES,
    group_weights,
    interval,
    multinomial_counts,
    two_sided,
)
from companion.runs.as_asked import test_groups
from companion.runs.run import Run
from companion.runs.store import Store, answers_right


@dataclass
class Answers:
    """What one arm answered: right [seeds, questions], or [1, questions] where each seed has questions of its own.

    groups: name or names ("|" between) of each question.
    """

    right: np.ndarray
    groups: np.ndarray


def pooled_answers(runs: Sequence[Run], store: Store) -> Answers:
    """The answers of one arm's runs. Raises ValueError when there are none, or one is not finished."""
    if not runs:
        raise ValueError(
            "There are no runs of this arm here: an arm may be missing at some setting."
        )
    right, groups = [], []
    for run in runs:
        result = _finished(run, store)
        right.append(answers_right(result).astype(float))
        groups.append(test_groups(run, result))
    if runs[0].fold is None:
        return Answers(np.stack(right), groups[0])
    return Answers(np.concatenate(right)[None], np.concatenate(groups))


def _finished(run: Run, store: Store) -> dict:
    result = store.result(run)
    if result is None or "right" not in result:
        what = (
            "diverged: lower its learning rate"
            if "diverged" in (result or {})
            else "is not finished: perform it"
        )
        raise ValueError(f"Run {run.key} ({run.dataset}, {run.arm}, seed {run.seed}) {what}.")
    return result


def resampled(answered: Answers, seed: int = 0, seeds_seed: int = 1) -> np.ndarray:
    """Accuracy in RESAMPLES samples: [RESAMPLES].

    With several seeds these are drawn too, their deviations scaled by √(n / (n−1)) since they are few.
    """
    by_seed = group_weights(answered.groups, seed) @ answered.right.T  # [RESAMPLES, seeds]
    count = by_seed.shape[1]
    if count == 1:
        return by_seed[:, 0]
    shares = multinomial_counts(count, RESAMPLES, seeds_seed) / count
    middle = by_seed.mean(1)
    return middle + ((by_seed - middle[:, None]) * shares).sum(1) * np.sqrt(count / (count - 1))


def _by_arm(runs: Sequence[Run]) -> dict[tuple[str, str, str], list[Run]]:
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.model, run.dataset, run.arm), []).append(run)
    return groups


def _seed_of(dataset: str) -> int:
    """Samples of different datasets are drawn independently."""
    return int.from_bytes(hashlib.sha256(dataset.encode()).digest()[:4], "big")


def accuracy_table(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """One row per model, dataset and arm: accuracy with its interval, what it cost and what it spoilt.

    Returns: model, dataset ("all" for the mean over all datasets, of arms that were tried on each), arm, accuracy, low,
    high, worst, best (seed), n (questions), groups, seeds, trained (weights), seconds (of training, mean), flops (of a
    forward pass over one question), operations (flops over the cheapest arm's), perplexity (of held-out text, mean; NaN
    from scratch), learning_rate.
    """
    rows, draws = [], []
    for (model, dataset, arm), mine in _by_arm(runs).items():
        answered, kept = pooled_answers(mine, store), [store.result(run) for run in mine]
        each = [answers_right(result).mean() for result in kept]
        draws.append(resampled(answered, _seed_of(dataset)))
        rows.append(
            {
                "model": model,
                "dataset": dataset,
                "arm": arm,
                "accuracy": answered.right.mean(),
                **interval(draws[-1]),
                "worst": min(each),
                "best": max(each),
                "n": answered.right.shape[1],
                "groups": len(
                    {name for group in answered.groups for name in str(group).split("|")}
                ),
                "seeds": len(mine),
                "trained": kept[0]["trained"],
                "seconds": float(np.mean([result["seconds"] for result in kept])),
                "flops": kept[0]["flops"],
                "perplexity": float(np.mean([result.get("perplexity", np.nan) for result in kept])),
                "learning_rate": mine[0].learning_rate,
            }
        )
    table = pd.DataFrame(rows)
    cheapest = table.groupby(["model", "dataset"])["flops"].transform("min")
    table.insert(table.columns.get_loc("perplexity"), "operations", table["flops"] / cheapest)
    over_all, asked = [], table.groupby("model")["dataset"].nunique()
    for (model, arm), part in table.groupby(["model", "arm"], sort=False):
        if 1 < len(part) == asked[model]:
            row = {"model": model, "dataset": "all", "arm": arm, "seeds": part["seeds"].min()}
            row |= {
                name: part[name].mean()
                for name in ("accuracy", "trained", "seconds", "operations", "perplexity")
            }
            row |= {name: part[name].sum() for name in ("n", "groups")}
            over_all.append(
                {**row, **interval(np.mean([draws[place] for place in part.index], axis=0))}
            )
    return pd.concat([table, pd.DataFrame(over_all)], ignore_index=True) if over_all else table


def difference_table(
    runs: Sequence[Run], store: Store, arm: str, others: Sequence[str]
) -> pd.DataFrame:
    """How far `arm` is ahead of each other arm, per dataset and over all on which both were tried (of equal weight).

    Returns: model, dataset ("all" for the mean, or how many where `other` was tried on some only), other, difference,
    low, high, p (two-sided), n (questions; of a mean, pairs of runs), names (held out by name; of a mean, datasets).
    The interval of a dataset is from samples of names, of a mean from Student's t over the paired differences of single
    runs within datasets.

    Raises ValueError when `arm` is missing on a dataset, another arm on all of them, or two arms were not tested on the
    same questions.
    """
    by, rows = _by_arm(runs), []
    places = list(dict.fromkeys((model, dataset) for model, dataset, _ in by))
    for model in dict.fromkeys(model for model, _ in places):
        for other in others:
            means, scatter = [], []
            mine = [name for owner, name in places if owner == model]
            both = [name for name in mine if (model, name, other) in by]
            missing = [(arm, name) for name in mine if (model, name, arm) not in by]
            missing += [(other, name) for name in mine if not both]
            if missing:
                raise ValueError(
                    f"There are no runs of {missing[0][0]!r} on {missing[0][1]!r} with {model}."
                )
            for dataset in both:
                one, two = (
                    pooled_answers(by[model, dataset, name], store) for name in (arm, other)
                )
                less = _paired(one, two, f"{arm!r} and {other!r} on {dataset!r}", _seed_of(dataset))
                means.append(less["difference"])
                pairs = zip(by[model, dataset, arm], by[model, dataset, other], strict=True)
                scatter.append(
                    [
                        answers_right(store.result(a)).mean()
                        - answers_right(store.result(b)).mean()
                        for a, b in pairs
                    ]
                )
                names = len({name for group in one.groups for name in str(group).split("|")})
                rows.append(
                    {"model": model, "dataset": dataset, "other": other, **less, "names": names}
                )
            if len(means) > 1:
                name = "all" if both == mine else f"{len(both)} datasets"
                about = {
                    "model": model,
                    "dataset": name,
                    "other": other,
                    "difference": float(np.mean(means)),
                }
                rows.append({**about, **_over_runs(np.mean(means), scatter), "names": len(means)})
    return pd.DataFrame(rows)


def _paired(one: Answers, two: Answers, which: str, seed: int = 0) -> dict[str, float]:
    """difference of the accuracies, its 95 % interval (low, high) and p, and n (questions).

    Raises ValueError naming `which` were compared when the questions are not the same.
    """
    _same_questions([one, two], which)
    draws = resampled(one, seed, seeds_seed=1) - resampled(two, seed, seeds_seed=2)
    difference = float(one.right.mean() - two.right.mean())
    return {
        "difference": difference,
        **interval(draws),
        "p": two_sided(draws),
        "n": len(one.groups),
    }


def _same_questions(several: Sequence[Answers], which: str) -> None:
    """Raises ValueError, saying which, unless all were tested on the same questions."""
    if not all(np.array_equal(one.groups, several[0].groups) for one in several):
        raise ValueError(f"{which} were not tested on the same questions.")


def _over_runs(mean: float, scatter: Sequence[Sequence[float]]) -> dict[str, float]:
    """Interval and p of a mean over datasets from the differences of single runs, a list per dataset."""
    free = sum(len(part) - 1 for part in scatter)
    error = np.sqrt(sum(np.var(part, ddof=1) / len(part) for part in scatter)) / len(scatter)
    half = stats.t.ppf(0.975, free) * error
    p = 2 * stats.t.sf(abs(mean) / error, free) if error > 0 else float(mean == 0)
    return {"low": mean - half, "high": mean + half, "p": float(p), "n": sum(map(len, scatter))}


def learning_curves(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """Validation accuracy and loss by step, mean and range over seeds.

    Returns: model, dataset, arm, step, validation, low, high (worst and best seed), loss.
    """
    rows = []
    for (model, dataset, arm), mine in _by_arm(runs).items():
        curves = pd.concat([pd.DataFrame(store.result(run)["curve"]) for run in mine])
        for step, part in curves.groupby("step"):
            score = part["validation"]
            row = {
                "model": model,
                "dataset": dataset,
                "arm": arm,
                "step": int(step),
                "validation": score.mean(),
            }
            rows.append(
                {**row, "low": score.min(), "high": score.max(), "loss": part["loss"].mean()}
            )
    return pd.DataFrame(rows)
