"""Where a model's weights lie: on one device, or spread over several by accelerate."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM

MEMORY_SHARE = 0.8  # share of the free memory that weights may take


def one_device(device: str | torch.device) -> torch.device:
    """A device by its name; "auto": a GPU where there is one."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def runs_on(module: nn.Module) -> torch.device:
    """The device on which a module computes, wherever accelerate keeps its weights until then."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):  # execution_device may be 0, the first GPU
        if (device := getattr(one, "execution_device", None)) is not None:
            return torch.device(device)
    return next(module.parameters()).device


def input_device(model: nn.Module) -> torch.device:
    """The device on which a model takes its tokens.

    Example:
        >>> input_device(model), in_one_place(model)
        (device(type='cpu'), True)
    """
    return runs_on(model.get_input_embeddings())


def in_one_place(model: nn.Module) -> bool:
    """Whether all weights lie on one device, not spread by a device_map of accelerate's."""
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
