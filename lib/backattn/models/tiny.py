"""Tiny random models of every family, for tests and examples."""

import math

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_WORDS = """the of is a an and to in on at by for from with capital country city state currency
continent language mother father spouse author river king queen planet colour France Paris Rome
Italy Spain Madrid Berlin Germany Tokyo Japan Europe Asia Africa America Mozart Leopold Anna Vienna
Austria Salzburg dollar euro yen one two three four five six seven eight nine ten plus minus times
equals cat dog red blue green born died wrote lives works north south"""

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
_HEADS = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
_GEMMA = {**_HEADS, "head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 12}
_LAYER_TYPES = ["sliding_attention", "full_attention"] * 2

TINY: dict[str, tuple[str, dict]] = {
    "tiny-llama": ("llama", {**_HEADS, "attention_bias": True, "mlp_bias": True}),
    "tiny-mistral": ("mistral", {**_HEADS, "sliding_window": None}),
    "tiny-qwen2": ("qwen2", _HEADS),
    "tiny-qwen3": ("qwen3", {**_HEADS, "head_dim": 12}),
    "tiny-gemma2": ("gemma2", _GEMMA),
    "tiny-gemma3": ("gemma3_text", {**_GEMMA, "layer_types": _LAYER_TYPES}),
    "tiny-olmo2": ("olmo2", _HEADS),
    "tiny-phi3": ("phi3", _HEADS),
    "tiny-gpt2": ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48}),
    "tiny-gpt-neox": ("gpt_neox", {**_SIZES, "num_attention_heads": 4}),
}


def tiny_names() -> list[str]:
    """Names of the tiny random models, one per family."""
    return list(TINY)


def tiny_model(name: str, seed: int = 0):
    """A seeded random model of four layers whose biases and norms are random too."""
    if name not in TINY:
        raise ValueError(f"No tiny model {name!r}. There are: {', '.join(TINY)}.")
    (family, settings), tokenizer = TINY[name], _tiny_tokenizer()
    settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}
    settings |= {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            vector = parameter.dim() == 1
            spread = 0.2 if vector else 1 / math.sqrt(parameter.shape[-1])
            noise = torch.randn(parameter.shape) * spread
            parameter.copy_(parameter + noise if vector else noise)
    model.generation_config.pad_token_id = 0
    return model, tokenizer


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few words: offline, reversible, with a pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([" " + word for word in _WORDS.split()] * 2 + _WORDS.split(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)
