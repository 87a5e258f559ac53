"""Capture of the residual stream and its exact decomposition.

The stream of a decoder is a running sum: embedding, then one attention and one FFN contribution per
layer. `capture` records every term of that sum in one forward pass, together with what each term is
made of (source positions, value channels, neurons), without changing the model.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from backattn.models.decoder import Arch, Linear, check_length, check_unshared, describe
from backattn.models.devices import in_one_place
from backattn.models.families import UnsupportedModelError
from backattn.models.hooks import analysis, hooks
from backattn.models.tokens import Batch, padded

FIRST = 4  # tokens on which eager attention is compared with that of the model as loaded


@functools.cache
def _directions(size: int, device: torch.device) -> Tensor:
    """Fixed random directions, on which outputs are compared: [size, 4]."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 4, generator=generator, dtype=torch.float32, device="cpu").to(device)


def prove(arch: Arch, what: str, miss: Tensor, whole: Tensor, slack: float = 1.0) -> None:
    """Raises UnsupportedModelError where a difference [..., n] is larger, against what it is part
    of [..., m], than what rounding explains."""
    size = whole.float().norm(dim=-1).clamp(min=1e-30)  # all weights may be zero
    worst, eps = (miss.float().norm(dim=-1) / size).max().item(), torch.finfo(arch.model.dtype).eps
    if not worst <= (allowed := slack * max(1e-4, 5 * eps)):
        raise UnsupportedModelError(
            f"{type(arch.model).__name__}, {what}: what is computed from the weights misses what "
            f"the model put out by {worst:.1e} (relative; allowed {allowed:.0e}). It was changed "
            "or differs from its family's row in backattn/models/families.py: merge adapters into "
            "it (merge_and_unload()), load it unquantised, take your hooks off."
        )


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
    # The frozen scale of the sandwich norm of "attention" or "ffn", 1 without one: [B, T, 1].
    scales: dict[str, Sequence[Tensor]] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return len(self.attention)

    def middle(self, layer: int) -> Tensor:
        """The FFN's base r_l = h_l + a_l: [B, T, D]."""
        return self.hidden[layer] + self.attention[layer]

    def input(self, kind: str, layer: int) -> Tensor:
        """State that the norm of "attention" or "ffn" reads, h_l or r_l: [B, T, D]."""
        reads_sum = kind == "ffn" and not self.arch.parallel
        return self.middle(layer) if reads_sum else self.hidden[layer]

    def prove_sums(self) -> None:
        """Raises UnsupportedModelError unless h_l + a_l + f_l = h_{l+1} in every layer."""
        for layer, after in enumerate(self.hidden[1:]):
            miss = self.middle(layer) + self.ffn[layer] - after
            self._prove(f"layer {layer}: residual sum", miss, after)

    def prove_outputs(self, layer: int, values: Tensor, neurons: Tensor) -> None:
        """Raises UnsupportedModelError unless a layer's output weights make, of attention's weights
        and values [B, T, G, d] and of neurons [B, T, F], what it added to the stream.

        Freivalds' check: both sides on some random directions, which costs one token's product.
        """
        block, directions = self.arch.blocks[layer], _directions(self.arch.width, values.device)
        for kind, out in (("attention", block.attention_out), ("ffn", block.ffn_out)):
            post, added = block.norm(f"{kind}_post"), getattr(self, kind)[layer]
            through = post.adjoint(directions.T, out.weight.new_ones(()))  # [4, D]
            whole = (through @ out.weight).T  # [n, 4]
            if kind == "ffn":
                whole = neurons @ whole
            else:
                heads = whole.unflatten(0, (block.heads, block.head_dim))
                whole = torch.einsum("bkhd,hdr->bhkr", block.per_head(values), heads)
                whole = torch.einsum("bhqk,bhkr->bqr", self.weights[layer], whole)
            whole = (whole + out.bias @ through.T) * self.scales[kind][layer]
            miss = whole + post.bias @ directions - added @ directions
            self._prove(f"layer {layer}: {kind} output", miss / 2, added)  # 2 = √4 directions

    def prove_inputs(self, layer: int, kind: str, *pairs: tuple[Linear | None, Tensor]) -> None:
        """Raises UnsupportedModelError unless each weight of `pairs` makes what stands beside it
        [B, T, n] of the state that "attention" or "ffn" reads, behind its norm."""
        norm, state = self.arch.blocks[layer].norm(f"{kind}_norm"), self.input(kind, layer)
        x = norm.linear(state, norm.scale(state)) + norm.bias
        for linear, found in pairs:
            if linear is not None:
                directions = _directions(len(linear.weight), x.device)
                whole = x @ (directions.T @ linear.weight).T + linear.bias @ directions
                miss = whole - found @ directions
                self._prove(f"layer {layer}: {kind} norm and input", miss / 2, found)

    def _prove(self, what: str, miss: Tensor, whole: Tensor) -> None:
        real = self.batch.attention_mask.bool()  # [B, T]
        sizes = (x.norm(dim=-1, keepdim=True)[real] for x in (miss, whole))
        prove(self.arch, what, *sizes)


