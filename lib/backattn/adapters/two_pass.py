"""A decoder that gets updates at source layers, made from the states of a first pass."""

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from backattn.adapters.call import attached
from backattn.adapters.modules import BackAttention, Update
from backattn.models.decoder import Arch, describe
from backattn.models.devices import runs_on
from backattn.models.hooks import exclusive
from backattn.models.next_token import cache_prefix


@dataclass
class _Base:
    """A model that carries adapters. requires_grad: of its weights, before the first of them."""

    requires_grad: dict[str, bool]
    carries: "weakref.WeakSet[TwoPassModel]" = field(default_factory=weakref.WeakSet)
    applied: "TwoPassModel | None" = None


_bases: "weakref.WeakKeyDictionary[nn.Module, _Base]" = weakref.WeakKeyDictionary()
# What `with` blocks of this thread ask of a model: id of the model -> options of `Call`.
_requests: ContextVar[dict[int, dict]] = ContextVar("requests")
# Of the base model's methods those that would leave the adapter out.
_NOT_THE_BASES = {"save_pretrained", "push_to_hub", "generate_batch", "init_continuous_batching"}


class _Forward(functools.partial):
    """A method with the base model's signature on an instance, by which Trainer keeps columns."""

    def __get__(self, model, owner):
        return self if model is None else _Forward(self.func, model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.args[0].base_model.forward if self.args else self.func)


