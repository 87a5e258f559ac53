"""Small models from scratch."""

from torch import nn

from backattn.adapters.back_attention import get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from backattn.adapters.modules import LoopLoRA, Return
from backattn.adapters.two_pass import TwoPassModel
from companion.questions.datasets import DATASETS
from companion.runs.run import Run

SCRATCH_ARMS = {
    "1 layer": "the baseline",
    "1 layer + back attention": "d′ = 160, reading the embedding's and the layer's own states",
    "2 layers": "what it is said to match",
    "1 layer, wide": "the FFN widened to the weights of back attention",
    "1 layer, twice": "the same layer run two times (weight-tied)",
}

COMPOSING_ARMS = {
    "2 layers": "the baseline",
    "2 layers + back attention": "d′ = 32, in layer 0, reading all states",
    "2 layers + same layer": "the same module reading the embedding's states only: no second pass",
    "2 layers + loop": "as many weights, a map of the final state at the same position into layer 0; layers run again",
    "2 layers + return": "one number: the final state itself, times it, in layer 0; layers run again",
    "2 layers, twice": "the same layers run two times (weight-tied)",
    "4 layers": "as many operations as the layers run twice",
}


def scratch_model(run: Run) -> tuple[nn.Module, object]:
    """A run's untrained small Llama, as for claim C7, and its tokenizer: of characters, or of the words of
    `datasets.compositions`.

    FFN of 8/3 of the width with a gate (as many weights as one of 4 times the width without), 10 heads; dim: d′ of back
    attention, or what widens the FFN by as many weights. Raises ValueError for an unknown arm.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words, arm = DATASETS[run.dataset].words, run.arm
    arms = COMPOSING_ARMS if words else SCRATCH_ARMS
    if arm not in arms:
        raise ValueError(f"Unknown arm {arm!r}; choose one of {', '.join(arms)}.")
    split = pre_tokenizers.WhitespaceSplit() if words else pre_tokenizers.Split("", "isolated")
    words = ["<pad>", *(words or "0123456789+-=;")]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    ffn, layers = round(8 * run.width / 3), int(arm[0])
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=run.width,
        intermediate_size=ffn + (round(4 * run.dim / 3) if arm == "1 layer, wide" else 0),
        num_hidden_layers=layers * (2 if arm.endswith("twice") else 1),
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    for k in range(layers, config.num_hidden_layers):
        model.model.layers[k] = model.model.layers[k - layers]
    if arm.endswith(("loop", "return")):
        update = LoopLoRA(run.width, 2 * run.dim) if arm.endswith("loop") else Return()
        return TwoPassModel(model, {0: update}, memory=(layers,), freeze_base=False), tokenizer
    if "+" in arm:
        memory = (0,) if arm.endswith("same layer") else run.memory_layers
        config = BackAttentionConfig(0, run.dim, memory_layers=memory)
        return get_back_attention_model(model, config, freeze_base=False), tokenizer
    return model, tokenizer
