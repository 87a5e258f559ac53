"""The runner: what fails is reported as what it is, and what is done is not done again."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields

import nbformat
import pandas as pd
import pytest
import yaml

from companion import paths
from companion.measures.compare import Comparison
from companion.runner import committed
from companion.runner.cli import key_of, main, parser, select
from companion.runner.execute import KERNEL, clean, kernel_environment

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
    monkeypatch.setattr("companion.runner.cli.cores", lambda: 1)
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
    monkeypatch.setenv("BACKATTN_OUTPUT", str(paths.OUTPUT))  # as it is afterwards
    monkeypatch.setenv("PYTHONIOENCODING", ":replace")
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
    monkeypatch.setattr("companion.runner.schedule.execute", full)
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
    assert select(found, " 1, 03 ", None, None) == found[1:]
    parts = [*found[:2], place.write("01b_b", "n = 1"), found[2]]  # a notebook in two parts
    assert committed.notebooks() == parts
    assert select(parts, "1", None, None) == parts[1:2]
    assert select(parts, "1b", None, None) == select(parts, "01b_b", None, None) == parts[2:3]
    assert select(parts, None, "1b", None) == parts[2:]
    wrong = [(None, "07", None), (None, "03", "01"), (None, "", None), (None, None, " ")]
    for three in (*wrong, *((word, None, None) for word in ("01,07", "", " ", ",", "98,", "01,"))):
        with pytest.raises(ValueError, match="There are: 00_a, 01_b, 03_c"):
            select(found, *three)


def test_every_option_of_the_design_is_there(capsys):
    names = "check html profile only from to list force keep-going update model device dtype"
    assert all(f"--{name}" in parser().format_help() for name in [*names.split(), "cluster"])
    assert list(committed.profiles()) == ["smoke", "paper", "full"]
    assert main(["--list"]) == 0
    assert "01_stage_discovery" in capsys.readouterr().out


def test_own_questions_are_compared_where_notebook_03_would_run(place, capsys, monkeypatch):
    asked, tables = [], {f.name: pd.DataFrame({"arm": ["x"]}) for f in fields(Comparison)}

    def compare(file, **options):
        asked.append((file, options))
        return Comparison(**tables)

    monkeypatch.setattr("companion.measures.compare.compare", compare)
    monkeypatch.setenv("BACKATTN_STARTED_IN", str(place.root))
    place.write("03_good")
    (place.root / "my.csv").write_text("prompt,answer\n")
    assert run("--only", "03", "--data", "my.csv", "--model", "tiny-llama") == 0
    assert asked == [(place.root / "my.csv", {"model": "tiny-llama", "device": "cpu"})]
    shown = capsys.readouterr().out
    assert all((paths.BUILD / "own/my" / f"{name}.csv").exists() for name in tables)
    assert all(f"{name}.csv" in shown for name in tables)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("companion.measures.compare.compare", stopped)
    assert run("--data", "my.csv") == 130
    assert "What is finished is kept" in capsys.readouterr().out


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
    assert not (paths.DATA / "01").exists()
    assert (paths.DATA / "runs.jsonl").read_text() == '{"key": "a", "seconds": 5}\n'
    cell = nbformat.read(path, as_version=4).cells[0]
    assert cell.execution_count is None  # the notebook is the paper profile's


def test_runs_of_several_notebooks_are_joined(tmp_path):
    new, goal = tmp_path / "new.jsonl", tmp_path / "runs.jsonl"
    goal.write_text('{"key": "b", "n": 1}\n{"key": "c", "n": 1}\n')
    new.write_text('{"key": "b", "n": 2}\n{"key": "a", "n": 2}\n')
    committed.join_lines(new, goal)
    assert goal.read_text() == '{"key": "a", "n": 2}\n{"key": "b", "n": 2}\n{"key": "c", "n": 1}\n'


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", ""], "No notebook fits ''. There are: 01_good"),
        (["--only", "98,"], "No notebook fits '98'"),
        (["--from", ""], "No notebook fits ''"),
        (["--model", ""], "--model is empty"),
        (["--model", "./nothing"], "'./nothing' is no folder with a model"),
        (["--model", "empty"], "'empty' is no folder with a model"),
        (["--device", "gpu"], "gpu"),
        (["--device", "cuda:99"], "CUDA"),
        (["--cluster", ""], "--cluster is empty"),
        (["--dtype", "float8"], "invalid choice"),
        (["--data", "my.csv"], "there is no file"),
        (["--data", "my.csv", "--only", "05"], "--data is asked of notebook 03's arms"),
        (["--data", "empty.csv", "--cluster", "tcp://x:1"], "no --cluster"),
        (["--data", "empty.csv"], "empty.csv lacks column 'prompt'"),
        (["--fork", "me"], "give owner/name"),
    ],
)
def test_a_wrong_wish_is_a_usage_error_before_any_work(place, capsys, monkeypatch, options, said):
    place.write("01_good")
    (place.root / "empty").mkdir()
    (place.root / "empty.csv").touch()
    monkeypatch.setenv("BACKATTN_STARTED_IN", str(place.root))
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and said in shown.err and "usage: run_all.sh" in shown.err
    assert not shown.out and not place.build.exists()


def test_what_to_type_next_repeats_every_wish(place, capsys, folder, monkeypatch):
    place.write("01_good", "model_name, device = 'smollm2', 'cpu'")
    place.write("02_bad", "model_name, device = 'smollm2', 'cpu'", "1 / 0")
    monkeypatch.setenv("BACKATTN_STARTED_IN", str(folder.parent))
    monkeypatch.setenv("BACKATTN_DTYPE", "float32")  # as it is afterwards
    monkeypatch.setenv("BACKATTN_CLUSTER", "")
    (folder.parent / "my model").symlink_to(folder)
    wishes = ["--model", "my model", "--device", "cpu", "--dtype", "bfloat16", "--only", "1,2"]
    wishes += ["--cluster", "tcp://a:1", "--to", "02", "--force", "--keep-going"]
    assert run(*wishes) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "resume with" in line]
    program, *words = shlex.split(line.partition(":")[2])
    assert program == str(paths.ROOT / "run_all.sh")  # it was typed elsewhere
    again, first = (vars(parser().parse_args(w)) for w in (words, ["--profile", "smoke", *wishes]))
    assert again == first | {"model": str(folder), "from": "02"}


def test_another_model_dtype_or_device_is_another_outcome(place, folder, monkeypatch):
    path, weights = place.write("01_good"), folder / "model.safetensors"
    wish = {"model_name": str(folder), "device": "cpu"}
    changes = [
        lambda: weights.write_bytes(weights.read_bytes()[:-1] + b"!"),  # of the same size
        lambda: (folder / "tokenizer.json").write_text("{}"),
        lambda: (folder / "config.json").write_text("{}"),
        lambda: (folder / "chat_template.jinja").write_text("new"),
        lambda: monkeypatch.setenv("BACKATTN_DTYPE", "bfloat16"),
        lambda: wish.update(device="cuda"),
        lambda: wish.update(model_name="smollm2"),
        lambda: (place.root / "data/twohop").mkdir(parents=True),
        lambda: (place.root / "data/twohop/two_hop.csv").write_text("other"),
    ]
    monkeypatch.setenv("BACKATTN_DTYPE", "float32")
    monkeypatch.setenv("BACKATTN_DATASETS", str(place.root / "data"))
    keys = [key_of(path, "smoke", wish)]
    for change in changes:
        change()
        keys.append(key_of(path, "smoke", wish))
        assert key_of(path, "smoke", wish) == keys[-1]
    assert len(set(keys)) == len(keys) - 1  # an empty folder changes nothing
    monkeypatch.delenv("BACKATTN_DTYPE")
    before = key_of(path, "smoke", wish)
    monkeypatch.setenv("BACKATTN_DTYPE", "float32")
    assert key_of(path, "smoke", wish) == before  # said or not


@pytest.mark.parametrize("where", ["JUPYTER_PATH", "JUPYTER_DATA_DIR"])
def test_notebooks_run_in_the_runners_own_interpreter(place, tmp_path, monkeypatch, where):
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (tmp_path / "jupyter/kernels/python3").mkdir(parents=True)
    (tmp_path / "jupyter/kernels/python3/kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv(where, str(tmp_path / "jupyter"))
    (tmp_path / "ipython/profile_default/startup").mkdir(parents=True)
    (tmp_path / "ipython/profile_default/startup/00.py").write_text("import os; os._exit(1)")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    say = "import sys\n(folder / 'made.txt').write_text(sys.executable)"
    path = place.write("01_good", "n = 3", say + "\nprint(sys.executable)")
    assert run() == 0 and (place.build / "made.txt").read_text() == sys.executable
    notebook = nbformat.read(path, as_version=4)  # and so does nbval, which --check calls
    notebook.metadata = {"kernelspec": KERNEL}
    notebook.cells[1].metadata["tags"] = ["nbval-check-output"]
    notebook.cells[0].execution_count, notebook.cells[1].execution_count = 1, 2
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text=f"{sys.executable}\n")]
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax"]
    environment = {**os.environ, **kernel_environment()}
    done = subprocess.run([*command, str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("option", ["--profile smoke", "--model tiny-llama", "--dtype bfloat16"])
def test_update_is_refused_for_other_profiles_and_models(monkeypatch, capsys, option):
    monkeypatch.setenv("BACKATTN_DTYPE", "float32")  # as it was afterwards
    with pytest.raises(SystemExit):
        main(["--update", *option.split()])
    assert "--update replaces committed results" in capsys.readouterr().err


def test_the_manifest_and_the_notebooks_are_as_the_runner_leaves_them():
    noted = committed.manifest()["results"]
    files = [*paths.DATA.rglob("*.safetensors"), *paths.DATA.glob("*.jsonl")]
    files.append(paths.DATA / "03_second_turns.csv")
    names = [path.relative_to(paths.DATA).as_posix() for path in files]
    names = [name if name.startswith("models/") else name.split("/")[-1] for name in names]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    shipped = dict(zip(names, hashes, strict=True))
    assert shipped == {name: entry["sha256"] for name, entry in noted.items()} and shipped
    for path in committed.notebooks():
        run = committed.took("paper")[path.stem]
        assert run["seconds"] > 0 and run["hardware"]
        notebook = nbformat.read(path, as_version=4)
        before = json.dumps(notebook)
        clean(notebook)
        assert json.dumps(notebook) == before, path.stem


def test_lab_opens_the_first_notebook(monkeypatch):
    called = []
    monkeypatch.setattr(subprocess, "call", lambda command, **_: called.append(command) or 0)
    assert main(["--lab"]) == 0
    command = [sys.executable, "-m", "jupyterlab", committed.notebooks()[0]]
    assert called[-1][: len(command)] == command
    for user, more in ((0, ["--allow-root"]), (1000, [])):  # it does not start for root else
        monkeypatch.setattr("os.geteuid", lambda user=user: user)
        assert main(["--lab"]) == 0 and called[-1] == command + more
    done = subprocess.run([*called[0][:3], "--version"], capture_output=True, check=True)
    assert done.stdout.startswith(b"4.")
