"""Running the upper layers again with updates made from the states of a first pass."""

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from backattn.adapters.cache import _cache_in, _OnlyPass, _SecondPass
from backattn.adapters.modules import BackAttention
from backattn.models.decoder import describe
from backattn.models.devices import runs_on
from backattn.models.next_token import cache_prefix


@dataclass
class _Pass:
    """What one forward pass of the decoder leaves for its second half."""

    past: int  # tokens in the cache before this pass
    mask: Tensor | None  # [B, past + T]
    states: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, T, D]
    settings: dict[int, tuple[tuple, dict]] = field(
        default_factory=dict
    )  # layer -> its other arguments
    again: bool = False  # the second pass is running
    single: bool = False  # a new token in one pass, see `BackAttentionModel.one_pass`


class TwoPassModel(nn.Module):
    """A decoder that gets updates at source layers, made from the states of a first pass.

    An update is a module with `remember(memory)`, which makes what is kept of earlier positions (or None), and
    `forward(h, keys, values, visible)`. Where the memory layers lie above a source layer, the layers from the lowest
    source layer on run twice; else the update is made on the way and one pass is enough.

    While wrapped, the model itself (`base_model`) is the adapted one, until `unload`. Its weights are frozen unless
    freeze_base=False. Padding may stand on either side; a forward pass of GPT-2 with padding on the left needs
    position_ids, as it does without an adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        updates: dict[int, nn.Module],
        memory: Sequence[int],
        freeze_base: bool = True,
    ):
        super().__init__()
        self._arch = describe(model)
        if model in _wrapped:
            raise ValueError(
                "This model carries an adapter already: call unload() on the wrapped model first."
            )
        self.base_model = model
        self.layers, self.sources, self.memory_layers = (
            len(self._arch.blocks),
            tuple(sorted(updates)),
            tuple(memory),
        )
        self.two_passes = bool(memory) and max(memory) > self.sources[0]
        self.updates = nn.ModuleDict({str(layer): updates[layer] for layer in self.sources})
        for layer in self.sources:
            self.updates[str(layer)].to(runs_on(self._arch.blocks[layer].module))
        self._required_gradient = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(not freeze_base)
        self.enabled, self._pass, self._given, self._maps = True, None, None, None
        self.one_pass = False  # see `BackAttentionModel`
        self._cells: Tensor | None = None  # these two: see `BackAttentionModel.edited`
        self._instead: Tensor | None = None
        self._asleep: list[tuple[nn.Module, object]] = []
        self._attach()
        _wrapped.add(model)

    @property
    def needed(self) -> tuple[int, ...]:
        """The states of the first pass that the rest is made from, lowest first."""
        return tuple(sorted({self.sources[0], *self.memory_layers}))

    # ------------------------------------------------------------ hooks

    def _attach(self) -> None:
        decoder = self.base_model.get_submodule(self._arch.family.layers.rpartition(".")[0])
        self._handles = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, always_call=True),
            self._arch.final_norm_module.register_forward_pre_hook(self._before_final_norm),
        ]
        for layer, block in enumerate(self._arch.blocks):
            self._handles.append(
                block.module.register_forward_pre_hook(self._before_layer(layer), with_kwargs=True)
            )

    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        self._pass = None  # an interrupt may have left one
        if not self.enabled:
            return
        if self.two_passes and any(
            kwargs.get(f"output_{what}") for what in ("hidden_states", "attentions")
        ):
            raise ValueError(
                "With back attention the layers run twice: output_hidden_states and output_attentions would mix both "
                "passes. Leave them out; see attention_maps() for the memory, first_pass_states() for the first pass."
            )
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ValueError(
                "Back attention needs the attention mask as [batch, time] with 1 for real tokens, or none."
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        tokens = (
            given.get("input_ids")
            if given.get("input_ids") is not None
            else given.get("inputs_embeds")
        )
        single = (
            self.one_pass
            and self.two_passes
            and past > 0
            and tokens.shape[1] == 1
            and self._given is None
        )
        if single and not all(
            isinstance(update, BackAttention) for update in self.updates.values()
        ):
            raise ValueError(
                "One pass is for back attention: this adapter needs a token's own final state."
            )
        if single and any(edit is not None for edit in (self._cells, self._instead, self._maps)):
            raise ValueError(
                "In one pass the memory can be neither edited nor mapped: set one_pass to False."
            )
        self._pass = _Pass(past, mask, single=single)

    def _end(self, *_) -> None:
        self._pass = None

    def _before_layer(self, layer: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict):
            now = self._pass
            if now is None or now.again:
                return None
            named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            h = args[0] if args else kwargs["hidden_states"]  # [B, T, D]
            now.settings[layer] = (args[1:], named)
            if layer in self.needed:
                now.states[layer] = h
            if now.single:
                return self._only_pass(layer, h, now) if layer >= self.sources[0] else None
            if self.two_passes or self._given is not None or layer not in self.sources:
                return None
            return (h + self._update(layer, h, now), *args[1:]), named

        return hook

    def _before_final_norm(self, module: nn.Module, args: tuple):
        now = self._pass
        if now is None or not (self.two_passes or self._given is not None):
            return None
        if now.single:
            now.states[self.layers] = args[0]
            for source in self.sources:
                self._memory_cache(_cache_in(now.settings[0]), source, now).update(
                    *self._remember(source, now)
                )
            return None
        if self._given is not None:
            self._wake()
            now.states = dict(zip(self.needed, self._given, strict=True))
        elif self.layers in self.needed:
            now.states[self.layers] = args[0]
        return (self._run_again(now), *args[1:])

    def _only_pass(self, layer: int, h: Tensor, now: _Pass) -> tuple[tuple, dict]:
        """The arguments of a layer from the lowest source layer on, for a new token [B, 1, D] that has one pass."""
        args, kwargs = now.settings[layer]
        cache = _cache_in(now.settings[0])
        if layer in self.sources:
            memory = self._memory_cache(cache, layer, now)
            visible = self._visible(now, h)[:, :, :-1]  # [B, 1, past]
            own = h.to(memory.keys.device)
            h = h + self.updates[str(layer)](
                own, memory.keys, memory.values, visible.to(own.device)
            ).to(h)
        once = _OnlyPass(cache, self.layers - self.sources[0])
        args = tuple(once if value is cache else value for value in args)
        return (h, *args), {
            name: once if value is cache else value for name, value in kwargs.items()
        }

    def _run_again(self, now: _Pass) -> Tensor:
        """Layers from the lowest source layer on, with the updates: the new state before the final norm [B, T, D]."""
        now.again = True
        cache = _cache_in(now.settings[0])
        second = None
        if cache is not None:
            self._extend(cache)
            second = _SecondPass(cache, self.layers - self.sources[0] if self.two_passes else 0)
        h = now.states[self.sources[0]]
        for layer in range(self.sources[0], self.layers):
            if layer in self.sources:
                h = h + self._update(layer, h, now)
            args, kwargs = now.settings[layer]
            args = (
                tuple(second if value is cache else value for value in args)
                if cache is not None
                else args
            )
            kwargs = {
                k: second if cache is not None and value is cache else value
                for k, value in kwargs.items()
            }
            out = self._arch.blocks[layer].module(h, *args, **kwargs)
            h = out[0] if isinstance(out, tuple) else out
        return h

    def _update(self, layer: int, h: Tensor, now: _Pass) -> Tensor:
        """What is added to h [B, T, D] at a source layer, like h in dtype and device."""
        update, before = self.updates[str(layer)], h
        h = h.to(next(update.parameters()).device)
        keys = values = visible = None
        if self.memory_layers:
            self._check_edits(h, now.past)
            keys, values = self._remember(layer, now)
            cache = _cache_in(now.settings[0])
            if cache is not None:
                if self._instead is not None:
                    raise ValueError(
                        "No other memory can be read where there is a cache: pass use_cache=False."
                    )
                keys, values = self._memory_cache(cache, layer, now).update(keys, values)
            visible = self._visible(now, h)
            if self._cells is not None:
                visible = visible[:, :, None] & self._cells  # [B, T, M, S]
        if self._maps is not None:
            self._maps[layer] = update.weights(h, keys, visible).detach()
        return update(h, keys, values, visible).to(before)

    def _check_edits(self, h: Tensor, past: int) -> None:
        """Raises ValueError when what is edited (see `BackAttentionModel.edited`) does not fit h [B, T, D]."""
        batch, time, _ = h.shape
        if self._instead is not None and self._instead.shape[1:] != h.shape:
            raise ValueError(
                f"memory is {list(self._instead.shape[1:])} per layer; this pass has {list(h.shape)}."
            )
        if self._cells is not None:
            one, queries, _, positions = self._cells.shape
            if one not in (1, batch) or queries not in (1, time) or positions != past + time:
                raise ValueError(
                    f"cells are for {one} texts, {queries} queries and {positions} positions; this pass has {batch} "
                    f"texts, {time} queries and {past + time} positions."
                )

    def _remember(self, layer: int, now: _Pass) -> tuple[Tensor, Tensor]:
        """Keys and values of this pass's memory for the module of a source layer: [B, K, T, d] each."""
        update, memory = self.updates[str(layer)], self._instead
        device = next(update.parameters()).device
        if memory is None:
            memory = torch.stack([now.states[t].to(device) for t in self.memory_layers])
        return update.remember(memory.to(device))

    def _memory_cache(self, cache: Cache, layer: int, now: _Pass) -> DynamicLayer:
        """Where a source layer's memory of earlier tokens lies; raises ValueError where theirs is not there."""
        self._extend(cache)
        place = len(cache.layers) - len(self.sources) + self.sources.index(layer)
        if cache.layers[place].get_seq_length() != now.past:
            raise ValueError(
                "This cache was filled while the adapter was off, or by another model: start with a fresh one."
            )
        return cache.layers[place]

    def _visible(self, now: _Pass, h: Tensor) -> Tensor:
        """Which positions each query may read: [B, T, past + T]. Each sees itself, so that padding gives no NaN."""
        total = now.past + h.shape[1]
        rows, columns = (
            torch.arange(now.past, total, device=h.device)[:, None],
            torch.arange(total, device=h.device),
        )
        visible = (columns <= rows).expand(len(h), -1, -1)
        if now.mask is not None:
            if now.mask.shape[1] != total:
                raise ValueError(
                    f"The attention mask covers {now.mask.shape[1]} tokens; there are {total}."
                )
            visible = (visible & now.mask.bool().to(h.device)[:, None]) | (columns == rows)
        return visible

    def _extend(self, cache: Cache) -> None:
        """Room behind the first pass's layers: one layer per layer that runs again, one per source layer's memory."""
        while len(cache.layers) < self.layers and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        again = cache.layers[self.sources[0] : self.layers] if self.two_passes else []
        if len(cache.layers) > self.layers:
            return
        for layer in cache.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"Back attention cannot use a cache of {type(layer).__name__}; leave the default, DynamicCache."
                )
        for layer in again:
            sliding = isinstance(layer, DynamicSlidingWindowLayer)
            cache.layers.append(
                DynamicSlidingWindowLayer(layer.sliding_window) if sliding else DynamicLayer()
            )
        cache.layers += [DynamicLayer() for _ in self.sources]

    # ------------------------------------------------------------ use

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        first_pass: Tensor | None = None,
        **kwargs,
    ):
        """The wrapped model's own forward, with the adapter in force; returns what it returns.

        first_pass: [K, B, T, D] from `first_pass_states` for these very tokens; the first pass is then left out. With a
        cache (past_key_values) input_ids are the last T tokens of the texts in it: what it holds of those before is
        used, and it stays as it is; no cache is returned. attention_mask is then of the whole texts, which must fit
        into a sliding window. Raises ValueError where states, mask or cache do not fit.
        """
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if labels is not None:
            kwargs["labels"] = labels
        if first_pass is None:
            return self.base_model(**kwargs)
        if len(first_pass) != len(self.needed) or not self.enabled:
            raise ValueError(
                f"first_pass must hold the {len(self.needed)} states {self.needed}, and the adapter be on."
            )
        cache = kwargs.get("past_key_values")
        if cache is not None:
            if attention_mask is None:
                raise ValueError(
                    "With first_pass and a cache pass attention_mask too, of the whole texts."
                )
            kwargs["past_key_values"] = cache_prefix(
                cache, attention_mask.shape[1] - input_ids.shape[1]
            )
        self._given = first_pass
        self._skip(self._arch.blocks)  # only the arguments that each layer would get are wanted
        try:
            out = self.base_model(**{**kwargs, "use_cache": cache is not None})
            if cache is not None and not isinstance(out, tuple):
                out["past_key_values"] = None  # the layers of the first pass have not grown
            return out
        finally:
            self._given = None
            self._wake()

    def _skip(self, blocks: Sequence) -> None:
        """Let layers hand on what they get until `_wake`; others may have put a forward of their own on them."""
        for block in blocks:
            self._asleep.append((block.module, block.module.__dict__.get("forward")))
            block.module.forward = _pass_through

    def _wake(self) -> None:
        while self._asleep:
            module, forward = self._asleep.pop()
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward

    @torch.no_grad()
    def first_pass_states(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> Tensor:
        """The states that the second pass needs, from one unmodified pass: [K, B, T, D], in the model's dtype."""
        seen: dict[int, Tensor] = {}

        def keep(layer: int):
            return lambda module, args, kwargs: seen.update(
                {layer: args[0] if args else kwargs["hidden_states"]}
            )

        modules = [*(block.module for block in self._arch.blocks), self._arch.final_norm_module]
        handles = [
            modules[t].register_forward_pre_hook(keep(t), with_kwargs=True) for t in self.needed
        ]
        # A place, not a count: see `training.answer_logits`.
        last = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)
        try:
            self._skip(self._arch.blocks[self.needed[-1] :])
            with self.disable_adapter():
                self.base_model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    use_cache=False,
                    logits_to_keep=last,
                )
        finally:
            self._wake()
            for handle in handles:
                handle.remove()
        return torch.stack([seen[t].to(input_ids.device) for t in self.needed])

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The unadapted model while the block runs."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextlib.contextmanager
    def attention_maps(self) -> Iterator[dict[int, Tensor]]:
        """Record the weights of the latest forward pass: source layer -> [B, H, T, M, S] (see `BackAttention.weights`).

        with wrapped.attention_maps() as maps:
            wrapped(input_ids)
        """
        self._maps = {}
        try:
            yield self._maps
        finally:
            self._maps = None

    def generate(self, *args, **kwargs) -> Tensor:
        """The wrapped model's `generate`; both passes and the memory are cached. A new token costs two short passes, or
        one (`BackAttentionModel.one_pass`)."""
        return self.base_model.generate(*args, **kwargs)

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's tensors by name, as they are: "updates.6.q_proj.weight" and so on."""
        return {f"updates.{name}": p.detach() for name, p in self.updates.named_parameters()}

    def state_dict(self, *args, **kwargs) -> dict:
        """What is trained: the adapter's tensors, and the base model's where they are not frozen."""
        trained = {
            name
            for name, p in self.named_parameters()
            if p.requires_grad or name.startswith("updates.")
        }
        return {
            name: value
            for name, value in super().state_dict(*args, **kwargs).items()
            if name in trained
        }

    def trainable(self) -> tuple[int, int]:
        """Numbers of weights: (trained, all)."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, on in sizes if on), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how many weights are trained."""
        trained, total = self.trainable()
        print(
            f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
        )

    def unload(self) -> nn.Module:
        """Take the adapter off; returns the base model as it was, its weights' requires_grad included."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name, p in self.base_model.named_parameters():
            p.requires_grad_(self._required_gradient[name])
        _wrapped.discard(self.base_model)
        return self.base_model

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


_wrapped: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def _pass_through(hidden_states: Tensor, *_, **__) -> Tensor:
    return hidden_states
