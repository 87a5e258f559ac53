"""Facts and files of others: read, checked and, where they are not here, fetched."""

import ast
import csv
import hashlib
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from backattn.files import atomic_file
from companion.paths import CACHE, DATA, ROOT


@dataclass(frozen=True)
class Published:
    """A published file: its place in the folder BACKATTN_DATASETS (seen from the repository), its
    public home, and its sha256; where that is None the first fetch notes it beside the file."""

    path: str
    url: str
    sha256: str | None = None


TWO_HOP = Published(
    "twohop/two_hop.csv",
    "https://raw.githubusercontent.com/edenbiran/HoppingTooLate/main/datasets/two_hop.csv",
)


def place_of(file: Published) -> Path:
    """Where the file lies, or will: in the folder BACKATTN_DATASETS, or else in the cache."""
    folder = os.environ.get("BACKATTN_DATASETS")
    return (ROOT / Path(folder).expanduser() if folder else CACHE / "datasets") / file.path


def published(file: Published) -> Path:
    """`place_of` the file, fetched if need be. Raises FileNotFoundError when the folder
    BACKATTN_DATASETS lacks it, OSError that says where to put it by hand when it cannot be fetched,
    and ValueError when its sha256 is another one."""
    folder, path = os.environ.get("BACKATTN_DATASETS"), place_of(file)
    note = path.with_suffix(".sha256")
    if not path.exists() and folder:
        raise FileNotFoundError(
            f"{path} is missing. Put it there, or unset BACKATTN_DATASETS to fetch {file.url}."
        )
    if not path.exists():
        try:
            with urllib.request.urlopen(file.url, timeout=30) as answer:
                content = answer.read()
        except OSError as error:
            raise OSError(
                f"Cannot fetch {file.url} ({error}). Put the file into <folder>/{file.path} and "
                "set BACKATTN_DATASETS to that folder."
            ) from error
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
        if file.sha256 is None:
            with atomic_file(note) as temporary:
                temporary.write_text(hashlib.sha256(content).hexdigest())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != (file.sha256 or (note.read_text().strip() if note.exists() else found)):
        raise ValueError(
            f"{path} has another sha256 than the published file. It was not used: delete it, and "
            "it is fetched again unless BACKATTN_DATASETS is set."
        )
    return path


def read_table(path: str | Path, columns: Sequence[str], strip: bool = False) -> pd.DataFrame:
    """Read a CSV as it stands: every cell is text. It must have `columns`, once each, and in them
    no cell that is empty or has spaces around (which strip=True takes off). Raises ValueError
    naming the file and column or row, FileNotFoundError with the path."""
    path = Path(path)
    if not path.exists():
        ours = "; it comes with the repository (git checkout -- data)"
        raise FileNotFoundError(f"{path} is missing{ours if DATA in path.parents else ''}.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, cells) for cells in reader if cells]
        if strip:
            lines = [(row, [cell.strip() for cell in cells]) for row, cells in lines]
    except (csv.Error, UnicodeDecodeError) as error:
        row = reader.line_num
        raise ValueError(f"{path.name} is no CSV in UTF-8 after row {row}: {error}.") from error
    header = lines[0][1] if lines else []
    repeated = sorted({name for name in header if header.count(name) > 1})
    missing = [name for name in columns if name not in header]
    if repeated or missing:
        problem = f"repeats column {repeated[0]!r}" if repeated else f"lacks column {missing[0]!r}"
        has = ", ".join(header) or "nothing"
        commas = " Put commas between cells." if len(header) == 1 and ";" in has else ""
        raise ValueError(f"{path.name} {problem}; it has {has}.{commas}")
    for row, cells in lines[1:]:
        if len(cells) != len(header):
            raise ValueError(
                f"{path.name} has {len(cells)} cells in row {row}, and {len(header)} columns: a "
                "cell that holds a comma stands in double quotes."
            )
        for name, cell in zip(header, cells, strict=True):
            if name in columns and (not cell or cell != cell.strip()):
                problem = "spaces around" if cell.strip() else "an empty"
                raise ValueError(f"{path.name} has {problem} {name!r} in row {row}.")
    if len(lines) < 2:
        raise ValueError(f"{path.name} has a header and no row.")
    return pd.DataFrame([cells for _, cells in lines[1:]], columns=header)


def facts(path: str | Path = DATA / "facts.csv") -> pd.DataFrame:
    """The single-hop facts: relation, subject, answer, geoname_id, population; see `read_table`."""
    return read_table(path, ["relation", "subject", "answer"])


def two_hop_facts(path: str | Path = DATA / "two_hop.csv") -> pd.DataFrame:
    """The two-hop facts: pair, e1, r1, e2, r2, e3, type2, type3, shortcut, e2_aliases, e3_aliases
    ("|" between), the last three empty in a file that lacks them, and whatever else it has (ours
    type1 and split); see `read_table`."""
    frame = read_table(path, ["pair", "e1", "r1", "e2", "r2", "e3", "type2", "type3"])
    empty = {name: "" for name in ("shortcut", "e2_aliases", "e3_aliases") if name not in frame}
    return frame.assign(**empty)


def published_two_hop() -> pd.DataFrame:
    """The TwoHop facts of Biran et al. (2024) in the columns of `two_hop_facts`; r1 and r2 are
    phrases with {}. Raises what `published` and `read_table` do, ValueError for a phrase without.
    """
    labels = {f"{entity}_label": entity for entity in ("e1", "e2", "e3")}
    labels |= {"r1_template": "r1", "r2_template": "r2", "e2_type": "type2", "e3_type": "type3"}
    path = published(TWO_HOP)
    columns = [*labels, "r1_type", "r2_type", "e2_aliases", "e3_aliases"]
    frame = read_table(path, columns, strip=True).rename(columns=labels)
    for (row, _), phrase in frame[["r1", "r2"]].stack().items():
        if phrase.count("{}") != 1:
            raise ValueError(
                f"{path.name}, row {row + 2}: the template {phrase!r} must have the slot {{}} once."
            )
    frame["pair"] = frame["type2"] + "-" + frame.pop("r1_type") + "-" + frame.pop("r2_type")
    for name in ("e2_aliases", "e3_aliases"):
        lists = frame[name].map(ast.literal_eval)
        frame[name] = ["|".join(word for word in words if len(word) > 1) for words in lists]
    return frame.assign(shortcut="", split="test")
