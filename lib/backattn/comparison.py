"""Accuracy of arms and differences between them, with 95 % intervals by resampling.

Questions that belong together (one bridge entity, one pair of digits, one kind of animal) are resampled together. The
arms answer the same questions, so their differences are paired. Where all seeds answer the same questions (from
scratch), seeds are resampled too. Where each seed answers its own fold, a question was answered by one trained model,
and what another training would have changed is not in the interval of one dataset; the interval over several datasets
comes from how far the paired differences of single runs scatter, which holds all of it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from .experiments import Run, Store, asked, right_of, test_groups
from .intervals import RESAMPLES, drawn, group_weights, interval, two_sided


@dataclass
class Answers:
    """What one arm answered: right [seeds, questions], or [1, questions] where each seed has questions of its own.

    groups: name or names ("|" between) of each question.
    """

    right: np.ndarray
    groups: np.ndarray


def answers(runs: Sequence[Run], store: Store) -> Answers:
    """The answers of one arm's runs. Raises ValueError when there are none, or one is not finished."""
    if not runs:
        raise ValueError("There are no runs of this arm here: an arm may be missing at some setting.")
    right, groups = [], []
    for run in runs:
        result = _finished(run, store)
        right.append(right_of(result).astype(float))
        groups.append(test_groups(run, result))
    if runs[0].fold is None:
        return Answers(np.stack(right), groups[0])
    return Answers(np.concatenate(right)[None], np.concatenate(groups))


def _finished(run: Run, store: Store) -> dict:
    result = store.result(run)
    if result is None or "right" not in result:
        what = "diverged: lower its learning rate" if "diverged" in (result or {}) else "is not finished: perform it"
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
    shares = drawn(count, RESAMPLES, seeds_seed) / count
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
        answered, kept = answers(mine, store), [store.result(run) for run in mine]
        each = [right_of(result).mean() for result in kept]
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
                "groups": len({name for group in answered.groups for name in str(group).split("|")}),
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
            row |= {name: part[name].mean() for name in ("accuracy", "trained", "seconds", "operations", "perplexity")}
            row |= {name: part[name].sum() for name in ("n", "groups")}
            over_all.append({**row, **interval(np.mean([draws[place] for place in part.index], axis=0))})
    return pd.concat([table, pd.DataFrame(over_all)], ignore_index=True) if over_all else table


def difference_table(runs: Sequence[Run], store: Store, arm: str, others: Sequence[str]) -> pd.DataFrame:
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
                raise ValueError(f"There are no runs of {missing[0][0]!r} on {missing[0][1]!r} with {model}.")
            for dataset in both:
                one, two = (answers(by[model, dataset, name], store) for name in (arm, other))
                less = _paired(one, two, f"{arm!r} and {other!r} on {dataset!r}", _seed_of(dataset))
                means.append(less["difference"])
                pairs = zip(by[model, dataset, arm], by[model, dataset, other], strict=True)
                scatter.append([right_of(store.result(a)).mean() - right_of(store.result(b)).mean() for a, b in pairs])
                names = len({name for group in one.groups for name in str(group).split("|")})
                rows.append({"model": model, "dataset": dataset, "other": other, **less, "names": names})
            if len(means) > 1:
                name = "all" if both == mine else f"{len(both)} datasets"
                about = {"model": model, "dataset": name, "other": other, "difference": float(np.mean(means))}
                rows.append({**about, **_over_runs(np.mean(means), scatter), "names": len(means)})
    return pd.DataFrame(rows)


def pooled_table(runs: Sequence[Run], store: Store, arm: str, others: Sequence[str]) -> pd.DataFrame:
    """`difference_table` over the questions of several datasets that ask of the same names, taken as one dataset "all".

    Names are resampled once for all datasets, so that a name counts as one however often and in whatever words it is
    asked of. Columns as there, and worst and best, the differences of single seeds (what another training changes is
    not in the interval).
    """
    by = {name: [run for run in runs if run.arm == name] for name in (arm, *others)}

    def whole(name: str, seed: int | None = None) -> Answers:
        mine = [run for run in by[name] if seed is None or run.seed == seed]
        parts = [answers([r for r in mine if r.dataset == d], store) for d in dict.fromkeys(r.dataset for r in mine)]
        return Answers(np.concatenate([p.right for p in parts], axis=1), np.concatenate([p.groups for p in parts]))

    rows, seeds = [], sorted({run.seed for run in by[arm]})
    for other in others:
        one, two = whole(arm), whole(other)
        single = [whole(arm, seed).right.mean() - whole(other, seed).right.mean() for seed in seeds]
        row = {"model": runs[0].model, "dataset": "all", "other": other, **_paired(one, two, f"{arm!r} and {other!r}")}
        rows.append({**row, "names": len(set(one.groups)), "worst": min(single), "best": max(single)})
    return pd.DataFrame(rows)


