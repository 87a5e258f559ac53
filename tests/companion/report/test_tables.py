"""Tables in three forms with the same numbers, which LaTeX takes."""

import shutil
import subprocess

import pandas as pd
import pytest

from companion import paths
from companion.report import tables

TABLES = sorted((paths.FIGURES / "tables").glob("*.tex"))


def test_tables_come_in_three_forms_with_the_same_numbers(tmp_path):
    frame = pd.DataFrame({"stage": ["A_1", "B"], "gap": [1.23456, -2.0], "n": [3, 4]})
    for path in tables.save(frame, tmp_path, "t"):
        text = path.read_text()
        assert "1.235" in text and "-2" in text
    assert r"A\_1" in (tmp_path / "t.tex").read_text()
    assert (tmp_path / "t.md").read_text().startswith("| stage")


def test_committed_tables_hold_nothing_that_latex_lacks():
    assert len(TABLES) > 100
    for path in TABLES:
        strange = {c for c in path.read_text("utf-8") if ord(c) > 255} - set("–—…←“”‘’")
        assert not strange, f"{path.name}: add {strange} to tables.SYMBOLS"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_committed_tables_compile(tmp_path):
    packages = r"\usepackage[T1]{fontenc}\usepackage{booktabs,textcomp}"
    head = rf"\documentclass{{article}}{packages}\begin{{document}}\tiny"
    lines = [head, *(rf"\input{{{path}}}\par" for path in TABLES), r"\end{document}"]
    (tmp_path / "all.tex").write_text("\n".join(lines))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
