"""The arms of small models from scratch, and where to find any run's arm."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from backattn.adapters.arms import ARMS, UNTRAINED, Arm
from backattn.adapters.back_attention import get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from backattn.adapters.modules import LoopLoRA, Return
from backattn.adapters.two_pass import TwoPassModel
from companion.questions.datasets import DATASETS
from companion.runs.run import SCRATCH, Run

RATES = (5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class ScratchArm(Arm):
    """An arm of models from scratch; make: run -> model. sized: whether d′ decides its weights."""

    sized: bool = False


def llama(run: Run, layers: int, repeats: int = 1, widened: bool = False) -> nn.Module:
    """An untrained small Llama, as for claim C7; a gated FFN of 8/3 of the width weighs what one of
    4 times the width does. repeats: of the same layers; widened: by back attention's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"vocab_size": len(_vocabulary(run.dataset)), "hidden_size": run.width}
    size |= {"intermediate_size": round(8 * run.width / 3) + widened * round(4 * run.dim / 3)}
    size |= {"num_hidden_layers": layers * repeats, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 10, "num_key_value_heads": 10}
    config = LlamaConfig(**size, **heads, tie_word_embeddings=False, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    model.model.layers = nn.ModuleList([*model.model.layers[:layers]] * repeats)
    return model


def half_skipped(run: Run, layers: int) -> nn.Module:
    """`llama` whose upper half also learns on embeddings: in training every second question of a
    batch skips the lower half ("Why knowing both hops is not enough")."""
    model = llama(run, layers)
    for layer in model.model.layers[: layers // 2]:
        layer.register_forward_hook(_skip)
    return model


def _skip(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    if not torch.is_grad_enabled():  # tested whole
        return output
    rows = torch.arange(len(output), device=output.device)
    return torch.where((rows % 2 == 1)[:, None, None], inputs[0], output)


def with_back_attention(run: Run, layers: int, memory: tuple[int, ...] | None = None) -> nn.Module:
    config = BackAttentionConfig(0, run.dim, memory_layers=memory or run.memory_layers)
    return get_back_attention_model(llama(run, layers), config, freeze_base=False)


def with_loop(run: Run, learnt: bool) -> nn.Module:
    model = llama(run, 2)
    update = LoopLoRA(run.width, 2 * run.dim) if learnt else Return()
    return TwoPassModel(model, {0: update}, memory=(2,), freeze_base=False)


def _arms(*rows: tuple) -> dict[str, ScratchArm]:
    return {
        name: ScratchArm(name, about, partial(make, **shape), colour, marker, RATES, sized=sized)
        for name, about, colour, marker, sized, make, shape in rows
    }


# fmt: off
SCRATCH_ARMS = _arms(
    ("1 layer", "the baseline", "#0173b2", "s", False, llama, dict(layers=1)),
    ("1 layer + back attention", "reading the embedding's and the layer's own states",
     "#d55e00", "o", True, with_back_attention, dict(layers=1)),
    ("2 layers", "what it is said to match", "#029e73", "P", False, llama, dict(layers=2)),
    ("1 layer, wide", "the FFN widened to the weights of back attention",
     "#de8f05", "s", True, llama, dict(layers=1, widened=True)),
    ("1 layer, twice", "the same layer run two times (weight-tied)",
     "#cc78bc", "D", False, llama, dict(layers=1, repeats=2)),
)
COMPOSING_ARMS = _arms(
    ("2 layers", "the baseline", "#029e73", "P", False, llama, dict(layers=2)),
    ("2 layers + back attention", "d′ = 32, in layer 0, reading all states",
     "#d55e00", "o", False, with_back_attention, dict(layers=2)),
    ("2 layers + same layer", "the same module reading the embedding's states only: one pass",
     "#de8f05", "s", False, with_back_attention, dict(layers=2, memory=(0,))),
    ("2 layers + loop", "as many weights, a map of the final state at the same position into "
     "layer 0; layers run again", "#ca9161", "^", False, with_loop, dict(learnt=True)),
    ("2 layers + return", "one number: the final state itself, times it, in layer 0; layers run "
     "again", "#949494", "<", False, with_loop, dict(learnt=False)),
    ("2 layers, twice", "the same layers run two times (weight-tied)",
     "#cc78bc", "D", False, llama, dict(layers=2, repeats=2)),
    ("4 layers", "as many operations as the layers run twice",
     "#0173b2", "v", False, llama, dict(layers=4)),
    ("4 layers, half skipped", "every second question of a batch enters at the third layer in "
     "training", "#56b4e9", "X", False, half_skipped, dict(layers=4)),
)
# fmt: on
SIZED = tuple(arm.name for arm in SCRATCH_ARMS.values() if arm.sized)
LOOKS = {**UNTRAINED, **ARMS, **SCRATCH_ARMS, **COMPOSING_ARMS}  # one arm, one look


def arm_of(run: Run) -> Arm:
    """The record of a run's arm. Raises ValueError naming those that its model and dataset have."""
    arms = COMPOSING_ARMS if DATASETS[run.dataset].words else SCRATCH_ARMS
    if run.model != SCRATCH:
        arms = {**UNTRAINED, **ARMS}
    if run.arm not in arms:
        raise ValueError(f"Unknown arm {run.arm!r}; choose one of {', '.join(arms)}.")
    return arms[run.arm]


def scratch_model(run: Run) -> tuple[nn.Module, object]:
    """A run's untrained small model and its tokenizer: of characters, or of invented words."""
    by = "words" if DATASETS[run.dataset].words else "characters"
    return arm_of(run).make(run), tokenizer_of(_vocabulary(run.dataset), by)


def tokenizer_of(vocabulary: list[str], by: str):
    """A tokenizer that cuts by "words" or "characters"; the first of the vocabulary is padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token=vocabulary[0]))
    cuts = {"words": ("WhitespaceSplit",), "characters": ("Split", "", "isolated")}[by]
    core.pre_tokenizer = getattr(pre_tokenizers, cuts[0])(*cuts[1:])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=vocabulary[0])


def _vocabulary(dataset: str) -> list[str]:
    return ["<pad>", *(DATASETS[dataset].words or "0123456789+-=;")]
