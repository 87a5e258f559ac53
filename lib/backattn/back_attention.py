"""Back attention: after a normal pass, a low layer attends to the high layers' states and the upper layers run again.

State h_t enters layer t; h_L, with L layers, enters the final norm. At source layer s, with memory layers t,

    B_i = Σ softmax_{(t, j ≤ i)} ( N(h_s,i) W_q · N(h_t,j) W_k / √d ) N(h_t,j) W_v W_o        (paper, section 5)

is added to h_s and layers s … L−1 run again; h_t are the states of the first, unmodified pass. Our reading, where the
paper is silent: one softmax over all (layer, position) pairs, and N, an RMS norm without weights, in front of the
projections, because raw high-layer states hold a few huge entries. Both are options of the config.

Everything happens in hooks at layer boundaries, so that the wrapped model's own forward, loss and `generate` are the
adapted ones.
"""

import contextlib
import hashlib
import inspect
import json
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .arch import describe, runs_on
from .residual import beginning
from .runtime import atomic_file

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE = "BACK_ATTENTION"
_PREFIX = "base_model.model."  # PEFT writes it in front of every tensor's name

# pipeline("text-generation") logs an error for a class that is not in this list.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("back_attention", "BackAttentionModel")


class AdapterError(OSError):
    """A saved adapter could not be read, or belongs to another base model. The message says what to do."""


@dataclass(frozen=True)
class BackAttentionConfig:
    """Where back attention sits and how large it is.

    source_layer: layer whose input gets the update; several layers each get a module of their own.
    dim: d′, the width of queries, keys and values over all heads; a module has 4 · width · dim weights.
    memory_layers: states that are read (t: the state entering layer t, L: the one before the final norm); None reads
        the lowest source layer's and all above it.
    norm: RMS norm without weights in front of the projections.
    softmax: "joint" over (layer, position) pairs, or "per-layer" over positions, then the mean over layers.

    Raises ValueError for a size or an option that makes no sense.
    """

    source_layer: int | tuple[int, ...]
    dim: int = 64
    heads: int = 1
    memory_layers: tuple[int, ...] | None = None
    norm: bool = True
    softmax: str = "joint"

    def __post_init__(self):
        layers = [self.source_layer] if not isinstance(self.source_layer, tuple | list) else self.source_layer
        for name, value in (("source_layer", layers), ("memory_layers", self.memory_layers or ())):
            if not all(isinstance(layer, int) for layer in value):
                raise ValueError(f"{name} must be an integer or several, not {getattr(self, name)!r}.")
        if not (isinstance(self.dim, int) and isinstance(self.heads, int)):
            raise ValueError(f"dim and heads must be integers, not {self.dim!r} and {self.heads!r}.")
        if self.dim < 1 or self.heads < 1 or self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must be a positive multiple of heads {self.heads}.")
        if self.softmax not in ("joint", "per-layer"):
            raise ValueError(f'Unknown softmax {self.softmax!r}; choose "joint" or "per-layer".')

    @property
    def sources(self) -> tuple[int, ...]:
        """The source layers, lowest first."""
        layers = (self.source_layer,) if isinstance(self.source_layer, int) else self.source_layer
        return tuple(sorted(layers))

    def memory(self, layers: int) -> tuple[int, ...]:
        """The memory layers of a model with `layers` layers; raises ValueError for a layer that it does not have."""
        sources = self.sources
        if not sources or len(set(sources)) < len(sources) or not 0 <= sources[0] <= sources[-1] < layers:
            raise ValueError(f"source_layer {self.source_layer} must name layers of 0 … {layers - 1}, each once.")
        chosen = self.memory_layers
        chosen = tuple(range(sources[0], layers + 1)) if chosen is None else tuple(sorted(chosen))
        if not chosen or len(set(chosen)) < len(chosen) or not 0 <= chosen[0] <= chosen[-1] <= layers:
            raise ValueError(f"memory_layers {self.memory_layers} must name states of 0 … {layers}, each once.")
        return chosen


