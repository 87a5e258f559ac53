"""Capture of the residual stream and its exact decomposition.

The stream of a decoder is a running sum: embedding, then one attention and one FFN contribution per
layer. `capture` records every term of that sum in one forward pass, together with what each term is
made of (heads, source positions, neurons), without changing the model.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from .arch import Arch, UnsupportedModelError, describe, in_one_place


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
                handles.append(module.register_forward_pre_hook(_on_input(function), with_kwargs=True))
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


@dataclass(frozen=True)
class Batch:
    """Tokenised prompts, padded on one side.

    ids, mask: [batch, time]; `start` and `last`: [batch], index of each prompt's first and last real token.
    """

    ids: Tensor
    mask: Tensor

    @property
    def start(self) -> Tensor:
        return self.mask.int().argmax(-1)

    @property
    def last(self) -> Tensor:
        return self.start + self.lengths - 1

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(-1)

    @property
    def position_ids(self) -> Tensor:
        """Positions counted from each prompt's own first token, so that padding does not shift them."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def at_last(self, x: Tensor) -> Tensor:
        """x[b, last_b]: [batch, time, ...] -> [batch, ...]."""
        return x[torch.arange(len(x), device=x.device), self.last.to(x.device)]


def encode(tokenizer, prompts: Sequence[str], side: str = "right", device: str | torch.device = "cpu") -> Batch:
    """Tokenise prompts into a padded `Batch`.

    Raises ValueError for an empty batch, for a prompt that is not text, or for one without tokens.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    prompts = list(prompts)
    if not prompts:
        raise ValueError("The batch is empty: give at least one prompt.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"Prompt {index} is a {type(prompt).__name__}; prompts are strings.")
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for index, row in enumerate(rows):
        if not row or not prompts[index].strip():
            raise ValueError(f"Prompt {index} ({prompts[index]!r}) has no words: give at least one.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, where], mask[index, where] = torch.tensor(row), 1
    return Batch(ids.to(device), mask.to(device))


@dataclass
class Stream:
    """Everything one forward pass added to the residual stream, in fp32.

    Shapes: L layers, B prompts, T positions, D width, H heads, d head width, G key/value heads, F neurons.
    """

    arch: Arch
    batch: Batch
    logits: Tensor  # [B, V] the model's own, at each prompt's last position
    hidden: Tensor  # [L+1, B, T, D] input of each layer; hidden[L] is the state before the final norm
    attention: Tensor  # [L, B, T, D] a_l, what attention adds
    ffn: Tensor  # [L, B, T, D] f_l, what the FFN adds
    heads: list[Tensor] = field(default_factory=list)  # L of [B, T, H, d] input of W_O
    values: list[Tensor] = field(default_factory=list)  # L of [B, T, G, d]
    weights: list[Tensor] = field(default_factory=list)  # L of [B, H, T, T] attention (query, source)
    gates: list[Tensor | None] = field(default_factory=list)  # L of [B, T, F] gate pre-activation
    ups: list[Tensor] = field(default_factory=list)  # L of [B, T, F] up pre-activation
    neurons: list[Tensor] = field(default_factory=list)  # L of [B, T, F] coefficients m
    attention_raw: list[Tensor] = field(default_factory=list)  # L of [B, T, D] before the sandwich norm
    ffn_raw: list[Tensor] = field(default_factory=list)

    @property
    def layers(self) -> int:
        return len(self.attention)

    def middle(self, layer: int) -> Tensor:
        """The FFN's base r_l = h_l + a_l: [B, T, D]."""
        return self.hidden[layer] + self.attention[layer]

    def attention_input(self, layer: int) -> Tensor:
        """State that attention's norm reads: [B, T, D]."""
        return self.hidden[layer]

    def ffn_input(self, layer: int) -> Tensor:
        """State that the FFN's norm reads (h_l when attention and FFN run in parallel): [B, T, D]."""
        return self.hidden[layer] if self.arch.parallel else self.middle(layer)

    def post_scale(self, kind: str, layer: int) -> Tensor:
        """Frozen scale of the sandwich norm of "attention" or "ffn", 1 where there is none: [B, T, 1]."""
        raw = self.attention_raw[layer] if kind == "attention" else self.ffn_raw[layer]
        return self.arch.blocks[layer].norm(f"{kind}_post").scale(raw)

    def expanded_values(self, layer: int) -> Tensor:
        """Values with each key/value head repeated for the heads that read it: [B, T, H, d]."""
        block = self.arch.blocks[layer]
        return self.values[layer].repeat_interleave(block.heads // block.kv_heads, dim=2)

    def decomposition_error(self) -> float:
        """Largest ‖h_0 + Σ(a + f) − h_L‖ / ‖h_L‖ over real positions."""
        total = self.hidden[0] + self.attention.sum(0) + self.ffn.sum(0)  # [B, T, D]
        real = self.batch.mask.bool()
        error = (total - self.hidden[-1])[real].norm(dim=-1) / self.hidden[-1][real].norm(dim=-1)
        return error.max().item()


@contextlib.contextmanager
def _attention_weights_visible(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Eager attention (the only kind that returns its weights) while the block runs, then as before."""
    before = model.config._attn_implementation
    if not wanted or before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def capture(model: nn.Module, batch: Batch, detail: bool = True) -> Stream:
    """One forward pass with every residual contribution recorded.

    Args:
        model: a supported Hugging Face decoder; its mode, hooks and attention kind are left as they were. While it
            carries back attention, layers that run twice are recorded in their second run.
        batch: see `encode`. Padding on either side.
        detail: also record heads, values, attention weights and neurons; False keeps memory small.

    Returns a `Stream`. Raises UnsupportedModelError (see `arch.describe`) and ValueError when a prompt is
    longer than the model's context.
    """
    arch = describe(model)
    if not in_one_place(model):
        raise ValueError(
            "The layers of this model are spread over several places (device_map), and what is asked for reads its "
            "weights in one: load it whole, in a smaller dtype or on a larger GPU. Back attention works as it is."
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and batch.ids.shape[1] > limit:
        raise ValueError(f"A prompt has {batch.ids.shape[1]} tokens; this model takes at most {limit}. Shorten it.")
    names = ["hidden", "attention", "ffn", "heads", "fused", "neurons", "gate", "up", "attention_raw", "ffn_raw"]
    seen: dict[str, dict[int, Tensor]] = {name: {} for name in [*names, "weights"]}  # of two runs the second stays

    def keep(name: str, layer: int) -> Callable:
        return lambda x: seen[name].update({layer: x.detach().float()})

    taps = [(arch.final_norm_module, "input", keep("hidden", len(arch.blocks)))]
    for layer, block in enumerate(arch.blocks):
        taps += [
            (block.module, "input", keep("hidden", layer)),
            (block.attention_result, "output", keep("attention", layer)),
            (block.ffn_result, "output", keep("ffn", layer)),
        ]
        if detail:
            family = block.family
            taps += [
                (block.get(family.attention_out), "input", keep("heads", layer)),
                (block.get(family.value), "output", keep("fused", layer)),
                (block.get(family.ffn_out), "input", keep("neurons", layer)),
                (block.get(family.up), "output", keep("up", layer)),
            ]
            if family.gate is not None and family.gate_layout == "own":
                taps.append((block.get(family.gate), "output", keep("gate", layer)))
            if family.attention_post is not None:
                taps.append((block.attention, "output", keep("attention_raw", layer)))
            if family.ffn_post is not None:
                taps.append((block.get(family.ffn), "output", keep("ffn_raw", layer)))

    def keep_weights(layer: int):
        return lambda module, args, output: seen["weights"].update({layer: output[1].detach().float()})

    was_training = model.training
    model.eval()
    blocks = enumerate(arch.blocks) if detail else ()
    handles = [block.attention.register_forward_hook(keep_weights(layer)) for layer, block in blocks]
    try:
        with torch.no_grad(), _attention_weights_visible(model, detail), hooks(*taps):
            output = model(
                input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False
            ).logits
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)

    kept = {name: [layers[k] for k in sorted(layers)] for name, layers in seen.items()}
    stream = Stream(
        arch=arch,
        batch=batch,
        logits=batch.at_last(output).float(),
        hidden=torch.stack(kept["hidden"]),
        attention=torch.stack(kept["attention"]),
        ffn=torch.stack(kept["ffn"]),
    )
    if detail:
        block = arch.blocks[0]
        pre = [
            b.split_ffn_in(gate, up)
            for b, gate, up in zip(arch.blocks, kept["gate"] or [None] * len(arch.blocks), kept["up"], strict=True)
        ]
        stream.heads = [x.unflatten(-1, (block.heads, block.head_dim)) for x in kept["heads"]]
        stream.values = [b.value_part(x) for b, x in zip(arch.blocks, kept["fused"], strict=True)]
        stream.weights = kept["weights"]
        stream.gates, stream.ups = [g for g, _ in pre], [u for _, u in pre]
        stream.neurons = kept["neurons"]
        stream.attention_raw = kept["attention_raw"] or list(stream.attention)
        stream.ffn_raw = kept["ffn_raw"] or list(stream.ffn)
    return stream


def next_log_probs(model, batch: Batch, share: bool = False, cache: Cache | None = None) -> Tensor:
    """Log-probabilities of the next token after each prompt, in fp32: [B, V]. The batch must be padded on the left.

    share: run the tokens with which all prompts begin (worked examples, say) once instead of once per prompt. The
    layers then see only the rest of each prompt, so hooks that count positions need share=False.
    cache: a `beginning` of the batch, which grows; its columns are then left out, and share says nothing.
    """
    if cache is not None:
        known = cache.get_seq_length()
        with torch.no_grad():
            output = model(
                input_ids=batch.ids[:, known:],
                attention_mask=batch.mask,
                position_ids=batch.position_ids[:, known:],
                past_key_values=cache,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float().log_softmax(-1)
    common = _common_start(batch) if share else 0
    window = getattr(model.config, "sliding_window", None)
    if window and batch.ids.shape[1] > window:  # padding between the shared start and the rest would shift the window
        common = 0
    with torch.no_grad():
        if common:
            first = batch.ids[:1, batch.start[0] : batch.start[0] + common]
            cache = model(input_ids=first, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(batch.ids))
        rest = int(batch.lengths.max()) - common  # the batch is padded on the left: cut its columns, keep row ends
        ids, mask = batch.ids[:, -rest:], batch.mask[:, -rest:].clone()
        for row, length in enumerate((batch.lengths - common).tolist()):
            mask[row, : rest - length] = 0
        output = model(
            input_ids=ids,
            attention_mask=torch.cat([mask.new_ones(len(mask), common), mask], dim=1),
            position_ids=(mask.cumsum(-1) - 1 + common).clamp(min=0),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
    return output.logits[:, -1].float().log_softmax(-1)


def in_window(model, batch: Batch) -> bool:
    """Whether a cache holds all of a batch's prompts, since no sliding window is shorter."""
    window = getattr(model.config, "sliding_window", None)
    return window is None or batch.ids.shape[1] < window


def whole_cache(model, batch: Batch) -> Cache | None:
    """Keys and values of whole prompts, of which `beginning` takes a part; None where a sliding window is shorter."""
    if not in_window(model, batch):
        return None
    given = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.position_ids}
    with torch.no_grad():
        return model(**given, use_cache=True, logits_to_keep=1).past_key_values


def beginning(cache: Cache, length: int) -> Cache:
    """What a cache holds of the first `length` tokens; the cache itself stays as it is.

    Raises ValueError where it holds fewer, or has dropped what was before a sliding window.
    """
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if windows and cache.get_seq_length() >= min(windows):
        raise ValueError(
            f"The texts in this cache are longer than the sliding window of {min(windows)} tokens, before which it "
            "keeps nothing: leave past_key_values out."
        )
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]  # their tensors are replaced when they grow, not changed
    spare = own.get_seq_length() - length
    if spare < 0:
        raise ValueError(f"The cache holds {length + spare} tokens of each text, not {length}.")
    if spare:
        own.crop(-spare)  # nothing but a negative number means the same in all versions of transformers 5
    return own