@analysis
def capture(model: nn.Module, batch: Batch, detail=True, compare=True) -> Stream:
    """One forward pass with every residual contribution recorded.

    model: a supported Hugging Face decoder; its mode, hooks and attention kind stay as they were.
    Of one with back attention, layers that run twice are recorded in their second run.
    batch: padded on either side. detail: also record values, attention weights and neurons.
    compare: that eager attention is what the model as loaded computes, on some tokens.

    Raises UnsupportedModelError as `describe` does, and where it is not; ValueError when a prompt
    is longer than the model's context, or the model is spread over several places.

    Example:
        >>> stream = capture(model, encode(tokenizer, ["France's capital is"]))
        >>> stream.attention.shape, stream.neurons[0].shape
        (torch.Size([4, 1, 5, 32]), torch.Size([1, 5, 48]))
        >>> stream.prove_sums()
    """
    arch = describe(model)
    if not in_one_place(model):
        raise ValueError(
            "The layers of this model are spread over several places (device_map), and what is "
            "asked for reads its weights in one: load it whole, in a smaller dtype or on a larger "
            "GPU. Back attention works as it is."
        )
    check_length(model, batch.input_ids.shape[1])
    check_unshared(arch.blocks)
    recorded: dict[str, dict[int, Tensor]] = defaultdict(dict)  # of two runs the second stays

    def record(name: str, layer: int, part: Callable = lambda x: x) -> Callable:
        def hook(x: Tensor | tuple) -> None:
            recorded[name][layer] = part(x).detach().float()

        return hook

    last = arch.final_norm_module, "input", record("hidden", len(arch.blocks))
    taps = [last]
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
    loaded = model.config._attn_implementation
    if detail and compare and loaded != "eager":
        beginning = padded([batch.rows[0][:FIRST]], device=batch.input_ids.device)
        with hooks(last):
            model(**beginning.inputs, use_cache=False, logits_to_keep=1)
    first = recorded["hidden"].pop(len(arch.blocks), None)  # [1, FIRST, D]
    try:
        if detail:
            model.set_attn_implementation("eager")  # the only kind that returns its weights
        # The unembedding is the largest matrix of small models, and only the last states are read.
        with hooks(*taps, (arch.unembedding_module, "input", lambda x: batch.at_last(x)[:, None])):
            logits = model(**batch.inputs, use_cache=False).logits
        if logits.shape[1] > 1:  # a head that is not called as a module makes all of them
            logits = batch.at_last(logits)[:, None]
    finally:
        if detail:
            model.set_attn_implementation(loaded)

    if any(len(recorded[name]) < len(arch.blocks) for name, *_ in wanted):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run all of its modules: pass one not compiled."
        )
    parts = {name: [layers[k] for k in sorted(layers)] for name, layers in recorded.items()}
    for kind in ("attention", "ffn") if detail else ():
        pairs = zip(arch.blocks, parts.pop(f"raw_{kind}"), strict=True)
        scales = [block.norm(f"{kind}_post").scale(raw) for block, raw in pairs]
        parts.setdefault("scales", {})[kind] = scales
    parts |= {name: torch.stack(parts[name]) for name in ("hidden", "attention", "ffn")}
    if first is not None:
        eager = parts["hidden"][-1, :1, batch.start[0] :][:, : first.shape[1]]
        prove(arch, f"eager attention in place of {loaded!r}", eager - first, first, slack=4)
    return Stream(arch, batch, logits[:, 0].float(), **parts)
