"""Checking what is committed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from backattn.files import one_process
from backattn.runtime import DTYPE, PROFILE
from companion import paths
from companion.report import tables


def notebooks(folder: Path = paths.NOTEBOOKS) -> list[Path]:
    """The numbered notebooks, in order, then the demo."""
    return [*sorted(folder.glob("[0-9][0-9]_*.ipynb")), *sorted(folder.glob("demo_*.ipynb"))]


def _manifest() -> dict:
    path = paths.DATA / "MANIFEST.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _side_by_side() -> list[str]:
    """Options of pytest that check two files at a time, where there are cores and memory for two notebooks."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    room = cores >= 2 and psutil.virtual_memory().available > 6 * 2**30
    print(
        "two files at a time"
        if room
        else "one file at a time: fewer than two cores, or less than 6 GiB free"
    )
    return ["-n", "2", "--dist", "loadfile"] if room else []


def check() -> int:
    """Lint, unit tests and guards, the committed notebooks re-run cell by cell, and their numbers compared."""
    with one_process(paths.run_folder("check")):
        return _check()


def _check() -> int:
    folder = paths.run_folder("check")
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, PROFILE: "check", "PYTHONHASHSEED": "0"}
    for name in ("MPLBACKEND", DTYPE):
        environment.pop(name, None)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_side_by_side()]
    took = _manifest().get("runs", {}).get("paper", {})
    longest = sorted(
        notebooks(), key=lambda path: -took.get(path.stem, {}).get("seconds", 0)
    )  # first, to end together
    nbval = [
        *pytest,
        "--no-loadscope-reorder",
        "--nbval-lax",
        "--nbval-cell-timeout=1200",
        *map(str, longest),
    ]
    steps: list[tuple[str, list[str]]] = [
        ("lint", [sys.executable, "-m", "ruff", "check", "."]),
        ("format", [sys.executable, "-m", "ruff", "format", "--check", "."]),
        ("unit tests and guards", [*pytest, "tests"]),
        ("committed notebooks", nbval),
    ]
    results = {}
    for name, command in steps:
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        passed = subprocess.run(command, cwd=paths.ROOT, env=environment).returncode == 0
        results[name] = (passed, time.monotonic() - begin)
    print("== numbers", flush=True)
    begin, problems = time.monotonic(), tables.compare(folder / "figures", paths.FIGURES)
    for problem in problems:
        print(f"changed: {problem}", flush=True)
    results["numbers"] = (not problems, time.monotonic() - begin)
    print("== summary")
    for name, (passed, seconds) in results.items():
        print(f"{'passed' if passed else 'FAILED':7} {name} ({seconds:.0f} s)")
    return 0 if all(passed for passed, _ in results.values()) else 1
