"""Checking what is committed."""

import os
import shutil
import subprocess
import sys
import time

import psutil

from backattn.files import one_process
from backattn.runtime import DTYPE, PROFILE
from companion import paths
from companion.report import tables
from companion.runner import committed, words
from companion.runner.execute import kernel_environment
from companion.runner.schedule import cores


def check() -> int:
    """Lint, tests, committed notebooks run again, their numbers compared, and what is hard to read
    listed; returns the status."""
    folder, results = paths.run_folder("check"), {}
    environment = {**os.environ, PROFILE: "check", "PYTHONHASHSEED": "0"}
    environment |= kernel_environment()
    for name in ("MPLBACKEND", DTYPE):
        environment.pop(name, None)
    with one_process(folder):
        shutil.rmtree(folder, ignore_errors=True)
        for name, command in _steps().items():
            print(f"== {name}", flush=True)
            begin = time.monotonic()
            done = subprocess.run(command, cwd=paths.ROOT, env=environment)
            results[name] = (done.returncode == 0, time.monotonic() - begin)
        print("== numbers", flush=True)
        begin, problems = time.monotonic(), tables.compare(folder / "figures", paths.FIGURES)
        results["numbers"] = (not problems, time.monotonic() - begin)
    print(*(f"changed: {problem}" for problem in problems), "== to be read, no failure", sep="\n")
    print(*words.outliers(), "== summary", sep="\n")
    for name, (passed, seconds) in results.items():
        print(f"{'passed' if passed else 'FAILED':7} {name} ({seconds:.0f} s)")
    return 0 if all(passed for passed, _ in results.values()) else 1


def _steps() -> dict[str, list[str]]:
    python, took = [sys.executable, "-m"], committed.took("paper")
    room = cores() >= 2 and psutil.virtual_memory().available > 6 * 2**30  # for two notebooks
    print("two files at a time" if room else "one file at a time: little memory, or one core")
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider"]
    pytest += ["-n", "2", "--dist", "loadfile"] if room else []
    longest_first = sorted(  # so that they end together
        committed.notebooks(), key=lambda path: -took.get(path.stem, {}).get("seconds", 0)
    )
    nbval = ["--no-loadscope-reorder", "--nbval-lax", "--nbval-cell-timeout=1200"]
    return {
        "lint": [*python, "ruff", "check", "."],
        "format": [*python, "ruff", "format", "--check", "."],
        "unit tests, examples and guards": [*pytest, "--doctest-modules", "tests", "lib/backattn"],
        "committed notebooks": [*pytest, *nbval, *map(str, longest_first)],
    }
