"""What differs between decoder families, in one table: one row per family.

To add a family, add its row to `FAMILIES` and a configuration to `tiny.TINY`; the tests of
`activations` then check it.
"""

from dataclasses import dataclass
from typing import Any


class UnsupportedModelError(ValueError):
    """The model's family has no row in the table, or its modules are not where the row says."""


@dataclass(frozen=True)
class Family:
    """Module paths of one family. Paths inside a block are relative to the decoder layer."""

    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention_norm: str | None = "input_layernorm"  # None: attention reads h_l itself
    attention: str = "self_attn"
    attention_out: str = "self_attn.o_proj"  # its input is the concatenated heads
    attention_post: str | None = None  # sandwich norm: its output enters the residual stream
    value: str = "self_attn.v_proj"  # its output ends with the values …
    value_by_head: bool = False  # … or holds query, key and value head by head
    ffn_norm: str | None = "post_attention_layernorm"
    ffn: str = "mlp"
    ffn_out: str = "mlp.down_proj"  # its input is the neurons' coefficients
    ffn_post: str | None = None
    gate: str | None = "mlp.gate_proj"  # None: no gate, the activation acts on `up`
    up: str = "mlp.up_proj"  # where it is the gate's module too, it holds the gate, then up
    activation: str = "mlp.act_fn"
    norm_offset: float = 0.0  # Gemma stores the norm weight minus one

    @property
    def fused_gate(self) -> bool:
        return self.gate == self.up


_SANDWICH = dict(attention_post="post_attention_layernorm", ffn_post="post_feedforward_layernorm")
_GEMMA = Family(**_SANDWICH, ffn_norm="pre_feedforward_layernorm", norm_offset=1.0)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Family()),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": Family(**_SANDWICH, attention_norm=None, ffn_norm=None),
    "phi3": Family(
        value="self_attn.qkv_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        activation="mlp.activation_fn",
    ),
    "gpt2": Family(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention_norm="ln_1",
        attention="attn",
        attention_out="attn.c_proj",
        value="attn.c_attn",
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
        value_by_head=True,
        ffn_out="mlp.dense_4h_to_h",
        gate=None,
        up="mlp.dense_h_to_4h",
        activation="mlp.act",
    ),
}


def supported() -> str:
    """The supported families, for messages."""
    return ", ".join(sorted(FAMILIES))


def check_supported(config: Any) -> Family:
    """The row of a Hugging Face config's family; UnsupportedModelError names those there are.

    Example:
        >>> check_supported(model.config).attention_out
        'self_attn.o_proj'
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"Model family {kind!r} is not supported. Supported families: {supported()}. "
            "To add one, write its row in backattn/models/families.py (see FAMILIES)."
        )
    return FAMILIES[kind]
