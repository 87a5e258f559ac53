"""Tables as CSV, Markdown and LaTeX, all from one frame."""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from backattn.files import atomic_file


def save(frame: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write `name`.csv, .md and .tex into `folder`; return the paths. Floats have four significant digits."""
    rounded = frame.map(lambda x: float(f"{x:.4g}") if isinstance(x, float) else x)
    writers = {
        "csv": lambda path: rounded.to_csv(path, index=False, lineterminator="\n"),
        "md": lambda path: path.write_text(
            rounded.to_markdown(index=False) + "\n", encoding="utf-8"
        ),
        "tex": lambda path: path.write_text(_latex(rounded), encoding="utf-8"),
    }
    paths = []
    for suffix, write in writers.items():
        paths.append(folder / f"{name}.{suffix}")
        with atomic_file(paths[-1]) as temporary:
            write(temporary)
    return paths


SYMBOLS = {  # what LaTeX does not take as it is
    "′": "$'$",
    "−": "$-$",
    "≈": r"$\approx$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\to$",
    "Σ": r"$\Sigma$",
    "∈": r"$\in$",
}


def _latex(frame: pd.DataFrame) -> str:
    """Needs booktabs, and T1 for the font's accents."""
    return frame.to_latex(index=False, escape=True).translate(str.maketrans(SYMBOLS))


def compare(folder: Path, reference: Path, relative: float = 0.02) -> list[str]:
    """Differences between the CSV files of two folders, as sentences; an empty list means agreement.

    Every file of `reference` must exist with the same columns, rows and words. A number may differ by `relative` of
    itself plus a thousandth of its column's largest entry. Columns whose name begins with "timed" hold measured times
    and what is made of them, and are not compared.
    """
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
            problem = _column_problem(expected[column], found[column], relative)
            if problem:
                problems.append(f"{name}, column {column}: {problem}")
    return problems


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _column_problem(expected: pd.Series, found: pd.Series, relative: float) -> str | None:
    if not (_is_number(expected) and _is_number(found)):
        expected, found = (
            column.astype(object).where(column.notna(), "").astype(str)
            for column in (expected, found)
        )
        differs = expected != found
        message = "{} in row {}, the committed file says {}"
    else:
        allowed = relative * expected.abs() + 1e-3 * expected.abs().max()
        differs = ~((expected - found).abs() <= allowed) & ~(expected.isna() & found.isna())
        message = "{:.4g} in row {}, the committed file says {:.4g}"
    if not differs.any():
        return None
    row = int(differs.idxmax())
    return message.format(found[row], row + 2, expected[row])


INDEX = """# Figures and tables

Every figure is here as PDF (column width, fonts embedded), PNG, and CSV with the numbers that it plots; every table, in
`tables/`, as CSV, Markdown and LaTeX. A file `NN_name` is made by notebook `NN`. With each figure the first sentence of
its finding, and the claim whose figure it is in the [ledger](tables/claims.csv). This page is written by
`./run_all.sh --update`.
"""


def figure_index(notebooks: Sequence[Path], ledger: pd.DataFrame) -> str:
    """figures/README.md: notebook -> claims and data -> figure -> first sentence of its finding.

    notebooks: executed, each figure followed by its "**Finding.**"; ledger: id, notebook, figure (`claims.ledger`).
    """
    import nbformat  # needed here only

    lines = [INDEX]
    for path in notebooks:
        cells = nbformat.read(path, as_version=4).cells
        reads = re.search(r"^\| reads \| (.+) \|$", cells[0].source, re.MULTILINE)
        own = [row.id for row in ledger.itertuples() if path.stem in row.notebook.split(", ")]
        lines.append(f"## [{path.stem}](../notebooks/{path.name})\n")
        lines.append(
            f"Claims: {', '.join(dict.fromkeys(own)) or 'none'}. Reads: {reads[1] if reads else 'nothing'}.\n"
        )
        for place, cell in enumerate(cells):
            for name in (
                re.findall(r'run\.figure\([^"]*"(\w+)"', cell.source)
                if cell.cell_type == "code"
                else ()
            ):
                told = next(
                    (c.source for c in cells[place:] if c.source.startswith("**Finding.**")), "–."
                )
                told = " ".join(told.removeprefix("**Finding.** ").split())
                sentence = re.match(r"(?:\(.*?\) )?(.+?(?<!et al)[.?!](?= |$)|.+)", told)[1]
                whose = ", ".join(dict.fromkeys(ledger.loc[ledger["figure"] == name, "id"]))
                files = ", ".join(
                    f"[{suffix}]({name}.{suffix})" for suffix in ("png", "pdf", "csv")
                )
                lines.append(f"- **{name}** ({files}){f', {whose}' if whose else ''}: {sentence}")
        lines.append("")
    return "\n".join(lines)
