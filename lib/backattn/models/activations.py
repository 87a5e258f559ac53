"""Capture of the residual stream and its exact decomposition.

The stream of a decoder is a running sum: embedding, then one attention and one FFN contribution per
layer. `capture` records every term of that sum in one forward pass, together with what each term is
made of (heads, source positions, neurons), without changing the model.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from backattn.models.decoder import Arch, describe, in_one_place
from backattn.models.families import UnsupportedModelError
from backattn.models.hooks import hooks
from backattn.models.tokens import Batch


@dataclass
class Stream:
    """Everything one forward pass added to the residual stream, in fp32.

    Shapes: L layers, B prompts, T positions, D width, H heads, d head width, G key/value heads, F neurons.
    """

    arch: Arch
    batch: Batch
    logits: Tensor  # [B, V] the model's own, at each prompt's last position
    hidden: (
        Tensor  # [L+1, B, T, D] input of each layer; hidden[L] is the state before the final norm
    )
    attention: Tensor  # [L, B, T, D] a_l, what attention adds
    ffn: Tensor  # [L, B, T, D] f_l, what the FFN adds
    heads: list[Tensor] = field(default_factory=list)  # L of [B, T, H, d] input of W_O
    values: list[Tensor] = field(default_factory=list)  # L of [B, T, G, d]
    weights: list[Tensor] = field(
        default_factory=list
    )  # L of [B, H, T, T] attention (query, source)
    gates: list[Tensor | None] = field(default_factory=list)  # L of [B, T, F] gate pre-activation
    ups: list[Tensor] = field(default_factory=list)  # L of [B, T, F] up pre-activation
    neurons: list[Tensor] = field(default_factory=list)  # L of [B, T, F] coefficients m
    attention_raw: list[Tensor] = field(
        default_factory=list
    )  # L of [B, T, D] before the sandwich norm
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
        real = self.batch.attention_mask.bool()
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
    if limit is not None and batch.input_ids.shape[1] > limit:
        raise ValueError(
            f"A prompt has {batch.input_ids.shape[1]} tokens; this model takes at most {limit}. Shorten it."
        )
    names = [
        "hidden",
        "attention",
        "ffn",
        "heads",
        "fused",
        "neurons",
        "gate",
        "up",
        "attention_raw",
        "ffn_raw",
    ]
    seen: dict[str, dict[int, Tensor]] = {
        name: {} for name in [*names, "weights"]
    }  # of two runs the second stays

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
        return lambda module, args, output: seen["weights"].update(
            {layer: output[1].detach().float()}
        )

    was_training = model.training
    model.eval()
    blocks = enumerate(arch.blocks) if detail else ()
    handles = [
        block.attention.register_forward_hook(keep_weights(layer)) for layer, block in blocks
    ]
    try:
        with torch.no_grad(), _attention_weights_visible(model, detail), hooks(*taps):
            output = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
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
            for b, gate, up in zip(
                arch.blocks, kept["gate"] or [None] * len(arch.blocks), kept["up"], strict=True
            )
        ]
        stream.heads = [x.unflatten(-1, (block.heads, block.head_dim)) for x in kept["heads"]]
        stream.values = [b.value_part(x) for b, x in zip(arch.blocks, kept["fused"], strict=True)]
        stream.weights = kept["weights"]
        stream.gates, stream.ups = [g for g, _ in pre], [u for _, u in pre]
        stream.neurons = kept["neurons"]
        stream.attention_raw = kept["attention_raw"] or list(stream.attention)
        stream.ffn_raw = kept["ffn_raw"] or list(stream.ffn)
    return stream


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
    return post.linear(
        raw, stream.batch.at_last(stream.post_scale("attention", layer))[:, None, None]
    )


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
            (
                "attention neurons",
                stream.heads[layer].flatten(-2),
                block.attention_out,
                stream.attention_raw[layer],
            ),
            ("FFN neurons", stream.neurons[layer], block.ffn_out, stream.ffn_raw[layer]),
        ):
            error = (parts @ out.weight.T + out.bias - whole).norm() / whole.norm()
            errors[name] = max(errors.get(name, 0.0), error.item())
        mixed = torch.einsum(
            "bhqk,bkhd->bqhd", stream.weights[layer], stream.expanded_values(layer)
        )
        error = (mixed - stream.heads[layer]).norm() / stream.heads[layer].norm()
        errors["attention weights × values"] = max(
            errors.get("attention weights × values", 0.0), error.item()
        )
    for name, error in errors.items():
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{type(model).__name__}: the {name} miss the model's own state by {error:.1e} (relative; allowed "
                f"{tolerance:.0e}). This variant differs from the family's row in backattn/models/families.py."
            )
    _checked.add(model)
