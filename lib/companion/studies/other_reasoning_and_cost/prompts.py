"""09: the same facts asked in other ways (claim N1)."""

from collections.abc import Sequence

import pandas as pd

from companion.measures.gains import gain_checks
from companion.report.verdicts import claim
from companion.runs.results import count_names, paired, seed_differences


def pooled_table(answered: pd.DataFrame, arm: str, others: Sequence[str]) -> pd.DataFrame:
    """`results.difference_table` over several datasets that ask of the same names, as one, "all".

    Names are resampled once for all datasets, so that a name counts as one however often and in
    whatever words it is asked of. Columns as there, and worst and best, the differences of single
    seeds (what another training changes is not in the interval).
    """
    rows = []
    for other in others:
        row = {"model": answered["model"].iloc[0], "dataset": "all", "other": other}
        row |= paired(answered, arm, other)
        single = seed_differences(answered, arm, other)
        row["names"] = count_names(answered["group"])
        rows.append({**row, "worst": single.min(), "best": single.max()})
    return pd.DataFrame(rows)


def other_prompts_too(difference: pd.DataFrame, controls: Sequence[str]) -> dict:
    """N1. difference: of back attention on questions asked in other ways, by dataset
    (`results.difference_table`) and over all of them (`pooled_table`); see `gain_checks`."""
    passed, against, words = gain_checks(difference, controls)
    counts = difference[difference["dataset"] != "all"].groupby("dataset", sort=False)["n"].first()
    n = ", ".join(f"{n:.0f} ({name})" for name, n in counts.items())
    return claim("N1", f"{words}; n = {n}, of the same second hops", passed, against)
