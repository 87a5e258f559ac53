"""What the set-up cell of every notebook calls, and where a notebook writes."""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from IPython import get_ipython
from matplotlib.figure import Figure

# What else this project holds is imported by the functions below: first, packages must be there.

# Small packages that a hosted notebook may lack, by what is imported; nothing heavy is installed.
LIGHT = {name: name for name in ("accelerate", "gguf", "joblib", "peft", "psutil", "seaborn")}
LIGHT |= {"filelock": "filelock", "jinja2": "Jinja2", "tabulate": "tabulate", "yaml": "PyYAML"}
FLOORS = {"torch": "2.6", "transformers": "5.3", "pandas": "2.2"}  # as in pyproject.toml


@dataclass(frozen=True)
class Notebook:
    """One execution of one notebook; everything it makes goes below `folder`."""

    name: str
    profile: str
    folder: Path

    def figure(self, figure: Figure, name: str, data: pd.DataFrame, title: str | None) -> None:
        """Save a figure as PDF, PNG and the CSV of its numbers. title: its finding, None where its
        panels have titles of their own."""
        from companion.report import figures

        if title:
            figure.suptitle(title, fontsize="medium", fontweight="bold")
        figures.save(figure, self.folder / "figures", name, data)
        _describe_pictures()

    def table(self, frame: pd.DataFrame, name: str) -> pd.DataFrame:
        """Save a table as CSV, Markdown and LaTeX; return it for display."""
        from companion.report import tables

        tables.save(frame, self.folder / "figures" / "tables", name)
        return frame

    def page(self, text: str, name: str, suffix: str = ".md") -> None:
        """Save a page of Markdown, or HTML, beside the figures."""
        from backattn.files import atomic_file

        with atomic_file(self.folder / "figures" / f"{name}{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")


def setup(name: str) -> Notebook:
    """Prepare a notebook: small missing packages, one thread, house style, no foreign warnings.
    Raises ImportError for a large package that is older than FLOORS say."""
    for package, least in FLOORS.items():
        if _numbers(version(package)) < _numbers(least):
            raise ImportError(
                f"{package} {version(package)} is here, and {least} or later is needed: run "
                f"`%pip install -U '{package}>={least}'`, restart the kernel, and begin again."
            )
    missing = [LIGHT[name] for name in LIGHT if importlib.util.find_spec(name) is None]
    if missing:
        print("Installing what is missing:", ", ".join(missing))
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
    from backattn import runtime
    from companion import paths
    from companion.report import figures

    runtime.use_threads()
    figures.style()
    warnings.filterwarnings("ignore", category=FutureWarning)
    profile = os.environ.get(runtime.PROFILE, "interactive")
    return Notebook(name, profile, paths.run_folder(profile))


def _numbers(release: str) -> list[int]:
    """Major and minor number of a release."""
    return [int(number) for number in re.findall(r"\d+", release)[:2]]


def _describe_pictures() -> None:
    """Every figure that a notebook shows gets its description, as the picture's `alt`."""
    shell = get_ipython()
    png = shell and shell.display_formatter.formatters["image/png"]
    draw = png and png.type_printers.get(Figure)  # matplotlib's own, where figures show inline
    if draw and not isinstance(draw, _Described):
        png.for_type(Figure, _Described(draw))


@dataclass(frozen=True)
class _Described:
    draw: Callable[[Figure], str | None]

    def __call__(self, figure: Figure) -> tuple[str | None, dict[str, str]] | None:
        from companion.report import figures

        picture = self.draw(figure)
        return picture and (picture, {"alt": figures.described(figure)})