def _paired(one: Answers, two: Answers, which: str, seed: int = 0) -> dict[str, float]:
    """difference of the accuracies, its 95 % interval (low, high) and p, and n (questions).

    Raises ValueError naming `which` were compared when the questions are not the same.
    """
    _same_questions([one, two], which)
    draws = resampled(one, seed, seeds_seed=1) - resampled(two, seed, seeds_seed=2)
    difference = float(one.right.mean() - two.right.mean())
    return {"difference": difference, **interval(draws), "p": two_sided(draws), "n": len(one.groups)}


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


def names_needed(differences: pd.DataFrame, points: float) -> pd.DataFrame:
    """How many held-out names would bring the interval of each difference to ± `points` hundredths.

    differences: from `difference_table`; of its rows over all datasets the number of runs is given instead. An interval
    narrows with the square root of the number of names (or runs). Returns: dataset, other, half_width, has, needed.
    """
    half = (differences["high"] - differences["low"]) / 2
    has = differences["names"].where(differences["dataset"] != "all", differences["n"])
    needed = np.ceil(has * (100 * half / points) ** 2).astype(int)
    return differences[["dataset", "other"]].assign(half_width=half, has=has, needed=needed)


def by_setting(runs: Sequence[Run], field: str, make: Callable[[Sequence[Run]], pd.DataFrame]) -> pd.DataFrame:
    """What `make` says of the runs with each value of one field of `Run`, one below the other; the field is a
    column."""
    parts = []
    for value in dict.fromkeys(getattr(run, field) for run in runs):
        parts.append(make([run for run in runs if getattr(run, field) == value]).assign(**{field: value}))
    return pd.concat(parts, ignore_index=True)


def setting_differences(runs: Sequence[Run], store: Store, arm: str, field: str, base) -> pd.DataFrame:
    """How far one arm is ahead with each value of one field of `Run` of itself with the value `base`, paired.

    Returns: the field, difference, low, high (95 %, samples of names), p, n, seeds. Raises ValueError when the tests
    differ.
    """
    mine = [run for run in runs if run.arm == arm]
    fixed, rows = answers([run for run in mine if getattr(run, field) == base], store), []
    for value in dict.fromkeys(getattr(run, field) for run in mine):
        own = [run for run in mine if getattr(run, field) == value]
        less = _paired(answers(own, store), fixed, f"{arm!r} with {field} {value} and {base}")
        rows.append({field: value, **less, "seeds": len(own)})
    return pd.DataFrame(rows)


def kept_share(narrow: Sequence[Run], best: Sequence[Run], base: Sequence[Run], store: Store) -> dict[str, float]:
    """Which share of what `best` gains over `base` is kept by `narrow`, three arms' runs on the same questions.

    Returns: kept, low, high (95 %, samples of names), n. Raises ValueError when the tests differ, or when `best` is not
    ahead of `base` in every sample.
    """
    three = [answers(runs, store) for runs in (narrow, best, base)]
    _same_questions(three, "The three arms")
    own, whole, floor = (one.right.mean() for one in three)
    one, two, zero = (resampled(answered) for answered in three)
    if (two <= zero).any():
        raise ValueError(f"A gain from {floor:.3f} to {whole:.3f} is too small: its share has no interval.")
    kept = (own - floor) / (whole - floor)
    return {"kept": kept, **interval((one - zero) / (two - zero)), "n": len(three[0].groups)}


def _over_values(runs: Sequence[Run], store: Store, field: str, values: Sequence, weights: np.ndarray) -> Answers:
    """The sum over values of one field of `Run`, weighted, of whether each question was answered right."""
    each = [answers([run for run in runs if getattr(run, field) == value], store) for value in values]
    _same_questions(each, f"The runs of {runs[0].arm!r} with every {field}")
    # Not a matrix product: its rounding depends on the processor, and with it on which side of zero a tie falls.
    return Answers((np.stack([one.right for one in each]) * weights[:, None, None]).sum(0), each[0].groups)


