"""Running one notebook."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from backattn.files import atomic_file
from backattn.runtime import PROFILE, PROGRESS_FILE
from companion import paths


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
        return (
            path.read_text(encoding="utf-8", errors="replace")
            .replace("\r", "\n")
            .strip()
            .rpartition("\n")[2]
        )
    return ""


def execute(
    path: Path, target: Path, profile: str, parameters: dict, say: Callable[[str], None] = print
) -> Outcome:
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
        notebook = parameterize_notebook(
            notebook, parameters, kernel_name="python3", language="python"
        )
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
        error = _report(
            path, notebook, position["cell"], partial, profile, _dead_kernel(watch.peak)
        )
    except CellExecutionError as failure:
        error = _report(
            path, notebook, position["cell"], partial, profile, _short(str(failure.traceback))
        )
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
    written = sorted(
        str(p.relative_to(folder)) for p, stamp in after.items() if before.get(p) != stamp
    )
    return Outcome(
        time.monotonic() - begin,
        watch.peak // 2**20,
        [w for w in written if ".partial" not in w],
        error,
    )


def _files(folder: Path) -> dict[Path, int]:
    return {
        p: p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file() and p.parent.name != "stamps"
    }


def _headings(notebook) -> dict[int, str]:
    """Code cell index → the Markdown heading above it, first code cell of each section only."""
    found, waiting = {}, None
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            titles = [
                line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")
            ]
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
