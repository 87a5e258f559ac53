"""09: other prompts."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from companion.report.verdicts import Claim, _gains, _weighed
from companion.runs.results import Answers, _paired, pooled_answers
from companion.runs.run import Run
from companion.runs.store import Store


def pooled_table(
    runs: Sequence[Run], store: Store, arm: str, others: Sequence[str]
) -> pd.DataFrame:
    """`difference_table` over the questions of several datasets that ask of the same names, taken as one dataset "all".

    Names are resampled once for all datasets, so that a name counts as one however often and in whatever words it is
    asked of. Columns as there, and worst and best, the differences of single seeds (what another training changes is
    not in the interval).
    """
    by = {name: [run for run in runs if run.arm == name] for name in (arm, *others)}

    def whole(name: str, seed: int | None = None) -> Answers:
        mine = [run for run in by[name] if seed is None or run.seed == seed]
        parts = [
            pooled_answers([r for r in mine if r.dataset == d], store)
            for d in dict.fromkeys(r.dataset for r in mine)
        ]
        return Answers(
            np.concatenate([p.right for p in parts], axis=1),
            np.concatenate([p.groups for p in parts]),
        )

    rows, seeds = [], sorted({run.seed for run in by[arm]})
    for other in others:
        one, two = whole(arm), whole(other)
        single = [whole(arm, seed).right.mean() - whole(other, seed).right.mean() for seed in seeds]
        row = {
            "model": runs[0].model,
            "dataset": "all",
            "other": other,
            **_paired(one, two, f"{arm!r} and {other!r}"),
        }
        rows.append(
            {**row, "names": len(set(one.groups)), "worst": min(single), "best": max(single)}
        )
    return pd.DataFrame(rows)


def other_prompts_too(difference: pd.DataFrame, controls: list[str]) -> Claim:
    """N1. difference: of back attention on questions asked in other ways, by dataset (`comparison.difference_table`)
    and over all of them (`comparison.pooled_table`); the checks are those of `_gains`."""
    passed, against, told = _gains(difference, controls)
    counts = difference[difference["dataset"] != "all"].groupby("dataset", sort=False)["n"].first()
    return Claim(
        id="N1",
        claim="back attention helps on three more datasets with other prompts",
        paper="next check",
        ours=f"{told}; n = {', '.join(f'{n:.0f} ({name})' for name, n in counts.items())}, of the same second hops",
        kind="band over seeds",
        verdict=_weighed(passed, against),
        notebook="08_beyond_facts_and_cost",
        figure="08_prompts",
    )
