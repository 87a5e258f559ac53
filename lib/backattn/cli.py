"""The program behind run_all.sh: runs the notebooks, resumes, reports, checks."""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import nbformat
import pandas as pd
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from . import paths, site, tables
from .runtime import CLUSTER, DTYPE, DTYPES, PROFILE, PROGRESS_FILE, atomic_file, hardware, one_process

# Sizes only: one code path for all profiles. What is not named here keeps the notebook's own value.
PROFILES: dict[str, dict[str, dict]] = {
    "smoke": {
        "01_stage_discovery": {"asked_per_relation": 16, "kept_per_relation": 6, "tested": 8, "knockout_draws": 2},
        "02_failure_analysis": {
            "asked_per_pair": 20,
            "read_prompts": 40,
            "flow_prompts": 24,
            "hidden_prompts": 24,
            "grid_prompts": 24,
            "grid_recomputed": 2,
        },
        "03_back_attention_training": {"rechecked": 6, "demo_steps": 40},
        "04_layer_ablation": {"made_again": []},
        "05_what_it_reads": {"read_for": 24, "hidden_for": 8},
        "07_controls": {"asked_for": 24, "second_asked_for": 12, "unknown_for": 100},
        "08_beyond_facts_and_cost": {
            "flow_prompts": 16,
            "scratch_prompts": 40,
            "tested": 6,
            "knockout_draws": 2,
            "cost_layers": [6],
            "contexts": [16],
            "answered_for": 4,
        },
    },
    "paper": {},
    "full": {
        "01_stage_discovery": {"kept_per_relation": 100, "tested": 400, "knockout_draws": 29},
        "02_failure_analysis": {"grid_recomputed": 1000},
        "03_back_attention_training": {"retrain": True, "processes": 2},
        "04_layer_ablation": {"retrain": True, "processes": 2},
        "06_capacity": {"retrain": True, "processes": 2},
        "07_controls": {"retrain": True, "processes": 2},
        "08_beyond_facts_and_cost": {"retrain": True, "processes": 2},
    },
}
VERSIONED = ("torch", "transformers", "numpy", "pandas", "scipy", "matplotlib", "seaborn")


# ---------------------------------------------------------------- what there is


def notebooks(folder: Path = paths.NOTEBOOKS) -> list[Path]:
    """The numbered notebooks, in order, then the demo."""
    return [*sorted(folder.glob("[0-9][0-9]_*.ipynb")), *sorted(folder.glob("demo_*.ipynb"))]


def select(found: list[Path], only: str | None, start: str | None, stop: str | None) -> list[Path]:
    """Notebooks chosen by --only 01[,03], --from 01, --to 03; raises SystemExit when a number or name fits none."""
    names = [path.stem for path in found]

    def matching(word: str) -> list[str]:
        fits = [name for name in names if name.startswith(word.zfill(2) if word.isdigit() else word)]
        if not fits:
            raise SystemExit(f"No notebook fits {word!r}. There are: {', '.join(names)}.")
        return fits

    wanted = {name for word in only.split(",") for name in matching(word)} if only else set(names)
    first, last = matching(start)[0] if start else names[0], matching(stop)[-1] if stop else names[-1]
    chosen = [path for path in found if path.stem in wanted and first <= path.stem <= last]
    if not chosen:
        raise SystemExit(f"No notebook fits. There are: {', '.join(names)}.")
    return chosen


