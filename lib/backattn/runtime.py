"""Seeds, threads, dtype, progress: what the process that runs us asks for, by the environment."""

import contextlib
import ctypes
import gc
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from tqdm import tqdm

if TYPE_CHECKING:  # the runner needs this file and not torch, which takes seconds to import
    import torch

# Environment variables that the runner sets:
PROFILE = "BACKATTN_PROFILE"  # which profile's folder a notebook writes to
CLUSTER = "BACKATTN_CLUSTER"  # address of a dask scheduler whose workers train
DTYPE = "BACKATTN_DTYPE"  # what models are loaded in where nothing else is said
PROGRESS_FILE = "BACKATTN_PROGRESS_FILE"  # the runner shows that file's last line

DTYPES = ("float32", "bfloat16", "float16")


def use_threads() -> None:
    """Use as many CPU threads as BACKATTN_THREADS of the environment says, else one."""
    import torch

    torch.set_num_threads(int(os.environ.get("BACKATTN_THREADS", "1")))


def use_terminal() -> None:
    """Print "?" for letters that the terminal has not, here and in processes started from here."""
    os.environ["PYTHONIOENCODING"] = ":replace"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")


def dtype(given: "torch.dtype | str | None" = None) -> "torch.dtype":
    """What models are loaded in: the given dtype, or that of `dtype_name`, which raises
    ValueError for another name than float32, bfloat16 and float16."""
    import torch

    if isinstance(given, torch.dtype):
        return given
    return getattr(torch, dtype_name(given))


def dtype_name(given: str | None = None) -> str:
    """The given name, BACKATTN_DTYPE of the environment, or float32.

    Raises ValueError for another name than float32, bfloat16 and float16.
    """
    name = (given or os.environ.get(DTYPE, "float32")).removeprefix("torch.")
    if name not in DTYPES:
        what = "dtype" if given else DTYPE
        raise ValueError(f"{what} is {name!r}: set it to one of {', '.join(DTYPES)}.")
    return name


def multiplies_bf16(device: "str | torch.device" = "cpu") -> bool:
    """Whether a device multiplies bf16 matrices itself; processors without AVX-512 do it number by
    number, far more slowly than in fp32.

    Example:
        >>> multiplies_bf16("cuda")
        True
    """
    import torch

    slow = ("DEFAULT", "AVX2")
    return torch.device(device).type != "cpu" or torch.backends.cpu.get_cpu_capability() not in slow


def process_state():
    """The processes that `accelerate launch` started, one without it, as accelerate's PartialState;
    they speak over gloo where there is no GPU."""
    import torch
    from accelerate import PartialState  # may have to be installed first, see `notebook.setup`

    return PartialState(cpu=not torch.cuda.is_available())


def free_bytes(device: "str | torch.device" = "cpu") -> int:
    """Memory that is free where weights would go: of that GPU, else of the machine.

    Example:
        >>> free_bytes() > 0
        True
    """
    import torch

    if torch.device(device).type != "cuda":
        return psutil.virtual_memory().available
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reusable


def release_memory() -> None:
    """Give freed memory back to the system, where its C library is glibc, which keeps it: else a
    second model comes on top of what the first one's results took."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def progress(items: Iterable | None = None, description: str = "", **options) -> tqdm:
    """A tqdm bar on the terminal or, under the runner, in the file that the runner watches; never
    in a notebook that is being executed for the record."""
    options |= {"desc": description}
    if target := os.environ.get(PROGRESS_FILE):
        stream = open(target, "w", encoding="utf-8")  # noqa: SIM115 (lives as long as the bar)
        return tqdm(items, file=stream, ncols=80, mininterval=1.0, **options)
    watched = sys.stderr.isatty() or ("ipykernel" in sys.modules and PROFILE not in os.environ)
    return tqdm(items, disable=not watched, leave=False, **options)


def say(text: str) -> None:
    """A line on stderr or, under the runner, where it shows progress: none of it is for the record
    of a notebook."""
    if target := os.environ.get(PROGRESS_FILE):
        Path(target).write_text(f"{text}\n", encoding="utf-8")
    else:
        print(text, file=sys.stderr)


def hardware() -> str:
    """One line on this machine, for the MANIFEST."""
    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    threads, memory = os.environ.get("BACKATTN_THREADS", "1"), psutil.virtual_memory().total
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    system = platform.system()
    with contextlib.suppress(OSError):
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    return f"{name}, {threads} of {os.cpu_count()} threads, {memory // 2**30} GiB{gpu}, {system}"
