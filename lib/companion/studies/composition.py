"""08: two hops learnt from nothing."""

from collections.abc import Sequence

import pandas as pd

from companion.report.intervals import interval
from companion.runs.as_asked import asked
from companion.runs.results import Answers, _paired, pooled_answers, resampled
from companion.runs.run import Run
from companion.runs.store import Store


def by_kind(
    runs: Sequence[Run], store: Store, arm: str, others: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Arms on each kind of question of a dataset that has kinds (`datasets.compositions`), all seeds on the same ones.

    Returns two tables. Accuracy: kind, arm, accuracy, low, high (95 %, samples of names and of seeds), worst, best
    (seed), n, seeds, trained, flops, learning_rate. Difference of `arm` from each other: kind, other, difference, low,
    high, p, n.
    """
    kinds, accuracy, difference = asked(runs[0], "test")["kind"].to_numpy(), [], []
    by = {
        name: [run for run in runs if run.arm == name]
        for name in dict.fromkeys(run.arm for run in runs)
    }
    whole = {name: pooled_answers(mine, store) for name, mine in by.items()}
    for kind in sorted(set(kinds)):
        mine = {
            name: Answers(own.right[:, kinds == kind], own.groups[kinds == kind])
            for name, own in whole.items()
        }
        for name, own in mine.items():
            each, kept = own.right.mean(1), store.result(by[name][0])
            row = {"kind": kind, "arm": name, "accuracy": each.mean(), **interval(resampled(own))}
            row |= {
                "worst": each.min(),
                "best": each.max(),
                "n": own.right.shape[1],
                "seeds": len(each),
            }
            about = {
                "trained": kept["trained"],
                "flops": kept["flops"],
                "learning_rate": by[name][0].learning_rate,
            }
            accuracy.append({**row, **about})
        for other in others:
            less = _paired(mine[arm], mine[other], f"{arm!r} and {other!r} on {kind}")
            difference.append({"kind": kind, "other": other, **less})
    return pd.DataFrame(accuracy), pd.DataFrame(difference)


def kind_curves(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """Validation accuracy by step and kind of question, mean and range over seeds: arm, kind, step, validation, low,
    high."""
    rows = [
        {
            "arm": run.arm,
            "seed": run.seed,
            "step": int(point["step"]),
            "kind": kind,
            "validation": share,
        }
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
