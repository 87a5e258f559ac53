"""Hooks that are always removed."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn


@contextlib.contextmanager
def hooks(*hooked: tuple[nn.Module, str, Callable]) -> Iterator[None]:
    """Attach hooks while the block runs, and remove them whatever happens in it.

    Each entry is (module, side, function). What the function returns replaces what it gets; None
    leaves that as it is. It gets, by side:
        "input", "output": the module's first input or output, a tensor;
        "arguments": all inputs, as function(args, kwargs), and returns both or None;
        "whole output": the output as the module returns it, which may be a tuple.

    Example:
        >>> states = []
        >>> with hooks((model.model.layers[1], "output", states.append)):
        ...     _ = model(tokenizer("the capital of Spain", return_tensors="pt").input_ids)
        >>> states[0].shape
        torch.Size([1, 4, 32])
    """
    with contextlib.ExitStack() as attached:
        for module, side, function in hooked:
            hook = _HOOKS[side](function)
            if side in ("input", "arguments"):
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = module.register_forward_hook(hook)
            attached.callback(handle.remove)
        yield


def _on_input(function: Callable) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict):
        key = None if args else next(k for k in ("hidden_states", "input") if k in kwargs)
        new = function(args[0] if args else kwargs[key])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, key: new})

    return hook


def _on_output(function: Callable) -> Callable:
    def hook(module: nn.Module, args: tuple, output):
        new = function(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if isinstance(output, tuple) and new is not None else new

    return hook


_HOOKS = {
    "input": _on_input,
    "output": _on_output,
    "arguments": lambda function: lambda module, args, kwargs: function(args, kwargs),
    "whole output": lambda function: lambda module, args, output: function(output),
}
