"""Saved adapters, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

With them goes a fingerprint of the base model, which tells on loading whether this is the same
model (silence), one that was trained on since (a warning) or another (an error).
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backattn.files import atomic_file
from backattn.models.decoder import describe

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
TRAINER_FILE, ABOUT = "model.safetensors", "_extra_state"  # a state dict, see `get_extra_state`
PEFT_TYPE = "BACK_ATTENTION"
PREFIX = "base_model.model."  # PEFT writes it in front of every tensor's name
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, zlib.error)
SAMPLE = 16  # numbers of each weight in a fingerprint
ALIKE = 0.6  # correlation of a layer's samples; of other weights it is 0 ± 0.13


class AdapterError(OSError):
    """A saved adapter could not be read, or is of another base model. Says what to do."""


@torch.no_grad()
def sample_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Some numbers of every weight of a model, wherever accelerate keeps it: name -> [16].

    Tokens that are added later change none of them.

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


def fingerprint(model: nn.Module) -> dict:
    """What tells a base model from others, for JSON: family, sizes, and samples of its weights."""
    arch = describe(model)
    block, sample = arch.blocks[0], sample_weights(model)
    return {
        "model_type": model.config.model_type,
        "layers": len(arch.blocks),
        "sizes": [arch.width, block.heads, block.kv_heads, block.head_dim],
        "dtype": str(model.dtype).removeprefix("torch."),
        "sample": {
            name.replace(".base_layer", ""): b64encode(numbers.tobytes()).decode()
            for name, numbers in sample.items()
        },
    }


def about(model: nn.Module, options: dict) -> dict:
    """What is kept beside an adapter's tensors: its options, and what tells its base model."""
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config.name_or_path,
        "revision": getattr(model.config, "_commit_hash", None),
        **options,
        "base_model_fingerprint": fingerprint(model),
    }


def check_base(known: dict, model: nn.Module, source: str | Path) -> None:
    """Warn where a model is a fine-tuned one of that which an adapter was trained on.

    known: see `about`. Raises AdapterError for another model.
    """
    was, now = known.get("base_model_fingerprint"), fingerprint(model)
    if was is None:  # saved before there were fingerprints
        other, changed = _another_unembedding(known, model), False
    else:
        matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
        other, changed = _compare(was, now, matrices)
    name = f"{known.get('base_model_name_or_path')!r} (revision {known.get('revision')})"
    here = f"({model.config.name_or_path!r}, {model.dtype})"
    if other:
        raise AdapterError(
            f"{source} was trained on {name}, whose {', '.join(other[:3])} differs from this "
            f"model's {here}. Load that base model."
        )
    if changed:
        warnings.warn(
            f"{source} was trained on {name}; this model {here} has other weights of the same "
            "origin (fine-tuned or edited): the adapter may do less here.",
            stacklevel=4,
        )


def _compare(was: dict, now: dict, matrices: set[str]) -> tuple[list[str], bool]:
    """(sizes and layers in which two fingerprints are of other models, whether a weight differs)"""
    other = [name for name in ("model_type", "layers", "sizes") if was[name] != now[name]]
    kinds = [torch.finfo(getattr(torch, either["dtype"])) for either in (was, now)]
    eps, least = max(k.eps for k in kinds), max(k.eps * k.tiny for k in kinds)
    names, likeness = was["sample"].keys() & now["sample"].keys(), {"weights": []}
    changed = len(names) < max(len(was["sample"]), len(now["sample"]))
    for name in names:
        a, b = (np.frombuffer(b64decode(x["sample"][name]), np.float32) for x in (was, now))
        changed |= not (np.abs(a - b) <= eps * np.abs(a) + least).all()
        if name in matrices and a.any():
            for part in ("weights", ".".join(name.split(".")[:3])):
                likeness.setdefault(part, []).append(a @ b / np.sqrt((a @ a) * max(b @ b, 1e-30)))
    return other + sorted(k for k, r in likeness.items() if not np.mean(r or [0]) > ALIKE), changed


def _another_unembedding(known: dict, model: nn.Module) -> list[str]:
    from accelerate.utils import align_module_device

    head = describe(model).unembedding_module
    with align_module_device(head):
        weight = head.weight.detach().to("cpu", torch.bfloat16).contiguous()
    same = hashlib.sha256(weight.view(torch.int16).numpy()).hexdigest()
    return [] if same == known.get("unembedding_hash") else ["unembedding"]


def from_tensor(packed: Tensor) -> dict:
    """What `about` gave, of the bytes that stand for it in a state dict."""
    return json.loads(zlib.decompress(bytes(packed.to(torch.uint8).tolist())))


def write(
    folder: str | Path, known: dict, tensors: dict[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write an adapter's tensors and what is known of it; other files stay."""
    tensors = {PREFIX + k: t.to(dtype or t.dtype).cpu().contiguous() for k, t in tensors.items()}
    with atomic_file(Path(folder) / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary)
    with atomic_file(Path(folder) / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def read(folder: str | Path, model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """(options, tensors) of an adapter that was trained on this model.

    folder: see `BackAttentionModel.from_pretrained`, as for AdapterError.
    """
    describe(model)  # or UnsupportedModelError
    trainers = Path(folder) / TRAINER_FILE
    try:
        if trainers.exists() and not (Path(folder) / CONFIG_FILE).exists():
            tensors = load_file(trainers)
            known = from_tensor(tensors.pop(ABOUT))
        else:
            known = json.loads(_path(folder, CONFIG_FILE).read_text(encoding="utf-8"))
            weights = _path(folder, WEIGHTS_FILE)
            tensors = load_file(weights) if known.get("peft_type") == PEFT_TYPE else {}
        if tensors:
            check_base(known, model, folder)
    except AdapterError:
        raise
    except (*DAMAGE, SafetensorError, OSError) as error:
        raise AdapterError(f"{folder} is damaged ({error!r}). Fetch the adapter again.") from error
    if not tensors:
        raise AdapterError(
            f"{folder} holds an adapter of type {known.get('peft_type')!r}, not {PEFT_TYPE}. Load "
            "it with peft."
        )
    return known, {name.removeprefix(PREFIX): t for name, t in tensors.items()}


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


def card(base: str, repository: str) -> str:
    """The README.md of an adapter on the Hugging Face hub."""
    base = Path(base).name if Path(base).is_absolute() else base  # no path of this machine
    on_hub = [f"base_model: {base}"] if base.count("/") == 1 else []
    return "\n".join(
        [
            *("---", "library_name: backattn", *on_hub, "tags: [back-attention, adapter]", "---"),
            f"# Back attention on {base}\n",
            "A low layer attends to the high layers' states, and the upper layers run again.\n",
            "```python\nimport backattn\n",
            f'model, tokenizer = backattn.load_model("{base}")',
            f'wrapped = backattn.BackAttentionModel.from_pretrained(model, "{repository}")\n```\n',
        ]
    )
