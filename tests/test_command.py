"""run_all.sh itself: one meaning, wherever it is typed and whatever the terminal."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from companion import paths

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository whose two notebooks take no time; 02 fails."""
    root = tmp_path_factory.mktemp("place") / "the checkout"
    skip = shutil.ignore_patterns(".*", "build", "figures", "*.ipynb", "checkpoints", "*.jsonl")
    shutil.copytree(paths.ROOT, root, ignore=skip)
    start = "import os, sys\nfrom pathlib import Path\nfrom companion import paths"
    report = "out = paths.run_folder('smoke')\nout.mkdir(parents=True, exist_ok=True)\n"
    report += "(out / 'made.txt').write_text(f'{model_name} {paths.OUTPUT}')"
    for stem, cell in (("01_good", report), ("02_bad", "raise ValueError('no … 山 here')")):
        cells = [nbformat.v4.new_code_cell(x) for x in ("model_name = 'none'", start, cell)]
        cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), root / f"notebooks/{stem}.ipynb")
    (root / "notebooks/profiles.yml").write_text("{smoke: {}, paper: {}, full: {}}")
    for name in ("cmd", "cmd/deep", "elsewhere", "models", "models/own"):
        (root.parent / name).mkdir()
    (root.parent / "models/own/config.json").write_text("{}")
    (root.parent / "cmd/run").symlink_to("../the checkout/run_all.sh")
    (root.parent / "cmd/deep/again").symlink_to("../run")
    (root.parent / "linked").symlink_to(root)
    (root.parent / "elsewhere/the checkout").mkdir()  # CDPATH would lead here
    return root


def run(checkout: Path, where: str, command: str, *options: str, **environment: str):
    place = checkout.parent
    paths_to = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(checkout / "lib")}
    environment = {**os.environ, "BACKATTN_OUTPUT": "", **paths_to, **environment}
    how = {"cwd": place / where, "env": environment, "capture_output": True}
    done = subprocess.run([command, "--profile", "smoke", *options], **how)
    assert not list(place.rglob(".venv")), done.stderr
    return done


@pytest.mark.parametrize(
    ("where", "command"),
    [
        ("the checkout", "./run_all.sh"),
        (".", "the checkout/run_all.sh"),
        ("linked", "./run_all.sh"),
        ("elsewhere", "../cmd/deep/again"),
    ],
)
def test_it_means_the_same_from_everywhere(checkout, where, command):
    model = os.path.relpath(checkout.parent / "models/own", (checkout.parent / where).resolve())
    shutil.rmtree(checkout / "results", ignore_errors=True)
    places = {"CDPATH": f"{checkout.parent / 'elsewhere'}:/", "BACKATTN_OUTPUT": "results"}
    done = run(checkout, where, command, "--only", "1", "--model", model, **places)
    assert done.returncode == 0, done.stdout + done.stderr
    made = (checkout / "results/build/smoke/made.txt").read_text()
    assert made == f"{checkout.parent / 'models/own'} {checkout / 'results'}"
    assert [path.name for path in checkout.parent.rglob("results")] == ["results"]


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize(
    ("options", "terminal"),
    [
        (["--help"], ASCII),
        (["--only", "山"], ASCII),
        (["--only", "2"], ASCII),
        (["--only", "2"], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        (["--help"], {"PYTHONIOENCODING": "latin-1:strict"}),
    ],
)
def test_a_terminal_without_these_letters_gets_no_traceback(checkout, options, terminal):
    done = run(checkout, ".", "linked/run_all.sh", *options, **terminal)
    assert done.returncode == {"山": 2, "2": 1}.get(options[-1], 0), done.stderr
    said = (done.stdout + done.stderr).decode("latin-1")
    assert "UnicodeEncodeError" not in said and "Traceback (most" not in done.stderr.decode(
        "latin-1"
    )
    assert said.count("?") >= (options[-1] in ("--help", "2"))


def test_datasets_of_others_are_looked_for_from_the_repository(checkout):
    program = "from companion.questions.facts import TWO_HOP, place_of; print(place_of(TWO_HOP))"
    for folder in ("own data", str(checkout / "own data")):
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout / "lib"),
            "BACKATTN_DATASETS": folder,
        }
        how = {"env": environment, "capture_output": True, "text": True, "cwd": "/"}
        said = subprocess.run([sys.executable, "-c", program], **how).stdout.strip()
        assert said == str(checkout / "own data/twohop/two_hop.csv")
