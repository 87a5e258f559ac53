"""The decomposition, on every family: biases and norms are random, so nothing holds by luck."""

import pytest
import torch
from conftest import PROMPTS

from backattn import load_model
from backattn.analysis.neuron_scores import sublayers
from backattn.models.activations import capture
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


def test_every_sublayer_is_the_sum_of_its_parts(stream):
    """Layer by layer: the stream; at the last position, neurons and the bias."""
    stream.prove_sums()
    for layer in range(stream.layers):
        added = stream.attention[layer] + stream.ffn[layer]
        close(stream.hidden[layer] + added, stream.hidden[layer + 1])
    for sub in sublayers(stream):
        whole = getattr(stream, sub.kind)[sub.layer]
        total = sub.coefficient.sum(1) @ sub.vectors + (0 if sub.bias is None else sub.bias)
        close(total, stream.batch.at_last(whole))


def test_attention_reads_no_padding_and_no_later_position(stream):
    for weights in stream.weights:  # [B, H, query, source]
        real = stream.batch.attention_mask.bool()
        causal = torch.ones(weights.shape[-2:]).tril().bool()
        for b in range(len(real)):
            rows = weights[b][:, real[b]]
            assert torch.all(rows[:, :, ~real[b]] == 0)
            assert torch.all(rows * ~causal[real[b]] == 0)
            assert torch.allclose(rows.sum(-1), torch.ones(()), atol=1e-5)


def test_values_and_neurons_are_made_again_to_the_bit_and_by_the_input_weights(stream):
    for layer, block in enumerate(stream.arch.blocks):
        (gate, up), (m, g, u) = block.ffn_in, block.neurons(stream.input("ffn", layer))
        assert torch.equal(m, stream.neurons[layer])
        assert torch.equal(block.values(stream.input("attention", layer)), stream.values[layer])
        for kind, pairs in (
            ("attention", [(block.value, stream.values[layer])]),
            ("ffn", [(up, u), (gate, g)]),
        ):
            norm, state = block.norm(f"{kind}_norm"), stream.input(kind, layer)
            x = norm.linear(state, norm.scale(state)) + norm.bias
            for linear, found in pairs:
                if linear is not None:
                    close((x @ linear.weight.T + linear.bias).reshape(found.shape), found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_equals_single_under_padding(tiny, side):
    model, tokenizer = tiny
    together = capture(model, encode(tokenizer, PROMPTS, side=side))
    for index, prompt in enumerate(PROMPTS):
        alone = capture(model, encode(tokenizer, [prompt]))
        assert torch.allclose(together.logits[index], alone.logits[0], atol=1e-5)
        real = together.batch.attention_mask[index].bool()
        assert torch.allclose(together.hidden[:, index, real], alone.hidden[:, 0], atol=1e-4)


def test_eager_equals_sdpa_and_settings_return(tiny):
    model, tokenizer = tiny
    batch, before = encode(tokenizer, PROMPTS, side="left"), model.config._attn_implementation
    model.train()
    eager, plain = capture(model, batch), capture(model, batch, detail=False)
    assert model.training
    assert torch.allclose(eager.logits, plain.logits, atol=1e-5)
    assert model.eval().config._attn_implementation == before


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


def test_a_layer_that_does_more_than_add_is_named():
    model, tokenizer = load_model("tiny-llama")
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kw: forward(*args, **kw) * 1.01  # multiplied, as in Granite
    with pytest.raises(UnsupportedModelError, match="layer 1: residual sum"):
        capture(model, encode(tokenizer, PROMPTS)).prove_sums()


def test_a_prompt_longer_than_the_context_is_refused(llama):
    model, tokenizer = llama
    with pytest.raises(ValueError, match="at most 256"):
        capture(model, encode(tokenizer, ["one " * 300]))
