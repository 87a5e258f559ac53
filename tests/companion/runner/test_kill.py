"""Killed at random, and two at once: nothing lost, nothing half-written, nothing made twice."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest

RUNNER = """
import sys
from pathlib import Path
from companion import paths
from companion.runner.cli import main
paths.NOTEBOOKS, paths.BUILD = Path(sys.argv[1]) / "notebooks", Path(sys.argv[1]) / "build"
sys.exit(main(["--profile", "smoke"]))
"""
CELLS = [
    "n = 3",
    "import pathlib, time, numpy as np\nfrom backattn.files import atomic_file",
    "folder = pathlib.Path(FOLDER)\nfolder.mkdir(parents=True, exist_ok=True)\ntime.sleep(0.4)",
    "for k in range(n):\n    with atomic_file(folder / f'NAME_{k}.csv') as file:\n"
    "        numbers = np.random.default_rng(k).random(50_000).tolist()\n"
    "        file.write_text(str(numbers))\n    time.sleep(0.2)",
]


@pytest.fixture
def runner(tmp_path):
    """Starts the runner in a process of its own, on two small notebooks below a folder."""

    def start(name: str) -> subprocess.Popen:
        place = tmp_path / name
        (place / "notebooks").mkdir(parents=True, exist_ok=True)
        (place / "notebooks/profiles.yml").write_text("{smoke: {}, paper: {}}")
        for stem in ("01_first", "02_second"):
            folder = repr(str(place / "build/smoke"))
            cells = [c.replace("FOLDER", folder).replace("NAME", stem) for c in CELLS]
            notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
            nbformat.write(notebook, place / "notebooks" / f"{stem}.ipynb")
        command = [sys.executable, "-c", RUNNER, str(place)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, text=True, start_new_session=True, **pipes)

    return start


def products(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((place / "build/smoke").glob("0*.csv"))}


def test_a_run_killed_at_random_ends_as_if_it_had_not_been(runner, tmp_path):
    """Three times; benchmarks/kill_and_resume.py does it twenty times with the real notebooks."""
    begin = time.monotonic()
    whole = runner("whole")
    assert whole.wait(timeout=300) == 0, whole.stdout.read()
    took, draw = time.monotonic() - begin, np.random.default_rng(0)
    for _ in range(3):
        process = runner("killed")
        time.sleep(float(draw.uniform(0.3, 1.0)) * took)
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended by itself
            parent = psutil.Process(process.pid)
            for one in [*parent.children(recursive=True), parent]:
                one.kill()  # the kernel, too
        process.wait(timeout=60)
        for content in products(tmp_path / "killed").values():
            assert content.endswith(b"]")  # never half a file
    process = runner("killed")
    assert process.wait(timeout=300) == 0, process.stdout.read()
    assert products(tmp_path / "killed") == products(tmp_path / "whole")
    assert len(products(tmp_path / "whole")) == 6


def test_two_runs_at_once_make_everything_once(runner):
    first, second = runner("both"), runner("both")
    said = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert first.returncode == second.returncode == 0, said
    waited = [text for text in said if "waiting for it" in text]
    assert len(waited) == 1 and waited[0].count("skipped") == 2  # it found all done
