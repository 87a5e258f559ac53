"""One setting of a run varied: differences, choices, ends of training."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from companion.runs.results import Answers, _finished, _paired, _same_questions, pooled_answers
from companion.runs.run import Run
from companion.runs.store import Store


def by_setting(
    runs: Sequence[Run], field: str, make: Callable[[Sequence[Run]], pd.DataFrame]
) -> pd.DataFrame:
    """What `make` says of the runs with each value of one field of `Run`, one below the other; the field is a
    column."""
    parts = []
    for value in dict.fromkeys(getattr(run, field) for run in runs):
        parts.append(
            make([run for run in runs if getattr(run, field) == value]).assign(**{field: value})
        )
    return pd.concat(parts, ignore_index=True)


def setting_differences(
    runs: Sequence[Run], store: Store, arm: str, field: str, base
) -> pd.DataFrame:
    """How far one arm is ahead with each value of one field of `Run` of itself with the value `base`, paired.

    Returns: the field, difference, low, high (95 %, samples of names), p, n, seeds. Raises ValueError when the tests
    differ.
    """
    mine = [run for run in runs if run.arm == arm]
    fixed, rows = pooled_answers([run for run in mine if getattr(run, field) == base], store), []
    for value in dict.fromkeys(getattr(run, field) for run in mine):
        own = [run for run in mine if getattr(run, field) == value]
        less = _paired(
            pooled_answers(own, store), fixed, f"{arm!r} with {field} {value} and {base}"
        )
        rows.append({field: value, **less, "seeds": len(own)})
    return pd.DataFrame(rows)


def _over_values(
    runs: Sequence[Run], store: Store, field: str, values: Sequence, weights: np.ndarray
) -> Answers:
    """The sum over values of one field of `Run`, weighted, of whether each question was answered right."""
    each = [
        pooled_answers([run for run in runs if getattr(run, field) == value], store)
        for value in values
    ]
    _same_questions(each, f"The runs of {runs[0].arm!r} with every {field}")
    # Not a matrix product: its rounding depends on the processor, and with it on which side of zero a tie falls.
    return Answers(
        (np.stack([one.right for one in each]) * weights[:, None, None]).sum(0), each[0].groups
    )


def over_settings(
    runs: Sequence[Run], store: Store, field: str, arm: str, others: Sequence[str]
) -> pd.DataFrame:
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
        row = {
            "other": other,
            **_paired(mean(arm, seeds), mean(other, seeds), f"{arm!r} and {other!r}"),
        }
        single = [
            mean(arm, [seed]).right.mean() - mean(other, [seed]).right.mean() for seed in seeds
        ]
        rows.append(
            {
                **row,
                "worst": min(single),
                "best": max(single),
                "seeds": len(seeds),
                "settings": len(values),
            }
        )
    return pd.DataFrame(rows)


def end_table(
    runs: Sequence[Run], store: Store, field: str, of: str = "validation"
) -> pd.DataFrame:
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
        row = {
            "arm": arm,
            field: mean.idxmax(),
            "validation": mean.max(),
            "lowest": own.min(),
            "highest": own.max(),
        }
        rows.append({**row, "seeds": wide.shape[1], "settings": len(wide)})
    return pd.DataFrame(rows)


def _at_end(runs: Sequence[Run], store: Store, field: str, of: str = "validation") -> pd.DataFrame:
    """Share of questions right at the end of training: a row per value of the field, a column per seed."""
    rows = [(getattr(run, field), run.seed, _finished(run, store)["curve"][-1][of]) for run in runs]
    return pd.DataFrame(rows, columns=[field, "seed", "share"]).pivot(
        index=field, columns="seed", values="share"
    )
