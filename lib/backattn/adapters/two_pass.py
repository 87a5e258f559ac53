"""Running the upper layers again with updates made from the states of a first pass.

`TwoPassModel._second_pass` is the method, from top to bottom. What else is here carries it into the
wrapped model's own forward: hooks note what each layer gets, layers that the first pass does not
need hand on what they get, and the second pass begins where the final norm would.
"""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from backattn.adapters.cache import UpperCache
from backattn.adapters.call import Pass, Request
from backattn.adapters.modules import BackAttention, Update
from backattn.models.decoder import describe
from backattn.models.devices import runs_on
from backattn.models.next_token import cache_prefix


class TwoPassModel(nn.Module):
    """A decoder that gets updates at source layers, made from the states of a first pass.

    updates: source layer -> `Update`. memory: the layers whose states it remembers. Where one lies
    above a source layer, the layers from the lowest source layer on run twice; else the update is
    made on the way and one pass is enough.

    While wrapped, the model itself (`base_model`) is the adapted one, until `unload`. Its weights
    are frozen unless freeze_base=False. Padding may stand on either side; a forward pass of GPT-2
    with padding on the left needs position_ids, as it does without an adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        updates: dict[int, Update],
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
        self.layers, self.memory_layers = len(self._arch.blocks), tuple(memory)
        self.sources = tuple(sorted(updates))
        self.two_passes = bool(memory) and max(memory) > self.sources[0]
        self.updates = nn.ModuleDict({str(layer): updates[layer] for layer in self.sources})
        for layer in self.sources:
            self.updates[str(layer)].to(runs_on(self._arch.blocks[layer].module))
        self._required_gradient = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(not freeze_base)
        self.enabled = True
        self.one_pass = False  # see `BackAttentionModel`
        self._request, self._call = Request(), None
        self._attach()
        _wrapped.add(model)

    @property
    def needed(self) -> tuple[int, ...]:
        """The states of the first pass that the rest is made from, lowest first."""
        return tuple(sorted({self.sources[0], *self.memory_layers}))

    # ------------------------------------------------------------ the passes

    def _second_pass(self, call: Pass) -> Tensor:
        """h_s + B, then layers s … L−1 again: the new state before the final norm [B, T, D].

        For back attention at source layer s, over memory layers t and positions j,

            B_i = Σ softmax_{(t, j ≤ i)} ( N(h_s,i) W_q · N(h_t,j) W_k / √d′ ) N(h_t,j) W_v W_o
        """
        h = call.states[self.sources[0]]  # h_s
        for layer in range(self.sources[0], self.layers):
            if layer in self.sources:
                update, h = self._at(layer, h)
                k, v, visible = self._read(layer, h, call)  # N(h_t) W_k, N(h_t) W_v, and j ≤ i
                q = update.query(h)  # N(h_s) W_q
                mixed = update.mix(q, k, v, visible)  # softmax(q · k / √d′) v
                h = h + update.write(mixed).to(h.dtype)  # h_s + mixed W_o
            h = self._run(layer, h, call)  # layers s … L−1 again
        return h

    def _single_pass(self, call: Pass) -> Tensor:
        """The same for a new token [B, 1, D] whose first pass ends at the lowest source layer.

        It reads the memory of earlier tokens, and leaves there its own states of this pass.
        """
        call.cache.single, h = True, call.states[self.sources[0]]
        for layer in range(self.sources[0], self.layers):
            call.states[layer] = h
            if layer in self.sources:
                update, h = self._at(layer, h)
                memory, earlier = call.cache.memory(layer, call.past), call.visible(h)[:, :, :-1]
                h = h + update(h, memory.keys, memory.values, earlier).to(h.dtype)
            h = self._run(layer, h, call)
        call.states[self.layers] = h
        for layer in self.sources:
            call.cache.memory(layer, call.past).update(*self._remember(layer, call))
        return h

    def _at(self, layer: int, h: Tensor) -> tuple[Update, Tensor]:
        """A source layer's update, and h on its device."""
        update = self.updates[str(layer)]
        return update, h.to(next(update.parameters()).device)

    def _remember(self, layer: int, call: Pass) -> tuple[Tensor, Tensor]:
        """Keys and values of this call's memory for the update of a source layer."""
        memory = call.request.memory
        if memory is None:
            memory = [call.states[t] for t in self.memory_layers]
        update = self.updates[str(layer)]
        device = next(update.parameters()).device
        return update.remember(torch.stack([h.to(device) for h in memory]))

    def _read(self, layer: int, h: Tensor, call: Pass) -> tuple[Tensor | None, ...]:
        """Keys, values and visible, as `Update.mix` takes them, earlier tokens' included."""
        if not self.memory_layers:
            return None, None, None
        request = call.request
        request.check(h, call.past, call.cache is not None)
        keys, values = self._remember(layer, call)
        if call.cache is not None:
            keys, values = call.cache.memory(layer, call.past).update(keys, values)
        visible = call.visible(h)
        if request.cells is not None:
            visible = visible[:, :, None] & request.cells  # [B, T, M, S]
        if request.maps is not None:
            request.maps[layer] = self.updates[str(layer)].weights(h, keys, visible).detach()
        return keys, values, visible

    def _run(self, layer: int, h: Tensor, call: Pass) -> Tensor:
        """A layer, with the other arguments that the decoder gave it."""
        args, kwargs = call.arguments[layer]
        out = self._arch.blocks[layer].module(h, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    # ------------------------------------------------------------ in the model's own forward

    def _attach(self) -> None:
        decoder = self.base_model.get_submodule(self._arch.family.layers.rpartition(".")[0])
        self._handles = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, always_call=True),
            self._arch.final_norm_module.register_forward_pre_hook(self._before_final_norm),
        ]
        self._forwards = []  # those that layers have of their own, as accelerate gives them
        for layer, block in enumerate(self._arch.blocks):
            module, before = block.module, functools.partial(self._before_layer, layer)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._forwards.append((module, module.__dict__.get("forward")))
            forward = functools.partial(self._in_layer, layer, module.forward)
            module.forward = functools.update_wrapper(forward, module.forward)

    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        self._call, request = None, self._request  # an interrupt may have left a call
        if request.states is not None:
            self._call = Pass(request, first=self.needed[-1], states=request.states)
        if request.states is not None or not self.enabled:
            return
        if self.two_passes and any(
            kwargs.get(f"output_{what}") for what in ("hidden_states", "attentions")
        ):
            raise ValueError(
                "With back attention the layers run twice: output_hidden_states and "
                "output_attentions would mix both passes. Leave them out; see attention_maps() for "
                "the memory, first_pass_states() for the first pass."
            )
        named = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        cache, mask = named.get("past_key_values"), named.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ValueError(
                "Back attention needs the attention mask as [batch, time] with 1 for real tokens, "
                "or none."
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        ids = named.get("input_ids")
        new = (ids if ids is not None else named.get("inputs_embeds")).shape[1]
        if request.first_pass is not None:
            states = dict(zip(self.needed, request.first_pass, strict=True))
            self._call = Pass(request, 0, self._second_pass, past, mask, states=states)
        elif self.one_pass and self.two_passes and past > 0 and new == 1:
            self._check_single(request)
            self._call = Pass(request, self.sources[0], self._single_pass, past, mask)
        else:
            then = self._second_pass if self.two_passes else None
            self._call = Pass(request, self.layers, then, past, mask)

    def _check_single(self, request: Request) -> None:
        if not all(isinstance(update, BackAttention) for update in self.updates.values()):
            raise ValueError(
                "One pass is for back attention: this adapter needs a token's own final state."
            )
        if any(edit is not None for edit in (request.cells, request.memory, request.maps)):
            raise ValueError(
                "In one pass the memory can be neither edited nor mapped: set one_pass to False."
            )

    def _end(self, *_) -> None:
        self._call = None

    def _before_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict):
        """Note what a layer gets; where one pass is enough, add the update on the way."""
        call = self._call
        if call is None or call.again:
            return None
        h = args[0] if args else kwargs["hidden_states"]  # [B, T, D]
        args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}
        if layer in self.needed:
            call.states.setdefault(layer, h)
        cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
        if cache is not None and call.cache is None and self.memory_layers:
            again = range(self.sources[0], self.layers if self.two_passes else self.sources[0])
            call.cache = UpperCache(cache, self.layers, self.sources, again)
        upper = call.cache or cache
        call.arguments[layer] = (
            [upper if v is cache else v for v in args],
            {k: upper if v is cache else v for k, v in kwargs.items()},
        )
        if call.then or call.request.states is not None or layer not in self.sources:
            return None
        update, h = self._at(layer, h)
        return (h + update(h, *self._read(layer, h, call)).to(h.dtype), *args), kwargs

    def _in_layer(self, layer: int, forward, hidden_states: Tensor, *args, **kwargs):
        """A layer's forward; it hands on what it gets where the first pass needs no more."""
        call = self._call
        if call is not None and not call.again and layer >= call.first:
            return hidden_states
        return forward(hidden_states, *args, **kwargs)

    def _before_final_norm(self, module: nn.Module, args: tuple):
        call = self._call
        if call is not None and self.layers in self.needed:
            call.states.setdefault(self.layers, args[0])
        if call is None or call.then is None:
            return None
        call.again = True
        return (call.then(call), *args[1:])

    # ------------------------------------------------------------ use

    def forward(self, input_ids=None, attention_mask=None, labels=None, first_pass=None, **kwargs):
        """The wrapped model's own forward, with the adapter in force; returns what it returns.

        first_pass: [K, B, T, D] from `first_pass_states` for these very tokens; the first pass is
        then left out. With a cache (past_key_values) input_ids are the last T tokens of the texts
        in it: what it holds of those before is used, and it stays as it is; no cache is returned.
        attention_mask is then of the whole texts, which must fit into a sliding window. Raises
        ValueError where states, mask or cache do not fit.
        """
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if labels is not None:
            kwargs["labels"] = labels
        if first_pass is None:
            return self.base_model(**kwargs)
        if len(first_pass) != len(self.needed) or not self.enabled:
            raise ValueError(
                f"first_pass must hold the {len(self.needed)} states {self.needed}, "
                "and the adapter be on."
            )
        cache = kwargs.get("past_key_values")
        if cache is not None:
            if attention_mask is None:
                raise ValueError(
                    "With first_pass and a cache pass attention_mask too, of the whole texts."
                )
            earlier = attention_mask.shape[1] - input_ids.shape[1]
            kwargs["past_key_values"] = cache_prefix(cache, earlier)
        with self._asked(first_pass=first_pass):
            out = self.base_model(**{**kwargs, "use_cache": cache is not None})
        if cache is not None and not isinstance(out, tuple):
            out["past_key_values"] = None  # the layers of the first pass have not grown
        return out

    @torch.no_grad()
    def first_pass_states(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> Tensor:
        """The states that the second pass needs, from one unmodified pass.

        Returns [K, B, T, D], in the model's dtype: the states entering the layers `needed`.
        """
        states: dict[int, Tensor] = {}
        # A place, not a count: see `training.evaluation.answer_logits`.
        last = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)
        with self._asked(states=states):
            self.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=last,
            )
        return torch.stack([states[t].to(input_ids.device) for t in self.needed])

    @contextlib.contextmanager
    def _asked(self, **changes) -> Iterator[None]:
        """The request with some changes, while the block runs."""
        if not self._handles:
            raise ValueError("This adapter was taken off by unload(): wrap the model anew.")
        before, self._request = self._request, replace(self._request, **changes)
        try:
            yield
        finally:
            self._request = before

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The unadapted model while the block runs."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def generate(self, *args, **kwargs) -> Tensor:
        """The wrapped model's `generate`; both passes and the memory are cached.

        A new token costs two short passes, or one (`BackAttentionModel.one_pass`).
        """
        return self.base_model.generate(*args, **kwargs)

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's tensors by name, as they are: "updates.6.q_proj.weight" and so on."""
        return {f"updates.{name}": p.detach() for name, p in self.updates.named_parameters()}

    def state_dict(self, *args, **kwargs) -> dict:
        """What is trained: the adapter's tensors, and the base model's if they are not frozen."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        whole = super().state_dict(*args, **kwargs)
        return {k: v for k, v in whole.items() if k in trained or k.startswith("updates.")}

    def trainable(self) -> tuple[int, int]:
        """Numbers of weights: (trained, all)."""
        weights = list(self.parameters())
        return sum(p.numel() for p in weights if p.requires_grad), sum(p.numel() for p in weights)

    def print_trainable_parameters(self) -> None:
        """Print how many weights are trained."""
        trained, total = self.trainable()
        share = f"{100 * trained / total:.4f}"
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share}")

    def unload(self) -> nn.Module:
        """Take the adapter off; returns the base model as it was, requires_grad included."""
        for handle in self._handles:
            handle.remove()
        for module, forward in self._forwards:
            del module.forward
            if forward is not None:
                module.forward = forward
        self._handles, self._forwards = [], []
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
