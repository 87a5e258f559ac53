"""Capture of the residual stream and its exact decomposition.

The stream of a decoder is a running sum: embedding, then one attention and one FFN contribution per
layer. `capture` records every term of that sum in one forward pass, together with what each term is
made of (heads, source positions, neurons), without changing the model.
"""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backattn.models.decoder import Arch, Block, describe
from backattn.models.devices import in_one_place
from backattn.models.families import UnsupportedModelError
from backattn.models.hooks import hooks
from backattn.models.tokens import Batch


@dataclass
class Stream:
    """Everything one forward pass added to the residual stream, in fp32.

    Shapes: L layers, B prompts, T positions, D width, H heads, d head width, G key/value heads,
    F neurons. A sequence has one tensor per layer, and none without `detail`.
    """

    arch: Arch
    batch: Batch
    logits: Tensor  # [B, V] the model's own, at each prompt's last position
    hidden: Tensor  # [L+1, B, T, D] input of each layer; hidden[L] enters the final norm
    attention: Tensor  # [L, B, T, D] a_l, what attention adds
    ffn: Tensor  # [L, B, T, D] f_l, what the FFN adds
    heads: Sequence[Tensor] = ()  # [B, T, H, d] input of W_O
    values: Sequence[Tensor] = ()  # [B, T, G, d]
    weights: Sequence[Tensor] = ()  # [B, H, T, T] attention (query, source)
    gates: Sequence[Tensor | None] = ()  # [B, T, F] gate pre-activation
    ups: Sequence[Tensor] = ()  # [B, T, F] up pre-activation
    neurons: Sequence[Tensor] = ()  # [B, T, F] coefficients m
    attention_raw: Sequence[Tensor] = ()  # [B, T, D] before the sandwich norm
    ffn_raw: Sequence[Tensor] = ()  # [B, T, D]

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
        """State that the FFN's norm reads (h_l where attention and FFN are parallel): [B, T, D]."""
        return self.hidden[layer] if self.arch.parallel else self.middle(layer)

    def post_scale(self, kind: str, layer: int) -> Tensor:
        """Frozen scale of the sandwich norm of "attention" or "ffn", 1 without one: [B, T, 1]."""
        raw = self.attention_raw[layer] if kind == "attention" else self.ffn_raw[layer]
        return self.arch.blocks[layer].norm(f"{kind}_post").scale(raw)

    def expanded_values(self, layer: int) -> Tensor:
        """Values with each key/value head repeated for the heads that read it: [B, T, H, d]."""
        block = self.arch.blocks[layer]
        return self.values[layer].repeat_interleave(block.heads // block.kv_heads, dim=2)

    def decomposition_error(self) -> float:
        """Largest ‖h_0 + Σ(a + f) − h_L‖ / ‖h_L‖ over real positions."""
        total = self.hidden[0] + self.attention.sum(0) + self.ffn.sum(0)  # [B, T, D]
        real = self.batch.attention_mask.bool()
        error = (total - self.hidden[-1])[real].norm(dim=-1) / self.hidden[-1][real].norm(dim=-1)
        return error.max().item()


def capture(model: nn.Module, batch: Batch, detail: bool = True) -> Stream:
    """One forward pass with every residual contribution recorded.

    Args:
        model: a supported Hugging Face decoder; its mode, hooks and attention kind are left as they
            were. Of one with back attention, layers that run twice are recorded in their
            second run.
        batch: see `encode`. Padding on either side.
        detail: also record heads, values, attention weights and neurons; False saves memory.

    Raises UnsupportedModelError (see `describe`) and ValueError when a prompt is longer than the
    model's context, or when the model is spread over several places.

    Example:
        >>> stream = capture(model, encode(tokenizer, ["France's capital is"]))
        >>> stream.attention.shape, stream.neurons[0].shape
        (torch.Size([4, 1, 5, 32]), torch.Size([1, 5, 48]))
        >>> stream.decomposition_error() < 1e-5
        True
    """
    arch = describe(model)
    if not in_one_place(model):
        raise ValueError(
            "The layers of this model are spread over several places (device_map), and what is "
            "asked for reads its weights in one: load it whole, in a smaller dtype or on a larger "
            "GPU. Back attention works as it is."
        )
    length, limit = batch.input_ids.shape[1], getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"A prompt has {length} tokens; this model takes at most {limit}. Shorten it."
        )
    recorded: dict[str, dict[int, Tensor]] = defaultdict(dict)  # of two runs the second stays

    def recorder(name: str, layer: int):
        def record(x: Tensor | tuple) -> None:
            x = x[1] if name == "weights" else x
            recorded[name][layer] = x.detach().float()

        return record

    taps = [(arch.final_norm_module, "input", recorder("hidden", len(arch.blocks)))]
    for layer, block in enumerate(arch.blocks):
        for name, (module, side) in _taps(block, detail).items():
            taps.append((module, side, recorder(name, layer)))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _attention_weights_visible(model, detail), hooks(*taps):
            logits = model(**batch.inputs, use_cache=False).logits
    finally:
        model.train(was_training)

    parts = {name: [layers[k] for k in sorted(layers)] for name, layers in recorded.items()}
    sums = (torch.stack(parts[name]) for name in ("hidden", "attention", "ffn"))
    stream = Stream(arch, batch, batch.at_last(logits).float(), *sums)
    if detail:
        heads, head_dim = arch.blocks[0].heads, arch.blocks[0].head_dim
        stream.heads = [x.unflatten(-1, (heads, head_dim)) for x in parts["heads"]]
        values = zip(arch.blocks, parts["fused"], strict=True)
        stream.values = [block.value_part(x) for block, x in values]
        gates = parts.get("gate", [None] * len(arch.blocks))
        pairs = zip(arch.blocks, gates, parts["up"], strict=True)
        split = [block.split_ffn_in(gate, up) for block, gate, up in pairs]
        stream.gates, stream.ups = [gate for gate, _ in split], [up for _, up in split]
        stream.weights, stream.neurons = parts["weights"], parts["neurons"]
        stream.attention_raw = parts.get("attention_raw", list(stream.attention))
        stream.ffn_raw = parts.get("ffn_raw", list(stream.ffn))
    return stream