def key_of(path: Path, profile: str, parameters: dict) -> str:
    """Hash of all that decides a notebook's outcome: its cells, the library, the data, the profile, the versions."""
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        for part in parts:
            digest.update(repr(part).encode())

    cells = nbformat.read(path, as_version=4).cells
    add([(cell.cell_type, cell.source) for cell in cells], profile, sorted(parameters.items()), os.environ.get(DTYPE))
    inputs = [*sorted(Path(__file__).parent.glob("*.py")), *sorted(paths.DATA.rglob("*.csv"))]
    if profile != "full":  # which makes these results itself
        inputs += sorted([*paths.DATA.rglob("*.safetensors"), *paths.DATA.glob("*.jsonl")])
    for file in inputs:
        if file.name != "cli.py":  # how it is run does not change what comes out
            add(file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    add([(name, metadata.version(name)) for name in VERSIONED])
    return digest.hexdigest()


# ---------------------------------------------------------------- running one notebook


@dataclass
class Outcome:
    """How one notebook ended."""

    seconds: float
    peak_megabytes: int
    written: list[str]
    error: str | None = None


@dataclass
class Watch:
    """Polls a running notebook: the peak memory of its kernel, and the progress line to show."""

    progress_file: Path
    show: Callable[[str], None]
    peak: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator["Watch"]:
        thread = threading.Thread(target=self._poll, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    def _poll(self) -> None:
        shown, shown_at, interval = "", time.monotonic(), 0.2 if sys.stdout.isatty() else 20.0
        while not self._stop.wait(0.2):
            total = 0
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += child.memory_info().rss
            self.peak = max(self.peak, total)
            line = _last_progress(self.progress_file)
            if line and line != shown and time.monotonic() - shown_at >= interval:
                self.show(line)
                shown, shown_at = line, time.monotonic()


def _last_progress(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().rpartition("\n")[2]
    return ""


def execute(path: Path, target: Path, profile: str, parameters: dict, say: Callable[[str], None] = print) -> Outcome:
    """Run a notebook from its clean source into `target`, which appears only when all cells succeeded.

    A failed run leaves its partial notebook as `<name>.partial.ipynb` beside it. The report names the failing cell,
    a short traceback and the command to resume; a dead kernel is called that.
    """
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook = load_notebook_node(str(path))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    if parameters:
        notebook = parameterize_notebook(notebook, parameters, kernel_name="python3", language="python")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial.ipynb")
    bar = target.with_suffix(".progress")
    folder = paths.run_folder(profile)
    before = _files(folder)
    headings: dict[int, str] = _headings(notebook)
    position = {"cell": 0}

    def starting(cell, cell_index: int) -> None:
        position["cell"] = cell_index
        if cell_index in headings:
            say(f"      {headings[cell_index]}")

    def finished(cell, cell_index: int, **_) -> None:
        with atomic_file(partial) as temporary:
            nbformat.write(notebook, temporary)

    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(paths.NOTEBOOKS)}},
        on_cell_start=starting,
        on_cell_executed=finished,
    )
    environment = {**os.environ, PROFILE: profile, PROGRESS_FILE: str(bar), "PYTHONHASHSEED": "0"}
    environment.pop("MPLBACKEND", None)  # Agg would silently remove every inline figure
    watch, error, begin = Watch(bar, lambda line: say(f"        {line}")), None, time.monotonic()
    try:
        with watch.running():
            client.execute(env=environment)
    except DeadKernelError:
        error = _report(path, notebook, position["cell"], partial, profile, _dead_kernel(watch.peak))
    except CellExecutionError as failure:
        error = _report(path, notebook, position["cell"], partial, profile, _short(str(failure.traceback)))
    finally:
        bar.unlink(missing_ok=True)
    if error:
        nbformat.write(notebook, partial)
    else:
        _clean(notebook)
        with atomic_file(target) as temporary:
            nbformat.write(notebook, temporary)
        partial.unlink(missing_ok=True)
    after = _files(folder)
    written = sorted(str(p.relative_to(folder)) for p, stamp in after.items() if before.get(p) != stamp)
    return Outcome(time.monotonic() - begin, watch.peak // 2**20, [w for w in written if ".partial" not in w], error)


def _files(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.parent.name != "stamps"}


def _headings(notebook) -> dict[int, str]:
    """Code cell index → the Markdown heading above it, first code cell of each section only."""
    found, waiting = {}, None
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            titles = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")]
            waiting = titles[-1] if titles else waiting
        elif waiting:
            found[index], waiting = waiting, None
    return found


def _clean(notebook) -> None:
    """Keep sources, outputs, counts, ids and tags; drop everything that differs between two equal runs."""
    language = notebook.metadata.get("language_info", {}).get("name", "python")
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": language},
        }
    )
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output["metadata"] = nbformat.from_dict({})


def _short(text: str, lines: int = 12) -> str:
    import re

    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return "\n".join(plain.strip().splitlines()[-lines:])


def _dead_kernel(peak: int) -> str:
    return (
        f"The kernel died (peak memory {peak // 2**20} MB). Most often the machine ran out of memory: close other "
        "programs, or use --profile smoke or a smaller model."
    )


def _report(path: Path, notebook, index: int, partial: Path, profile: str, reason: str) -> str:
    source = "\n".join(f"    | {line}" for line in notebook.cells[index].source.splitlines())
    return (
        f"FAILED {path.name}, cell {index}:\n{source}\n\n"
        + "\n".join(f"    {line}" for line in reason.splitlines())
        + f"\n\n    partial notebook: {partial}\n    resume with:      "
        f"./run_all.sh --profile {profile} --from {path.stem[:2]}"
    )


