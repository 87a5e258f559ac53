"""11: the ledger of all claims."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from companion.report.verdicts import CLAIMS

IDS = tuple(dict.fromkeys(about.get("id", key) for key, about in CLAIMS.items()))


def whole_ledger(folders: Sequence[Path]) -> pd.DataFrame:
    """The rows that all notebooks wrote (`NN_claims.csv`), in the order of data/claims.yml.

    A table in an earlier folder counts. Raises ValueError when a row of the ledger is missing.
    """
    paths = [path for folder in reversed(folders) for path in folder.glob("[0-9][0-9]_claims.csv")]
    found = {path.name: path for path in paths}  # of the first folder that has it
    as_text = {"dtype": str, "keep_default_na": False}
    parts = [pd.read_csv(found[name], **as_text) for name in sorted(found)]
    rows = pd.concat(parts, ignore_index=True)
    missing = ", ".join(name for name in IDS if name not in set(rows["id"]))
    if missing:
        raise ValueError(f"The ledger has no row {missing}: run the notebooks that write them.")
    order = rows["id"].map(IDS.index).argsort(kind="stable")
    return rows.iloc[order].reset_index(drop=True)
