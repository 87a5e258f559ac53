"""One call of a two-pass model; `Call.second_pass` is the method, from top to bottom.

What else is here carries it into the wrapped model's own forward, while a call lasts: layers note
what they get, those that the first pass does not need hand it on, and the second pass runs where
the final norm would begin.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from threading import get_ident

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from backattn.adapters.modules import BackAttention, Update
from backattn.models.hooks import in_place_of

# Arguments that say where texts in a row begin.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cu_seqlens")


class Call:
    """One forward pass of the decoder: what its first pass leaves for what follows.

    model: a `TwoPassModel`. layers: of the decoder. inputs: its arguments by name. Of request:
    first_pass, states [K, B, T, D] that stand for the first pass; states, to be filled by a first
    pass and nothing else; cells, memory and maps, see `BackAttentionModel`.
    """

    def __init__(self, model, layers: list[nn.Module], inputs: dict, request: dict):
        cache, self.mask = inputs.get("past_key_values"), inputs.get("attention_mask")
        ids = inputs.get("input_ids")
        self.batch, self.time = (inputs["inputs_embeds"] if ids is None else ids).shape[:2]
        self.past = 0 if cache is None else int(cache.get_seq_length())  # tokens before this call
        self.model, self.layers, self.again, self.cache = model, layers, False, None
        self.cells, self.memory, self.maps = map(request.get, ("cells", "memory", "maps"))
        self.source, self.states = model.sources[0], request.get("states")  # layer -> [B, T, D]
        self.arguments: dict[int, tuple[list, dict]] = {}  # layer -> its others
        self.single = self.past > 0 and model.one_pass and model.two_passes
        self.first = model.layers if model.two_passes else self.source  # layers of the first pass
        self.only_first = self.states is not None
        if self.only_first:
            self.first = model.needed[-1]
            return
        self.states = {}
        if request.get("first_pass") is not None:
            self.first, self.single = 0, False
            self.states = dict(zip(model.needed, request["first_pass"], strict=True))
        elif self.single:
            self.first = self.source
        if problem := self._problem(inputs):
            raise ValueError(problem)

    def second_pass(self) -> Tensor:
        """h_s + B, then layers s … L−1 again: the new state before the final norm [B, T, D].

        For back attention at source layer s, over memory layers t and positions j,

            B_i = Σ softmax_{(t, j ≤ i)} ( N(h_s,i) W_q · N(h_t,j) W_k / √d′ ) N(h_t,j) W_v W_o
        """
        h = self.states[self.source]  # h_s
        for layer in range(self.source, self.model.layers):
            if self.single:  # the only state that this token has
                self.states[layer] = h
            if layer in self.model.sources:
                update = self.model.updates[str(layer)]
                h = h.to(update.device)
                k, v, visible = self._read(layer, update, h)  # N(h_t) W_k, N(h_t) W_v, and j ≤ i
                q = update.query(h)  # N(h_s) W_q
                mixed = update.mix(q, k, v, visible)  # softmax(q · k / √d′) v
                h = h + update.write(mixed).to(h.dtype)  # h_s + mixed W_o
            args, kwargs = self.arguments[layer]
            out = self.layers[layer](h, *args, **kwargs)  # layers s … L−1 again
            h = out[0] if isinstance(out, tuple) else out
        if self.single:
            self.states[self.model.layers] = h
            for layer in self.model.sources:
                remembered = self._remember(self.model.updates[str(layer)])
                self.cache.memory(layer, self.past).update(*remembered)
        return h

    def _read(self, layer: int, update: Update, h: Tensor) -> tuple[Tensor | None, ...]:
        """Keys, values and visible [B, T, past + T], as `Update.mix` takes them."""
        if not self.model.memory_layers:
            return None, None, None
        columns = torch.arange(self.past + self.time, device=h.device)
        rows = columns[self.past :, None]
        visible = (columns <= rows).expand(self.batch, -1, -1)
        if self.mask is not None:  # a query sees itself always, so that padding gives no NaN
            visible = (visible & self.mask.bool().to(h.device)[:, None]) | (columns == rows)
        if self.single:
            memory = self.cache.memory(layer, self.past)
            return memory.keys, memory.values, visible[:, :, :-1]
        keys, values = self._remember(update)
        if self.cache is not None:
            keys, values = self.cache.memory(layer, self.past).update(keys, values)
        if self.cells is not None:
            visible, unseen = visible[:, :, None], self.cells.new_tensor(-1)
            bools = self.cells.dtype == torch.bool
            visible = visible & self.cells if bools else torch.where(visible, self.cells, unseen)
        if self.maps is not None:
            weights = update.weights(update.query(h), keys, visible)
            if visible.is_floating_point():
                weights = weights * visible.clamp(min=0)[:, None]
            self.maps[layer] = weights.detach()
        return keys, values, visible

    def _remember(self, update: Update) -> tuple[Tensor, Tensor]:
        """Keys and values of this call's memory for the update of a source layer."""
        own = self.memory is None
        memory = [self.states[t] for t in self.model.memory_layers] if own else self.memory
        return update.remember(torch.stack([h.to(update.device) for h in memory]))

    def note(self, layer: int, h: Tensor, args: tuple, kwargs: dict) -> None:
        """Keep what the decoder gives a layer, with the second pass's cache for its own."""
        if layer in self.model.needed:
            self.states.setdefault(layer, h)
        cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
        if cache is not None and self.cache is None and self.model.memory_layers:
            if self.memory is not None:
                raise ValueError("No other memory can be read with a cache: pass use_cache=False.")
            self.cache = UpperCache(cache, self.model, self.single)
        upper = self.cache or cache
        self.arguments[layer] = (
            [upper if v is cache else v for v in args],
            {k: upper if v is cache else v for k, v in kwargs.items()},
        )

    def _problem(self, inputs: dict) -> str | None:
        """What back attention cannot do with these inputs, before anything is computed."""
        total, mask, places = self.past + self.time, self.mask, inputs.get("position_ids")
        attends = [isinstance(update, BackAttention) for update in self.model.updates.values()]
        edited = any(edit is not None for edit in (self.cells, self.memory, self.maps))
        packed = any(inputs.get(name) is not None for name in PACKED)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return "The attention mask must be [batch, time] with 1 for real tokens, or none."
        if mask is not None and mask.shape[1] != total:
            return f"The attention mask covers {mask.shape[1]} tokens; there are {total}."
        if self.time > 1 and places is not None and places.dim() == 2:
            again = places[:, 1:] <= places[:, :-1]
            if mask is not None:
                real = mask[:, -self.time :].bool().to(places.device)
                again = again & real[:, 1:] & real[:, :-1]
            packed = packed or bool(again.any())
        if packed and any(attends):
            texts = "Several texts in one row (position_ids start again, or cu_seq_lens)"
            return f"{texts}: back attention would read the others. Pad a row for each text."
        if self.single and not all(attends):
            return "One pass is for back attention: this adapter needs a token's own final state."
        if self.single and (edited or self.time > 1):
            one = "In one pass new tokens come one at a time, and the memory"
            return f"{one} can be neither edited nor mapped: set one_pass to False."
        here = f"this pass has {self.batch} texts, {self.time} queries and {total} positions."
        if self.memory is not None and self.memory.shape[1:3] != (self.batch, self.time):
            return f"memory is {[*self.memory.shape[1:3]]} per layer; {here}"
        if self.cells is not None:
            texts, queries, _, positions = self.cells.shape
            if texts not in (1, self.batch) or queries not in (1, self.time) or positions != total:
                return f"cells are {[*self.cells.shape]}; {here}"
        return None


