"""Capture of the residual stream and its exact decomposition.

The stream of a decoder is a running sum: embedding, then one attention and one FFN contribution per
layer. `capture` records every term of that sum in one forward pass, together with what each term is
made of (source positions, value channels, neurons), without changing the model.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from backattn.models.decoder import Arch, describe
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
    values: Sequence[Tensor] = ()  # [B, T, G, d]
    weights: Sequence[Tensor] = ()  # [B, H, T, T] attention (query, source)
    neurons: Sequence[Tensor] = ()  # [B, T, F] coefficients m
    scales: dict[str, Sequence[Tensor]] = field(default_factory=dict)  # see `post_scale`

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
        return self.scales[kind][layer]

    def expanded_values(self, layer: int) -> Tensor:
        """Values with each key/value head repeated for the heads that read it: [B, T, H, d]."""
        return self.arch.blocks[layer].per_head(self.values[layer])

    def decomposition_error(self) -> float:
        """Largest ‖h_0 + Σ(a + f) − h_L‖ / ‖h_L‖ over real positions."""
        total = self.hidden[0] + self.attention.sum(0) + self.ffn.sum(0)  # [B, T, D]
        real = self.batch.attention_mask.bool()
        error = (total - self.hidden[-1])[real].norm(dim=-1) / self.hidden[-1][real].norm(dim=-1)
        return error.max().item()


def capture(model: nn.Module, batch: Batch, detail: bool = True) -> Stream:
    """One forward pass with every residual contribution recorded.

    model: a supported Hugging Face decoder; its mode, hooks and attention kind stay as they were.
    Of one with back attention, layers that run twice are recorded in their second run.
    batch: padded on either side. detail: also record values, attention weights and neurons.

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

    def record(name: str, layer: int, part: Callable = lambda x: x) -> Callable:
        def hook(x: Tensor | tuple) -> None:
            recorded[name][layer] = part(x).detach().float()

        return hook

    taps = [(arch.final_norm_module, "input", record("hidden", len(arch.blocks)))]
    for layer, block in enumerate(arch.blocks):
        wanted = [("hidden", block.module, "input")]
        wanted += [(kind, block.result(kind), "output") for kind in ("attention", "ffn")]
        wanted += detail * [
            ("values", block.get("value"), "output", block.value_part),
            ("weights", block.get("attention"), "whole output", lambda output: output[1]),
            ("neurons", block.get("ffn_out"), "input"),
            ("raw_attention", block.get("attention"), "output"),
            ("raw_ffn", block.get("ffn"), "output"),
        ]
        taps += [(module, side, record(name, layer, *part)) for name, module, side, *part in wanted]
    was_training, implementation = model.training, model.config._attn_implementation
    model.eval()
    if detail:
        model.set_attn_implementation("eager")  # the only kind that returns its weights
    try:
        with torch.no_grad(), hooks(*taps):
            logits = model(**batch.inputs, use_cache=False).logits
    finally:
        model.train(was_training)
        if detail:
            model.set_attn_implementation(implementation)

    parts = {name: [layers[k] for k in sorted(layers)] for name, layers in recorded.items()}
    for kind in ("attention", "ffn") if detail else ():
        pairs = zip(arch.blocks, parts.pop(f"raw_{kind}"), strict=True)
        scales = [block.norm(f"{kind}_post").scale(raw) for block, raw in pairs]
        parts.setdefault("scales", {})[kind] = scales
    parts |= {name: torch.stack(parts[name]) for name in ("hidden", "attention", "ffn")}
    return Stream(arch, batch, batch.at_last(logits).float(), **parts)


_checked: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def self_check(model: nn.Module) -> None:
    """Verify the family's row on this very model with one short pass; remembered per model object.

    Raises UnsupportedModelError with the measured error when residual contributions or neurons do
    not sum to what the model computed.
    """
    if model in _checked:
        return
    ids = torch.tensor([[1, 5, 3, 7, 2]], device=model.device) % model.config.vocab_size
    stream = capture(model, Batch(ids, torch.ones_like(ids)))
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    errors = {"residual contributions": [stream.decomposition_error()]}
    for layer, block in enumerate(stream.arch.blocks):
        values = stream.expanded_values(layer)
        heads = torch.einsum("bhqk,bkhd->bqhd", stream.weights[layer], values).flatten(-2)
        for kind, raw, whole in (
            ("attention", block.attention_out(heads), stream.attention[layer]),
            ("ffn", block.ffn_out(stream.neurons[layer]), stream.ffn[layer]),
        ):
            parts = block.norm(f"{kind}_post").linear(raw, stream.post_scale(kind, layer))
            error = (parts - whole).norm() / whole.norm()
            errors.setdefault(f"{kind} neurons", []).append(error.item())
    for name, found in errors.items():
        if not all(error <= tolerance for error in found):
            raise UnsupportedModelError(
                f"{type(model).__name__}: the {name} miss the model's own state by "
                f"{max(found):.1e} (relative; allowed {tolerance:.0e}). This variant differs from "
                "the family's row in backattn/models/families.py."
            )
    _checked.add(model)
