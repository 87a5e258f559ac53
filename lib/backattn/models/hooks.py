"""Hooks that are always removed."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn


@contextlib.contextmanager
def hooks(*hooked: tuple[nn.Module, str, Callable]) -> Iterator[None]:
    """Attach hooks while the block runs, and remove them whatever happens in it.

    Each entry is (module, "input" or "output", function). An "input" function gets the first input
    and may return its replacement; an "output" function gets the first output and may do the same.

        with hooks((layer, "output", states.append)):
            model(ids)
    """
    handles = []
    try:
        for module, side, function in hooked:
            if side == "input":
                handles.append(
                    module.register_forward_pre_hook(_on_input(function), with_kwargs=True)
                )
            else:
                handles.append(module.register_forward_hook(_on_output(function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook
