"""Running one notebook with papermill: its memory, its progress, and what is said when it fails."""

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch  # puts the environment back as it was

import nbformat
import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color

from backattn.files import atomic_file
from backattn.runtime import PROFILE, PROGRESS_FILE
from companion import paths

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


class NotebookError(Exception):
    """A notebook failed; the message names the cell, and the reason."""


def kernel_environment() -> dict[str, str]:
    """Makes "python3" this very interpreter, with no start-up files, whatever kernels there are."""
    folder = paths.BUILD / "kernels" / hashlib.sha256(sys.executable.encode()).hexdigest()[:8]
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    about = {"argv": argv, "display_name": KERNEL["display_name"], "language": "python"}
    with atomic_file(folder / "kernels" / KERNEL["name"] / "kernel.json") as temporary:
        temporary.write_text(json.dumps(about), encoding="utf-8")
    others = filter(None, [os.environ.get("JUPYTER_PATH")])
    searched = os.pathsep.join([str(folder), *others])
    return {"JUPYTER_PATH": searched, "IPYTHONDIR": str(folder / "ipython")}


def execute(path: Path, target: Path, profile: str, parameters: dict) -> dict:
    """Run a notebook from its clean source into `target`, which appears when all cells succeeded:
    {"written": files below the profile's folder, "seconds", "peak_megabytes"}. Raises
    NotebookError, and then leaves the notebook as far as it came as `<name>.partial.ipynb`."""
    partial, bar = target.with_suffix(".partial.ipynb"), target.with_suffix(".progress")
    target.parent.mkdir(parents=True, exist_ok=True)
    environment = {PROFILE: profile, PROGRESS_FILE: str(bar), "PYTHONHASHSEED": "0"}
    environment |= kernel_environment()
    how = {"cwd": paths.NOTEBOOKS, "kernel_name": "python3", "language": "python"}
    how |= {"progress_bar": False, "extra_arguments": ["--log-level=ERROR"]}
    begin = time.time()
    with patch.dict(os.environ, environment), _watched(bar, path.stem) as peak:
        os.environ.pop("MPLBACKEND", None)  # Agg would silently remove every inline figure
        try:
            notebook = papermill.execute_notebook(path, partial, parameters, **how)
        except (PapermillExecutionError, DeadKernelError) as error:
            raise NotebookError(_report(path, partial, error, peak[0])) from error
    clean(notebook)
    with atomic_file(target) as temporary:
        nbformat.write(notebook, temporary)
    partial.unlink()
    folder, others = paths.run_folder(profile), path.parent.glob("*.ipynb")
    numbers = {other.stem.partition("_")[0] for other in others} - {path.stem.partition("_")[0]}
    written = [
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file()
        and file.parent.name != "stamps"
        and file.stat().st_mtime >= begin
        and file.name.lstrip(".").partition("_")[0] not in numbers  # another's, at the same time
        and ".partial" not in file.name
    ]
    seconds = round(time.time() - begin, 1)
    return {"written": sorted(written), "seconds": seconds, "peak_megabytes": peak[0]}


@contextlib.contextmanager
def _watched(bar: Path, name: str) -> Iterator[list[int]]:
    """Show the last line of the file `bar` as it changes, with the notebook's number; yields [peak
    memory of kernels, MB]."""
    peak, stop, interval = [0], threading.Event(), 0.2 if sys.stdout.isatty() else 20.0

    def poll() -> None:
        shown, shown_at = [], time.monotonic()
        while not stop.wait(0.2):
            total = 0
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += child.memory_info().rss
            peak[0] = max(peak[0], total // 2**20)
            text = bar.read_text("utf-8", "replace") if bar.exists() else ""
            line = text.strip().splitlines()[-1:]
            if line and line != shown and time.monotonic() - shown_at >= interval:
                shown, shown_at = line, time.monotonic()
                print(f"    {name.split('_')[0]}  {line[0]}", flush=True)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        bar.unlink(missing_ok=True)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop, in place, all that differs between two equal runs, and tag code for the site."""
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook.metadata = nbformat.from_dict(metadata)
    for cell in notebook.cells:
        tags = list(cell.metadata.get("tags", []))
        if "injected-parameters" in tags:
            cell.id = "injected-parameters"  # papermill draws one
        if cell.cell_type == "code" and not {"hide-input", "remove-cell"} & set(tags):
            tags.append("remove-cell" if "setup" in tags else "hide-input")
        kept: dict = {}
        for output in cell.get("outputs", []):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if "metadata" in output:
                output["metadata"] = nbformat.from_dict({"image/png": {"alt": alt}} if alt else {})
            if alt:
                kept["mystnb"] = {"image": {"alt": alt}}  # where Jupyter Book looks for it
        cell.metadata = nbformat.from_dict(kept | ({"tags": tags} if tags else {}))


def _report(path: Path, partial: Path, error: Exception, megabytes: int) -> str:
    if isinstance(error, PapermillExecutionError):
        index, source = error.cell_index, error.source
        reason = strip_color("\n".join(error.traceback)).strip().splitlines()[-12:]
    else:  # papermill does not say which cell it was
        cells = nbformat.read(partial, as_version=4).cells
        index = [k for k, c in enumerate(cells) if c.metadata.papermill.get("start_time")][-1]
        source = cells[index].source
        reason = [
            f"The kernel died (peak memory {megabytes} MB). Most often the machine ran out of",
            "memory: close other programs, or use --profile smoke or a smaller model.",
        ]
    lines = [f"FAILED {path.name}, cell {index}:", *(f"    | {x}" for x in source.splitlines()), ""]
    lines += [*(f"    {x}" for x in reason), "", f"    partial notebook: {partial}"]
    return "\n".join(lines)