# ---------------------------------------------------------------- running all


def _manifest() -> dict:
    path = paths.DATA / "MANIFEST.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen notebooks of a profile; returns the exit status. A second run waits for the first to end."""
    with one_process(paths.run_folder(arguments.profile)):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    profile, folder = arguments.profile, paths.run_folder(arguments.profile)
    chosen = select(notebooks(), arguments.only, arguments.start, arguments.stop)
    failed, began = [], time.monotonic()
    if arguments.model and profile == "full" and any(path.stem.startswith("03") for path in chosen):
        _estimate(arguments)
    for number, path in enumerate(chosen, 1):
        parameters = dict(PROFILES[profile].get(path.stem, {}))
        for name, value in (("model_name", arguments.model), ("device", arguments.device)):
            if value:
                parameters[name] = value
        key, stamp_path = key_of(path, profile, parameters), folder / "stamps" / f"{path.stem}.json"
        stamp = _read_stamp(stamp_path)
        label = f"[{number}/{len(chosen)}] {path.stem}"
        if not arguments.force and stamp.get("key") == key and all((folder / f).exists() for f in stamp["written"]):
            print(f"{label}  done before ({stamp['seconds']:.0f} s), skipped", flush=True)
            if arguments.update:
                _update(path, folder / "notebooks" / path.name, folder, profile, stamp)
            continue
        estimate = stamp.get("seconds") or _manifest().get("runs", {}).get(profile, {}).get(path.stem, {}).get(
            "seconds"
        )
        print(f"{label}  {f'est {estimate:.0f} s' if estimate else 'no estimate yet'}", flush=True)
        target = folder / "notebooks" / path.name
        outcome = execute(path, target, profile, parameters, say=lambda line: print(line, flush=True))
        if outcome.error:
            failed.append(path.stem)
            print(f"\n{outcome.error}\n", flush=True)
            if not arguments.keep_going:
                break
            continue
        stamp = {"key": key, "written": outcome.written, "seconds": round(outcome.seconds, 1)}
        stamp["peak_megabytes"] = outcome.peak_megabytes
        with atomic_file(stamp_path) as temporary:
            temporary.write_text(json.dumps(stamp, indent=1))
        print(
            f"      took {outcome.seconds:.0f} s, peak memory {outcome.peak_megabytes} MB, "
            f"wrote {len(outcome.written)} files below {folder}",
            flush=True,
        )
        if arguments.update:
            _update(path, target, folder, profile, stamp)
    print(
        f"{'FAILED: ' + ', '.join(failed) if failed else 'All done'} after {time.monotonic() - began:.0f} s.",
        flush=True,
    )
    return 1 if failed else 0


def _estimate(arguments: argparse.Namespace) -> None:
    """Say what notebook 03's training takes on another model, from a process that leaves no memory taken."""
    command = [sys.executable, "-m", "backattn.launch", "--estimate", "--model", arguments.model]
    command += ["--dtype", os.environ.get(DTYPE, "float32"), "--device", arguments.device or "cpu"]
    print("Notebook 03's training runs:", flush=True)
    if subprocess.run(command, cwd=paths.ROOT).returncode:
        print("no estimate could be made (see above); going on without it", flush=True)