def normed(x: Tensor) -> Tensor:
    """x over its root mean square, in fp32: [..., D]."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


class BackAttention(nn.Module):
    """The module of one source layer. W_o starts at zero, so that an untrained module changes nothing, to the bit."""

    def __init__(self, width: int, config: BackAttentionConfig):
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(width, config.dim, bias=False)
        self.k_proj = nn.Linear(width, config.dim, bias=False)
        self.v_proj = nn.Linear(width, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, width, bias=False)
        nn.init.zeros_(self.o_proj.weight)

    def _read(self, x: Tensor) -> Tensor:
        return normed(x) if self.config.norm else x.float()

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.heads, -1))

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of memory states [M, B, S, D]: [B, H·M, S, d] each, the layout of a cache."""
        memory = self._read(memory)

        def project(linear: nn.Linear) -> Tensor:
            return self._heads(linear(memory)).permute(1, 3, 0, 2, 4).flatten(1, 2)  # [B, H·M, S, d]

        return project(self.k_proj), project(self.v_proj)

    def _query(self, h: Tensor) -> Tensor:
        return self._heads(self.q_proj(self._read(h))).transpose(1, 2)  # [B, H, T, d]

    def forward(self, h: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """The update of h [B, T, D] from keys and values of `remember` and visible [B, T, S]: [B, T, D], fp32.

        visible may also be [B, T, M, S], of single cells; a query that sees none gets zero.
        """
        query, heads = self._query(h), self.config.heads
        layers, seen = keys.shape[1] // heads, visible[:, None]  # [B, 1, T, S]
        if visible.dim() == 4:
            weights, values = self.weights(h, keys, visible), values.unflatten(1, (heads, layers))
            mixed = torch.einsum("bhtms,bhmsd->bhtd", weights, values)
            return self.o_proj(mixed.transpose(1, 2).flatten(-2))
        if self.config.softmax == "joint":
            keys, values = (x.unflatten(1, (heads, layers)).flatten(2, 3) for x in (keys, values))  # [B, H, M·S, d]
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen.repeat(1, 1, 1, layers))
        else:
            query = query.repeat_interleave(layers, dim=1)  # [B, H·M, T, d]
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
            mixed = mixed.unflatten(1, (heads, layers)).mean(2)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def weights(self, h: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        """Attention weights of every query over (memory layer, position): [B, H, T, M, S].

        They sum to one; to zero where no cell is visible (per-layer: a layer of which no cell is visible counts zero).
        """
        heads = self.config.heads
        keys = keys.unflatten(1, (heads, keys.shape[1] // heads))  # [B, H, M, S, d]
        scores = torch.einsum("bhtd,bhmsd->bhtms", self._query(h), keys) / math.sqrt(keys.shape[-1])
        seen = visible[:, None] if visible.dim() == 4 else visible[:, None, :, None]  # [B, 1, T, M or 1, S]
        scores = scores.masked_fill(~seen, -math.inf)
        if self.config.softmax == "joint":
            weights = scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])
            return weights.masked_fill(~seen.flatten(-2).any(-1)[..., None, None], 0.0)
        return scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0) / scores.shape[-2]


# ---------------------------------------------------------------- running the upper layers again


@dataclass
class _Pass:
    """What one forward pass of the decoder leaves for its second half."""

    past: int  # tokens in the cache before this pass
    mask: Tensor | None  # [B, past + T]
    states: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, T, D]
    settings: dict[int, tuple[tuple, dict]] = field(default_factory=dict)  # layer -> its other arguments
    again: bool = False  # the second pass is running
    single: bool = False  # a new token in one pass, see `BackAttentionModel.one_pass`


class _SecondPass:
    """A cache as the second pass sees it: its keys and values lie in layers of their own behind the first pass's."""

    def __init__(self, cache: Cache, offset: int):
        self._cache, self._offset = cache, offset

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self._cache.update(keys, values, layer + self._offset, *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._cache, name)


