"""Hooks that are always removed."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator

from torch import nn

_locks: "weakref.WeakKeyDictionary[nn.Module, object]" = weakref.WeakKeyDictionary()


def exclusive(model: nn.Module):
    """The lock that a thread holds while it changes a model, or the base model in a wrapper."""
    while "base_model" in model._modules:
        model = model._modules["base_model"]
    return _locks.setdefault(model, threading.RLock())


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
                hook = functools.partial(_before, function, side == "input")
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                hook = functools.partial(_after, function, side == "output")
                handle = module.register_forward_hook(hook)
            attached.callback(handle.remove)
        yield


def _before(function: Callable, first: bool, module: nn.Module, args: tuple, kwargs: dict):
    if not first:
        return function(args, kwargs)
    key = None if args else next(k for k in ("hidden_states", "input") if k in kwargs)
    new = function(args[0] if args else kwargs[key])
    if new is None:
        return None
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, key: new})


def _after(function: Callable, first: bool, module: nn.Module, args: tuple, output):
    if not (first and isinstance(output, tuple)):
        return function(output)
    new = function(output[0])
    return None if new is None else (new, *output[1:])
