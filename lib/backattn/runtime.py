"""Seeds, threads, progress and writing files so that a crash leaves nothing half-written."""

import contextlib
import errno
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

# Bars here are plain text, so tqdm's advice to install its notebook widgets is noise in every notebook.
warnings.filterwarnings("ignore", message="IProgress not found")

PROFILE = "BACKATTN_PROFILE"  # set by the runner: which profile's folder a notebook writes to
CLUSTER = "BACKATTN_CLUSTER"  # set by the runner: address of a dask scheduler whose workers train
DTYPE = "BACKATTN_DTYPE"  # set by the runner: what models are loaded in where nothing else is said
DTYPES = ("float32", "bfloat16", "float16")
PROGRESS_FILE = "BACKATTN_PROGRESS_FILE"  # set by the runner, which shows that file's last line


def use_threads(count: int | None = None) -> int:
    """Use `count` CPU threads (default 1, or the environment variable BACKATTN_THREADS); return the number used."""
    if count is None:
        count = int(os.environ.get("BACKATTN_THREADS", "1"))
    torch.set_num_threads(count)
    return count


def dtype() -> torch.dtype:
    """What models are loaded in: the environment variable BACKATTN_DTYPE, else fp32. Raises ValueError for another."""
    name = os.environ.get(DTYPE, "float32")
    if name not in DTYPES:
        raise ValueError(f"{DTYPE} is {name!r}: set it to one of {', '.join(DTYPES)}.")
    return getattr(torch, name)


def world():
    """The processes that `accelerate launch` started, one where it did not, as accelerate's PartialState; they speak
    over gloo where there is no GPU."""
    from accelerate import PartialState  # may have to be installed first, see `notebook.setup`

    return PartialState(cpu=not torch.cuda.is_available())


def free_bytes(device: str | torch.device = "cpu") -> int:
    """Memory that is free where weights would go: of that GPU, else of the machine."""
    if torch.device(device).type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, to be used again
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


def progress(items: Iterable | None = None, description: str = "", **options) -> tqdm:
    """A tqdm bar on the terminal or, under the runner, in the file that the runner watches.

    It never writes into a notebook that is being executed for the record.
    """
    target = os.environ.get(PROGRESS_FILE)
    interactive = "ipykernel" in sys.modules and PROFILE not in os.environ
    if target:
        stream = open(target, "w", encoding="utf-8")  # noqa: SIM115 (lives as long as the bar)
        return tqdm(items, desc=description, file=stream, ncols=80, mininterval=1.0, **options)
    return tqdm(items, desc=description, disable=not (interactive or sys.stderr.isatty()), leave=False, **options)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty staging folder that becomes `folder` on success and vanishes on failure.

    Raises OSError with a plain message when the disk is full or the place is not writable.
    """
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield staging
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staging, folder)
    except OSError as error:
        raise _disk_error(error, folder) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` on success and vanishes on failure."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_process(path: Path) -> Iterator[None]:
    """Hold the right to write `path` while the block runs; another process that asks for it waits, and says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"Another process writes {path}; waiting for it.", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise _disk_error(error, path) from error
    try:
        yield
    finally:
        lock.release()


def _disk_error(error: OSError, path: Path) -> OSError:
    advice = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "your disk quota is used up: free some space",
        errno.EACCES: "the folder is not writable: change its permissions",
        errno.EPERM: "the folder is not writable: change its permissions",
        errno.EROFS: "the file system is read-only",
    }.get(error.errno)
    if advice is None:
        return error
    return OSError(
        error.errno,
        f"Cannot write {path}: {advice}, or set BACKATTN_OUTPUT to another folder. Nothing half-written is left.",
    )


def hardware() -> str:
    """One line on this machine, for the MANIFEST."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = os.environ.get("BACKATTN_THREADS", "1")
    return f"{name}, {threads} of {os.cpu_count()} threads, {psutil.virtual_memory().total // 2**30} GiB{gpu}"
