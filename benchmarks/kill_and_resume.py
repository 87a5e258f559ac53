"""Reliability: `./run_all.sh` killed at random moments, again and again, ends where an undisturbed
run ends.

    python benchmarks/kill_and_resume.py --kills 20 --only 00,03

Two runs of the smoke profile into folders of their own: one is left alone, the other is killed
(SIGKILL, with all its processes) so many times before it may end. Then every table and every
figure's numbers are compared cell by cell, but for measured times.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from companion import paths

TIMES = ("timed", "seconds")  # columns that are measured begin with these


def start(only: str, output: Path) -> subprocess.Popen:
    environment = {**os.environ, "BACKATTN_OUTPUT": str(output)}
    command = [str(paths.ROOT / "run_all.sh"), "--profile", "smoke", "--only", only]
    log = (output / "log.txt").open("a")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def place(folder: Path, name: str) -> Path:
    """An output folder with the models that were fetched before."""
    (folder / name).mkdir()
    (folder / name / ".cache").symlink_to(paths.CACHE)
    return folder / name


def numbers(output: Path) -> dict[str, str]:
    """Every table and sidecar, without what is measured."""
    found = {}
    for path in sorted((output / "build" / "smoke" / "figures").rglob("*.csv")):
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        found[str(path.relative_to(output))] = frame[
            [name for name in frame if not name.startswith(TIMES)]
        ].to_csv(index=False)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--only", default="00,03", help="which notebooks")
    p.add_argument("--seed", type=int, default=0)
    arguments = p.parse_args()
    folder, draw = Path(tempfile.mkdtemp()), np.random.default_rng(arguments.seed)
    calm, harried = place(folder, "calm"), place(folder, "harried")
    begin = time.monotonic()
    if start(arguments.only, calm).wait():
        raise SystemExit(f"The undisturbed run failed: {calm / 'log.txt'}")
    took, killed, half = time.monotonic() - begin, 0, 0
    for _ in range(arguments.kills):
        process = start(arguments.only, harried)
        time.sleep(float(draw.uniform(0.02, 0.6)) * took)
        killed += process.poll() is None
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [
                *psutil.Process(process.pid).children(recursive=True),
                psutil.Process(process.pid),
            ]:
                one.kill()  # the kernel, too
        process.wait()
        for path in (harried / "build").rglob("[!.]*.csv"):
            try:
                half += pd.read_csv(path).empty
            except (ValueError, OSError):
                half += 1
    if start(arguments.only, harried).wait():
        raise SystemExit(f"The run that was killed did not end well: {harried / 'log.txt'}")
    one, other = numbers(calm), numbers(harried)
    differ = sorted({*one, *other} - {name for name in one if one[name] == other.get(name)})
    rows = [
        ("notebooks, smoke profile", arguments.only),
        ("seconds, left alone", round(took)),
        ("killed while running", f"{killed} of {arguments.kills} times"),
        ("half-written tables found after a kill", half),
        ("tables and figures' numbers compared", len(one)),
        ("of them different at the end", len(differ)),
    ]
    print(pd.DataFrame(rows, columns=["figure", "value"]).to_markdown(index=False))
    print(*differ, sep="\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