class UpperCache:
    """A cache as layers see it that run again: their keys and values are not the first pass's.

    Behind the first pass's layers lie, in the same cache, so that beams and copies take them along,
    one layer for each that runs again and one for the memory of each source layer. single: put new
    keys and values into the first pass's layers too, so that all layers stay of one length.
    """

    def __init__(self, cache: Cache, model, single: bool):
        again = range(model.sources[0], model.layers) if model.two_passes else ()
        self._cache, self._sources, self._single = cache, model.sources, single
        self._offset = len(again)
        while len(cache.layers) < model.layers and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        if len(cache.layers) > model.layers:
            return
        other = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
        if other:
            names = ", ".join(kind.__name__ for kind in other)
            raise ValueError(f"Back attention cannot use a cache of {names}; leave DynamicCache.")
        windows = [getattr(cache.layers[t], "sliding_window", None) for t in again]
        cache.layers += [DynamicSlidingWindowLayer(w) if w else DynamicLayer() for w in windows]
        cache.layers += [DynamicLayer() for _ in model.sources]

    def memory(self, source: int, past: int) -> DynamicLayer:
        """A source layer's memory of `past` earlier tokens; ValueError where it is not there."""
        layer = self._cache.layers[self._sources.index(source) - len(self._sources)]
        if layer.get_seq_length() != past:
            filled = "This cache was filled while the adapter was off, or by another model"
            raise ValueError(f"{filled}: start with a fresh one.")
        return layer

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs):
        if self._single:
            self._cache.update(keys, values, layer, *args, **kwargs)
        return self._cache.update(keys, values, layer + self._offset, *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._cache, name)


