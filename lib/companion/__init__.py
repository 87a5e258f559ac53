"""This paper: its questions, runs, studies, report and runner."""

from pathlib import Path

if not (Path(__file__).resolve().parents[2] / "data").is_dir():
    raise ImportError(
        "`companion` reads data/ of its repository, which a pip install lacks: clone the "
        "repository and run `pip install -e .` there. `backattn` needs no clone."
    )
