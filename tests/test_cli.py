"""The runner and the checks: what fails is reported as what it is, and what is done is not done again."""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from companion import paths
from companion.report import tables
from companion.runner import cli
from companion.runner.check import check, notebooks
from companion.runner.cli import PROFILES, _join_lines, main, parser, select

GOOD = ["n = 3", "import pathlib\nprint('n is', n)", "(FOLDER / 'made.txt').write_text(str(n))"]


def write(folder, name, cells):
    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# A title"),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    notebook.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository of our own: notebooks/ and build/ below tmp_path."""
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.setattr(cli, "notebooks", lambda: sorted((tmp_path / "notebooks").glob("*.ipynb")))
    monkeypatch.setitem(PROFILES, "smoke", {})
    return tmp_path


def good_cells(place, profile="smoke"):
    return [
        cell.replace("FOLDER", f"pathlib.Path({str(place / 'build' / profile)!r})") for cell in GOOD
    ]


def run(*options):
    return cli.run(parser().parse_args(["--profile", "smoke", *options]))


def test_a_good_notebook_is_run_noted_and_then_skipped(place, capsys):
    write(place / "notebooks", "01_good", good_cells(place))
    assert run() == 0
    shown = capsys.readouterr().out
    assert (
        "[1/1] 01_good" in shown
        and "A title" in shown
        and "peak memory" in shown
        and "wrote 2 files" in shown
    )
    made = place / "build/smoke/made.txt"
    stamp = made.stat().st_mtime_ns
    assert run() == 0
    assert "skipped" in capsys.readouterr().out
    assert made.stat().st_mtime_ns == stamp
    executed = nbformat.read(place / "build/smoke/notebooks/01_good.ipynb", as_version=4)
    assert [cell.execution_count for cell in executed.cells[1:]] == [1, 2, 3]
    assert set(executed.metadata) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("change", ["source", "product", "parameter", "force"])
def test_what_changed_is_run_again(place, capsys, monkeypatch, change):
    path = write(place / "notebooks", "01_good", good_cells(place))
    assert run() == 0
    if change == "source":
        write(place / "notebooks", "01_good", [*good_cells(place), "4"])
    elif change == "product":
        (place / "build/smoke/made.txt").unlink()
    elif change == "parameter":
        monkeypatch.setitem(PROFILES, "smoke", {path.stem: {"n": 5}})
    capsys.readouterr()
    assert run(*(["--force"] if change == "force" else [])) == 0
    assert "skipped" not in capsys.readouterr().out
    assert (place / "build/smoke/made.txt").read_text() == ("5" if change == "parameter" else "3")


def test_a_failing_cell_is_shown_with_its_source_and_the_way_on(place, capsys):
    write(
        place / "notebooks",
        "01_bad",
        ["n = 3", "print('fine')", "total = n / (n - 3)  # the culprit"],
    )
    write(place / "notebooks", "02_good", good_cells(place))
    assert run() == 1
    shown = capsys.readouterr().out
    assert "FAILED 01_bad.ipynb, cell 3" in shown
    assert "| total = n / (n - 3)  # the culprit" in shown
    assert "ZeroDivisionError" in shown
    assert "./run_all.sh --profile smoke --from 01" in shown
    partial = place / "build/smoke/notebooks/01_bad.partial.ipynb"
    assert str(partial) in shown
    assert nbformat.read(partial, as_version=4).cells[2].outputs[0].text == "fine\n"
    assert not (place / "build/smoke/notebooks/01_bad.ipynb").exists()
    assert "02_good" not in shown  # stopped at the failure
    assert run("--keep-going") == 1
    assert "[2/2] 02_good" in capsys.readouterr().out


def test_a_dead_kernel_is_called_that(place, capsys):
    write(
        place / "notebooks",
        "01_dead",
        ["n = 3", "import os\nos._exit(9)  # as if the system had killed it"],
    )
    assert run() == 1
    shown = capsys.readouterr().out
    assert "The kernel died" in shown and "memory" in shown
    assert "os._exit(9)" in shown and "--from 01" in shown


def test_finished_work_survives_a_later_failure(place, capsys):
    write(place / "notebooks", "01_good", good_cells(place))
    write(place / "notebooks", "02_bad", ["n = 3", "1 / 0"])
    assert run() == 1
    write(place / "notebooks", "02_bad", ["n = 3", "1 / 1"])
    capsys.readouterr()
    assert run() == 0
    shown = capsys.readouterr().out
    assert "[1/2] 01_good  done before" in shown and "[2/2] 02_bad" in shown


