"""The runner: what fails is reported as what it is, and what is done is not done again."""

import hashlib
import json
import os

import nbformat
import pytest
import yaml

from companion import paths
from companion.runner import committed
from companion.runner.cli import main, parser, select
from companion.runner.execute import clean

GOOD = ["n = 3", "print('n is', n)", "(folder / 'made.txt').write_text(str(n))"]


class Place:
    """A repository below a temporary folder; each notebook begins with its parameter cell."""

    def __init__(self, root):
        self.root, self.build = root, root / "build/smoke"
        self.profile(smoke={}, paper={}, full={})

    def profile(self, **profiles):
        (self.root / "notebooks").mkdir(exist_ok=True)
        (self.root / "notebooks/profiles.yml").write_text(yaml.safe_dump(profiles))

    def write(self, name, *cells, profile="smoke"):
        parameters, *rest = cells or GOOD
        where = f"import pathlib\nfolder = pathlib.Path({str(self.root / 'build' / profile)!r})\n"
        code = [parameters, where + rest[0] if rest else where, *rest[1:]]
        notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, code)))
        notebook.cells[0].metadata["tags"] = ["parameters"]
        path = self.root / "notebooks" / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("NOTEBOOKS", "BUILD", "FIGURES", "DATA"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    return Place(tmp_path)


def run(*options):
    return main(["--profile", "smoke", *options])


def test_a_good_notebook_is_run_noted_and_then_skipped(place, capsys):
    place.write("01_good")
    assert run() == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("[1/1] 01_good", "peak memory", "wrote 2 files"))
    stamp = (place.build / "made.txt").stat().st_mtime_ns
    assert run() == 0
    assert "skipped" in capsys.readouterr().out
    assert (place.build / "made.txt").stat().st_mtime_ns == stamp
    executed = nbformat.read(place.build / "notebooks/01_good.ipynb", as_version=4)
    assert [cell.execution_count for cell in executed.cells] == [1, 2, 3]
    assert set(executed.metadata) == {"kernelspec", "language_info"}
    assert not list(place.build.rglob("*.partial.ipynb")) + list(place.build.rglob("*.progress"))


def test_what_changed_is_run_again(place, capsys):
    path, made = place.write("01_good"), place.build / "made.txt"
    changes = {
        "source": lambda: place.write("01_good", *GOOD, "4"),
        "product": made.unlink,
        "parameter": lambda: place.profile(smoke={"01_good": {"n": 5}}),
        "force": path.exists,
    }
    assert run() == 0
    for name, change in changes.items():
        change()
        capsys.readouterr()
        assert run(*(["--force"] if name == "force" else [])) == 0
        assert "skipped" not in capsys.readouterr().out
        assert made.read_text() == ("5" if name in ("parameter", "force") else "3")


def test_two_equal_runs_are_equal_to_the_byte(place):
    place.write("01_good", "n = 3", "n", "import sys\n_ = sys.stdout.write('a')\nn / 2")
    place.profile(smoke={"01_good": {"n": 5}})
    products = []
    for _ in range(2):
        assert run("--force") == 0
        products.append((place.build / "notebooks/01_good.ipynb").read_bytes())
    assert products[0] == products[1] and b"injected-parameters" in products[0]


