"""Saved adapters, in PEFT's layout."""

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from backattn.models.decoder import describe

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

PEFT_TYPE = "BACK_ATTENTION"

_PREFIX = "base_model.model."  # PEFT writes it in front of every tensor's name


class AdapterError(OSError):
    """A saved adapter could not be read, or belongs to another base model. The message says what to do."""


def unembedding_hash(model: nn.Module) -> str:
    """sha256 of the unembedding in bf16, so that it is the same however the model was loaded."""
    from accelerate.utils import (
        align_module_device,  # may have to be installed first, see `notebook.setup`
    )

    head = describe(model).unembedding_module
    with align_module_device(head):  # fetches it where accelerate keeps it elsewhere
        weight = head.weight.detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(weight.view(torch.int16).numpy().tobytes()).hexdigest()


def _read_folder(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors of a saved adapter."""
    paths = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        paths[name] = Path(folder) / name
        if not paths[name].exists():
            paths[name] = _from_hub(folder, name)
    try:
        about = json.loads(paths[CONFIG_FILE].read_text(encoding="utf-8"))
        kind = about.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise AdapterError(
            f"{paths[CONFIG_FILE]} is damaged ({error}). Fetch the adapter again."
        ) from error
    if kind != PEFT_TYPE:
        raise AdapterError(
            f"{folder} holds an adapter of type {kind!r}, not {PEFT_TYPE}. Load it with peft."
        )
    try:
        return about, load_file(paths[WEIGHTS_FILE])
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{paths[WEIGHTS_FILE]} is damaged ({error}). Fetch the adapter again."
        ) from error


def _from_hub(folder: str | Path, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not Path(folder).exists():
        with contextlib.suppress(HFValidationError, HfHubHTTPError, OSError):
            return Path(hf_hub_download(str(folder), name))
    raise AdapterError(
        f"{folder} lacks {name}: give a folder written by save_pretrained, or the id of a Hugging Face adapter that "
        "can be reached from here."
    )
