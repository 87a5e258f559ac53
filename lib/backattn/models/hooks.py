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
            if side in ("input", "arguments"):
                hook = _before(function, first=side == "input")
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = module.register_forward_hook(_after(function, first=side == "output"))
            attached.callback(handle.remove)
        yield


def _before(function: Callable, first: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict):
        if not first:
            return function(args, kwargs)
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        key = next(k for k in ("hidden_states", "input") if k in kwargs)
        new = function(kwargs[key])
        return None if new is None else (args, {**kwargs, key: new})

    return hook


def _after(function: Callable, first: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, output):
        if not (first and isinstance(output, tuple)):
            return function(output)
        new = function(output[0])
        return None if new is None else (new, *output[1:])

    return hook