class _OnlyPass(_SecondPass):
    """A cache as the only pass of a new token sees it: earlier tokens' second pass; their first pass's layers get the
    new keys and values too, so that all layers stay of one length."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self._cache.update(keys, values, layer, *args, **kwargs)
        return super().update(keys, values, layer, *args, **kwargs)


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
        self, model: nn.Module, updates: dict[int, nn.Module], memory: Sequence[int], freeze_base: bool = True
    ):
        super().__init__()
        self._arch = describe(model)
        if model in _wrapped:
            raise ValueError("This model carries an adapter already: call unload() on the wrapped model first.")
        self.base_model = model
        self.layers, self.sources, self.memory_layers = len(self._arch.blocks), tuple(sorted(updates)), tuple(memory)
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
            self._handles.append(block.module.register_forward_pre_hook(self._before_layer(layer), with_kwargs=True))

    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        self._pass = None  # an interrupt may have left one
        if not self.enabled:
            return
        if self.two_passes and any(kwargs.get(f"output_{what}") for what in ("hidden_states", "attentions")):
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
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        single = self.one_pass and self.two_passes and past > 0 and tokens.shape[1] == 1 and self._given is None
        if single and not all(isinstance(update, BackAttention) for update in self.updates.values()):
            raise ValueError("One pass is for back attention: this adapter needs a token's own final state.")
        if single and any(edit is not None for edit in (self._cells, self._instead, self._maps)):
            raise ValueError("In one pass the memory can be neither edited nor mapped: set one_pass to False.")
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
                self._memory_cache(_cache_in(now.settings[0]), source, now).update(*self._remember(source, now))
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
            h = h + self.updates[str(layer)](own, memory.keys, memory.values, visible.to(own.device)).to(h)
        once = _OnlyPass(cache, self.layers - self.sources[0])
        args = tuple(once if value is cache else value for value in args)
        return (h, *args), {name: once if value is cache else value for name, value in kwargs.items()}

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
            args = tuple(second if value is cache else value for value in args) if cache is not None else args
            kwargs = {k: second if cache is not None and value is cache else value for k, value in kwargs.items()}
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
                    raise ValueError("No other memory can be read where there is a cache: pass use_cache=False.")
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
            raise ValueError(f"memory is {list(self._instead.shape[1:])} per layer; this pass has {list(h.shape)}.")
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
        rows, columns = torch.arange(now.past, total, device=h.device)[:, None], torch.arange(total, device=h.device)
        visible = (columns <= rows).expand(len(h), -1, -1)
        if now.mask is not None:
            if now.mask.shape[1] != total:
                raise ValueError(f"The attention mask covers {now.mask.shape[1]} tokens; there are {total}.")
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
            cache.layers.append(DynamicSlidingWindowLayer(layer.sliding_window) if sliding else DynamicLayer())
        cache.layers += [DynamicLayer() for _ in self.sources]

    # ------------------------------------------------------------ use

    def forward(self, input_ids=None, attention_mask=None, labels=None, first_pass: Tensor | None = None, **kwargs):
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
                raise ValueError("With first_pass and a cache pass attention_mask too, of the whole texts.")
            kwargs["past_key_values"] = beginning(cache, attention_mask.shape[1] - input_ids.shape[1])
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
    def first_pass_states(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """The states that the second pass needs, from one unmodified pass: [K, B, T, D], in the model's dtype."""
        seen: dict[int, Tensor] = {}

        def keep(layer: int):
            return lambda module, args, kwargs: seen.update({layer: args[0] if args else kwargs["hidden_states"]})

        modules = [*(block.module for block in self._arch.blocks), self._arch.final_norm_module]
        handles = [modules[t].register_forward_pre_hook(keep(t), with_kwargs=True) for t in self.needed]
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
        trained = {name for name, p in self.named_parameters() if p.requires_grad or name.startswith("updates.")}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}

    def trainable(self) -> tuple[int, int]:
        """Numbers of weights: (trained, all)."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, on in sizes if on), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how many weights are trained."""
        trained, total = self.trainable()
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

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


def _cache_in(settings: tuple[tuple, dict]) -> Cache | None:
    """The cache among a layer's arguments."""
    args, kwargs = settings
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


# ---------------------------------------------------------------- back attention on a model