class TwoPassModel(nn.Module):
    """A decoder that gets updates at source layers, made from the states of a first pass.

    updates: source layer -> `Update`. memory: the layers whose states it remembers. Where one lies
    above a source layer, the layers from the lowest source layer on run twice. The base model's
    weights are frozen unless freeze_base=False; it is the plain model, except while this one runs,
    in its thread. It may carry several adapters, of which one runs at a time, if it stays frozen.
    Threads that call wait for each other. Padding may stand on either side; GPT-2
    with padding on the left needs position_ids, as it does without an adapter.
    """

    def __init__(self, model, updates: dict[int, Update], memory: Sequence[int], freeze_base=True):
        super().__init__()
        arch = describe(model)
        others = _bases[model].carries if model in _bases else ()
        if others and not (freeze_base and all(other.frozen for other in others)):
            raise ValueError(
                "This model carries an adapter already, and its own weights are trained: call "
                "unload() first, or freeze the base for all."
            )
        self.base_model, self.training = model, model.training
        self.layers, self.memory_layers = len(arch.blocks), tuple(memory)
        self.sources = tuple(sorted(updates))
        self.two_passes = bool(memory) and max(memory) > self.sources[0]
        # The states of the first pass that the rest is made from, lowest first.
        self.needed = tuple(sorted({self.sources[0], *memory}))
        self.updates = nn.ModuleDict({str(layer): updates[layer] for layer in self.sources})
        for layer, update in updates.items():
            update.to(runs_on(arch.blocks[layer].module), torch.float32)
        now = {name: p.requires_grad for name, p in model.named_parameters()}
        self._required_gradient = _bases[model].requires_grad if model in _bases else now
        model.requires_grad_(not freeze_base)
        self.enabled = True
        self.one_pass = False  # see `BackAttentionModel`
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_frozen_may_lack)
        self._carried()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self._required_gradient is not None:
            self._carried()

    def _carried(self) -> None:
        base = _bases.setdefault(self.base_model, _Base(self._required_gradient))
        base.carries.add(self)

    @property
    def _arch(self) -> Arch:
        return describe(self.base_model)

    @property
    def frozen(self) -> bool:
        return not any(p.requires_grad for p in self.base_model.parameters())

    def _forward(self, input_ids=None, attention_mask=None, labels=None, first_pass=None, **kwargs):
        """The base model's own forward, with the adapter in force.

        first_pass: [K, B, T, D] from `first_pass_states` for these very tokens; the first pass is
        then left out. With a cache input_ids are the last T tokens of the texts in it; what it
        holds of those before is used, it stays as it is, and none is returned; attention_mask is of
        the whole texts, which must fit into a sliding window. Raises ValueError where states, mask
        or cache do not fit, and for texts packed into one row.
        """
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        cache = kwargs.get("past_key_values")
        if first_pass is None:
            with self.applied():
                return self.base_model(**kwargs)
        if len(first_pass) != len(self.needed) or self.request["off"]:
            states = f"the {len(self.needed)} states {self.needed}"
            raise ValueError(f"first_pass must hold {states}, and the adapter be on.")
        if cache is not None:
            if attention_mask is None:
                raise ValueError(
                    "With first_pass and a cache pass the whole texts' attention_mask."
                )
            earlier = attention_mask.shape[1] - input_ids.shape[1]
            kwargs["past_key_values"] = cache_prefix(cache, earlier)
        with self._asked(first_pass=first_pass), self.applied():
            out = self.base_model(**{**kwargs, "use_cache": cache is not None})
        if cache is not None and not isinstance(out, tuple):
            out["past_key_values"] = None  # the layers of the first pass have not grown
        return out

    forward = _Forward(_forward)

    @torch.no_grad()
    def first_pass_states(self, input_ids, attention_mask, position_ids) -> Tensor:
        """The states entering the layers `needed`, from one unmodified pass: [K, B, T, D]."""
        states: dict[int, Tensor] = {}
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        # A place, not a count: see `training.evaluation.answer_logits`.
        last = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)
        with self._asked(states=states), self.applied():
            self.base_model(input_ids, **inputs, logits_to_keep=last, use_cache=False)
        return torch.stack([states[t].to(input_ids.device) for t in self.needed])

    @property
    def request(self) -> dict:
        """What this thread asks of calls: options of `Call`, and whether the adapter is off."""
        return {"off": not self.enabled, **_requests.get({}).get(id(self), {})}

    @contextlib.contextmanager
    def _asked(self, **changes) -> Iterator[None]:
        """The request of this thread with some changes, while the block runs."""
        if self._required_gradient is None:
            raise ValueError("This adapter was taken off by unload(): wrap the model anew.")
        before = _requests.get({})
        _requests.set({**before, id(self): {**before.get(id(self), {}), **changes}})
        try:
            yield
        finally:
            _requests.set(before)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """`base_model` itself is the adapted model while the block runs, for what needs its class,
        in this thread; others that call wait. Raises ValueError within another adapter's block."""
        if self.request.get("applied") == threading.get_ident():
            yield
            return
        with exclusive(self), self._asked(applied=threading.get_ident()):
            base = _bases[self.base_model]
            if base.applied is not None:
                raise ValueError("Another adapter of this model is applied: leave its block first.")
            base.applied = self
            try:
                with attached(self):
                    yield
            finally:
                base.applied = None

    def edited(
        self, cells: Tensor | None = None, memory: Tensor | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Change what this thread can read while the block runs, to test what is used.

        cells: [B, T, M, S] bool (B and T may be 1): False hides a (memory layer, position) from a
        query. The softmax goes over the others, and a query that may read none gets no update. Of
        numbers from 0 to 1: a cell's weight is multiplied by it, and the others stay what they are.
        S counts the positions in a cache too. memory: [M, B, S, D], states to be read instead of
        the first pass's; not with a cache. Raises ValueError for another shape, here or in the
        call, for other numbers, and for cells where an update does not attend.
        """
        count, width = len(self.memory_layers), self._arch.width
        attends = all(isinstance(update, BackAttention) for update in self.updates.values())
        if cells is not None and not attends:
            raise ValueError("Only back attention reads cells; give another memory instead.")
        if cells is not None and (cells.dim() != 4 or cells.shape[2] != count):
            shape = f"[batch, queries, {count} memory layers, positions]"
            raise ValueError(f"cells must be {shape}, not {list(cells.shape)}.")
        numbers = cells is not None and cells.dtype != torch.bool
        if numbers and not (cells.is_floating_point() and ((cells >= 0) & (cells <= 1)).all()):
            raise ValueError("cells must be True or False, or numbers from 0 to 1.")
        if memory is not None and (memory.dim() != 4 or memory.shape[::3] != (count, width)):
            shape = f"[{count} memory layers, batch, positions, width {width}]"
            raise ValueError(f"memory must be {shape}, not {list(memory.shape)}.")
        return self._asked(cells=cells, memory=memory)

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        """The unadapted model while the block runs, in this thread."""
        return self._asked(off=True)

    def generate(self, inputs=None, generation_config=None, **kwargs) -> Tensor:
        """The base model's `generate`, adapted; both passes and the memory are cached.

        A new token costs two short passes, or one (`BackAttentionModel.one_pass`). Raises
        ValueError, before any work, for an assistant or prompt lookup where caches cannot take back
        what they guess: with a sliding window, or in one pass.
        """
        config = generation_config or self.base_model.generation_config
        asked = {k for k, v in {**vars(config), **kwargs}.items() if v is not None}
        wrong = {"assistant_early_exit", *(["prefill_chunk_size"] if self.one_pass else [])}
        if self.one_pass or getattr(self.base_model.config, "sliding_window", None):
            wrong |= {"assistant_model", "prompt_lookup_num_tokens"}
        wrong = sorted(wrong & asked)
        if wrong and not self.request["off"]:
            raise ValueError(f"This adapter cannot generate with {', '.join(wrong)}: leave it out.")
        with self.applied():
            return self.base_model.generate(inputs, generation_config, **kwargs)

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's tensors by name, as they are: "updates.6.q_proj.weight" and so on."""
        return {f"updates.{name}": p.detach() for name, p in self.updates.named_parameters()}

    def trainable(self) -> tuple[int, int]:
        """Numbers of weights: (trained, all)."""
        weights = list(self.parameters())
        return sum(p.numel() for p in weights if p.requires_grad), sum(p.numel() for p in weights)

    def print_trainable_parameters(self) -> None:
        """Print how many weights are trained."""
        some, total = self.trainable()
        share = f"trainable%: {100 * some / total:.4f}"
        print(f"trainable params: {some:,} || all params: {total:,} || {share}")

    def unload(self) -> nn.Module:
        """Take the adapter off; returns the base model, with the last one as it was, requires_grad
        included."""
        before, self._required_gradient = self._required_gradient, None
        if before is not None:
            _bases[self.base_model].carries.discard(self)
            if not _bases[self.base_model].carries:
                del _bases[self.base_model]
                for name, p in self.base_model.named_parameters():
                    p.requires_grad_(before[name])
        return self.base_model

    def extra_repr(self) -> str:
        return f"memory_layers={self.memory_layers}"

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _NOT_THE_BASES:
                meant = f"call base_model.{name}() if that is meant"
                raise AttributeError(f"{name} would be without the adapter: {meant}.") from None
            return getattr(super().__getattr__("base_model"), name)


def _leave_out_frozen(model: TwoPassModel, state: dict, prefix: str, _) -> None:
    """A state dict holds what is trained."""
    trained = {prefix + name for name, p in model.named_parameters() if p.requires_grad}
    for key in [k for k in state if k.startswith(f"{prefix}base_model.") and k not in trained]:
        state.pop(key)


def _frozen_may_lack(model: TwoPassModel, incompatible) -> None:
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {f"base_model.{name}" for name in nn.Module.state_dict(model.base_model)} - trained
    missing = [k for k in incompatible.missing_keys if not k.endswith(tuple(frozen))]
    incompatible.missing_keys[:] = missing
