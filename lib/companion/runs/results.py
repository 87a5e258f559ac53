"""Results of finished runs as tidy frames: accuracies of arms, paired differences between them.

Questions that belong together are resampled together, and seeds where all answer the same ones. For
seeds with folds of their own, what another training would have changed is in the interval over
several datasets only: it comes from how far paired differences of single runs scatter."""

import hashlib
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from companion.report import intervals
from companion.report.intervals import RESAMPLES, bootstrap, interval
from companion.runs.as_asked import test_groups
from companion.runs.run import Run
from companion.runs.store import Store, answers_right

SETTINGS = (
    *("model", "dataset", "arm", "seed", "source_layer", "memory_layers"),
    *("dim", "width", "learning_rate"),
)
COSTS = ("trained", "seconds", "flops", "perplexity")


def finished(run: Run, store: Store) -> dict:
    """The result of a run that was tested; raises ValueError where there is none."""
    result = store.result(run) or {}
    if "right" not in result:
        diverged = "diverged" in result
        what = "diverged: lower its learning rate" if diverged else "is not finished: perform it"
        raise ValueError(f"Run {run.key} ({run.dataset}, {run.arm}, seed {run.seed}) {what}.")
    return result


def answers(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """One row per run and test question: SETTINGS, COSTS, question (its name), group, right (0.0 or
    1.0). Raises ValueError when there are no runs, or one is not finished."""
    parts = []
    for run in runs:
        result = finished(run, store)
        right = answers_right(result).astype(float)
        about = {name: [getattr(run, name)] * len(right) for name in SETTINGS}
        about |= {name: result.get(name, np.nan) for name in COSTS}
        fold = "" if run.fold is None else run.fold
        about |= {"question": [f"{run.dataset} {fold} {k}" for k in range(len(right))]}
        about |= {"group": test_groups(run, result), "right": right}
        parts.append(pd.DataFrame(about))
    if not parts:
        raise ValueError("There are no runs here: an arm may be missing at some setting.")
    return pd.concat(parts, ignore_index=True)


def curves(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """One row per run and evaluation: SETTINGS of the run, step, loss, train, validation, losses,
    kinds (see `backattn.training.loop.train`). Raises ValueError when a run is not finished."""
    about = {run: {name: getattr(run, name) for name in SETTINGS} for run in runs}
    points = [about[run] | point for run in runs for point in finished(run, store)["curve"]]
    return pd.DataFrame(points)


def matrix(part: pd.DataFrame) -> np.ndarray:
    """`right` of one arm: [seeds, questions] where all seeds answer the same questions, else [1,
    questions], the mean where several seeds have one fold. Questions are in the order in which they
    come first."""
    if part.duplicated(["seed", "question"]).any():
        raise ValueError("These are several runs of one seed: take one setting, or use by_setting.")
    by_seed = part.groupby("seed", sort=False)
    if by_seed["question"].agg(tuple).nunique() > 1:
        return part.groupby("question", sort=False)["right"].mean().to_numpy()[None]
    return np.stack([single.to_numpy() for _, single in by_seed["right"]])


def resampled(part: pd.DataFrame, seed: int = 0, seeds_seed: int = 1) -> np.ndarray:
    """Accuracy of one arm in samples: [RESAMPLES], NaN where all questions have one name. Several
    seeds are drawn too, their deviations scaled by √(n / (n−1)) since they are few."""
    right = matrix(part)  # [seeds, questions]
    names = part.drop_duplicates("question")["group"]
    if count_names(names) < 2:
        return np.full(RESAMPLES, np.nan)
    weights, count = bootstrap(names, seed=seed), len(right)
    by_seed = weights @ right.T
    if count == 1:
        return by_seed[:, 0]
    shares, middle = (
        intervals.multinomial_counts(count, RESAMPLES, seeds_seed) / count,
        by_seed.mean(1),
    )
    away = ((by_seed - middle[:, None]) * shares).sum(1)
    return middle + away * np.sqrt(count / (count - 1))


def seed_of(dataset: str) -> int:  # samples of different datasets are drawn independently
    return int(hashlib.sha256(dataset.encode()).hexdigest()[:8], 16)


def count_names(groups: pd.Series) -> int:
    """How many names the labels of some questions hold together."""
    return len({name for label in groups.unique() for name in intervals.names_of(label)})


def accuracy_table(answered: pd.DataFrame) -> pd.DataFrame:
    """One row per model, dataset and arm, and ("all") for the mean over all datasets of a model:
    accuracy, low, high, worst, best (seed), n (questions), groups (names), seeds, COSTS (of a
    forward pass over one question), operations (flops over the cheapest arm's), learning_rate."""
    rows, draws = [], []
    for (model, dataset, arm), part in answered.groupby(["model", "dataset", "arm"], sort=False):
        draws.append(resampled(part, seed_of(dataset)))
        each, runs = part.groupby("seed", sort=False)["right"].mean(), part.drop_duplicates("seed")
        row = {"model": model, "dataset": dataset, "arm": arm, "accuracy": matrix(part).mean()}
        row |= {**interval(draws[-1]), "worst": each.min(), "best": each.max()}
        row |= {"n": part["question"].nunique(), "groups": count_names(part["group"])}
        row |= {"seeds": len(runs), "trained": runs["trained"].iloc[0]}
        row |= {"seconds": runs["seconds"].mean(), "flops": runs["flops"].iloc[0]}
        row |= {"operations": np.nan, "perplexity": runs["perplexity"].mean()}
        rows.append({**row, "learning_rate": runs["learning_rate"].iloc[0]})
    table = pd.DataFrame(rows)
    cheapest = table.groupby(["model", "dataset"])["flops"].transform("min")
    table["operations"] = table["flops"] / cheapest
    over_all, tried = [], table.groupby("model")["dataset"].nunique()
    means = ("accuracy", "trained", "seconds", "operations", "perplexity")
    for (model, arm), part in table.groupby(["model", "arm"], sort=False):
        if 1 < len(part) == tried[model]:
            row = {"model": model, "dataset": "all", "arm": arm, "seeds": part["seeds"].min()}
            row |= {name: part[name].mean() for name in means}
            row |= {name: part[name].sum() for name in ("n", "groups")}
            over_all.append({**row, **interval(np.mean([draws[i] for i in part.index], axis=0))})
    return pd.concat([table, pd.DataFrame(over_all)], ignore_index=True) if over_all else table


def rows_with(answered: pd.DataFrame, by: str, value: Hashable) -> pd.DataFrame:
    """Rows whose column `by` is a value, maybe a tuple or None; ValueError where there are none."""
    part = answered[[one == value for one in answered[by]]]
    if part.empty:
        raise ValueError(f"There are no runs with {by} {value!r}.")
    return part


def same_questions(parts: Sequence[pd.DataFrame], which: str) -> None:
    """Raises ValueError, saying which, unless all were tested on the same questions."""
    groups = [part.drop_duplicates("question")["group"] for part in parts]
    if not all(np.array_equal(one, groups[0]) for one in groups):
        raise ValueError(f"{which} were not tested on the same questions.")


def paired(
    answered: pd.DataFrame,
    a: Hashable,
    b: Hashable,
    by: str = "arm",
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, float]:
    """Accuracy where column `by` is a, less where it is b: difference, low, high (at `level`: 0.9
    for a test of equivalence at 5 %), p, n (questions). Raises ValueError when one is missing, or
    the tests are not of the same questions."""
    one, two = (rows_with(answered, by, which) for which in (a, b))
    same_questions([one, two], f"{a!r} and {b!r}")
    draws = resampled(one, seed, seeds_seed=1) - resampled(two, seed, seeds_seed=2)
    difference, n = float(matrix(one).mean() - matrix(two).mean()), one["question"].nunique()
    ends, p = interval(draws, level), intervals.two_sided(draws)
    return {"difference": difference, **ends, "p": p, "n": n}


def seed_differences(answered: pd.DataFrame, arm: str, other: str) -> pd.Series:
    """Accuracy of an arm, less another's, of each seed."""
    each = answered.groupby(["arm", "seed"])["right"].mean()
    return each[arm] - each[other]


def difference_table(answered: pd.DataFrame, arm: str, others: Sequence[str]) -> pd.DataFrame:
    """How far `arm` is ahead of each other arm, per dataset and ("all") over all on which both were
    tried: difference, low, high, p, n (questions; of a mean, pairs of runs), names (of a mean,
    datasets). The interval of a dataset is from samples of names, of a mean from Student's t over
    single runs. Raises ValueError when an arm is missing, or tests differ."""
    rows = []
    for model, whole in answered.groupby("model", sort=False):
        datasets = dict(list(whole.groupby("dataset", sort=False)))
        for other in others:
            both = {name: part for name, part in datasets.items() if other in part["arm"].values}
            if not both:
                raise ValueError(f"There are no runs of {other!r} with {model}.")
            means, scatter = [], []
            for name, part in both.items():
                less = paired(part, arm, other, seed=seed_of(name))
                names = count_names(rows_with(part, "arm", arm)["group"])
                rows.append(dict(model=model, dataset=name, other=other, **less, names=names))
                means.append(less["difference"])
                scatter.append(seed_differences(part, arm, other))
            if len(both) > 1:
                name = "all" if len(both) == len(datasets) else f"{len(both)} datasets"
                less = {"difference": float(np.mean(means)), **_over_runs(np.mean(means), scatter)}
                rows.append(dict(model=model, dataset=name, other=other, **less, names=len(both)))
    return pd.DataFrame(rows)


def _over_runs(mean: float, scatter: Sequence[pd.Series]) -> dict[str, float]:
    """Interval and p of a mean over datasets from differences of single runs, a series of each."""
    free = sum(len(part) - 1 for part in scatter)
    error = np.sqrt(sum(part.var() / len(part) for part in scatter)) / len(scatter)
    half = stats.t.ppf(0.975, free) * error
    p = 2 * stats.t.sf(abs(mean) / error, free) if error > 0 else float(mean == 0)
    return {"low": mean - half, "high": mean + half, "p": float(p), "n": sum(map(len, scatter))}


def by_setting(
    frame: pd.DataFrame, setting: str, make: Callable[[pd.DataFrame], pd.DataFrame]
) -> pd.DataFrame:
    """What `make` says of the rows with each value of a column, which comes last."""
    tables = [make(x).assign(**{setting: value}) for value, x in frame.groupby(setting, sort=False)]
    return pd.concat(tables, ignore_index=True)
