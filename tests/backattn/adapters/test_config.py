"""Where back attention may sit."""

import pytest

from backattn import BackAttentionConfig, get_back_attention_model, load_model


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(source_layer=4), "0 … 3"),
        (dict(source_layer=-1), "0 … 3"),
        (dict(source_layer=(1, 1)), "each once"),
        (dict(source_layer=()), "each once"),
        (dict(source_layer=1, memory_layers=(5,)), "0 … 4"),
        (dict(source_layer=1, memory_layers=()), "0 … 4"),
        (dict(source_layer=1, dim=0), "positive multiple"),
        (dict(source_layer=1, dim=6, heads=4), "positive multiple"),
        (dict(source_layer=1, softmax="both"), "joint"),
        (dict(source_layer=1.0), "integer"),
        (dict(source_layer="1"), "integer"),
        (dict(source_layer=1, dim=8.0), "integers"),
    ],
)
def test_bad_configs_are_refused(options, message):
    model, _ = load_model("tiny-llama")
    with pytest.raises(ValueError, match=message):
        get_back_attention_model(model, BackAttentionConfig(**options))
    get_back_attention_model(model, BackAttentionConfig(1, dim=8))  # and the model is still free
