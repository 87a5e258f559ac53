"""11: the ledger of all claims."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from companion.report.verdicts import CLAIMS

IDS = tuple(dict.fromkeys(about.get("id", key) for key, about in CLAIMS.items()))


def whole_ledger(folders: Sequence[Path]) -> pd.DataFrame:
    """The rows that all notebooks wrote (`NN_claims.csv`), in the order of data/claims.yml.

    folders: where tables are looked for, the first that has one counts. Raises ValueError when a
    row of the ledger is missing.
    """
    found = {}
    for folder in folders:
        for path in sorted(folder.glob("[0-9][0-9]_claims.csv")):
            found.setdefault(path.name, path)
    rows = pd.concat([pd.read_csv(found[name]) for name in sorted(found)], ignore_index=True)
    missing = [name for name in IDS if name not in set(rows["id"])]
    if missing:
        names = ", ".join(missing)
        raise ValueError(f"The ledger has no row {names}: run the notebooks that write them.")
    return rows.sort_values(
        "id", key=lambda ids: ids.map(IDS.index), kind="stable", ignore_index=True
    )
