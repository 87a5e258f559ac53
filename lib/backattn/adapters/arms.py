"""The arms that back attention must beat: what else could the same data and the same number of weights do?

Each arm acts at one place, the input of the source layer, as back attention does, but for LoRA on queries and values,
which is peft's. All start as the identity. A loop that hands the final state back whole would not: a pretrained model's
low layers cannot read it.
"""

from torch import nn

from backattn.adapters.back_attention import get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from backattn.adapters.modules import Bias, LoopLoRA, ResidualLoRA
from backattn.adapters.two_pass import TwoPassModel
from backattn.models.decoder import describe

ARMS = {
    "back attention": "reads the states of the source layer and all above it, at this and earlier positions",
    "same layer": "the same module, reading only the source layer's own states: no second pass",
    "residual LoRA": "a low-rank map of the source layer's own state at the same position: no second pass",
    "loop LoRA": "a low-rank map of the final state at the same position, added at the source layer; layers run again",
    "LoRA q,v": "peft's LoRA on the queries and values of all layers: no second pass",
    "bias": "one trained vector, added at the source layer",
}


def make_arm(
    name: str,
    model: nn.Module,
    source_layer: int | tuple[int, ...],
    dim: int,
    memory_layers: tuple[int, ...] | None = None,
) -> nn.Module:
    """Put an arm on a frozen model, untrained, with about as many weights as back attention of width `dim` has.

    Exactly as many for the arms at the source layer (rank 2·dim), the nearest rank for LoRA on queries and values, one
    vector for the bias. source_layer: several for back attention and residual LoRA only, a module at each.
    memory_layers: see `BackAttentionConfig`, of back attention only.

    Returns the wrapped model. Raises ValueError for an unknown arm, and for layers that an arm cannot have.
    """
    if name not in ARMS:
        raise ValueError(f"Unknown arm {name!r}; choose one of {', '.join(ARMS)}.")
    if not isinstance(source_layer, int) and name not in ("back attention", "residual LoRA"):
        raise ValueError(f"{name!r} goes to one source layer, not to {source_layer}.")
    if memory_layers is not None and name != "back attention":
        raise ValueError(f"{name!r} reads no memory that could be chosen; leave memory_layers out.")
    if name in ("back attention", "same layer"):
        memory = (source_layer,) if name == "same layer" else memory_layers
        return get_back_attention_model(
            model, BackAttentionConfig(source_layer, dim, memory_layers=memory)
        )
    if name == "LoRA q,v":
        return _lora(model, dim)
    arch = describe(model)
    if name == "bias":
        return TwoPassModel(model, {source_layer: Bias(arch.width)}, memory=())
    if name == "residual LoRA":
        layers = [source_layer] if isinstance(source_layer, int) else source_layer
        return TwoPassModel(
            model, {layer: ResidualLoRA(arch.width, 2 * dim) for layer in layers}, memory=()
        )
    return TwoPassModel(
        model, {source_layer: LoopLoRA(arch.width, 2 * dim)}, memory=(len(arch.blocks),)
    )


def _lora(model: nn.Module, dim: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = ("q_proj", "v_proj")
    linear = [m for name, m in model.named_modules() if name.endswith(names)]
    if not linear:
        raise ValueError(
            "LoRA on queries and values needs modules named q_proj and v_proj; this model has none."
        )
    per_rank = sum(m.in_features + m.out_features for m in linear)
    rank = max(1, round(4 * dim * describe(model).width / per_rank))
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(names), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings, autocast_adapter_dtype=True)
