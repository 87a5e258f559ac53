"""Saved adapters, in PEFT's layout: adapter_config.json and adapter_model.safetensors."""

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backattn.files import atomic_file
from backattn.models.decoder import describe

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE = "BACK_ATTENTION"
PREFIX = "base_model.model."  # PEFT writes it in front of every tensor's name


class AdapterError(OSError):
    """A saved adapter could not be read, or is of another base model. Says what to do."""


def unembedding_hash(model: nn.Module) -> str:
    """sha256 of the unembedding in bf16, so that it is the same however the model was loaded.

    Example:
        >>> unembedding_hash(model)[:8]
        'e8d517b8'
    """
    from accelerate.utils import align_module_device  # may have to be installed first

    head = describe(model).unembedding_module
    with align_module_device(head):  # fetches it where accelerate keeps it elsewhere
        weight = head.weight.detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(weight.view(torch.int16).numpy().tobytes()).hexdigest()


def write(
    folder: str | Path,
    model: nn.Module,
    options: dict,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter's options and tensors, with what tells its base model; other files stay."""
    about = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config.name_or_path,
        "revision": getattr(model.config, "_commit_hash", None),
        "unembedding_hash": unembedding_hash(model),
        **options,
    }
    tensors = {PREFIX + k: t.to(dtype or t.dtype).cpu().contiguous() for k, t in tensors.items()}
    with atomic_file(Path(folder) / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary)
    with atomic_file(Path(folder) / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def read(folder: str | Path, model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """(options, tensors) of an adapter that was trained on this model.

    folder: see `BackAttentionModel.from_pretrained`, as for AdapterError.
    """
    paths = {name: _path(folder, name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    try:
        about = json.loads(paths[CONFIG_FILE].read_text(encoding="utf-8"))
        kind = about.get("peft_type")
        tensors = load_file(paths[WEIGHTS_FILE]) if kind == PEFT_TYPE else {}
    except (ValueError, AttributeError, SafetensorError, OSError) as error:
        raise AdapterError(f"{folder} is damaged ({error}). Fetch the adapter again.") from error
    if kind != PEFT_TYPE:
        raise AdapterError(
            f"{folder} holds an adapter of type {kind!r}, not {PEFT_TYPE}. Load it with peft."
        )
    if about.get("unembedding_hash") != unembedding_hash(model):
        raise AdapterError(
            f"{folder} was trained on {about.get('base_model_name_or_path')!r} (revision "
            f"{about.get('revision')}), whose unembedding differs from this model's "
            f"({model.config.name_or_path!r}, {model.dtype}). Load that base model, in the dtype "
            "that it is published in or in fp32 (fp16 rounds small weights away)."
        )
    return about, {name.removeprefix(PREFIX): t for name, t in tensors.items()}


def _path(folder: str | Path, name: str) -> Path:
    """Where a file of an adapter lies, fetched from the hub if need be."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if (Path(folder) / name).exists():
        return Path(folder) / name
    if not Path(folder).exists():
        with contextlib.suppress(HFValidationError, HfHubHTTPError, OSError):
            return Path(hf_hub_download(str(folder), name))
    raise AdapterError(
        f"{folder} lacks {name}: give a folder written by save_pretrained, or the id of a Hugging "
        "Face adapter that can be reached from here."
    )