def test_the_kernel_has_its_environment_and_this_process_its_own(place, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names, before = ["PYTHONHASHSEED", "BACKATTN_PROFILE", "MPLBACKEND"], dict(os.environ)
    say = f"import os\n(folder / 'e').write_text(str([*map(os.getenv, {names})]))"
    place.write("01_good", "n = 3", say)
    assert run() == 0
    found = (place.build / "e").read_text()
    assert found.startswith("['0', 'smoke', ") and "Agg" not in found and os.environ == before


def test_a_failing_cell_is_shown_with_its_source_and_the_way_on(place, capsys):
    place.write("01_bad", "n = 3", "print('fine')", "total = n / (n - 3)  # the culprit")
    place.write("02_good")
    assert run() == 1
    shown, partial = capsys.readouterr().out, place.build / "notebooks/01_bad.partial.ipynb"
    said = ("FAILED 01_bad.ipynb, cell 2", "| total = n / (n - 3)  # the culprit")
    said += ("ZeroDivisionError", "./run_all.sh --profile smoke --from 01", str(partial))
    assert all(part in shown for part in said)
    assert "02_good" not in shown  # stopped at the failure
    assert '"fine\\n"' in partial.read_text()
    assert not (place.build / "notebooks/01_bad.ipynb").exists()
    assert run("--keep-going") == 1
    assert "[2/2] 02_good" in capsys.readouterr().out
    place.write("01_bad", "n = 3", "1 / 1")
    assert run() == 0
    shown = capsys.readouterr().out
    assert "[1/2] 01_bad  est" not in shown and "[2/2] 02_good  done before" in shown


def test_a_dead_kernel_is_called_that(place, capsys):
    place.write("01_dead", "n = 3", "n", "import os\nos._exit(9)  # the system killed it", "4")
    assert run() == 1
    shown = capsys.readouterr().out
    said = ("The kernel died", "memory", "cell 2:", "os._exit(9)", "--from 01")
    assert all(part in shown for part in said)


def test_a_full_disk_is_one_message(place, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "Cannot write it: the disk is full")

    place.write("01_good")
    monkeypatch.setattr("companion.runner.cli.execute", full)
    assert run() == 1
    said = capsys.readouterr().err
    assert "the disk is full" in said and "run the same command again" in said
    assert "Traceback" not in said


def test_selection(place):
    found = [place.write(name, "n = 1") for name in ("00_a", "01_b", "03_c")]
    assert committed.notebooks() == found
    assert select(found, "01,03", None, None) == select(found, None, "01", None) == found[1:]
    assert (
        select(found, None, None, "01") == found[:2] and select(found, None, "1", "3") == found[1:]
    )
    assert select(found, "1", None, None) == found[1:2]
    for wrong in (("01,07", None, None), (None, "07", None), (None, "03", "01")):
        with pytest.raises(SystemExit, match="00_a, 01_b, 03_c"):
            select(found, *wrong)


def test_every_option_of_the_design_is_there(capsys):
    names = "check html profile only from to list force keep-going update model device dtype"
    assert all(f"--{name}" in parser().format_help() for name in [*names.split(), "cluster"])
    assert list(committed.profiles()) == ["smoke", "paper", "full"]
    assert main(["--list"]) == 0
    assert "01_stage_discovery" in capsys.readouterr().out


def test_update_after_a_finished_run_still_updates(place):
    path = place.write("01_good", profile="paper")
    (place.root / "figures/tables").mkdir(parents=True)
    (place.root / "figures/tables/claims.csv").write_text("id,notebook,figure\nC1,01_good,01_x\n")
    for options, count in ([], None), (["--update"], 1):
        assert main(options) == 0
        assert nbformat.read(path, as_version=4).cells[0].execution_count == count
    assert committed.took("paper")["01_good"]["seconds"] > 0
    assert "01_good" in (place.root / "figures/README.md").read_text()


def test_update_of_the_full_profile_replaces_results_and_notes_their_checksum(place):
    lines = (
        "(folder / 'data/01').mkdir(parents=True)",
        "(folder / 'data/made.safetensors').write_text('new')",
        '(folder / \'data/01/runs.jsonl\').write_text(\'{"key": "a", "seconds": 5}\\n\')',
    )
    path = place.write("01_good", "n = 3", "\n".join(lines), profile="full")
    assert main(["--profile", "full", "--update"]) == 0
    assert (paths.DATA / "made.safetensors").read_text() == "new"
    noted = committed.manifest()["results"]["made.safetensors"]
    assert noted["sha256"] == hashlib.sha256(b"new").hexdigest() and noted["hardware"]
    assert (paths.DATA / "runs.jsonl").exists() and not (paths.DATA / "01").exists()
    assert committed.took("full")["01_good"]["training_seconds"] == 5
    cell = nbformat.read(path, as_version=4).cells[0]
    assert cell.execution_count is None  # the notebook is the paper profile's


def test_runs_of_several_notebooks_are_joined(tmp_path):
    new, goal = tmp_path / "new.jsonl", tmp_path / "runs.jsonl"
    goal.write_text('{"key": "b", "n": 1}\n{"key": "c", "n": 1}\n')
    new.write_text('{"key": "b", "n": 2}\n{"key": "a", "n": 2}\n')
    assert committed.join_lines(new, goal) == [{"key": "b", "n": 2}, {"key": "a", "n": 2}]
    assert goal.read_text() == '{"key": "a", "n": 2}\n{"key": "b", "n": 2}\n{"key": "c", "n": 1}\n'


@pytest.mark.parametrize("option", ["--profile smoke", "--model tiny-llama", "--dtype bfloat16"])
def test_update_is_refused_for_other_profiles_and_models(monkeypatch, option):
    monkeypatch.setenv("BACKATTN_DTYPE", "float32")  # as it was afterwards
    with pytest.raises(SystemExit, match="--update replaces committed results"):
        main(["--update", *option.split()])


def test_the_manifest_and_the_notebooks_are_as_the_runner_leaves_them():
    noted = committed.manifest()["results"]
    files = [*paths.DATA.rglob("*.safetensors"), *paths.DATA.glob("*.jsonl")]
    shipped = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert shipped == {name: entry["sha256"] for name, entry in noted.items()} and shipped
    for path in committed.notebooks():
        run = committed.took("paper")[path.stem]
        assert run["seconds"] > 0 and run["hardware"]
        notebook = nbformat.read(path, as_version=4)
        before = json.dumps(notebook)
        clean(notebook)
        assert json.dumps(notebook) == before, path.stem
