"""`load_model`: the embedded models, any Hugging Face id or local folder, tiny random models for tests."""

import sys

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from backattn import runtime
from backattn.models.checkpoint import (
    MEMORY_SHARE,
    ModelLoadError,
    _whole_model,
    one_device,
    weight_bytes,
)
from backattn.models.decoder import in_one_place
from backattn.models.families import UnsupportedModelError, check_supported, supported
from backattn.models.packaged import EMBEDDED, _load_embedded
from backattn.models.tiny import _tiny
from backattn.paths import CACHE


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
        model.set_attn_implementation(
            "eager"
        )  # Gemma 2: not every transformers has its soft cap in other kinds
    if in_one_place(model):
        model = model.to(one_device(device))
    return model.eval(), tokenizer


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


def _spread(name: str, config, dtype: torch.dtype, device: str | torch.device) -> dict:
    """Options of from_pretrained that spread the layers of a model that one place cannot hold, or should not."""
    need, free = weight_bytes(config, dtype), runtime.free_bytes(one_device(device))
    fits = need <= MEMORY_SHARE * free
    if str(device) != "auto" and fits:
        return {}
    if not fits:
        told = (
            f"{name}: its weights take {need / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and "
            f"{free / 2**30:.1f} GiB are free on {one_device(device)}"
        )
        if runtime.process_state().num_processes > 1:
            raise ModelLoadError(
                f"{told}. Each process needs a device that holds them: start one process alone."
            )
        print(
            f"{told}: its layers are spread over GPUs, memory and disk, and run slower.",
            file=sys.stderr,
        )
    memory = None if torch.cuda.is_available() else {"cpu": int(MEMORY_SHARE * free)}
    (CACHE / "offload").mkdir(parents=True, exist_ok=True)
    return {"device_map": "auto", "max_memory": memory, "offload_folder": str(CACHE / "offload")}