def over_settings(runs: Sequence[Run], store: Store, field: str, arm: str, others: Sequence[str]) -> pd.DataFrame:
    """How far `arm` is ahead of each other arm in the mean over all values of one field of `Run`, paired.

    A question counts with the share of values at which it was answered right. Returns: other, difference, low, high
    (95 %, samples of names), p, n (questions), worst, best (single seeds' differences), seeds, settings (values).
    Raises ValueError when the tests differ.
    """
    values = list(dict.fromkeys(getattr(run, field) for run in runs))
    alike = np.ones(len(values))

    def mean(name: str, seeds: Sequence[int]) -> Answers:
        mine = [run for run in runs if run.arm == name and run.seed in seeds]
        total = _over_values(mine, store, field, values, alike)
        return Answers(total.right / len(values), total.groups)

    rows, seeds = [], sorted({run.seed for run in runs})
    for other in others:
        row = {"other": other, **_paired(mean(arm, seeds), mean(other, seeds), f"{arm!r} and {other!r}")}
        single = [mean(arm, [seed]).right.mean() - mean(other, [seed]).right.mean() for seed in seeds]
        rows.append({**row, "worst": min(single), "best": max(single), "seeds": len(seeds), "settings": len(values)})
    return pd.DataFrame(rows)


def doubling_table(runs: Sequence[Run], store: Store, field: str) -> pd.DataFrame:
    """What one doubling of a field of `Run` does to accuracy, per arm: the least-squares slope over log2 of its values.

    Returns: arm, slope, low, high (95 %, samples of names), worst, best (single seeds' slopes), n (questions), seeds,
    settings (values). Raises ValueError when the tests differ.
    """
    rows, values = [], list(dict.fromkeys(getattr(run, field) for run in runs))
    away = np.log2(values) - np.log2(values).mean()
    weights = away / (away**2).sum()
    for arm in dict.fromkeys(run.arm for run in runs):
        mine = [run for run in runs if run.arm == arm]
        whole, seeds = _over_values(mine, store, field, values, weights), sorted({run.seed for run in mine})
        own = {seed: [run for run in mine if run.seed == seed] for seed in seeds}
        single = [_over_values(part, store, field, values, weights).right.mean() for part in own.values()]
        row = {"arm": arm, "slope": whole.right.mean(), **interval(resampled(whole))}
        row |= {"worst": min(single), "best": max(single), "n": len(whole.groups)}
        rows.append({**row, "seeds": len(seeds), "settings": len(values)})
    return pd.DataFrame(rows)


def end_table(runs: Sequence[Run], store: Store, field: str, of: str = "validation") -> pd.DataFrame:
    """Share of questions right at the end of training: arm, field, `of` (mean over seeds), low and high (single seeds),
    seeds.

    of: "validation", or "train" for the training questions, as their batches came since the evaluation before the last.
    Raises ValueError when a run is not finished.
    """
    tables = []
    for arm in dict.fromkeys(run.arm for run in runs):
        wide = _at_end([run for run in runs if run.arm == arm], store, field, of)
        row = {"arm": arm, of: wide.mean(axis=1), "low": wide.min(axis=1), "high": wide.max(axis=1)}
        tables.append(pd.DataFrame({**row, "seeds": wide.shape[1]}).reset_index())
    return pd.concat(tables, ignore_index=True)


def choose(runs: Sequence[Run], store: Store, field: str) -> pd.DataFrame:
    """Which value of one field of `Run` does best on the validation questions, per arm.

    Returns: arm, the field (the best value), validation (mean over seeds), lowest and highest (of the choices that
    single seeds would make), seeds, settings (values to choose from). Raises ValueError when a run is not finished.
    """
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs):
        mine = [run for run in runs if run.arm == arm]
        wide = _at_end(mine, store, field)
        mean, own = wide.mean(axis=1), wide.idxmax()
        row = {"arm": arm, field: mean.idxmax(), "validation": mean.max(), "lowest": own.min(), "highest": own.max()}
        rows.append({**row, "seeds": wide.shape[1], "settings": len(wide)})
    return pd.DataFrame(rows)


