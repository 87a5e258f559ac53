"""The program behind run_all.sh: runs the notebooks, resumes, reports, checks."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path

import nbformat
import pandas as pd

from backattn.files import atomic_file, one_process
from backattn.runtime import CLUSTER, DTYPE, DTYPES, hardware
from companion import paths
from companion.report import tables
from companion.runner import site
from companion.runner.check import _manifest, check, notebooks
from companion.runner.execute import execute

# Sizes only: one code path for all profiles. What is not named here keeps the notebook's own value.
PROFILES: dict[str, dict[str, dict]] = {
    "smoke": {
        "01_stage_discovery": {
            "asked_per_relation": 16,
            "kept_per_relation": 6,
            "tested": 8,
            "knockout_draws": 2,
        },
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


def select(found: list[Path], only: str | None, start: str | None, stop: str | None) -> list[Path]:
    """Notebooks chosen by --only 01[,03], --from 01, --to 03; raises SystemExit when a number or name fits none."""
    names = [path.stem for path in found]

    def matching(word: str) -> list[str]:
        fits = [
            name for name in names if name.startswith(word.zfill(2) if word.isdigit() else word)
        ]
        if not fits:
            raise SystemExit(f"No notebook fits {word!r}. There are: {', '.join(names)}.")
        return fits

    wanted = {name for word in only.split(",") for name in matching(word)} if only else set(names)
    first, last = (
        matching(start)[0] if start else names[0],
        matching(stop)[-1] if stop else names[-1],
    )
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
    add(
        [(cell.cell_type, cell.source) for cell in cells],
        profile,
        sorted(parameters.items()),
        os.environ.get(DTYPE),
    )
    inputs = [*sorted((paths.ROOT / "lib").rglob("*.py")), *sorted(paths.DATA.rglob("*.csv"))]
    if profile != "full":  # which makes these results itself
        inputs += sorted([*paths.DATA.rglob("*.safetensors"), *paths.DATA.glob("*.jsonl")])
    for file in inputs:
        if "runner" not in file.parts:  # how it is run does not change what comes out
            add(file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    add([(name, metadata.version(name)) for name in VERSIONED])
    return digest.hexdigest()


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
        if (
            not arguments.force
            and stamp.get("key") == key
            and all((folder / f).exists() for f in stamp["written"])
        ):
            print(f"{label}  done before ({stamp['seconds']:.0f} s), skipped", flush=True)
            if arguments.update:
                _update(path, folder / "notebooks" / path.name, folder, profile, stamp)
            continue
        estimate = stamp.get("seconds") or _manifest().get("runs", {}).get(profile, {}).get(
            path.stem, {}
        ).get("seconds")
        print(f"{label}  {f'est {estimate:.0f} s' if estimate else 'no estimate yet'}", flush=True)
        target = folder / "notebooks" / path.name
        outcome = execute(
            path, target, profile, parameters, say=lambda line: print(line, flush=True)
        )
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
    command = [
        sys.executable,
        "-m",
        "companion.runs.launch",
        "--estimate",
        "--model",
        arguments.model,
    ]
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
            if (
                goal.suffix == ".jsonl"
            ):  # runs of several notebooks, a file each, join those that are there
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
    manifest.setdefault("runs", {}).setdefault(profile, {})[path.stem] = {
        **took,
        "hardware": hardware(),
    }
    with atomic_file(paths.DATA / "MANIFEST.json") as temporary:
        temporary.write_text(
            json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
    if profile == "paper":
        with atomic_file(paths.FIGURES / "README.md") as temporary:
            temporary.write_text(figure_index(), encoding="utf-8")


def figure_index() -> str:
    """What figures/README.md says of the committed notebooks and ledger."""
    return tables.figure_index(notebooks(), pd.read_csv(paths.FIGURES / "tables" / "claims.csv"))


def _join_lines(new: Path, goal: Path) -> None:
    """Put the lines of one file of keyed results into another, in place of those with the same keys."""
    files = [path for path in (goal, new) if path.exists()]
    lines = {
        json.loads(line)["key"]: line
        for path in files
        for line in path.read_text("utf-8").splitlines()
    }
    with atomic_file(goal) as temporary:
        temporary.write_text("".join(f"{lines[key]}\n" for key in sorted(lines)), encoding="utf-8")


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
    p.add_argument(
        "--check", action="store_true", help="run all tests and compare the committed results"
    )
    p.add_argument(
        "--profile", choices=PROFILES, default="paper", help="sizes: smoke, paper (default) or full"
    )
    p.add_argument("--only", metavar="01,03", help="only these notebooks")
    p.add_argument("--from", dest="start", metavar="NN", help="from this notebook on")
    p.add_argument("--to", dest="stop", metavar="NN", help="up to this notebook")
    p.add_argument(
        "--html",
        action="store_true",
        help="the committed notebooks as a static site, in build/html",
    )
    p.add_argument("--list", action="store_true", help="list the notebooks and what each takes")
    p.add_argument("--force", action="store_true", help="run again what is done already")
    p.add_argument("--keep-going", action="store_true", help="go on after a failed notebook")
    p.add_argument(
        "--update",
        action="store_true",
        help="replace what is committed: notebooks, figures and tables; with --profile full the results in data/",
    )
    p.add_argument(
        "--model",
        metavar="NAME",
        help="another model: a name of load_model, a Hugging Face id or a folder",
    )
    p.add_argument("--device", metavar="D", help="cpu (default), cuda, …")
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the models (training is in bfloat16); float32 is the default",
    )
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
    except (
        OSError
    ) as error:  # a full disk, a folder that cannot be written: its message says what to do
        print(
            f"\n{error}\nFinished notebooks are kept; run the same command again to go on.",
            file=sys.stderr,
        )
        return 1
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