def test_selection(place):
    for name in ("00_a", "01_b", "03_c"):
        write(place / "notebooks", name, ["n = 1"])
    found = notebooks()

    def names(*options):
        return [p.stem for p in select(found, *options)]

    assert names("01,03", None, None) == ["01_b", "03_c"]
    assert names(None, "01", None) == ["01_b", "03_c"]
    assert names(None, None, "01") == ["00_a", "01_b"]
    assert names("1", None, None) == ["01_b"]
    assert names(None, "1", "3") == ["01_b", "03_c"]
    for wrong in (("01,07", None, None), (None, "07", None), (None, "03", "01")):
        with pytest.raises(SystemExit, match="00_a, 01_b, 03_c"):
            names(*wrong)


def test_update_after_a_finished_run_still_updates(place, monkeypatch):
    path = write(place / "notebooks", "01_good", good_cells(place, "paper"))
    monkeypatch.setattr(paths, "FIGURES", place / "figures")
    monkeypatch.setattr(paths, "DATA", place / "data")
    assert main([]) == 0
    assert nbformat.read(path, as_version=4).cells[1].execution_count is None
    (place / "figures/tables").mkdir(parents=True, exist_ok=True)
    (place / "figures/tables/claims.csv").write_text("id,notebook,figure\nC1,01_good,01_x\n")
    assert main(["--update"]) == 0
    assert nbformat.read(path, as_version=4).cells[1].execution_count == 1
    assert "01_good" in json.loads((place / "data/MANIFEST.json").read_text())["runs"]["paper"]


def test_update_of_the_full_profile_replaces_results_and_notes_their_checksum(place, monkeypatch):
    made = (
        f"p = pathlib.Path({str(place / 'build/full/data/made.safetensors')!r})\np.parent.mkdir()\n"
        "p.write_text('new')\n"
        'r = p.parent / \'01/runs.jsonl\'\nr.parent.mkdir()\nr.write_text(\'{"key": "a", "seconds": 5}\\n\')'
    )
    path = write(place / "notebooks", "01_good", ["n = 3", f"import pathlib\n{made}"])
    monkeypatch.setattr(paths, "FIGURES", place / "figures")
    monkeypatch.setattr(paths, "DATA", place / "data")
    assert main(["--profile", "full", "--update"]) == 0
    assert (place / "data/made.safetensors").read_text() == "new"
    noted = json.loads((place / "data/MANIFEST.json").read_text())["results"]["made.safetensors"]
    assert noted["sha256"] == hashlib.sha256(b"new").hexdigest() and noted["hardware"]
    assert (place / "data/runs.jsonl").exists() and not (place / "data/01").exists()
    took = json.loads((place / "data/MANIFEST.json").read_text())["runs"]["full"]["01_good"]
    assert took["training_seconds"] == 5
    assert (
        nbformat.read(path, as_version=4).cells[1].execution_count is None
    )  # the notebook is the paper profile's


def test_runs_of_several_notebooks_are_joined(tmp_path):
    new, goal = tmp_path / "new.jsonl", tmp_path / "runs.jsonl"
    goal.write_text('{"key": "b", "n": 1}\n{"key": "c", "n": 1}\n')
    new.write_text('{"key": "b", "n": 2}\n{"key": "a", "n": 2}\n')
    _join_lines(new, goal)
    assert goal.read_text() == '{"key": "a", "n": 2}\n{"key": "b", "n": 2}\n{"key": "c", "n": 1}\n'


def test_shipped_results_have_the_checksum_that_the_manifest_notes():
    noted = json.loads((paths.DATA / "MANIFEST.json").read_text())["results"]
    files = [*paths.DATA.rglob("*.safetensors"), *paths.DATA.glob("*.jsonl")]
    shipped = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert shipped == {name: entry["sha256"] for name, entry in noted.items()} and shipped


def test_update_is_refused_for_other_profiles_and_models(monkeypatch):
    monkeypatch.setenv("BACKATTN_DTYPE", "float32")  # as it was afterwards
    for options in (["--profile", "smoke"], ["--model", "tiny-llama"], ["--dtype", "bfloat16"]):
        with pytest.raises(SystemExit, match="--update replaces committed results"):
            main(["--update", *options])


def test_every_option_of_the_design_is_there():
    text = parser().format_help()
    named = (
        "check",
        "html",
        "profile",
        "only",
        "from",
        "to",
        "list",
        "force",
        "keep-going",
        "update",
        "model",
        "device",
    )
    assert all(f"--{name}" in text for name in named)
    assert set(PROFILES) == {"smoke", "paper", "full"}
    assert isinstance(parser().parse_args([]), argparse.Namespace)


