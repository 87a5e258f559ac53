"""What differs between decoder families, in one table: one row per family.

A row says where the modules are. Everything else (which vectors add up, how a neuron is read) is the
same for all families and lives in `residual` and `lens`. To add a family, add a row to `FAMILIES`
and a configuration to `models.TINY`; `tests/test_residual.py` then checks it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class UnsupportedModelError(ValueError):
    """The model's family has no row in the table, or its modules are not where the row says."""


@dataclass(frozen=True)
class Family:
    """Module paths of one family. Paths inside a block are relative to the decoder layer."""

    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention_norm: str | None = "input_layernorm"  # in front of attention; None: attention reads h_l itself
    attention: str = "self_attn"
    attention_out: str = "self_attn.o_proj"  # its input is the concatenated heads
    attention_post: str | None = None  # sandwich norm whose output is what enters the residual stream
    value: str = "self_attn.v_proj"
    value_layout: str = "own"  # own | thirds (q,k,v side by side) | tail (last part of q|k|v) | heads (q,k,v per head)
    ffn_norm: str | None = "post_attention_layernorm"
    ffn: str = "mlp"
    ffn_out: str = "mlp.down_proj"  # its input is the neurons' coefficients
    ffn_post: str | None = None
    gate: str | None = "mlp.gate_proj"  # None: no gate, the activation acts on `up`
    up: str = "mlp.up_proj"  # with gate_layout "halves" it holds gate and up together
    gate_layout: str = "own"  # own | halves
    activation: str = "mlp.act_fn"
    norm_offset: float = 0.0  # Gemma stores the norm weight minus one


_LLAMA = Family()
_GEMMA = Family(
    attention_post="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post="post_feedforward_layernorm",
    norm_offset=1.0,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": Family(
        attention_norm=None,
        attention_post="post_attention_layernorm",
        ffn_norm=None,
        ffn_post="post_feedforward_layernorm",
    ),
    "phi3": Family(
        value="self_attn.qkv_proj",
        value_layout="tail",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        gate_layout="halves",
        activation="mlp.activation_fn",
    ),
    "gpt2": Family(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention_norm="ln_1",
        attention="attn",
        attention_out="attn.c_proj",
        value="attn.c_attn",
        value_layout="thirds",
        ffn_norm="ln_2",
        ffn_out="mlp.c_proj",
        gate=None,
        up="mlp.c_fc",
        activation="mlp.act",
    ),
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        attention_out="attention.dense",
        value="attention.query_key_value",
        value_layout="heads",
        ffn_out="mlp.dense_4h_to_h",
        gate=None,
        up="mlp.dense_h_to_4h",
        activation="mlp.act",
    ),
}


@dataclass(frozen=True)
class Linear:
    """A projection y = x @ weight.T + bias in fp32. weight: [out, in]; bias: [out]."""

    weight: Tensor
    bias: Tensor


class Norm:
    """The fixed part of a norm: x -> weight * centre(x) * scale(x) + bias, all in fp32.

    RMS norms do not centre and have no bias; layer norms do and may. `scale` is the only part that
    depends on x, so freezing it makes the norm affine. A missing module is the identity.
    """

    def __init__(self, module: nn.Module | None, width: int, offset: float = 0.0):
        self.present = module is not None
        weight = getattr(module, "weight", None)
        self.weight = torch.ones(width) if weight is None else weight.detach().float() + offset
        bias = getattr(module, "bias", None)
        self.bias = torch.zeros_like(self.weight) if bias is None else bias.detach().float()
        self.centred = isinstance(module, nn.LayerNorm)
        self.eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), 0.0)

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

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x, self.scale(x)) + self.bias if self.present else x


