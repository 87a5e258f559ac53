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


def test_text_of_digits_is_written_as_it_is_in_all_forms(tmp_path):
    frame = pd.DataFrame({"code": ["0020", "0030"], "price": ["1.50", "2.00"], "n": [1.5, 2.0]})
    for path in tables.save(frame, tmp_path, "t"):
        assert all(word in path.read_text() for word in ("0020", "1.50", "2.00"))


DIFFERENT = [("007", "7"), ("1.50", "1.5"), ("1e5", "100000.0"), ("TRUE", "True"), ("NA", "")]
DIFFERENT += [("nan", ""), ("None", ""), ("NA", "nan"), ("inf", "-inf"), ("inf", "1.0"), ("", "0")]
DIFFERENT += [
    ("2.0", "2.1"),
    ("0.5", "inf"),
    ("1.0", "one"),
    ("1.0", ""),
    ("a", "a "),
    ("1e-05", ""),
]
ALIKE = [
    ("1.0", "1.01"),
    ("3", "3.0"),
    ("-2.5e-06", "-2.51e-06"),
    ("0.0", "-0.0"),
    ("", ""),
    ("nan", "nan"),
]
ALIKE += [("inf", "inf"), ("-inf", "-inf"), ("007", "007")]


@pytest.mark.parametrize(
    ("old", "new", "alike"), [(*p, False) for p in DIFFERENT] + [(*p, True) for p in ALIKE]
)
@pytest.mark.parametrize("beside", ["2", "inf", "word", ""])
def test_tables_are_compared_exactly_but_for_plain_numbers(tmp_path, old, new, alike, beside):
    for folder, cell in (("committed", old), ("made", new)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.csv").write_text(f"x,timed\n{beside},{cell}\n{cell},1\n")
    problems = tables.compare(tmp_path / "made", tmp_path / "committed")
    alike = old == new if beside == "word" else alike
    if alike:
        assert problems == []
    else:
        assert [f"column x: {new} in row 3" in problem for problem in problems] == [True]


@pytest.mark.parametrize("text", ["", "x\n", "y\n1\n", "x,x\n1,1\n", "x\n1\n2\n", "x\n1,2\n"])
def test_a_table_of_another_shape_is_named(tmp_path, text):
    for folder, content in (("committed", "x\n1\n"), ("made", text)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.csv").write_text(content)
    for pair in (("made", "committed"), ("committed", "made")):
        (problem,) = tables.compare(*(tmp_path / name for name in pair))
        assert "rows and columns" in problem


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
