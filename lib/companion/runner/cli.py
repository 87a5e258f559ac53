"""The program behind run_all.sh: runs the notebooks, resumes, reports, checks."""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import nbformat

from backattn import runtime
from backattn.files import atomic_file, one_process
from backattn.runtime import CLUSTER, DTYPE, DTYPES
from companion import paths
from companion.questions.facts import TWO_HOP, place_of
from companion.runner import committed, site
from companion.runner.check import check
from companion.runner.execute import NotebookError
from companion.runner.fork import fork
from companion.runner.schedule import Job, cores, side_by_side

VERSIONED = ("torch", "transformers", "numpy", "pandas", "scipy", "matplotlib", "seaborn")
SWITCHES = {
    "--check": "run all tests and compare the committed results",
    "--html": "the committed notebooks as a static site, in build/html",
    "--lab": "JupyterLab, opened on notebook 00",
    "--list": "list the notebooks and what each takes",
    "--force": "run again what is done already",
    "--keep-going": "go on after a failed notebook",
    "--update": "replace what is committed: notebooks, figures, tables; with --profile full data/",
}


def select(found: list[Path], only: str | None, start: str | None, stop: str | None) -> list[Path]:
    """Notebooks chosen by --only 01[,03], --from 01, --to 03; ValueError when a word fits none."""
    names = [path.stem for path in found]

    def matching(word: str) -> list[str]:
        word = re.sub(r"^\d(?=[a-z]?$)", r"0\g<0>", word.strip())  # 2 is 02, 2b is 02b
        numbered = [name for name in names if name.split("_")[0] == word]
        return numbered or [name for name in names if word and name.startswith(word)] or unfit(word)

    def unfit(word: str) -> list:
        raise ValueError(f"No notebook fits {word!r}. There are: {', '.join(names)}.")

    wanted = names if only is None else [n for word in only.split(",") for n in matching(word)]
    first = names[0] if start is None else matching(start)[0]
    last = names[-1] if stop is None else matching(stop)[-1]
    chosen = [path for path in found if path.stem in wanted and first <= path.stem <= last]
    return chosen or unfit(f"--only {only} --from {start} --to {stop}")


