"""The executed notebooks as a static site: `./run_all.sh --html`.

Jupyter Book makes it; here is only what goes in: README as the first page, the notebooks with their code folded, the
ledger, the index of figures, the card of the data.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd

from backattn.files import atomic_folder
from companion import paths

CONFIG = """title: {title}
author: ""
copyright: ""
only_build_toc_files: true
execute:
  execute_notebooks: "off"
html:
  use_repository_button: false
  use_issues_button: false
  home_page_in_navbar: true
sphinx:
  config:
    html_show_copyright: false
    myst_heading_anchors: 3
    suppress_warnings: ["mystnb.unknown_mime_type", "misc.highlighting_failure"]
    nb_merge_streams: true
"""

TITLE = "Back Attention, a reproducible companion"

PAGES = ("ledger", "figures/README", "data/README", "CONTRIBUTING")


def build(folder: Path, notebooks: list[Path]) -> Path:
    """Write the site below `folder`; returns its index.html.

    notebooks: executed ones, in order. Raises RuntimeError with Jupyter Book's own words when a page or a link fails,
    ModuleNotFoundError where Jupyter Book is missing.
    """
    if importlib.util.find_spec("jupyter_book") is None:
        raise ModuleNotFoundError(
            "The site is made by jupyter-book: install it in the version environment.yml names."
        )
    with atomic_folder(folder) as staging:
        _build(staging, notebooks)
    return folder / "index.html"


def _build(folder: Path, notebooks: list[Path]) -> None:
    """The site's files in `folder`, which is empty."""
    source = folder / "source"
    for name in ("figures", "data"):
        kept = shutil.ignore_patterns("checkpoints", "*.safetensors", "*.tex")
        shutil.copytree(paths.ROOT / name, source / name, ignore=kept)
    for name in ("LICENSE", "CITATION.cff", "CONTRIBUTING.md", "environment.yml"):
        shutil.copyfile(paths.ROOT / name, source / name)
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    (source / "index.md").write_text(readme, encoding="utf-8")
    (source / "ledger.md").write_text(ledger_page(), encoding="utf-8")
    (source / "notebooks").mkdir()
    for path in notebooks:
        nbformat.write(folded(path), source / "notebooks" / path.name)
    (source / "_config.yml").write_text(CONFIG.format(title=TITLE), encoding="utf-8")
    (source / "_toc.yml").write_text(contents(notebooks), encoding="utf-8")
    program = "from jupyter_book.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "build",
        str(source),
        "--path-output",
        str(folder),
        "-W",
        "--keep-going",
        "-q",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    html = folder / "_build" / "html"
    if done.returncode or not (html / "index.html").exists():
        said = re.findall(r"^.*(?:WARNING|ERROR|Error).*$", done.stderr, re.MULTILINE) or [
            done.stderr[-2000:]
        ]
        raise RuntimeError("The site could not be built:\n" + "\n".join(said))
    shutil.rmtree(source)
    for path in html.iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "_build")


def folded(path: Path) -> nbformat.NotebookNode:
    """A notebook whose code is folded away, its set-up cell altogether."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            tags = cell.metadata.setdefault("tags", [])
            tags.append("remove-cell" if "setup" in tags else "hide-input")
    return notebook


def ledger_page() -> str:
    """The ledger with the paper's words and ours, a section per row."""
    ledger = pd.read_csv(paths.FIGURES / "tables" / "claims.csv")
    parts = ["# What held, in full\n"]
    for row in ledger.itertuples():
        names = [
            f"[{name}](notebooks/{name}.ipynb)"
            for name in row.notebook.split(", ")
            if name != "none"
        ]
        parts.append(
            f"## {row.id}: {row.claim}\n\n**{row.verdict}** ({row.kind})\n\n- *paper*: {row.paper}\n"
            f"- *here*: {row.ours}\n- *notebook*: {', '.join(names) or 'none'}\n"
        )
        picture = paths.FIGURES / f"{row.figure}.png"
        if picture.exists():
            parts.append(f"![{row.claim}](figures/{picture.name})\n")
    return "\n".join(parts)


def contents(notebooks: list[Path]) -> str:
    """Jupyter Book's table of contents."""
    lines = ["format: jb-book", "root: index", "parts:", "- caption: Notebooks", "  chapters:"]
    lines += [f"  - file: notebooks/{path.stem}" for path in notebooks]
    lines += ["- caption: More", "  chapters:"]
    lines += [f"  - file: {name}" for name in PAGES]
    return "\n".join(lines) + "\n"
