"""A decoder seen through its family's row: its modules, and its weights in one orientation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from backattn.models.families import Family, UnsupportedModelError, check_supported, supported


def _plain(x: Tensor) -> Tensor:
    """In fp32, without a graph, and fit for one where it was made in inference mode."""
    x = x.detach().float()
    return x.clone() if x.is_inference() else x


@dataclass(frozen=True)
class Linear:
    """A projection y = x @ weight.T + bias in fp32. weight: [out, in]; bias: [out]."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, module: nn.Module, name: str, width: int, axis: int) -> "Linear":
        """Of a module with `width` weights along an axis; else UnsupportedModelError."""
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
            if isinstance(module, Conv1D) or weight.shape[axis] != width:  # [in, out]
                weight = weight.T
            if weight.shape[axis] == width:
                weight = _plain(weight)
                return cls(weight, weight.new_zeros(len(weight)) if bias is None else _plain(bias))
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__} whose weight is no matrix of floats: load the "
            "model unquantised (dtype float32, bfloat16 or float16), merge adapters into it."
        )


class Norm:
    """The fixed part of a norm: x -> weight * centre(x) * scale(x) + bias, all in fp32.

    RMS norms do not centre and have no bias; layer norms do and may. `scale` is the only part that
    depends on x, so freezing it makes the norm affine. A missing module is the identity.
    """

    def __init__(self, module: nn.Module | None, width: int, offset: float, device: torch.device):
        self.present = module is not None
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        ones = torch.ones(width, dtype=torch.float32, device=device)
        self.weight = ones if weight is None else _plain(weight) + offset
        self.bias = torch.zeros_like(self.weight) if bias is None else _plain(bias)
        self.centred = isinstance(module, nn.LayerNorm)
        self.eps = getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Tensor) -> Tensor:
        """1 / root mean square (or standard deviation) of x: [..., width] -> [..., 1]."""
        if not self.present:
            return torch.ones_like(x[..., :1])
        return torch.rsqrt(self.centre(x).pow(2).mean(-1, keepdim=True) + self.eps)

    def linear(self, x: Tensor, scale: Tensor) -> Tensor:
        """The norm's linear part under a given scale, without its bias."""
        return self.weight * self.centre(x) * scale if self.present else x

    def adjoint(self, covector: Tensor, scale: Tensor) -> Tensor:
        """Transpose of `linear`: hands a covector on the norm's output back to its input."""
        return self.centre(self.weight * covector) * scale if self.present else covector


