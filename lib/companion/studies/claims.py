"""11: the ledger of all claims."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from companion.report.verdicts import ledger
from companion.studies.controls.memory import r1_is_needed
from companion.studies.failure_analysis.census import conflict_not_ignorance
from companion.studies.stage_discovery import one_after_the_other

IDS = tuple(
    f"{letter}{k}"
    for letter, count in (("C", 11), ("Q", 3), ("N", 3), ("B", 5))
    for k in range(1, count + 1)
)  # every row that a whole ledger has; C11 has two, of its size and of its use


def whole_ledger(folders: Sequence[Path]) -> pd.DataFrame:
    """The ledgers of all notebooks, with the break conditions that are read off their tables, in the order of IDS.

    folders: where tables are looked for, the first that has one counts. Raises FileNotFoundError when a table is
    nowhere, ValueError when a row of IDS is missing.
    """

    def table(name: str) -> pd.DataFrame:
        found = [folder / f"{name}.csv" for folder in folders if (folder / f"{name}.csv").exists()]
        if not found:
            raise FileNotFoundError(
                f"{name}.csv is in none of {', '.join(map(str, folders))}: run its notebook first."
            )
        return pd.read_csv(found[0])

    memory = {"smollm2": table("07_memory"), "gemma3-270m": table("07_gemma_memory")}
    read_off = [
        one_after_the_other(table("01_order"), n=int(table("01_stages")["n"].iloc[0])),
        conflict_not_ignorance(table("02_census")),
        r1_is_needed(table("02_against_donor"), memory),
    ]
    names = sorted(
        {path.stem for folder in folders for path in folder.glob("[0-9][0-9]_claims.csv")}
    )
    rows = pd.concat([*map(table, names), ledger(read_off)], ignore_index=True)
    missing = [name for name in IDS if name not in set(rows["id"])]
    if missing:
        raise ValueError(
            f"The ledger has no row {', '.join(missing)}: run the notebooks that write them."
        )
    return rows.sort_values(
        "id", key=lambda ids: ids.map(IDS.index), kind="stable", ignore_index=True
    )
