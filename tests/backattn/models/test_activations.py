"""The decomposition, on every family: biases and norms are random, so nothing holds by luck."""

import pytest
import torch
from conftest import PROMPTS

from backattn import load_model
from backattn.models.activations import capture, head_contributions, self_check
from backattn.models.decoder import describe
from backattn.models.families import UnsupportedModelError
from backattn.models.hooks import hooks
from backattn.models.tokens import Batch, encode


@pytest.fixture(scope="module")
def stream(tiny):
    model, tokenizer = tiny
    return capture(model, encode(tokenizer, PROMPTS, side="left"))


def close(found, expected, tolerance=1e-5):
    error = (found - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.1e}"


def test_contributions_sum_to_the_state_before_the_final_norm(stream):
    assert stream.decomposition_error() <= 1e-5
    for layer in range(stream.layers):  # every layer, not only the last
        close(
            stream.hidden[layer] + stream.attention[layer] + stream.ffn[layer],
            stream.hidden[layer + 1],
        )


def test_heads_and_source_positions_sum_to_attention(stream):
    for layer, block in enumerate(stream.arch.blocks):
        post = block.norm("attention_post")
        scale = stream.batch.at_last(stream.post_scale("attention", layer))
        total = head_contributions(stream, layer).sum((1, 2)) + post.linear(
            block.attention_out.bias, scale
        )
        close(total, stream.batch.at_last(stream.attention[layer]))


def test_attention_reads_no_padding_and_no_later_position(stream):
    for layer in range(stream.layers):
        weights = stream.weights[layer]  # [B, H, query, source]
        real = stream.batch.attention_mask.bool()
        causal = torch.ones(weights.shape[-2:]).tril().bool()
        for b in range(len(real)):
            rows = weights[b][:, real[b]]
            assert torch.all(rows[:, :, ~real[b]] == 0)
            assert torch.all(rows * ~causal[real[b]] == 0)
            assert torch.allclose(rows.sum(-1), torch.ones(()), atol=1e-5)


def test_neurons_and_bias_sum_to_the_ffn(stream):
    for layer, block in enumerate(stream.arch.blocks):
        raw = stream.neurons[layer] @ block.ffn_out.weight.T + block.ffn_out.bias
        post = block.norm("ffn_post")
        close(post.linear(raw, stream.post_scale("ffn", layer)), stream.ffn[layer])


def test_neuron_coefficients_come_from_the_input_weights(stream):
    for layer, block in enumerate(stream.arch.blocks):
        gate, up = block.ffn_in
        x = block.norm("ffn_norm")(stream.ffn_input(layer))
        u = x @ up.weight.T + up.bias
        m = (
            block.activation(u)
            if gate is None
            else block.activation(x @ gate.weight.T + gate.bias) * u
        )
        close(m, stream.neurons[layer])
        v = (
            block.norm("attention_norm")(stream.attention_input(layer)) @ block.value.weight.T
            + block.value.bias
        )
        close(v.unflatten(-1, (block.kv_heads, block.head_dim)), stream.values[layer])


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_equals_single_under_padding(tiny, side):
    model, tokenizer = tiny
    together = capture(model, encode(tokenizer, PROMPTS, side=side))
    for index, prompt in enumerate(PROMPTS):
        alone = capture(model, encode(tokenizer, [prompt]))
        assert torch.allclose(together.logits[index], alone.logits[0], atol=1e-5)
        real = together.batch.attention_mask[index].bool()
        assert torch.allclose(together.hidden[:, index, real], alone.hidden[:, 0], atol=1e-4)


def test_eager_equals_sdpa_and_the_setting_returns(tiny):
    model, tokenizer = tiny
    batch, before = encode(tokenizer, PROMPTS, side="left"), model.config._attn_implementation
    eager, plain = (
        capture(model, batch),
        capture(model, batch, detail=False),
    )  # only detail needs eager
    assert torch.allclose(eager.logits, plain.logits, atol=1e-5)
    assert model.config._attn_implementation == before


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_survives_an_exception(tiny):
    model, _ = tiny
    before, attention = hook_count(model), model.config._attn_implementation
    with pytest.raises(IndexError):
        capture(model, Batch(torch.tensor([[10**6]]), torch.ones(1, 1, dtype=torch.long)))
    block = describe(model).blocks[0]
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        hooks((block.module, "input", lambda x: None)),
    ):
        assert hook_count(model) == before + 1
        raise RuntimeError("on purpose")
    assert hook_count(model) == before
    assert model.config._attn_implementation == attention


def test_capture_leaves_training_mode_as_it_was(llama):
    model, tokenizer = llama
    model.train()
    try:
        capture(model, encode(tokenizer, PROMPTS))
        assert model.training
    finally:
        model.eval()


def test_self_check_passes_on_every_family(tiny):
    model, _ = tiny
    self_check(model)


def test_self_check_names_what_does_not_add_up():
    model, _ = load_model("tiny-llama")
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (
        forward(*args, **kwargs) * 1.01
    )  # a residual multiplier, as in Granite
    with pytest.raises(UnsupportedModelError, match="residual contributions miss"):
        self_check(model)


def test_a_prompt_longer_than_the_context_is_refused(llama):
    model, tokenizer = llama
    with pytest.raises(ValueError, match="at most 256"):
        capture(model, encode(tokenizer, ["one " * 300]))