def _taps(block: Block, detail: bool) -> dict[str, tuple[nn.Module, str]]:
    """Where a block's terms can be read: name -> (module, side of `hooks`)."""
    family = block.family
    taps = {
        "hidden": (block.module, "input"),
        "attention": (block.attention_result, "output"),
        "ffn": (block.ffn_result, "output"),
    }
    if detail:
        taps |= {
            "heads": (block.get(family.attention_out), "input"),
            "fused": (block.get(family.value), "output"),
            "weights": (block.attention, "whole output"),
            "neurons": (block.get(family.ffn_out), "input"),
            "up": (block.get(family.up), "output"),
        }
        if family.gate is not None and not family.fused_gate:
            taps["gate"] = block.get(family.gate), "output"
        if family.attention_post is not None:
            taps["attention_raw"] = block.attention, "output"
        if family.ffn_post is not None:
            taps["ffn_raw"] = block.get(family.ffn), "output"
    return taps


@contextlib.contextmanager
def _attention_weights_visible(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Eager attention, the only kind that returns its weights, while the block runs."""
    before = model.config._attn_implementation
    if not wanted or before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def head_contributions(stream: Stream, layer: int) -> Tensor:
    """What each head brings from each source position to each prompt's last position.

    Returns [B, H, T, D]; the sum over heads and sources, plus the output bias, is a_l there.

    Example:
        >>> stream = capture(model, encode(tokenizer, ["France's capital is"]))
        >>> head_contributions(stream, 2).shape
        torch.Size([1, 4, 5, 32])
    """
    block, batch = stream.arch.blocks[layer], stream.batch
    alpha = batch.at_last(stream.weights[layer].transpose(1, 2))  # [B, H, T]
    mixed = alpha[..., None] * stream.expanded_values(layer).transpose(1, 2)  # [B, H, T, d]
    w_o = block.attention_out.weight.unflatten(-1, (block.heads, block.head_dim))  # [D, H, d]
    raw = torch.einsum("bhtd,whd->bhtw", mixed, w_o)
    scale = batch.at_last(stream.post_scale("attention", layer))[:, None, None]
    return block.norm("attention_post").linear(raw, scale)


_checked: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def self_check(model: nn.Module, sample: Iterable[int] = (1, 5, 3, 7, 2)) -> None:
    """Verify the family's row on this very model with one short pass; remembered per model object.

    Raises UnsupportedModelError with the measured error when residual contributions, attention
    neurons or FFN neurons do not sum to what the model computed.

    Example:
        >>> self_check(model)
    """
    if model in _checked:
        return
    ids = torch.tensor([list(sample)], device=model.device) % model.config.vocab_size
    stream = capture(model, Batch(ids, torch.ones_like(ids)))
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    errors = defaultdict(float, {"residual contributions": stream.decomposition_error()})
    for k, block in enumerate(stream.arch.blocks):
        mixed = torch.einsum("bhqk,bkhd->bqhd", stream.weights[k], stream.expanded_values(k))
        by_head, by_neuron = stream.heads[k].flatten(-2), stream.neurons[k]
        for name, parts, whole in (
            ("attention neurons", block.attention_out(by_head), stream.attention_raw[k]),
            ("FFN neurons", block.ffn_out(by_neuron), stream.ffn_raw[k]),
            ("attention weights × values", mixed, stream.heads[k]),
        ):
            error = (parts - whole).norm() / whole.norm()
            errors[name] = max(errors[name], error.item())
    for name, error in errors.items():
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{type(model).__name__}: the {name} miss the model's own state by {error:.1e} "
                f"(relative; allowed {tolerance:.0e}). This variant differs from the family's row "
                "in backattn/models/families.py."
            )
    _checked.add(model)
