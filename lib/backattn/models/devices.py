"""Where a model's weights lie: on one device, or spread over several by accelerate."""

import sys

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from backattn import runtime
from backattn.models.checkpoint import ModelLoadError
from backattn.paths import CACHE

MEMORY_SHARE = 0.8  # share of the free memory that weights may take


def one_device(device: str | torch.device) -> torch.device:
    """A device by its name; "auto": a GPU where there is one.

    Example:
        >>> one_device("cpu")
        device(type='cpu')
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def runs_on(module: nn.Module) -> torch.device:
    """The device on which a module computes, wherever accelerate keeps its weights until then.

    Example:
        >>> runs_on(model.model.layers[0])
        device(type='cpu')
    """
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def input_device(model: nn.Module) -> torch.device:
    """The device on which a model takes its tokens.

    Example:
        >>> input_device(model)
        device(type='cpu')
    """
    return runs_on(model.get_input_embeddings())


def in_one_place(model: nn.Module) -> bool:
    """Whether all weights lie on one device, not spread by a device_map of accelerate's.

    Example:
        >>> in_one_place(model)
        True
    """
    devices = set(getattr(model, "hf_device_map", {}).values())
    return len(devices) < 2 and "disk" not in devices


def weight_bytes(config, dtype: torch.dtype) -> int:
    """Bytes that the weights of a model of this configuration take.

    Example:
        >>> weight_bytes(model.config, torch.float32) == 4 * model.num_parameters()
        True
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def spread_options(name: str, config, dtype: torch.dtype, device: str | torch.device) -> dict:
    """Options of from_pretrained that spread a model's layers, where one device cannot hold them.

    None of them where the model fits, unless `device` is "auto". Raises ModelLoadError where
    several processes would each need such a model.
    """
    place = one_device(device)
    need, free = weight_bytes(config, dtype), runtime.free_bytes(place)
    fits = need <= MEMORY_SHARE * free
    if fits and str(device) != "auto":
        return {}
    if not fits:
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
    memory = None if torch.cuda.is_available() else {"cpu": int(MEMORY_SHARE * free)}
    offload = CACHE / "offload"
    offload.mkdir(parents=True, exist_ok=True)
    return {"device_map": "auto", "max_memory": memory, "offload_folder": str(offload)}
