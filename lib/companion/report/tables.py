"""Tables as CSV, Markdown and LaTeX, all from one frame; comparing them."""

import csv
import re
from pathlib import Path

import numpy as np
import pandas as pd

from backattn.files import atomic_file

SYMBOLS = dict(zip("′−≤≥", ("$'$", "$-$", r"$\leq$", r"$\geq$"), strict=True)) | dict(
    zip("≈→Σ∈", (r"$\approx$", r"$\to$", r"$\Sigma$", r"$\in$"), strict=True)
)  # what LaTeX does not take as it is


def save(frame: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write `name`.csv, .md and .tex into `folder`, floats to four digits; return the paths. The
    LaTeX needs booktabs, and T1 for the font's accents."""
    rounded = frame.map(lambda x: float(f"{x:.4g}") if isinstance(x, float) else x)
    latex = rounded.to_latex(index=False, escape=True).translate(str.maketrans(SYMBOLS))
    as_csv = rounded.to_csv(index=False, lineterminator="\n")
    words = [i for i, name in enumerate(rounded) if rounded[name].map(type).eq(str).all()]
    markdown = rounded.to_markdown(index=False, disable_numparse=words)  # 0020 is no number
    texts = {"csv": as_csv, "md": markdown + "\n", "tex": latex}
    for suffix, text in texts.items():
        with atomic_file(folder / f"{name}.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    return [folder / f"{name}.{suffix}" for suffix in texts]


def compare(folder: Path, reference: Path, relative: float = 0.02) -> list[str]:
    """Differences between the CSV files of two folders, as sentences, none if they agree. Cells are
    compared as text, but in columns that hold only numbers: there one may differ by `relative` of
    itself plus a thousandth of its column's largest entry. Columns whose name begins with "timed"
    hold measured times and are not compared."""
    problems = []
    for path in sorted(reference.rglob("*.csv")):
        name = path.relative_to(reference)
        if not (folder / name).exists():
            problems.append(f"{name}: was not made by this run")
            continue
        expected, found = _cells(path), _cells(folder / name)
        whole = len({*map(len, expected + found)}) == 1
        if not whole or len(expected) != len(found) or expected[0] != found[0]:
            shapes = [(len(rows) - 1, max(map(len, rows), default=0)) for rows in (found, expected)]
            problems.append(
                f"{name}: has {shapes[0]} rows and columns, the committed file {shapes[1]}"
            )
            continue
        both = (np.array(rows, dtype=object).T.tolist() for rows in (expected, found))
        for (column, *old), (_, *new) in zip(*both, strict=True):
            if column.startswith("timed"):
                continue
            numbers = [_number(cell) for cell in old]
            text = None in numbers
            allowed = 0 if text else 1e-3 * np.nanmax(np.abs(numbers), initial=0)
            for row, (a, b, x) in enumerate(zip(old, new, numbers, strict=True), 2):
                y = None if text else _number(b)
                if a != b and (y is None or not abs(y - x) <= allowed + relative * abs(x)):
                    where = f"{name}, column {column}: {b} in row {row}"
                    problems.append(f"{where}, the committed file says {a}")
                    break
    return problems


def _cells(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return list(csv.reader(file))


def _number(cell: str) -> float | None:
    """The number that a cell is; None for text, as which count 007, 1.50 and 1e5 (no number is
    written like that); NaN for what is near nothing: an empty cell, an infinity."""
    if cell in ("", "inf", "-inf"):
        return float("nan")
    plain = re.fullmatch(r"-?(0|[1-9]\d*)(\.(0|\d*[1-9]))?(e[+-][0-2]?\d\d)?", cell)
    return float(cell) if plain else None