class BackAttentionModel(TwoPassModel):
    """A decoder with back attention; made by `get_back_attention_model` or `from_pretrained`.

    one_pass: set it to True for a cheaper `generate` (our variant). The prompt is read as before, in two passes. A new
    token has one: at the source layer it reads the memory of earlier tokens only, and goes on up from there, attending
    to their second pass. What it leaves in memory are its own states of that pass.
    """

    def __init__(self, model: nn.Module, config: BackAttentionConfig, freeze_base: bool = True):
        arch = describe(model)
        memory = config.memory(len(arch.blocks))
        updates = {layer: BackAttention(arch.width, config) for layer in config.sources}
        super().__init__(model, updates, memory, freeze_base)
        self.back_attention_config = config

    @contextlib.contextmanager
    def edited(self, cells: Tensor | None = None, memory: Tensor | None = None) -> Iterator[None]:
        """Change what can be read while the block runs, to test what is used.

        cells: [B, T, M, S] bool (B and T may be 1): False hides a (memory layer, position) from a query. The softmax
        goes over the others, and a query that may read none gets no update. S counts the positions in a cache too.
        memory: [M, B, S, D], states to be read instead of the first pass's; not with a cache.

        Raises ValueError for another shape, here or when the model is called.
        """
        count = len(self.memory_layers)
        if cells is not None and (cells.dim() != 4 or cells.shape[2] != count):
            raise ValueError(
                f"cells must be [batch, queries, {count} memory layers, positions], not {list(cells.shape)}."
            )
        if memory is not None and (memory.dim() != 4 or len(memory) != count):
            raise ValueError(
                f"memory must be [{count} memory layers, batch, positions, width], not {list(memory.shape)}."
            )
        before = self._cells, self._instead
        self._cells, self._instead = cells, memory
        try:
            yield
        finally:
            self._cells, self._instead = before

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the adapter in PEFT's layout: adapter_config.json and adapter_model.safetensors; other files stay.

        The config names the base model, its revision and a hash of its unembedding, checked on load. dtype: of the
        file, for example torch.float16; None keeps fp32. A base model that was trained too is saved on its own.
        """
        base = self.base_model
        about = {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.config.name_or_path,
            "revision": getattr(base.config, "_commit_hash", None),
            "unembedding_hash": unembedding_hash(base),
            **asdict(self.back_attention_config),
        }
        tensors = {
            _PREFIX + name: t.to(dtype or t.dtype).cpu().contiguous() for name, t in self.adapter_state().items()
        }
        with atomic_file(Path(folder) / WEIGHTS_FILE) as temporary:
            save_file(tensors, temporary)
        with atomic_file(Path(folder) / CONFIG_FILE) as temporary:
            temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path) -> "BackAttentionModel":
        """Put a saved adapter on its base model.

        folder: a local folder, or a Hugging Face id. Raises AdapterError when it is not there, is no back-attention
        adapter, is damaged, or was trained on another base model (another unembedding).
        """
        about, weights = _read_folder(folder)
        hashed = unembedding_hash(model)
        if about.get("unembedding_hash") != hashed:
            raise AdapterError(
                f"{folder} was trained on {about.get('base_model_name_or_path')!r} (revision {about.get('revision')}), "
                f"whose unembedding differs from this model's ({model.config.name_or_path!r}). Load that base model."
            )
        names = BackAttentionConfig.__dataclass_fields__
        try:
            options = {key: tuple(v) if isinstance(v, list) else v for key, v in about.items() if key in names}
            wrapped = cls(model, BackAttentionConfig(**options))
        except (TypeError, ValueError) as error:
            raise AdapterError(f"{folder}/{CONFIG_FILE} does not fit this model: {error}") from error
        expected = {_PREFIX + name: t for name, t in wrapped.adapter_state().items()}
        wrong = sorted({*expected} ^ {*weights}) or sorted(n for n in expected if expected[n].shape != weights[n].shape)
        wrong += [name for name in weights if not weights[name].isfinite().all()]
        if wrong:
            wrapped.unload()
            raise AdapterError(f"{folder}/{WEIGHTS_FILE}: {wrong[0]} is missing, unknown, misshapen or not finite.")
        with torch.no_grad():
            for name, p in wrapped.updates.named_parameters():
                p.copy_(weights[f"{_PREFIX}updates.{name}"])
        return wrapped


def get_back_attention_model(
    model: nn.Module, config: BackAttentionConfig, freeze_base: bool = True
) -> BackAttentionModel:
    """Put untrained back attention on a Hugging Face decoder; until it is trained, its output is the model's own.

    model: any supported decoder with its language-model head (see `backattn.arch`), fp32 or bf16; the adapter is fp32.
    freeze_base: False trains the model's weights too (from scratch).

    The model itself carries the hooks until `unload()`. Draws the projections' weights from torch's generator.
    Raises UnsupportedModelError for another family, ValueError for layers that the model does not have and for a
    model that carries an adapter already.
    """
    return BackAttentionModel(model, config, freeze_base)


def sizes(base: nn.Module, dims: Sequence[int], source_layer: int = 6) -> list[dict]:
    """How many weights back attention has at each width, and which share of the base model's (may lie on "meta").

    Returns per width: dim, weights, share.
    """
    total, rows = sum(p.numel() for p in base.parameters()), []
    for dim in dims:
        wrapped = get_back_attention_model(base, BackAttentionConfig(source_layer, dim))
        weights = wrapped.trainable()[0]
        wrapped.unload()
        rows.append({"dim": dim, "weights": weights, "share": weights / total})
    return rows


def unembedding_hash(model: nn.Module) -> str:
    """sha256 of the unembedding in bf16, so that it is the same however the model was loaded."""
    from accelerate.utils import align_module_device  # may have to be installed first, see `notebook.setup`

    head = describe(model).unembedding_module
    with align_module_device(head):  # fetches it where accelerate keeps it elsewhere
        weight = head.weight.detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(weight.view(torch.int16).numpy().tobytes()).hexdigest()


def _read_folder(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors of a saved adapter."""
    paths = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        paths[name] = Path(folder) / name
        if not paths[name].exists():
            paths[name] = _from_hub(folder, name)
    try:
        about = json.loads(paths[CONFIG_FILE].read_text(encoding="utf-8"))
        kind = about.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise AdapterError(f"{paths[CONFIG_FILE]} is damaged ({error}). Fetch the adapter again.") from error
    if kind != PEFT_TYPE:
        raise AdapterError(f"{folder} holds an adapter of type {kind!r}, not {PEFT_TYPE}. Load it with peft.")
    try:
        return about, load_file(paths[WEIGHTS_FILE])
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{paths[WEIGHTS_FILE]} is damaged ({error}). Fetch the adapter again.") from error


def _from_hub(folder: str | Path, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not Path(folder).exists():
        with contextlib.suppress(HFValidationError, HfHubHTTPError, OSError):
            return Path(hf_hub_download(str(folder), name))
    raise AdapterError(
        f"{folder} lacks {name}: give a folder written by save_pretrained, or the id of a Hugging Face adapter that "
        "can be reached from here."
    )