def key_of(path: Path, profile: str, parameters: dict) -> str:
    """Hash of all that decides an outcome: cells, library, data, model, dtype, versions …"""
    cells = [(c.cell_type, c.source) for c in nbformat.read(path, as_version=4).cells]
    lib = [file for kind in ("*.py", "*.html") for file in (paths.ROOT / "lib").rglob(kind)]
    inputs = sorted([*lib, *paths.DATA.rglob("*.csv")])
    inputs += [*sorted(paths.DATA.glob("*.yml")), paths.DATA / "held_out.txt", place_of(TWO_HOP)]
    if profile != "full":  # which makes these results itself
        inputs += sorted([*paths.DATA.rglob("*.safetensors"), *paths.DATA.glob("*.jsonl")])
    files = [
        (file.name, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in inputs
        if "runner" not in file.parts and file.exists()  # how it is run changes no outcome
    ]
    versions = [sys.version, *((name, metadata.version(name)) for name in VERSIONED)]
    parts = [cells, profile, sorted(parameters.items()), files, versions]
    parts.append(os.environ.get(DTYPE, "float32"))
    if model := parameters.get("model_name"):
        from companion.runs.run import source_of  # slow to import

        parts.append(source_of(model))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def started_in() -> Path:
    """The folder in which the command was typed: run_all.sh notes it."""
    return Path(os.environ.get("BACKATTN_STARTED_IN") or Path.cwd()).resolve()


def resume(arguments: argparse.Namespace, path: Path) -> str:
    """The command that goes on from a notebook."""
    words = ["./run_all.sh" if started_in() == paths.ROOT else str(paths.ROOT / "run_all.sh")]
    for name, value in {**vars(arguments), "from": path.stem.split("_")[0]}.items():
        if value:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def run(arguments: argparse.Namespace, chosen: list[Path]) -> int:
    """Run notebooks; returns the exit status. A second run waits for the first."""
    with one_process(paths.run_folder(arguments.profile)):
        began, failed = time.monotonic(), []
        trains = arguments.profile == "full" and any(p.stem.startswith("03") for p in chosen)
        if arguments.model and trains:  # in a process of its own, which frees its memory
            command = [sys.executable, "-m", "companion.runs.launch", "--estimate"]
            command += ["--model", arguments.model, "--device", arguments.device or "cpu"]
            command += ["--dtype", os.environ.get(DTYPE, "float32")]
            print("Notebook 03's training runs:", flush=True)
            if subprocess.run(command, cwd=paths.ROOT).returncode:
                print("no estimate could be made (see above); going on without it", flush=True)
        wanted = [Wanted.of(path, arguments) for path in chosen]
        labels = [f"[{k}/{len(chosen)}] {path.stem}" for k, path in enumerate(chosen, 1)]
        named = dict(zip(chosen, labels, strict=True))

        def begun(job: Job) -> None:
            known = f"est {job.seconds:.0f} s" if job.seconds else "no estimate yet"
            print(f"{named[job.path]}  {known}", flush=True)

        jobs = [one.job for one in wanted if not one.done]
        workers = min(jobs_at_once(arguments), len(jobs) or 1)
        made = side_by_side(jobs, workers, begun, arguments.keep_going)
        for one, label in zip(wanted, labels, strict=True):
            if one.done:
                print(f"{label}  done before ({one.stamp['seconds']:.0f} s), skipped", flush=True)
                one.update(arguments)
        by_job = {id(one.job): (one, named[one.job.path]) for one in wanted}
        for job, outcome in made:
            one, label = by_job[id(job)]
            if isinstance(outcome, NotebookError):
                print(f"\n{outcome}\n    resume with:      {resume(arguments, job.path)}\n")
                failed.append(job.path.stem)
                continue
            one.keep(outcome, label if len(jobs) > 1 else "")
            one.update(arguments)
    ending = f"FAILED: {', '.join(failed)}" if failed else "All done"
    print(f"{ending} after {time.monotonic() - began:.0f} s.", flush=True)
    return int(bool(failed))


def jobs_at_once(arguments: argparse.Namespace) -> int:
    """How many notebooks run side by side: as asked, else as many as there are cores, and one
    where they train, which they do in separate processes, or share a device."""
    if arguments.jobs:
        return arguments.jobs
    alone = arguments.profile == "full" or arguments.device not in (None, "cpu")
    return 1 if alone else cores()


@dataclass
class Wanted:
    """A notebook that is asked for, and whether all that it makes is there."""

    job: Job
    key: str
    stamp_path: Path
    stamp: dict
    done: bool

    @classmethod
    def of(cls, path: Path, arguments: argparse.Namespace) -> "Wanted":
        profile, folder = arguments.profile, paths.run_folder(arguments.profile)
        options = {"model_name": arguments.model, "device": arguments.device}
        parameters = committed.profiles()[profile].get(path.stem, {})
        parameters |= {name: value for name, value in options.items() if value}
        key, stamp_path = key_of(path, profile, parameters), folder / "stamps" / f"{path.stem}.json"
        try:
            stamp = json.loads(stamp_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none has finished, or the stamp is damaged
            stamp = {"key": None, "written": [], "seconds": None}
        there = all((folder / name).exists() for name in stamp["written"])
        done = there and stamp["key"] == key and not arguments.force
        before = committed.took(profile).get(path.stem, {})
        seconds = stamp["seconds"] or before.get("seconds")
        target, megabytes = folder / "notebooks" / path.name, before.get("peak_megabytes")
        job = Job(path, target, profile, parameters, seconds, megabytes)
        return cls(job, key, stamp_path, stamp, done)

    def keep(self, took: dict, label: str) -> None:
        """Leave a stamp, and say what the notebook took."""
        self.stamp = {"key": self.key, **took}
        with atomic_file(self.stamp_path) as temporary:
            temporary.write_text(json.dumps(self.stamp, indent=1))
        note = f"took {took['seconds']:.0f} s, peak memory {took['peak_megabytes']} MB"
        where = f"wrote {len(took['written'])} files below {self.stamp_path.parents[1]}"
        print(f"{label or '     '} {note}, {where}", flush=True)

    def update(self, arguments: argparse.Namespace) -> None:
        if arguments.update:
            committed.update(self.job.path, self.job.profile, self.stamp)


def parser() -> argparse.ArgumentParser:
    """The command line of run_all.sh."""
    about = "Run every notebook: figures, tables and verdicts again."
    p = argparse.ArgumentParser(prog="run_all.sh", description=about)
    for name, text in SWITCHES.items():
        p.add_argument(name, action="store_true", help=text)
    p.add_argument("--profile", choices=committed.profiles(), default="paper", help="sizes")
    p.add_argument("--only", metavar="01,03", help="only these notebooks")
    p.add_argument("--from", metavar="NN", help="from this notebook on")
    p.add_argument("--to", metavar="NN", help="up to this notebook")
    p.add_argument("--model", metavar="NAME", help="another: a name, a hub id or a folder")
    p.add_argument("--device", metavar="D", help="cpu (default), cuda, …")
    p.add_argument("--dtype", choices=DTYPES, help="of the models; training is in bfloat16")
    p.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="notebooks side by side; default: cores, one in training or on a device",
    )
    workers = "train on a dask scheduler's workers, of one thread each, that see this folder"
    p.add_argument("--cluster", metavar="ADDRESS", help=workers)
    p.add_argument("--data", metavar="FILE", help="notebook 03's arms on questions of your own")
    p.add_argument("--fork", metavar="OWNER/NAME[@TAG]", help="badges and links for your fork")
    return p


def prepare(arguments: argparse.Namespace) -> list[Path]:
    """The chosen notebooks, when all that was asked for is there, else ValueError, or what torch
    raises for a device; tells the kernels by the environment."""
    start, stop = getattr(arguments, "from"), arguments.to
    chosen = select(committed.notebooks(), arguments.only, start, stop)
    for name, value in vars(arguments).items():
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"--{name} is empty.")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}: give a whole number of at least 1.")
    for name, value in ((CLUSTER, arguments.cluster), (DTYPE, arguments.dtype)):
        if value:
            os.environ[name] = value
    os.environ["BACKATTN_OUTPUT"] = str(paths.OUTPUT)
    dtype = runtime.dtype_name()
    if arguments.device not in (None, "auto"):
        import torch  # slow to import

        torch.empty(0, device=arguments.device)
    if arguments.model:
        from companion.runs.run import located  # slow to import

        arguments.model = located(arguments.model, started_in())
    other = arguments.model or arguments.device or dtype != "float32"
    if arguments.update and (other or arguments.profile == "smoke"):
        raise ValueError(
            "--update replaces committed results: use it with profile paper or full and the "
            "default model."
        )
    return chosen


def own_data(arguments: argparse.Namespace) -> int:
    """--data: the arms compared on a CSV of questions; raises ValueError for what is not one."""
    from companion.measures.compare import compare  # slow to import

    if arguments.only not in (None, "3", "03"):
        raise ValueError("--data is asked of notebook 03's arms: leave --only out, or give 03.")
    if arguments.cluster or arguments.update:
        raise ValueError(
            "--data trains on this machine and replaces nothing: no --cluster, --update."
        )
    file = (started_in() / Path(arguments.data).expanduser()).resolve()
    if not file.is_file():
        raise ValueError(f"--data: there is no file {file}.")
    prepare(arguments)
    model, device = arguments.model or "smollm2", arguments.device or "cpu"
    found = compare(file, model=model, device=device)
    for path in found.save(paths.BUILD / "own" / file.stem):
        table = getattr(found, path.stem)
        print(f"\n{path}\n{table.round(3).to_string(index=False) if len(table) else 'nothing'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; returns the exit status."""
    runtime.use_terminal()
    p = parser()
    arguments = p.parse_args(argv)
    if arguments.check:
        return check()
    if arguments.list:
        for path in committed.notebooks():
            took = committed.took("paper").get(path.stem)
            note = (
                "{seconds:.0f} s, {peak_megabytes} MB".format(**took) if took else "not timed yet"
            )
            print(f"{path.stem:28} paper profile: {note}")
        return 0
    if arguments.lab:
        command = [sys.executable, "-m", "jupyterlab", committed.notebooks()[0]]
        if os.geteuid() == 0:  # in a container; else it would not start
            command.append("--allow-root")
        return subprocess.call(command, cwd=paths.ROOT)
    if arguments.html:
        print(f"Open {site.build(paths.BUILD / 'html')}")
        return 0
    again = "What is finished is kept; run the same command again to go on."
    try:
        try:
            if arguments.fork is not None:
                changed = fork(arguments.fork)
                print(f"{len(changed)} files now say {arguments.fork}. Look at git diff, commit.")
                return 0
            if arguments.data is not None:
                return own_data(arguments)
            chosen = prepare(arguments)
        except (ValueError, RuntimeError, AssertionError) as error:  # torch's, for a device
            p.error(str(error).splitlines()[0])
        return run(arguments, chosen)
    except KeyboardInterrupt:
        print(f"\nStopped. {again}")
        return 130
    except OSError as error:  # a full disk, a folder that cannot be written: it says what to do
        print(f"\n{error}\n{again}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
