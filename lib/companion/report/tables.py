"""Tables as CSV, Markdown and LaTeX, all from one frame; comparing them."""

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
    csv = rounded.to_csv(index=False, lineterminator="\n")
    texts = {"csv": csv, "md": rounded.to_markdown(index=False) + "\n", "tex": latex}
    for suffix, text in texts.items():
        with atomic_file(folder / f"{name}.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    return [folder / f"{name}.{suffix}" for suffix in texts]


def compare(folder: Path, reference: Path, relative: float = 0.02) -> list[str]:
    """Differences between the CSV files of two folders, as sentences, none if they agree. A number
    may differ by `relative` of itself plus a thousandth of its column's largest entry; columns
    whose name begins with "timed" hold measured times and are not compared."""
    problems = []
    for path in sorted(reference.rglob("*.csv")):
        name = path.relative_to(reference)
        if not (folder / name).exists():
            problems.append(f"{name}: was not made by this run")
            continue
        expected, found = pd.read_csv(path), pd.read_csv(folder / name)
        if list(expected.columns) != list(found.columns) or len(expected) != len(found):
            problems.append(
                f"{name}: has {found.shape} rows and columns, the committed file {expected.shape}"
            )
            continue
        for column in [name for name in expected if not name.startswith("timed")]:
            both = old, new = expected[column], found[column]
            if all(pd.api.types.is_numeric_dtype(x) and x.dtype != bool for x in both):
                allowed = 1e-3 * np.nan_to_num(old.abs().max())
                same = np.isclose(new, old, relative, allowed, equal_nan=True)
            else:
                words = [x.astype(object).where(x.notna(), "").astype(str) for x in both]
                same = (words[0] == words[1]).to_numpy()
            for row in np.flatnonzero(~same)[:1]:
                where = f"{name}, column {column}: {new[row]} in row {row + 2}"
                problems.append(f"{where}, the committed file says {old[row]}")
    return problems