def without_updates(cache: Cache, model) -> Cache:
    """The cache of a call in two passes as it would be had no query read anything, so that layers
    that ran again left what they left in the first pass; the cache itself stays as it is."""
    other, again = copy.copy(cache), slice(model.layers, 2 * model.layers - model.sources[0])
    other.layers = [*cache.layers]
    other.layers[again] = cache.layers[model.sources[0] : model.layers]
    return other


@contextlib.contextmanager
def attached(model) -> Iterator[None]:
    """A `Call` at each forward pass that this thread makes of the base model of a `TwoPassModel`,
    on which nothing stays, whatever happens in the block."""
    arch, thread, running = model._arch, get_ident(), []
    decoder = model.base_model.get_submodule(arch.family.layers.rpartition(".")[0])
    layers, depth = [block.module for block in arch.blocks], decoder.config.num_hidden_layers
    if len(layers) != model.layers:
        now = f"The base model has {len(layers)} layers now; it had {model.layers}"
        raise ValueError(f"{now}: wrap it anew.")

    def running_call() -> Call | None:
        return running[0] if running and get_ident() == thread else None

    def begin(decoder: nn.Module, args: tuple, kwargs: dict):
        request = model.request
        if get_ident() != thread or (request["off"] and "states" not in request):
            return None
        inputs = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        wishes = {name: inputs.get(name) for name in ("output_hidden_states", "output_attentions")}
        for name, wish in wishes.items():
            if getattr(decoder.config, name, False) if wish is None else wish:
                twice = f"With back attention the layers run twice: {name} would mix both passes"
                see = "attention_maps() for the memory, first_pass_states() for the first pass"
                raise ValueError(f"{twice}. Leave it out; see {see}.")
        if decoder.config.num_hidden_layers != depth:
            raise ValueError("Early exit leaves out layers that back attention reads.")
        running[:] = [Call(model, layers, inputs, request)]
        return args, {
            "return_dict": True,
            **kwargs,
        }  # whatever the config says: its caller reads it

    def end(*_) -> None:
        if get_ident() == thread:
            running.clear()

    def in_layer(layer: int, forward, hidden_states: Tensor, *args, **kwargs):
        call = running_call()
        if call is not None and not call.again:
            call.note(layer, hidden_states, args, kwargs)
            if layer >= call.first:
                return hidden_states
        return forward(hidden_states, *args, **kwargs)

    def before_final_norm(module: nn.Module, args: tuple):
        call = running_call()
        if call is None:
            return None
        if model.layers in model.needed:
            call.states.setdefault(model.layers, args[0])
        call.again = True
        return args if call.only_first else (call.second_pass(), *args[1:])

    with contextlib.ExitStack() as stack:
        for handle in (
            decoder.register_forward_pre_hook(begin, with_kwargs=True, prepend=True),
            decoder.register_forward_hook(end, always_call=True),
            arch.final_norm_module.register_forward_pre_hook(before_final_norm, prepend=True),
        ):
            stack.callback(handle.remove)
        for layer, module in enumerate(layers):
            forward = functools.partial(in_layer, layer, module.forward)
            stack.enter_context(in_place_of(module, forward))
        stack.callback(setattr, decoder.config, "num_hidden_layers", depth)  # else early exit's
        yield
