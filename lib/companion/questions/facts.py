"""The facts that are asked, read and checked."""

import ast
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from companion.paths import DATA
from companion.questions.published import Published, published

TWO_HOP_COLUMNS = ("pair", "e1", "r1", "e2", "r2", "e3", "type2", "type3", "split")

TWO_HOP = Published(
    "twohop/two_hop.csv",
    "https://raw.githubusercontent.com/edenbiran/HoppingTooLate/main/datasets/two_hop.csv",
)


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV that must have `columns`, once each, without empty cells in them.

    Raises ValueError naming the file and the missing column, repeated column or first empty row,
    and FileNotFoundError with the path.
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


def facts(path: Path = DATA / "facts.csv") -> pd.DataFrame:
    """The single-hop facts: relation, subject, answer, geoname_id, population; see `read_table`."""
    return read_table(path, ["relation", "subject", "answer"])


def two_hop_facts(path: Path = DATA / "two_hop.csv") -> pd.DataFrame:
    """The two-hop facts: pair, e1, r1, e2, r2, e3, shortcut, type1–3, e2_aliases, e3_aliases ("|"
    between), split; see `read_table`."""
    frame = read_table(path, TWO_HOP_COLUMNS)
    absent = [name for name in ("shortcut", "e2_aliases", "e3_aliases") if name not in frame]
    return frame.assign(**dict.fromkeys(absent, ""))


def published_two_hop() -> pd.DataFrame:
    """The TwoHop facts of Biran et al. (2024) in the columns of `two_hop_facts`; r1 and r2 are
    phrases with {}.

    Raises what `published` and `read_table` raise, and ValueError for a phrase without {}.
    """
    labels = {f"{entity}_label": entity for entity in ("e1", "e2", "e3")}
    labels |= {"r1_template": "r1", "r2_template": "r2", "e2_type": "type2", "e3_type": "type3"}
    columns = [*labels, "r1_type", "r2_type", "e2_aliases", "e3_aliases"]
    path = published(TWO_HOP)
    frame = read_table(path, columns).rename(columns=labels)
    for row, phrases in enumerate(zip(frame["r1"], frame["r2"], strict=True)):
        for phrase in phrases:
            if phrase.count("{}") != 1:
                raise ValueError(
                    f"{path.name}, row {row + 2}: the template {phrase!r} must have the slot {{}} "
                    "once."
                )
    frame["pair"] = frame["type2"] + "-" + frame.pop("r1_type") + "-" + frame.pop("r2_type")
    for name in ("e2_aliases", "e3_aliases"):
        frame[name] = [
            "|".join(word for word in ast.literal_eval(cell) if len(word) > 1)
            for cell in frame[name]
        ]
    return frame.assign(shortcut="", split="test")
