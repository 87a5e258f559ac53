"""The paper's own setting, Llama 3.1 8B with back attention at layer 6, without its weights.

The same code on its exact configuration without data (meta device), and on a narrow random model.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from backattn import (
    BackAttentionConfig,
    flow_back,
    get_back_attention_model,
    load_model,
    logit_flow,
)

ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
SHAPE = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {**ROPE, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
LAYER = 6


@pytest.fixture(scope="module")
def narrow():
    tokenizer = load_model("tiny-llama")[1]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=448, head_dim=4, **SHAPE
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def test_weights_and_shapes_of_the_exact_configuration():
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, **SHAPE)
        )
        wrapped = get_back_attention_model(model, BackAttentionConfig(LAYER, dim=10))
    trained, total = wrapped.trainable()
    assert total - trained == 8_030_261_248  # Llama 3.1 8B's, as its card has it: 8.03 billion
    assert trained == 4 * 4096 * 10 and round(100 * trained / total, 3) == 0.002
    assert wrapped.memory_layers == tuple(range(LAYER, 33))
    assert {name: tuple(p.shape) for name, p in wrapped.adapter_state().items()} == {
        f"updates.{LAYER}.{name}.weight": (4096, 10) if name == "o_proj" else (10, 4096)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }


def test_logit_flow_on_its_shape(narrow):
    flow = logit_flow(
        *narrow, ["France 's capital is", "Mozart 's mother is"], ["Paris", "Anna"], method="exact"
    )
    assert flow.check() < 1e-4 and flow.layers["layer"].max() == 31
    assert flow_back(*narrow, flow).check() < 1e-3


def test_back_attention_on_its_shape(narrow):
    model, tokenizer = narrow
    batch = tokenizer(["Mozart 's mother 's father is"], return_tensors="pt")
    with torch.no_grad():
        plain = model(**batch).logits
        wrapped = get_back_attention_model(model, BackAttentionConfig(LAYER, dim=10))
        try:
            assert torch.equal(wrapped(**batch).logits, plain)  # untrained: no change, to the bit
            for weight in wrapped.updates.parameters():
                weight.normal_(std=0.5)
            changed = wrapped(**batch, use_cache=False).logits
            made = wrapped.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
            again = wrapped(made[:, :-1], use_cache=False).logits[:, -1].argmax(-1)
        finally:
            wrapped.unload()
    assert not torch.allclose(changed, plain, atol=1e-3) and again.item() == made[0, -1].item()
