"""Seeds, threads, progress and writing files so that a crash leaves nothing half-written."""

import contextlib
import os
import platform
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
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


def process_state():
    """The processes that `accelerate launch` started, one where it did not, as accelerate's PartialState; they speak
    over gloo where there is no GPU."""
    from accelerate import PartialState  # may have to be installed first, see `notebook.setup`

    return PartialState(cpu=not torch.cuda.is_available())


def free_bytes(device: str | torch.device = "cpu") -> int:
    """Memory that is free where weights would go: of that GPU, else of the machine."""
    if torch.device(device).type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # by torch, to be used again
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
    return tqdm(
        items,
        desc=description,
        disable=not (interactive or sys.stderr.isatty()),
        leave=False,
        **options,
    )


def hardware() -> str:
    """One line on this machine, for the MANIFEST."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), name
        )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = os.environ.get("BACKATTN_THREADS", "1")
    return f"{name}, {threads} of {os.cpu_count()} threads, {psutil.virtual_memory().total // 2**30} GiB{gpu}"
