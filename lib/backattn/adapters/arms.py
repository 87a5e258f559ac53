"""The arms that back attention must beat: what else could the same data and weights do?

Each acts at the input of the source layer, as back attention does, but for peft's LoRA on queries
and values. All start as the identity. A loop that hands the final state back whole would not: a
pretrained model's low layers cannot read it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from backattn.adapters.back_attention import get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from backattn.adapters.modules import (
    BackAttention,
    Bias,
    LoopLoRA,
    PreviousToken,
    ResidualLoRA,
    ShuffledMemory,
)
from backattn.adapters.two_pass import TwoPassModel
from backattn.models.decoder import describe

Layers = int | tuple[int, ...]
RATES = (2.5e-4, 1e-3, 4e-3)


@dataclass(frozen=True)
class Arm:
    """One way to answer: what is put on the model, how it is tuned, and how it is drawn.

    make: see `make_arm`; None for an untrained arm. rates: learning rates to try first. colour: of
    seaborn's palette "colorblind", grey for an untrained arm. two_passes: layers from the source
    layer on run twice. trains: gradients go through the layers "above" it, or through "all".
    several_sources: it may have several source layers. chooses_memory: it takes memory_layers.
    """

    name: str
    about: str
    make: Callable[[nn.Module, Layers, int, tuple[int, ...] | None], nn.Module] | None
    colour: str
    marker: str
    rates: tuple[float, ...] = RATES
    two_passes: bool = False
    trains: str = "above"
    several_sources: bool = False
    chooses_memory: bool = False


def _back_attention(model, source_layer, dim, memory_layers):
    config = BackAttentionConfig(source_layer, dim, memory_layers=memory_layers)
    return get_back_attention_model(model, config)


def _variant(kind: type[BackAttention]):
    """What puts a variant of back attention at the source layer, which reads all memory layers."""

    def make(model, source_layer, dim, _):
        arch, config = describe(model), BackAttentionConfig(source_layer, dim)
        updates = {source_layer: kind(arch.width, config)}
        return TwoPassModel(model, updates, config.memory(len(arch.blocks)))

    return make


def _at_source(kind, reads_final=False):
    """What puts an update of the width and of rank 2·dim at each source layer."""

    def make(model, source_layer, dim, _):
        arch = describe(model)
        layers = (source_layer,) if isinstance(source_layer, int) else source_layer
        updates = {layer: kind(arch.width, 2 * dim) for layer in layers}
        return TwoPassModel(model, updates, memory=(len(arch.blocks),) * reads_final)

    return make


def _lora(model, _, dim, __):
    from peft import LoraConfig, get_peft_model

    names = ("q_proj", "v_proj")
    linear = [m for name, m in model.named_modules() if name.endswith(names)]
    if not linear:
        raise ValueError("LoRA on q,v needs modules named q_proj and v_proj; this model has none.")
    per_rank = sum(m.in_features + m.out_features for m in linear)
    rank = max(1, round(4 * dim * describe(model).width / per_rank))
    about = {"target_modules": list(names), "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, **about))


_ARMS = (
    Arm(
        "back attention",
        "reads the states of the source layer and all above it, at this and earlier positions",
        *(_back_attention, "#d55e00", "o"),
        **dict.fromkeys(("two_passes", "several_sources", "chooses_memory"), True),
    ),
    Arm(
        "same layer",
        "the same module, reading only the source layer's own states: no second pass",
        lambda model, layer, dim, _: _back_attention(model, layer, dim, (layer,)),
        *("#de8f05", "s"),
    ),
    Arm(
        "shuffled memory",
        "the same module, reading what the first pass made of another question, in training too",
        *(_variant(ShuffledMemory), "#56b4e9", "X"),
        two_passes=True,
    ),
    Arm(
        "previous token",
        "the same module, reading the states of the position before its own alone",
        *(_variant(PreviousToken), "#949494", "P"),
        two_passes=True,
    ),
    Arm(
        "residual LoRA",
        "a low-rank map of the source layer's own state at the same position: no second pass",
        *(_at_source(ResidualLoRA), "#0173b2", "D"),
        several_sources=True,
    ),
    Arm(
        "loop LoRA",
        "a low-rank map of the final state at the same position, added at the source layer; "
        "layers run again",
        *(_at_source(LoopLoRA, reads_final=True), "#cc78bc", "^"),
        two_passes=True,
    ),
    Arm(
        "LoRA q,v",
        "peft's LoRA on the queries and values of all layers: no second pass",
        *(_lora, "#029e73", "v"),
        trains="all",
    ),
    Arm(
        "bias",
        "one trained vector, added at the source layer",
        *(_at_source(lambda width, _: Bias(width)), "#ca9161", "d"),
        rates=(4e-3, 1.6e-2, 6.4e-2),
    ),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}
UNTRAINED: dict[str, Arm] = {
    "zero-shot": Arm("zero-shot", "the model as it is", None, "#bfbfbf", "x", rates=()),
    "few-shot": Arm("few-shot", "with worked examples first", None, "#808080", "P", rates=()),
}


def make_arm(
    name: str, model: nn.Module, source_layer: Layers, dim: int, memory_layers: Layers | None = None
) -> nn.Module:
    """Put an arm on a frozen model, untrained, with as many weights as back attention of `dim` has.

    Exactly as many at the source layer (rank 2·dim), the nearest rank for LoRA on queries and
    values, one vector for the bias. memory_layers: see `BackAttentionConfig`. Returns the wrapped
    model. Raises ValueError for an unknown arm, and for layers that an arm cannot have.

    Example:
        >>> make_arm("bias", model, source_layer=1, dim=8).trainable()[0]
        32
    """
    if name not in ARMS:
        raise ValueError(f"Unknown arm {name!r}; choose one of {', '.join(ARMS)}.")
    arm = ARMS[name]
    if not (isinstance(source_layer, int) or arm.several_sources):
        raise ValueError(f"{name!r} goes to one source layer, not to {source_layer}.")
    if not (memory_layers is None or arm.chooses_memory):
        raise ValueError(f"{name!r} reads no memory that could be chosen; leave memory_layers out.")
    return arm.make(model, source_layer, dim, memory_layers)