@dataclass
class Block:
    """One decoder layer: its own modules, and its weights in one orientation for all families."""

    family: Family
    layer: int
    module: nn.Module
    width: int
    heads: int
    kv_heads: int
    head_dim: int

    def get(self, name: str) -> nn.Module | None:
        """A module by its name in the family's row; None where the family has none."""
        path = getattr(self.family, name)
        return None if path is None else self.module.get_submodule(path)

    def result(self, kind: str) -> nn.Module:
        """The module whose output "attention" or "ffn" adds to the residual stream."""
        return self.get(f"{kind}_post") or self.get(kind)

    def norm(self, name: str) -> Norm:
        """`name`: attention_norm, attention_post, ffn_norm or ffn_post."""
        device = next(self.module.parameters()).device
        return Norm(self.get(name), self.width, self.family.norm_offset, device)

    def _linear(self, name: str) -> Linear:
        axis = 0 if name.endswith("_out") else 1  # where the residual stream's width is
        path = f"Layer {self.layer}: {getattr(self.family, name)}"
        return Linear.of(self.get(name), path, self.width, axis)

    @property
    def attention_out(self) -> Linear:  # W_O: [width, heads * head_dim]
        return self._linear("attention_out")

    @property
    def ffn_out(self) -> Linear:  # W_down: [width, neurons]
        return self._linear("ffn_out")

    def value_part(self, fused: Tensor) -> Tensor:
        """View of the values [..., kv_heads, head_dim] in the value module's output [..., out]."""
        if self.family.value_by_head:
            return fused.unflatten(-1, (self.heads, 3, self.head_dim))[..., 2, :]
        size = self.kv_heads * self.head_dim
        return fused[..., -size:].unflatten(-1, (self.kv_heads, self.head_dim))

    @property
    def value(self) -> Linear:
        """W_V: [kv_heads * head_dim, width]."""
        fused = self._linear("value")
        weight = self.value_part(fused.weight.T).flatten(-2).T
        return Linear(weight, self.value_part(fused.bias).flatten(-2))

    @property
    def ffn_in(self) -> tuple[Linear | None, Linear]:
        """(gate, up): [neurons, width] each; gate is None where the FFN has no gate."""
        up = self._linear("up")
        if self.family.fused_gate:
            gate, up = map(Linear, up.weight.chunk(2), up.bias.chunk(2))
            return gate, up
        return None if self.family.gate is None else self._linear("gate"), up

    def per_head(self, values: Tensor) -> Tensor:
        """Values [..., kv_heads, head_dim], each repeated for the heads that read it."""
        return values.repeat_interleave(self.heads // self.kv_heads, dim=-2)

    @torch.no_grad()
    def run(self, names: Sequence[str], states: Tensor) -> Tensor:
        """What modules, one after the other, make of states [B, T, width]: the model's own bits."""
        x = states.to(next(self.module.parameters()).dtype)
        for module in filter(None, map(self.get, names)):
            x = module(x)
        return x

    def values(self, states: Tensor) -> Tensor:
        """The values of states before attention's norm: [B, T, kv_heads, head_dim]."""
        return self.value_part(self.run(("attention_norm", "value"), states)).float()

    def neurons(self, states: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """(m, g, u) of states before the FFN's norm: neurons m = act(g) u, or act(u) where there is
        no gate, each [B, T, neurons]."""
        up, act, gate = self.run(("ffn_norm", "up"), states), self.get("activation"), None
        if self.family.fused_gate:
            gate, up = up.chunk(2, dim=-1)
        elif self.family.gate is not None:
            gate = self.run(("ffn_norm", "gate"), states)
        m = act(up) if gate is None else act(gate) * up
        return m.float(), None if gate is None else gate.float(), up.float()


@dataclass
class Arch:
    """A model seen through its family's row."""

    model: nn.Module
    family: Family
    blocks: list[Block]
    final_norm_module: nn.Module
    unembedding_module: nn.Module
    softcap: float | None
    parallel: bool  # attention and FFN both read h_l (GPT-NeoX)

    @property
    def width(self) -> int:
        return self.blocks[0].width


def check_length(model, length: int) -> None:
    """Raises ValueError where a prompt has more tokens than the model takes."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"A prompt has {length} tokens; this model takes at most {limit}. Shorten it."
        )


def check_unshared(blocks: Sequence[Block]) -> None:
    """Raises UnsupportedModelError where layers share a module: what is hooked in one of them would
    happen in all."""
    if len({id(block.module) for block in blocks}) < len(blocks):
        raise UnsupportedModelError(
            "Layers of this model share a module, so that none can be read or changed by itself: "
            "give each its own (copy.deepcopy)."
        )


def describe(model: nn.Module) -> Arch:
    """Find the parts of a Hugging Face decoder. Reads no weights.

    Raises UnsupportedModelError for a family without a row, or when a module is missing.

    Example:
        >>> arch = describe(model)
        >>> len(arch.blocks), arch.blocks[0].ffn_out.weight.shape  # [width, neurons]
        (4, torch.Size([32, 48]))
    """
    if hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"{type(model).__name__} wraps a model by peft: pass model.merge_and_unload()."
        )
    if not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Hugging Face decoder with a language-model head. "
            f"Load one with backattn.load_model. Supported families: {supported()}."
        )
    config, family = model.config, check_supported(model.config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = config.hidden_size, heads, kv_heads, head_dim
    try:
        layers = enumerate(model.get_submodule(family.layers))
        blocks = [Block(family, layer, module, *sizes) for layer, module in layers]
        for name in ("attention", "attention_out", "value", "ffn_out", "up"):
            blocks[0].get(name)
        final_norm = model.get_submodule(family.final_norm)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} is of family {config.model_type!r}, but {error}. "
            "Pass the model with its language-model head (AutoModelForCausalLM), unwrapped."
        ) from error
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no unembedding. Load it with AutoModelForCausalLM."
        )
    softcap = getattr(config, "final_logit_softcapping", None)
    parallel = bool(getattr(config, "use_parallel_residual", False))
    return Arch(model, family, blocks, final_norm, unembedding, softcap, parallel)