def _common_start(batch: Batch) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    shortest = int(batch.lengths.min())
    starts = torch.stack([row[begin : begin + shortest] for row, begin in zip(batch.ids, batch.start, strict=True)])
    same = (starts == starts[:1]).all(0).int().cumprod(0)
    return min(int(same.sum()), shortest - 1)


def head_contributions(stream: Stream, layer: int) -> Tensor:
    """What each head brings from each source position to each prompt's last position.

    Returns [B, H, T, D]; the sum over heads and sources, plus the output bias, is a_l at the last position.
    """
    block = stream.arch.blocks[layer]
    alpha = stream.batch.at_last(stream.weights[layer].transpose(1, 2))  # [B, H, T]
    mixed = alpha[..., None] * stream.expanded_values(layer).transpose(1, 2)  # [B, H, T, d]
    w_o = block.attention_out.weight.unflatten(-1, (block.heads, block.head_dim))  # [D, H, d]
    raw = torch.einsum("bhtd,whd->bhtw", mixed, w_o)
    post = block.norm("attention_post")
    return post.linear(raw, stream.batch.at_last(stream.post_scale("attention", layer))[:, None, None])


_checked: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def self_check(model: nn.Module, sample: Iterable[int] = (1, 5, 3, 7, 2)) -> None:
    """Verify the family's row on this very model with one short forward pass; remembered per model object.

    Raises UnsupportedModelError with the measured error when residual contributions, attention neurons or
    FFN neurons do not sum to what the model computed.
    """
    if model in _checked:
        return
    ids = torch.tensor([list(sample)], device=model.device) % model.config.vocab_size
    stream = capture(model, Batch(ids, torch.ones_like(ids)))
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    errors = {"residual contributions": stream.decomposition_error()}
    for layer, block in enumerate(stream.arch.blocks):
        for name, parts, out, whole in (
            ("attention neurons", stream.heads[layer].flatten(-2), block.attention_out, stream.attention_raw[layer]),
            ("FFN neurons", stream.neurons[layer], block.ffn_out, stream.ffn_raw[layer]),
        ):
            error = (parts @ out.weight.T + out.bias - whole).norm() / whole.norm()
            errors[name] = max(errors.get(name, 0.0), error.item())
        mixed = torch.einsum("bhqk,bkhd->bqhd", stream.weights[layer], stream.expanded_values(layer))
        error = (mixed - stream.heads[layer]).norm() / stream.heads[layer].norm()
        errors["attention weights × values"] = max(errors.get("attention weights × values", 0.0), error.item())
    for name, error in errors.items():
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{type(model).__name__}: the {name} miss the model's own state by {error:.1e} (relative; allowed "
                f"{tolerance:.0e}). This variant differs from the family's row in backattn/arch.py."
            )
    _checked.add(model)
