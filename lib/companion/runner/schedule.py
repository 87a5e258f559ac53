"""Notebooks side by side: which may run now, on how many cores, within what memory."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import psutil

from companion import paths
from companion.runner.execute import NotebookError, execute

FIRST, LAST = "00", "11"  # fetches the models; reads the tables of all others
UNKNOWN = 3000  # megabytes of a notebook that was never measured


@dataclass
class Job:
    """A notebook that is to run; seconds and megabytes: of its last run, or None."""

    path: Path
    target: Path
    profile: str
    parameters: dict = field(default_factory=dict)
    seconds: float | None = None
    megabytes: int | None = None

    @property
    def stage(self) -> int:
        """Those of a stage wait for all of earlier ones."""
        return {FIRST: 0, LAST: 2}.get(self.path.stem.split("_")[0], 1)


def cores() -> int:
    """Cores that this process may use."""
    limited = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1


def side_by_side(
    jobs: Sequence[Job], workers: int, begun, keep_going: bool = False
) -> Iterator[tuple[Job, dict | NotebookError]]:
    """Each job with what `execute` gave, or why it failed, in the order of `jobs`. At most
    `workers` run at a time, the longest first, and no more than fit into what memory is free; after
    a failure none is begun. begun(job) is called when one is."""
    if workers == 1:
        yield from _one_by_one(jobs, begun, keep_going)
        return
    free, done = psutil.virtual_memory().available / 2**20, {}
    waiting = sorted(jobs, key=lambda job: (job.stage, -(job.seconds or 0)))
    running: dict[Future, Job] = {}
    about = os.getpid(), paths.NOTEBOOKS, paths.BUILD
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, about)
    try:
        for job in jobs:
            while id(job) not in done and (waiting or running):
                while next_one := _fits(waiting, running.values(), workers, free):
                    waiting.remove(next_one)
                    begun(next_one)
                    running[pool.submit(_run, next_one)] = next_one
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    ended = running.pop(future)
                    done[id(ended)] = (ended, future.result())
                    if isinstance(future.result(), NotebookError) and not keep_going:
                        waiting = []
            if id(job) in done:
                yield done[id(job)]
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(jobs: Sequence[Job], begun, keep_going: bool):
    for job in jobs:
        begun(job)
        outcome = _run(job)
        yield job, outcome
        if isinstance(outcome, NotebookError) and not keep_going:
            return


def _fits(waiting: list[Job], running, workers: int, free: float) -> Job | None:
    """The next job that may begin now."""
    running = list(running)
    used = sum(job.megabytes or UNKNOWN for job in running)
    for job in waiting if len(running) < workers else ():
        earlier = any(other.stage < job.stage for other in [*waiting, *running])
        if not earlier and (not running or used + (job.megabytes or UNKNOWN) < 0.9 * free):
            return job
    return None


def _begin(parent: int, notebooks: Path, build: Path) -> None:
    """A worker looks for notebooks where its parent does, and ends when that is killed."""
    paths.NOTEBOOKS, paths.BUILD = notebooks, build

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(job: Job) -> dict | NotebookError:
    try:
        return execute(job.path, job.target, job.profile, job.parameters)
    except NotebookError as error:
        return error
