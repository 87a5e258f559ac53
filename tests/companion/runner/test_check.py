"""--check: what changed in committed notebooks and numbers is found and named."""

import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from companion import paths
from companion.report import tables
from companion.runner.check import check


def test_a_changed_committed_number_is_named(tmp_path):
    shutil.copytree(paths.FIGURES, tmp_path, dirs_exist_ok=True)
    assert tables.compare(paths.FIGURES, tmp_path) == []
    name, frame = "01_flow_map.csv", pd.read_csv(paths.FIGURES / "01_flow_map.csv")
    row = int(frame["mean"].abs().sort_values().index[int(0.6 * len(frame))])  # not a large one
    for column, other in (("layer", frame["layer"] + 1), ("mean", frame["mean"] * 1.2)):
        changed = other.where(frame.index == row, frame[column])
        frame.assign(**{column: changed}).to_csv(tmp_path / name, index=False)
        (problem,) = tables.compare(paths.FIGURES, tmp_path)
        assert all(part in problem for part in (name, f"column {column}", f"row {row + 2}"))


def test_small_differences_between_machines_pass_and_words_do_not(tmp_path):
    for name, value, word in ("a", 1.0, "partly"), ("b", 1.01, "partly"), ("c", 1, "reproduced"):
        (tmp_path / name).mkdir()
        frame = pd.DataFrame({"x": [value, 3.0], "verdict": [word, "partly"]})
        frame.to_csv(tmp_path / name / "t.csv", index=False)
    assert tables.compare(tmp_path / "b", tmp_path / "a") == []
    assert "reproduced in row 2" in tables.compare(tmp_path / "c", tmp_path / "a")[0]
    assert "was not made" in tables.compare(tmp_path / "empty", tmp_path / "a")[0]


@pytest.mark.parametrize(
    "cell, output, status",
    [
        ("print(f'{n / 8:.2f}')", "0.38", 0),
        ("print(f'{n / 8:.2f}')", "0.83", 1),
        ("print('fetching a model', file=sys.stderr)\nprint(n)", "3", 0),
    ],
)
def test_a_changed_number_in_a_committed_notebook_turns_the_check_red(
    tmp_path, cell, output, status
):
    checked = nbformat.v4.new_code_cell(cell, metadata={"tags": ["nbval-check-output"]})
    checked.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"{output}\n")]
    first = nbformat.v4.new_code_cell("import sys\nn = 3")
    notebook = nbformat.v4.new_notebook(cells=[first, checked])
    for count, each in enumerate(notebook.cells, 1):
        each.execution_count = count
    nbformat.write(notebook, tmp_path / "09_numbers.ipynb")
    shutil.copy(paths.ROOT / "conftest.py", tmp_path)  # says what is not compared
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax"]
    command += [str(tmp_path / "09_numbers.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=paths.ROOT)
    assert done.returncode == status, done.stdout
    assert not status or ("0.83" in done.stdout and "0.38" in done.stdout)


def test_check_reports_each_step_and_fails_when_one_does(monkeypatch, tmp_path, capsys):
    commands = []

    def pretend(command, **_):
        commands.append(" ".join(command))
        return subprocess.CompletedProcess(command, 1 if "--nbval-lax" in command else 0)

    problem = "t.csv, column x: 1 in row 2, the committed file says 2"
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr("companion.runner.check.subprocess.run", pretend)
    monkeypatch.setattr("companion.runner.check.tables.compare", lambda *_: [problem])
    assert check() == 1
    shown = capsys.readouterr().out
    failed = ("FAILED  committed notebooks", "FAILED  numbers", f"changed: {problem}")
    assert all(part in shown for part in ("passed  unit tests", *failed))
    for part in ("ruff check", "ruff format", "--doctest-modules"):
        assert any(part in command for command in commands)
