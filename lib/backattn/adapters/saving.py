"""Saved adapters, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

A fingerprint of the base model goes with them. It tells on loading whether a model is the same one
(silence), one that was trained on since (a warning), or another (an error).
"""

import contextlib
import hashlib
import json
import warnings
import zlib
from base64 import b64decode, b64encode
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from backattn.models.decoder import describe

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
STATE_FILE, ABOUT = "model.safetensors", "_extra_state"  # as Trainer writes a state dict
PEFT_TYPE = "BACK_ATTENTION"
FINGERPRINT = "base_model_fingerprint"
PREFIX = "base_model.model."  # PEFT writes it in front of every tensor's name
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, SafetensorError, zlib.error)
SAMPLE = 16  # numbers of each weight in a fingerprint
ALIKE = 0.6  # cosine of a layer's samples; 0 ± 0.13 for a matrix of another model


class AdapterError(OSError):
    """A saved adapter could not be read, or is of another base model. Says what to do."""


@torch.no_grad()
def sample_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Some numbers of every weight of a model, wherever accelerate keeps it: name -> [16]. Tokens
    that are added later change none of them.

    Example:
        >>> sample_weights(model)["model.layers.3.mlp.down_proj.weight"].shape
        (16,)
    """
    from accelerate.utils import align_module_device  # may have to be installed first

    sample, tokens = {}, len(model.get_input_embeddings().weight)
    once = {name for name, _ in model.named_parameters()}  # tied weights
    for place, module in model.named_modules():
        with align_module_device(module):
            for name, p in module.named_parameters(place, recurse=False):
                if name in once and p.is_floating_point() and p.numel():
                    rows = p[:64] if len(p) == tokens else p
                    where = [k * (rows.numel() - 1) // (SAMPLE - 1) for k in range(SAMPLE)]
                    sample[name] = rows.flatten()[where].float().cpu().numpy()
    return sample


def about(model: nn.Module, options: dict) -> dict:
    """What is kept beside an adapter's tensors: its options, and what tells its base model."""
    arch, block = describe(model), describe(model).blocks[0]
    sample = {
        name.replace(".base_layer", ""): b64encode(numbers.tobytes()).decode()
        for name, numbers in sample_weights(model).items()
    }
    fingerprint = {"model_type": model.config.model_type, "layers": len(arch.blocks)}
    fingerprint["sizes"] = [arch.width, block.heads, block.kv_heads, block.head_dim]
    fingerprint |= {"dtype": str(model.dtype).removeprefix("torch."), "sample": sample}
    base, revision = model.config.name_or_path, getattr(model.config, "_commit_hash", None)
    kind = {"peft_type": PEFT_TYPE, "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    return {**kind, "revision": revision, **options, FINGERPRINT: fingerprint}


def check_base(known: dict, model: nn.Module, source: str | Path) -> None:
    """Warn where a model is a fine-tuned one of that which an adapter was trained on, and raise
    AdapterError for another one. known: see `about`."""
    name = f"{known.get('base_model_name_or_path')!r} (revision {known.get('revision')})"
    here = f"({model.config.name_or_path!r}, {model.dtype})"
    other, changed = _differences(known, model)
    if other:
        differs = f"whose {', '.join(other[:3])} differs from this model's {here}"
        raise AdapterError(f"{source} was trained on {name}, {differs}. Load that base model.")
    if changed:
        differs = f"this model {here} has other weights of the same origin (fine-tuned or edited)"
        message = f"{source} was trained on {name}; {differs}: the adapter may do less here."
        warnings.warn(message, stacklevel=4)


def _differences(known: dict, model: nn.Module) -> tuple[list[str], bool]:
    """(sizes and layers that are of another model, whether any weight differs)"""
    now, was = about(model, {})[FINGERPRINT], known.get(FINGERPRINT)
    if was is None:  # saved before there were fingerprints
        head = describe(model).unembedding_module.weight.detach().to("cpu", torch.bfloat16)
        found = hashlib.sha256(head.contiguous().view(torch.int16).numpy()).hexdigest()
        return ["unembedding"] * (found != known.get("unembedding_hash")), False
    other = [name for name in ("model_type", "layers", "sizes") if was[name] != now[name]]
    kinds = [torch.finfo(getattr(torch, either["dtype"])) for either in (was, now)]
    eps, least = max(k.eps for k in kinds), max(k.eps * k.tiny for k in kinds)
    names, likeness = was["sample"].keys() & now["sample"].keys(), {"weights": []}
    changed = len(names) < max(len(was["sample"]), len(now["sample"]))
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    for name in names:
        a, b = (np.frombuffer(b64decode(x["sample"][name]), np.float32) for x in (was, now))
        changed |= not (np.abs(a - b) <= eps * np.abs(a) + least).all()
        if name in matrices and a.any():
            for part in ("weights", ".".join(name.split(".")[:3])):
                likeness.setdefault(part, []).append(a @ b / np.sqrt((a @ a) * max(b @ b, 1e-30)))
    return other + sorted(k for k, r in likeness.items() if not np.mean(r or [0]) > ALIKE), changed


def unpack(state: Tensor) -> dict:
    """What `about` gave, of `BackAttentionModel.get_extra_state`."""
    return json.loads(zlib.decompress(bytes(state.tolist())))


def read(folder: str | Path, model: nn.Module, **hub) -> tuple[dict, dict[str, Tensor]]:
    """(what is known, tensors) of an adapter that was trained on this model; arguments and errors:
    see `BackAttentionModel.from_pretrained`. hub: options of `hf_hub_download`."""
    describe(model)  # or UnsupportedModelError
    state = Path(folder) / STATE_FILE
    try:
        if state.exists() and not (Path(folder) / CONFIG_FILE).exists():
            tensors = load_file(state)
            known = unpack(tensors.pop(ABOUT))
        else:
            known = json.loads(_path(folder, CONFIG_FILE, **hub).read_text(encoding="utf-8"))
            weights = _path(folder, WEIGHTS_FILE, **hub)
            tensors = load_file(weights) if known.get("peft_type") == PEFT_TYPE else {}
        if tensors:
            check_base(known, model, folder)
    except DAMAGE as error:
        raise AdapterError(f"{folder} is damaged ({error!r}). Fetch the adapter again.") from error
    if not tensors:
        kind = f"an adapter of type {known.get('peft_type')!r}, not {PEFT_TYPE}"
        raise AdapterError(f"{folder} holds {kind}. Load it with peft.")
    return known, {name.removeprefix(PREFIX): t for name, t in tensors.items()}


def _path(folder: str | Path, name: str, **hub) -> Path:
    """Where a file of an adapter lies, fetched from the hub if need be."""
    from huggingface_hub import hf_hub_download

    if (Path(folder) / name).exists():
        return Path(folder) / name
    with contextlib.suppress(ValueError, OSError):  # also what huggingface_hub raises
        if not Path(folder).exists():
            return Path(hf_hub_download(str(folder), name, **hub))
    raise AdapterError(
        f"{folder} lacks {name}: give a folder written by save_pretrained, or the id of a Hugging "
        "Face adapter that can be reached from here."
    )


def card(base: str, repository: str) -> str:
    """The README.md of an adapter on the Hugging Face hub."""
    base = Path(base).name if Path(base).is_absolute() else base  # no path of this machine
    on_hub = f"base_model: {base}\n" if base.count("/") == 1 else ""
    head = f"---\nlibrary_name: backattn\n{on_hub}tags: [back-attention, adapter]\n---\n"
    load = f'model, tokenizer = backattn.load_model("{base}")\n'
    load += f'wrapped = backattn.BackAttentionModel.from_pretrained(model, "{repository}")\n'
    return f"{head}# Back attention on {base}\n\n```python\nimport backattn\n\n{load}```\n"