# ---------------------------------------------------------------- committed numbers


@pytest.mark.parametrize("column", ["mean", "layer"])
def test_a_changed_committed_number_is_named(tmp_path, column):
    shutil.copytree(paths.FIGURES, tmp_path / "figures")
    assert tables.compare(paths.FIGURES, tmp_path / "figures") == []
    file = tmp_path / "figures/01_flow_map.csv"
    frame = pd.read_csv(file)
    row = int(frame["mean"].abs().sort_values().index[int(0.6 * len(frame))])  # not a large one
    frame.loc[row, column] = (
        frame.loc[row, column] + 1 if column == "layer" else frame.loc[row, column] * 1.2
    )
    frame.to_csv(file, index=False)
    problems = tables.compare(paths.FIGURES, tmp_path / "figures")
    assert len(problems) == 1
    assert (
        "01_flow_map.csv" in problems[0]
        and f"column {column}" in problems[0]
        and f"row {row + 2}" in problems[0]
    )


def test_small_differences_between_machines_pass_and_words_do_not(tmp_path):
    for name, value, word in (
        ("one", 1.0, "partly"),
        ("two", 1.01, "partly"),
        ("three", 1.01, "reproduced"),
    ):
        (tmp_path / name).mkdir()
        pd.DataFrame({"x": [value, 3.0], "verdict": [word, "partly"]}).to_csv(
            tmp_path / name / "t.csv", index=False
        )
    assert tables.compare(tmp_path / "two", tmp_path / "one") == []
    assert "reproduced in row 2" in tables.compare(tmp_path / "three", tmp_path / "one")[0]
    assert "was not made" in tables.compare(tmp_path / "empty", tmp_path / "one")[0]


def nbval(path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
        str(path),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=paths.ROOT)


def committed(folder, cell, output):
    """A notebook as it is committed, its second code cell checked against `output`."""
    path = write(folder, "09_numbers", ["import sys\nn = 3", cell])
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].metadata["tags"] = ["nbval-check-output"]
    for count, own in enumerate(notebook.cells[1:], 1):
        own.execution_count = count
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text=output)]
    nbformat.write(notebook, path)
    return path


def test_what_is_told_while_a_model_is_fetched_is_no_change(tmp_path):
    shutil.copy(paths.ROOT / "conftest.py", tmp_path)
    done = nbval(committed(tmp_path, "print('fetching', file=sys.stderr)\nprint(3)", "3\n"))
    assert done.returncode == 0, done.stdout


def test_a_changed_number_in_a_committed_notebook_turns_the_check_red(tmp_path):
    done = nbval(committed(tmp_path, "print(f'{n / 8:.2f}')", "0.38\n"))
    assert done.returncode == 0, done.stdout
    done = nbval(committed(tmp_path, "print(f'{n / 8:.2f}')", "0.83\n"))
    assert done.returncode == 1
    assert "0.83" in done.stdout and "0.38" in done.stdout


def test_check_reports_each_step_and_fails_when_one_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    commands = []

    def pretend(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1 if "--nbval-lax" in command else 0)

    monkeypatch.setattr(cli.subprocess, "run", pretend)
    monkeypatch.setattr(
        cli.tables, "compare", lambda *_: ["t.csv, column x: 1 in row 2, the committed file says 2"]
    )
    assert check() == 1
    shown = capsys.readouterr().out
    assert (
        "passed  unit tests" in shown
        and "FAILED  committed notebooks" in shown
        and "FAILED  numbers" in shown
    )
    assert "changed: t.csv" in shown
    assert any("ruff" in part for command in commands for part in command)


def test_the_manifest_times_every_notebook():
    runs = json.loads((paths.DATA / "MANIFEST.json").read_text())["runs"]["paper"]
    for path in sorted((paths.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        assert runs[path.stem]["seconds"] > 0 and runs[path.stem]["hardware"]


def test_a_full_disk_is_one_message(place, monkeypatch, capsys):
    write(place / "notebooks", "01_good", good_cells(place))

    def full(*_, **__):
        raise OSError(28, "Cannot write it: the disk is full")

    monkeypatch.setattr(cli, "execute", full)
    assert main(["--profile", "smoke"]) == 1
    said = capsys.readouterr().err
    assert (
        "the disk is full" in said
        and "run the same command again" in said
        and "Traceback" not in said
    )
