"""The facts that are asked: read, checked, fetched."""

import ast
import hashlib
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from backattn.files import atomic_file
from companion.paths import CACHE, DATA


def facts(path: Path = DATA / "facts.csv") -> pd.DataFrame:
    """The single-hop facts: relation, subject, answer, geoname_id, population.

    Raises ValueError naming the missing or repeated column.
    """
    return read_table(path, ["relation", "subject", "answer"])


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV that must have `columns`, once each, without empty cells in them.

    Raises ValueError naming the file and the missing column, repeated column or first empty row, and
    FileNotFoundError with the path.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; it comes with the repository (git checkout -- data)."
        )
    header = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].tolist()
    repeated = sorted({name for name in header if header.count(name) > 1})
    missing = [name for name in columns if name not in header]
    if repeated or missing:
        problem = f"repeats column {repeated[0]!r}" if repeated else f"lacks column {missing[0]!r}"
        raise ValueError(f"{path.name} {problem}; it has {', '.join(map(str, header))}.")
    frame = pd.read_csv(path, keep_default_na=False)
    for name in columns:
        empty = frame.index[frame[name].astype(str).str.strip() == ""]
        if len(empty):
            raise ValueError(f"{path.name} has an empty {name!r} in row {empty[0] + 2}.")
    return frame


TWO_HOP_COLUMNS = ("pair", "e1", "r1", "e2", "r2", "e3", "type2", "type3", "split")

TWO_HOP_URL = "https://raw.githubusercontent.com/edenbiran/HoppingTooLate/main/datasets/two_hop.csv"


def two_hop_facts(path: Path = DATA / "two_hop.csv") -> pd.DataFrame:
    """The two-hop facts: pair, e1, r1, e2, r2, e3, shortcut, type1–3, e2_aliases, e3_aliases ("|" between), split.

    Raises ValueError naming the missing or repeated column, or the row with an empty cell.
    """
    frame = read_table(path, TWO_HOP_COLUMNS)
    return frame.assign(
        **{name: "" for name in ("shortcut", "e2_aliases", "e3_aliases") if name not in frame}
    )


def published_two_hop(folder: Path | None = None, sha256: str | None = None) -> pd.DataFrame:
    """The TwoHop facts of Biran et al. (2024) in the columns of `two_hop_facts`; r1 and r2 are phrases with {}.

    Args:
        folder: where twohop/two_hop.csv lies; None takes the folder named by BACKATTN_DATASETS, else the file is
            fetched from its public home into the cache.
        sha256: the file must have it. None: a fetched file's is written beside it, and must stay the same.

    Raises OSError when it cannot be fetched, ValueError for another checksum, a missing column or an empty cell.
    """
    named = folder or os.environ.get("BACKATTN_DATASETS")
    path = (Path(named) if named else CACHE / "datasets") / "twohop" / "two_hop.csv"
    if not path.exists() and not named:
        fetch(TWO_HOP_URL, path)
        with atomic_file(path.with_suffix(".sha256")) as temporary:
            temporary.write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    note = path.with_suffix(".sha256")
    expected = sha256 or (note.read_text().strip() if note.exists() else None)
    if path.exists() and expected and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise ValueError(
            f"{path} is not the file it was (sha256 differs): delete it and it is fetched again."
        )
    labels = {
        "e1_label": "e1",
        "e2_label": "e2",
        "e3_label": "e3",
        "r1_template": "r1",
        "r2_template": "r2",
    }
    columns = [*labels, "e2_type", "e3_type", "r1_type", "r2_type", "e2_aliases", "e3_aliases"]
    frame = read_table(path, columns).rename(
        columns={**labels, "e2_type": "type2", "e3_type": "type3"}
    )
    for row, phrases in enumerate(zip(frame["r1"], frame["r2"], strict=True)):
        for phrase in phrases:
            if phrase.count("{}") != 1:
                raise ValueError(
                    f"{path.name}, row {row + 2}: the template {phrase!r} must have the slot {{}} once."
                )
    frame["pair"] = frame["type2"] + "-" + frame.pop("r1_type") + "-" + frame.pop("r2_type")
    for name in ("e2_aliases", "e3_aliases"):
        frame[name] = [
            "|".join(word for word in ast.literal_eval(cell) if len(word) > 1)
            for cell in frame[name]
        ]
    return frame.assign(shortcut="", split="test")


def fetch(url: str, path: Path) -> None:
    """Fetch a small file; raises OSError that says where to put it by hand."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            content = answer.read()
    except OSError as error:
        raise OSError(
            f"Cannot fetch {url} ({error}). Put the file into <folder>/{path.parent.name}/{path.name} and set "
            "BACKATTN_DATASETS to that folder."
        ) from error
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