def _at_end(runs: Sequence[Run], store: Store, field: str, of: str = "validation") -> pd.DataFrame:
    """Share of questions right at the end of training: a row per value of the field, a column per seed."""
    rows = [(getattr(run, field), run.seed, _finished(run, store)["curve"][-1][of]) for run in runs]
    return pd.DataFrame(rows, columns=[field, "seed", "share"]).pivot(index=field, columns="seed", values="share")


def unrest(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """How unsteady training is at each source layer, per arm.

    Returns: arm, source_layer, spread, jump, seeds. spread: standard deviation over seeds of the accuracy on the
    validation questions (in points; they are the same for all seeds), each seed less its mean over layers. jump: the
    largest sudden rise of the loss, in nats, mean over seeds. A rise is a step's loss less the mean of the three steps
    before it, all less their medians over layers: the batches are the same at all layers, and some are hard. Raises
    ValueError when a run is not finished.
    """
    tables = []
    for arm in dict.fromkeys(run.arm for run in runs):
        mine = [run for run in runs if run.arm == arm]
        wide = 100 * _at_end(mine, store, "source_layer")
        jumps = []
        for seed in wide.columns:
            own = sorted((run for run in mine if run.seed == seed), key=lambda run: run.source_layer)
            curves = [_finished(run, store)["curve"] for run in own]
            losses = np.stack([np.concatenate([row["losses"] for row in curve]) for curve in curves])  # [layers, steps]
            over = losses - np.median(losses, axis=0)
            before = (over[:, :-3] + over[:, 1:-2] + over[:, 2:-1]) / 3
            jumps.append((over[:, 3:] - before).max(1))
        table = pd.DataFrame(
            {"arm": arm, "source_layer": wide.index, "spread": (wide - wide.mean()).std(axis=1).values}
        )
        tables.append(table.assign(jump=np.mean(jumps, axis=0), seeds=wide.shape[1]))
    return pd.concat(tables, ignore_index=True)


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


# ---------------------------------------------------------------- kinds of questions


def by_kind(runs: Sequence[Run], store: Store, arm: str, others: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Arms on each kind of question of a dataset that has kinds (`datasets.compositions`), all seeds on the same ones.

    Returns two tables. Accuracy: kind, arm, accuracy, low, high (95 %, samples of names and of seeds), worst, best
    (seed), n, seeds, trained, flops, learning_rate. Difference of `arm` from each other: kind, other, difference, low,
    high, p, n.
    """
    kinds, accuracy, difference = asked(runs[0], "test")["kind"].to_numpy(), [], []
    by = {name: [run for run in runs if run.arm == name] for name in dict.fromkeys(run.arm for run in runs)}
    whole = {name: answers(mine, store) for name, mine in by.items()}
    for kind in sorted(set(kinds)):
        mine = {name: Answers(own.right[:, kinds == kind], own.groups[kinds == kind]) for name, own in whole.items()}
        for name, own in mine.items():
            each, kept = own.right.mean(1), store.result(by[name][0])
            row = {"kind": kind, "arm": name, "accuracy": each.mean(), **interval(resampled(own))}
            row |= {"worst": each.min(), "best": each.max(), "n": own.right.shape[1], "seeds": len(each)}
            about = {"trained": kept["trained"], "flops": kept["flops"], "learning_rate": by[name][0].learning_rate}
            accuracy.append({**row, **about})
        for other in others:
            less = _paired(mine[arm], mine[other], f"{arm!r} and {other!r} on {kind}")
            difference.append({"kind": kind, "other": other, **less})
    return pd.DataFrame(accuracy), pd.DataFrame(difference)


def kind_curves(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """Validation accuracy by step and kind of question, mean and range over seeds: arm, kind, step, validation, low,
    high."""
    rows = [
        {"arm": run.arm, "seed": run.seed, "step": int(point["step"]), "kind": kind, "validation": share}
        for run in runs
        for point in store.result(run)["curve"]
        for kind, share in point["kinds"].items()
    ]
    seeds = pd.DataFrame(rows).groupby(["arm", "kind", "step"], sort=False)["validation"]
    return (
        seeds.agg(["mean", "min", "max"])
        .reset_index()
        .set_axis(["arm", "kind", "step", "validation", "low", "high"], axis=1)
    )