@dataclass
class Block:
    """One decoder layer: its modules, and its weights in one orientation for all families."""

    family: Family
    module: nn.Module
    width: int
    heads: int
    kv_heads: int
    head_dim: int

    def get(self, path: str | None) -> nn.Module | None:
        return None if path is None else self.module.get_submodule(path)

    @property
    def attention(self) -> nn.Module:
        return self.get(self.family.attention)

    @property
    def attention_result(self) -> nn.Module:
        """The module whose output attention adds to the residual stream."""
        return self.get(self.family.attention_post or self.family.attention)

    @property
    def ffn_result(self) -> nn.Module:
        """The module whose output the FFN adds to the residual stream."""
        return self.get(self.family.ffn_post or self.family.ffn)

    def norm(self, name: str) -> Norm:
        """`name`: attention_norm, attention_post, ffn_norm or ffn_post."""
        return Norm(self.get(getattr(self.family, name)), self.width, self.family.norm_offset)

    def linear(self, path: str) -> Linear:
        module = self.get(path)
        weight = module.weight.detach().float()
        if type(module).__name__ == "Conv1D":  # GPT-2 stores [in, out]
            weight = weight.T
        bias = module.bias.detach().float() if module.bias is not None else weight.new_zeros(weight.shape[0])
        return Linear(weight, bias)

    @property
    def attention_out(self) -> Linear:
        """W_O: [width, heads * head_dim]."""
        return self.linear(self.family.attention_out)

    @property
    def ffn_out(self) -> Linear:
        """W_down: [width, neurons]."""
        return self.linear(self.family.ffn_out)

    def value_part(self, fused: Tensor) -> Tensor:
        """View of the values [..., kv_heads, head_dim] in the output [..., out] of the value projection."""
        layout, size = self.family.value_layout, self.kv_heads * self.head_dim
        if layout == "heads":
            return fused.unflatten(-1, (self.heads, 3, self.head_dim))[..., 2, :]
        part = fused if layout == "own" else fused[..., -size:]
        return part.unflatten(-1, (self.kv_heads, self.head_dim))

    @property
    def value(self) -> Linear:
        """W_V: [kv_heads * head_dim, width]."""
        fused = self.linear(self.family.value)
        weight = self.value_part(fused.weight.T).flatten(-2).T
        return Linear(weight, self.value_part(fused.bias).flatten(-2))

    @property
    def ffn_in(self) -> tuple[Linear | None, Linear]:
        """(gate, up): [neurons, width] each; gate is None where the FFN has no gate."""
        up = self.linear(self.family.up)
        if self.family.gate is None:
            return None, up
        if self.family.gate_layout == "halves":
            (gate_w, up_w), (gate_b, up_b) = up.weight.chunk(2), up.bias.chunk(2)
            return Linear(gate_w, gate_b), Linear(up_w, up_b)
        return self.linear(self.family.gate), up

    def split_ffn_in(self, gate: Tensor | None, up: Tensor) -> tuple[Tensor | None, Tensor]:
        """Pre-activations (gate, up) from the outputs of the modules `gate` and `up`."""
        if self.family.gate_layout == "halves":
            return up.chunk(2, dim=-1)
        return gate, up

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        return self.get(self.family.activation)


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

    @property
    def final_norm(self) -> Norm:
        return Norm(self.final_norm_module, self.width, self.family.norm_offset)


def runs_on(module: nn.Module) -> torch.device:
    """The device on which a module computes, also where accelerate keeps its weights elsewhere until it does."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        place = getattr(one, "execution_device", None)
        if place is not None:
            return torch.device(place)
    return next(module.parameters()).device


def in_one_place(model: nn.Module) -> bool:
    """Whether all weights lie on one device, not spread by a device_map of accelerate's."""
    places = set(getattr(model, "hf_device_map", {}).values())
    return len(places) < 2 and "disk" not in places


def input_device(model: nn.Module) -> torch.device:
    """The device on which a model takes its tokens."""
    return runs_on(model.get_input_embeddings())


def supported() -> str:
    """The supported families, for messages."""
    return ", ".join(sorted(FAMILIES))


def check_supported(config: Any) -> Family:
    """The family's row for a Hugging Face config; raises UnsupportedModelError naming the supported families."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"Model family {kind!r} is not supported. Supported families: {supported()}. "
            "To add one, write its row in backattn/arch.py (see FAMILIES)."
        )
    return FAMILIES[kind]


def describe(model: nn.Module) -> Arch:
    """Find the parts of a Hugging Face decoder. Reads no weights.

    Raises UnsupportedModelError for a family without a row, or when a module is missing.
    """
    if not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Hugging Face decoder with a language-model head. "
            f"Load one with backattn.load_model. Supported families: {supported()}."
        )
    config, family = model.config, check_supported(model.config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    try:
        layers = model.get_submodule(family.layers)
        blocks = [Block(family, layer, config.hidden_size, heads, kv_heads, head_dim) for layer in layers]
        for path in (family.attention, family.attention_out, family.value, family.ffn_out, family.up):
            blocks[0].get(path)
        final_norm = model.get_submodule(family.final_norm)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} is of family {config.model_type!r}, but {error}. "
            "Pass the model with its language-model head (AutoModelForCausalLM), unwrapped."
        ) from error
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no unembedding. Load it with AutoModelForCausalLM.")
    return Arch(
        model=model,
        family=family,
        blocks=blocks,
        final_norm_module=final_norm,
        unembedding_module=unembedding,
        softcap=getattr(config, "final_logit_softcapping", None),
        parallel=bool(getattr(config, "use_parallel_residual", False)),
    )
