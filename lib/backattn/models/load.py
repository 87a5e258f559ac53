"""`load_model`: the packaged models, any Hugging Face id or local folder, tiny random models."""

import sys

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from backattn import runtime
from backattn.models.devices import MEMORY_SHARE, in_one_place, one_device, weight_bytes
from backattn.models.families import UnsupportedModelError, check_supported, supported
from backattn.models.packaged import EMBEDDED, ModelLoadError, load_packaged, read_checkpoint
from backattn.models.tiny import tiny_model
from backattn.paths import CACHE


def load_model(
    name: str,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    device_map: str | None = None,
):
    """Load a decoder and its tokenizer, ready for analysis (eval mode).

    Args:
        name: "smollm2", "gemma3-270m", "tiny-<family>" (see `tiny_names`), a Hugging Face id, or a
            local folder.
        dtype: also by its name, "bfloat16". None: fp32, or what the environment variable
            BACKATTN_DTYPE says (`--dtype`). Sums of bf16 contributions are off by about one per
            cent.
        device: where the weights go. "auto" spreads the layers over all GPUs, the machine's memory
            and the disk, and so does any other where a hub id or a folder does not fit (which is
            said). Back attention works on such a model (its training needs room for the layers
            above the source layer), logit flow does not.
        device_map: "auto", transformers' word for device="auto".

    Returns (model, tokenizer); the tokenizer always has a pad token. Raises UnsupportedModelError
    for a family without a row in `FAMILIES`, ModelLoadError where a model cannot be fetched,
    verified or read, ValueError for an unknown "tiny-…" name or another device_map.

    Example:
        >>> model, tokenizer = load_model("tiny-llama")
        >>> model.config.num_hidden_layers, model.dtype
        (4, torch.float32)
    """
    if device_map not in (None, "auto"):
        raise ValueError(f'device_map is {device_map!r}: give "auto", or one device as `device`.')
    name, dtype, device = str(name), runtime.dtype(dtype), device_map or device
    if name.startswith("tiny-"):
        model, tokenizer = tiny_model(name)
        model = model.to(dtype)
    elif name in EMBEDDED:
        model, tokenizer = load_packaged(name, dtype)
    else:
        model, tokenizer = _load_hub(name, dtype, revision, device)
    if name.startswith("tiny-") or name in EMBEDDED:
        model.config.name_or_path = name  # what load_model takes, not where the copy happens to lie
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # not every transformers has Gemma 2's cap elsewhere
    if in_one_place(model):
        model = model.to(one_device(device))
    return model.eval(), tokenizer


def _load_hub(name: str, dtype: torch.dtype, revision: str | None, device: str | torch.device):
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        check_supported(config)  # before any weight is fetched
        options = _spread_options(name, config, dtype, device)
        return read_checkpoint(name, dtype, revision, **options)
    except (UnsupportedModelError, ModelLoadError):
        raise
    except SafetensorError as error:
        raise ModelLoadError(
            f"A weight file of {name!r} is damaged ({error}). Delete it and fetch it again."
        ) from error
    except (OSError, ValueError) as error:
        if "does not recognize this architecture" in str(error):
            raise UnsupportedModelError(
                f"{name!r} is of a family that transformers does not know. "
                f"Supported families: {supported()}."
            ) from error
        raise ModelLoadError(
            f"Could not load {name!r}: it is neither a local folder with config.json, "
            "model.safetensors and a tokenizer, nor a Hugging Face id that can be reached from "
            "here. Check the spelling and the network (gated models need `hf auth login`). Models "
            f"that come with the package index: {', '.join(EMBEDDED)}. "
            f"transformers said: {str(error).splitlines()[0]}"
        ) from error


def _spread_options(name: str, config, dtype: torch.dtype, device: str | torch.device) -> dict:
    """Options of from_pretrained that spread a model's layers, where one device cannot hold them or
    `device` is "auto". Raises ModelLoadError where several processes would each need that."""
    place = one_device(device)
    need, free = weight_bytes(config, dtype), runtime.free_bytes(place)
    if need > MEMORY_SHARE * free:
        finding = (
            f"{name}: its weights take {need / 2**30:.1f} GiB in {str(dtype).split('.')[1]}, and "
            f"{free / 2**30:.1f} GiB are free on {place}"
        )
        if runtime.process_state().num_processes > 1:
            raise ModelLoadError(
                f"{finding}. Each process needs a device that holds them: start one process alone."
            )
        slower = "its layers are spread over GPUs, memory and disk, and run slower."
        print(f"{finding}: {slower}", file=sys.stderr)
    elif str(device) != "auto":
        return {}
    memory = None if torch.cuda.is_available() else {"cpu": int(MEMORY_SHARE * free)}
    offload = CACHE / "offload"
    offload.mkdir(parents=True, exist_ok=True)
    return {"device_map": "auto", "max_memory": memory, "offload_folder": str(offload)}
