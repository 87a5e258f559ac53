"""Hooks that are always removed, and a model to which nobody else does anything meanwhile."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from backattn.models.decoder import describe

PLAIN = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
_locks: "weakref.WeakKeyDictionary[nn.Module, object]" = weakref.WeakKeyDictionary()


def exclusive(model: nn.Module):
    """The lock that a thread holds while it changes a model, or the base model in a wrapper."""
    while "base_model" in model._modules:
        model = model._modules["base_model"]
    return _locks.setdefault(model, threading.RLock())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for this thread alone, without gradients, autocast, inference mode and
    wishes in its config; afterwards all is as it was. Raises UnsupportedModelError (`describe`)."""
    config = describe(model).model.config
    full = torch.autocast(model.device.type, enabled=False)
    with exclusive(model), torch.inference_mode(False), torch.no_grad(), full:
        training = [module for module in model.modules() if module.training]
        wishes = {name: getattr(config, name) for name in PLAIN}
        try:
            for name, value in PLAIN.items():
                setattr(config, name, value)
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
            for name, value in wishes.items():
                setattr(config, name, value)


def analysis(function: Callable) -> Callable:
    """A function of a model that runs while it is `evaluating`."""

    @functools.wraps(function)
    def alone(model: nn.Module, *args, **kwargs):
        with evaluating(model):
            return function(model, *args, **kwargs)

    return alone


@contextlib.contextmanager
def hooks(*hooked: tuple[nn.Module, str, Callable]) -> Iterator[None]:
    """Attach hooks for this thread while the block runs, and remove them whatever happens in it.

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
    thread = threading.get_ident()

    def before(function: Callable, first: bool, module: nn.Module, args: tuple, kwargs: dict):
        if threading.get_ident() != thread:
            return None
        if not first:
            return function(args, kwargs)
        key = None if args else next(k for k in ("hidden_states", "input") if k in kwargs)
        new = function(args[0] if args else kwargs[key])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, key: new})

    def after(function: Callable, first: bool, module: nn.Module, args: tuple, output):
        if threading.get_ident() != thread:
            return None
        if not (first and isinstance(output, tuple)):
            return function(output)
        new = function(output[0])
        return None if new is None else (new, *output[1:])

    with contextlib.ExitStack() as attached:
        for module, side, function in hooked:
            if side in ("input", "arguments"):
                hook = functools.partial(before, function, side == "input")
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                hook = functools.partial(after, function, side == "output")
                handle = module.register_forward_hook(hook)
            attached.callback(handle.remove)
        yield


@contextlib.contextmanager
def in_place_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """A module with another forward for this thread; afterwards with what accelerate gave it as its
    own, or its class's.

    Example:
        >>> with in_place_of(model.lm_head, lambda x: x[..., :1]):
        ...     model(tokenizer("Spain", return_tensors="pt").input_ids).logits.shape
        torch.Size([1, 1, 1])
    """
    own, usual, thread = vars(module), module.forward, threading.get_ident()
    before = {"forward": own["forward"]} if "forward" in own else {}

    def either(*args, **kwargs):
        return (forward if threading.get_ident() == thread else usual)(*args, **kwargs)

    own["forward"] = either
    try:
        yield
    finally:
        own.pop("forward", None)
        own.update(before)


@contextlib.contextmanager
def begin_at(blocks: Sequence, layer: int, states: torch.Tensor) -> Iterator[None]:
    """A forward pass that begins with a layer (of `describe(model).blocks`), in the states
    [B, T, D] that enter it; layers below are not run.

    Example:
        >>> ids, blocks = tokenizer("Spain", return_tensors="pt").input_ids, describe(model).blocks
        >>> before = model(ids, output_hidden_states=True)
        >>> with begin_at(blocks, 2, before.hidden_states[2]):
        ...     bool(torch.allclose(model(ids).logits, before.logits, atol=1e-5))
        True
    """
    with contextlib.ExitStack() as stack:
        for block in blocks[:layer]:
            skip: Callable = lambda hidden_states, *_, **__: hidden_states  # noqa: E731
            stack.enter_context(in_place_of(block.module, skip))
        stack.enter_context(hooks((blocks[layer].module, "input", lambda _: states)))
        yield