def _read_stamp(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _update(path: Path, target: Path, folder: Path, profile: str, stamp: dict) -> None:
    """Replace what is committed by this run's, and note what the run took.

    The paper profile replaces the notebook, its figures and its tables, the full profile the results in data/ that it
    alone makes whole.
    """
    replaces = {"paper": ("figures/", paths.FIGURES), "full": ("data/", paths.DATA)}[profile]
    manifest = _manifest()
    for name in stamp["written"]:
        if name.startswith(replaces[0]):
            goal = replaces[1] / Path(name).relative_to(replaces[0])
            if goal.suffix == ".jsonl":  # runs of several notebooks, a file each, join those that are there
                goal = paths.DATA / goal.name
                _join_lines(folder / name, goal)
            else:
                goal.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, goal)
            if profile == "full":
                digest = hashlib.sha256(goal.read_bytes()).hexdigest()
                manifest.setdefault("results", {})[goal.name] = {
                    "sha256": digest,
                    "made by": path.stem,
                    "hardware": hardware(),
                }
    if profile == "paper":
        shutil.copyfile(target, path)
    took = {name: stamp[name] for name in ("seconds", "peak_megabytes")}
    made = [name for name in stamp["written"] if name.endswith(".jsonl") and profile == "full"]
    for name in made:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        took["training_seconds"] = round(sum(json.loads(line).get("seconds", 0) for line in lines))
    manifest.setdefault("runs", {}).setdefault(profile, {})[path.stem] = {**took, "hardware": hardware()}
    with atomic_file(paths.DATA / "MANIFEST.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if profile == "paper":
        with atomic_file(paths.FIGURES / "README.md") as temporary:
            temporary.write_text(figure_index(), encoding="utf-8")


def figure_index() -> str:
    """What figures/README.md says of the committed notebooks and ledger."""
    return tables.figure_index(notebooks(), pd.read_csv(paths.FIGURES / "tables" / "claims.csv"))


def _join_lines(new: Path, goal: Path) -> None:
    """Put the lines of one file of keyed results into another, in place of those with the same keys."""
    files = [path for path in (goal, new) if path.exists()]
    lines = {json.loads(line)["key"]: line for path in files for line in path.read_text("utf-8").splitlines()}
    with atomic_file(goal) as temporary:
        temporary.write_text("".join(f"{lines[key]}\n" for key in sorted(lines)), encoding="utf-8")


# ---------------------------------------------------------------- checking


def _side_by_side() -> list[str]:
    """Options of pytest that check two files at a time, where there are cores and memory for two notebooks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = cores >= 2 and psutil.virtual_memory().available > 6 * 2**30
    print("two files at a time" if room else "one file at a time: fewer than two cores, or less than 6 GiB free")
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
    longest = sorted(notebooks(), key=lambda path: -took.get(path.stem, {}).get("seconds", 0))  # first, to end together
    nbval = [*pytest, "--no-loadscope-reorder", "--nbval-lax", "--nbval-cell-timeout=1200", *map(str, longest)]
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


# ---------------------------------------------------------------- command line


def list_notebooks() -> int:
    runs = _manifest().get("runs", {}).get("paper", {})
    for path in notebooks():
        took = runs.get(path.stem, {})
        note = f"{took['seconds']:.0f} s, {took['peak_megabytes']} MB" if took else "not timed yet"
        print(f"{path.stem:28} paper profile: {note}")
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="run_all.sh", description="Run every notebook: figures, tables and verdicts again."
    )
    p.add_argument("--check", action="store_true", help="run all tests and compare the committed results")
    p.add_argument("--profile", choices=PROFILES, default="paper", help="sizes: smoke, paper (default) or full")
    p.add_argument("--only", metavar="01,03", help="only these notebooks")
    p.add_argument("--from", dest="start", metavar="NN", help="from this notebook on")
    p.add_argument("--to", dest="stop", metavar="NN", help="up to this notebook")
    p.add_argument("--html", action="store_true", help="the committed notebooks as a static site, in build/html")
    p.add_argument("--list", action="store_true", help="list the notebooks and what each takes")
    p.add_argument("--force", action="store_true", help="run again what is done already")
    p.add_argument("--keep-going", action="store_true", help="go on after a failed notebook")
    p.add_argument(
        "--update",
        action="store_true",
        help="replace what is committed: notebooks, figures and tables; with --profile full the results in data/",
    )
    p.add_argument("--model", metavar="NAME", help="another model: a name of load_model, a Hugging Face id or a folder")
    p.add_argument("--device", metavar="D", help="cpu (default), cuda, …")
    p.add_argument("--dtype", choices=DTYPES, help="of the models (training is in bfloat16); float32 is the default")
    p.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="train on a dask scheduler's workers, of one thread each, that see this folder",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.check:
        return check()
    if arguments.list:
        return list_notebooks()
    if arguments.html:
        print(f"Open {site.build(paths.BUILD / 'html', notebooks())}")
        return 0
    for name, value in ((CLUSTER, arguments.cluster), (DTYPE, arguments.dtype)):
        if value:
            os.environ[name] = value
    other = arguments.model or arguments.device or os.environ.get(DTYPE, "float32") != "float32"
    if arguments.update and (other or arguments.profile == "smoke"):
        raise SystemExit(
            "--update replaces committed results: use it with profile paper or full and the default model."
        )
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print("\nStopped. Finished notebooks are kept; run the same command again to go on.")
        return 130
    except OSError as error:  # a full disk, a folder that cannot be written: its message says what to do
        print(f"\n{error}\nFinished notebooks are kept; run the same command again to go on.", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
