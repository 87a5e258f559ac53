"""Flow back: conservation, both routes, and what each is meant to be."""

import numpy as np
import pytest
import torch
from conftest import PROMPTS

from backattn import flow_back, load_model, logit_flow
from backattn.models.activations import capture
from backattn.models.lens import Lens
from backattn.models.tokens import encode
from companion.studies.stage_discovery import agreement, normaliser_diagnostics


@pytest.mark.parametrize("route", ["parts", "linear"])
@pytest.mark.parametrize("method", ["exact", "screen"])
def test_what_enters_leaves(tiny, route, method):
    model, tokenizer = tiny
    flow = logit_flow(model, tokenizer, PROMPTS, method=method, top_k=40)
    back = flow_back(model, tokenizer, flow, route=route, batch_size=2)
    assert back.check() <= 1e-4
    assert set(back.frame["prompt"]) == {0, 1, 2}


def test_parts_start_from_the_neurons_importances(tiny):
    model, tokenizer = tiny
    flow = logit_flow(model, tokenizer, PROMPTS, top_k=40)
    back = flow_back(model, tokenizer, flow)
    neurons = flow.frame[flow.frame["neuron"].notna()]
    keys = ["prompt", "layer", "kind", "position"]
    expected = neurons.groupby(keys, observed=True)["increase"].sum()
    found = back.frame.set_index(keys)["direct"].reindex(expected.index)
    withheld = back.conservation["withheld"].abs().max()
    assert np.abs(found - expected).max() <= 1e-5 + withheld


def test_linear_starts_from_the_centred_logit(tiny):
    model, tokenizer = tiny
    flow = logit_flow(model, tokenizer, PROMPTS, level="layer")
    back = flow_back(model, tokenizer, flow, route="linear")
    stream = capture(model, encode(tokenizer, PROMPTS))
    lens, last = Lens(stream.arch), stream.batch.at_last(stream.hidden[-1])
    raw = lens.raw_logits(last) - lens.offset
    expected = raw.gather(1, torch.tensor(flow.answer_ids)[:, None])[:, 0] - raw.mean(-1)
    assert np.allclose(back.conservation["entering"], expected, atol=1e-4)


def test_linear_direct_flow_is_each_sublayers_own_share_of_the_logit(llama):
    """The direct part needs no sweep: it is the answer's direction times the contribution at the last position."""
    model, tokenizer = llama
    flow = logit_flow(model, tokenizer, PROMPTS[:1], level="layer")
    back = flow_back(model, tokenizer, flow, route="linear")
    stream = capture(model, encode(tokenizer, PROMPTS[:1]))
    lens, last = Lens(stream.arch), stream.hidden[-1, 0, -1]
    row = lens.weight[flow.answer_ids[0]] - lens.weight.mean(0)
    gradient = lens.norm.adjoint(row, lens.scale(last))
    ffn = back.frame[
        (back.frame["kind"] == "ffn") & (back.frame["position"] == stream.hidden.shape[2] - 1)
    ]
    neurons = torch.stack(
        [stream.ffn[i, 0, -1] - b.ffn_out.bias for i, b in enumerate(stream.arch.blocks)]
    )
    assert np.allclose(ffn["direct"], neurons @ gradient, atol=1e-5)


def test_linear_is_one_backward_pass_of_the_frozen_model(llama):
    """Autograd on a hand-written frozen copy of tiny-llama gives the same embedding flow."""
    model, tokenizer = llama
    flow = logit_flow(model, tokenizer, PROMPTS[:1], level="layer")
    back = flow_back(model, tokenizer, flow, route="linear")
    stream = capture(model, encode(tokenizer, PROMPTS[:1]))
    lens, state = Lens(stream.arch), stream.hidden[0, 0].clone().requires_grad_()
    h = state
    for layer, block in enumerate(stream.arch.blocks):
        norm = block.norm("attention_norm")
        x = norm.linear(h, norm.scale(stream.hidden[layer, 0]))
        v = (x @ block.value.weight.T + block.value.bias).unflatten(
            -1, (block.kv_heads, block.head_dim)
        )
        v = v.repeat_interleave(block.heads // block.kv_heads, dim=1)
        mixed = torch.einsum("hqk,khd->qhd", stream.weights[layer][0], v).flatten(1)
        h = h + mixed @ block.attention_out.weight.T + block.attention_out.bias
        norm, (_, up) = block.norm("ffn_norm"), block.ffn_in
        x = norm.linear(h, norm.scale(stream.middle(layer)[0]))
        gate = block.activation(stream.gates[layer][0])
        h = h + (gate * (x @ up.weight.T + up.bias)) @ block.ffn_out.weight.T + block.ffn_out.bias
    assert torch.allclose(h, stream.hidden[-1, 0], atol=1e-4)
    row = lens.weight[flow.answer_ids[0]] - lens.weight.mean(0)
    score = (lens.norm.adjoint(row, lens.scale(stream.hidden[-1, 0, -1])) * h[-1]).sum()
    (gradient,) = torch.autograd.grad(score, state)
    embedding = back.frame[back.frame["kind"] == "embedding"]
    assert np.allclose(embedding["flow"], (gradient * state).sum(-1).detach(), atol=1e-4)


def test_no_flow_reaches_positions_from_which_nothing_is_read(llama):
    """Causality: in a prompt continued by other words, flow at the last position stays out of padding."""
    model, tokenizer = llama
    flow = logit_flow(model, tokenizer, PROMPTS, top_k=40)
    back = flow_back(model, tokenizer, flow)
    lengths = [len(tokenizer(p)["input_ids"]) for p in PROMPTS]
    assert back.frame.groupby("prompt")["position"].max().tolist() == [n - 1 for n in lengths]
    top = back.frame[
        (back.frame["kind"] == "ffn") & (back.frame["layer"] == model.config.num_hidden_layers - 1)
    ]
    earlier = top[top["position"] < np.array(lengths)[top["prompt"]] - 1]
    assert earlier["flow"].abs().max() == 0  # the last FFN of an earlier position reaches no output


def test_a_lost_conservation_is_caught(llama):
    flow = logit_flow(*llama, PROMPTS, top_k=40)
    back = flow_back(*llama, flow)
    back.conservation.loc[1, "error"] = 0.1 * back.conservation.loc[1, "scale"]
    with pytest.raises(ValueError, match="not conserved"):
        back.check()


def test_routes_agree_better_than_shuffled_ones(tiny):
    model, tokenizer = tiny
    flow = logit_flow(model, tokenizer, PROMPTS, method="exact")
    one, other = (flow_back(model, tokenizer, flow, route=route) for route in ("parts", "linear"))
    agree = agreement(one, other)
    shuffled = other.frame.assign(
        flow=other.frame["flow"].sample(frac=1, random_state=0).to_numpy()
    )
    other.frame = shuffled
    assert agree["pearson"].mean() > 0.5 > agreement(one, other)["pearson"].abs().mean()


def test_hand_back_reports_amplification_where_the_normaliser_is_small(tiny):
    model, tokenizer = tiny
    flow = logit_flow(model, tokenizer, PROMPTS, method="exact")
    table = normaliser_diagnostics(model, tokenizer, flow, prompts=[0, 2])
    assert set(table["prompt"]) == {0, 2}
    assert table["normaliser"].between(0, 1 + 1e-5).all()
    assert (table["amplification"] >= 1 - 1e-5).all()
    small = table["normaliser"] < table["normaliser"].quantile(0.1)
    assert (
        table.loc[small, "amplification"].median() > 3 * table.loc[~small, "amplification"].median()
    )


def test_neurons_with_a_vanishing_coefficient_are_withheld_and_counted():
    model, tokenizer = load_model("tiny-gpt2")
    with torch.no_grad():  # a neuron that is off: its coefficient is gelu(0) = 0
        model.transformer.h[1].mlp.c_fc.weight[:, 7] = 0
        model.transformer.h[1].mlp.c_fc.bias[7] = 0
    flow = logit_flow(model, tokenizer, PROMPTS[:1], method="exact")
    frame = flow.frame
    neuron = frame.index[(frame["kind"] == "ffn") & (frame["layer"] == 1) & (frame["neuron"] == 7)][
        0
    ]
    frame.loc[neuron, "increase"] = 0.5
    back = flow_back(model, tokenizer, flow)
    assert back.conservation.loc[0, "withheld"] == pytest.approx(0.5, abs=0.01)
    assert back.conservation.loc[0, "error"] < 1e-4
    frame.loc[neuron, "increase"] = 5.0
    with pytest.raises(ValueError, match="withheld"):
        flow_back(model, tokenizer, flow).check()


def test_a_flow_of_another_model_is_refused(llama):
    flow = logit_flow(*llama, PROMPTS, top_k=5)
    other, tokenizer = load_model("tiny-qwen2")
    with pytest.raises(ValueError, match="another model"):
        flow_back(other, tokenizer, flow)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_bfloat16_is_conserved_within_its_own_rounding(name):
    model, tokenizer = load_model(name, dtype=torch.bfloat16)
    flow = logit_flow(model, tokenizer, PROMPTS, top_k=40)
    flow.check()
    for route in ("parts", "linear"):
        assert 0 < flow_back(model, tokenizer, flow, route=route).check() < 5e-2


@pytest.mark.parametrize("change", [{"route": "both"}, {"level": "layer"}])
def test_wrong_use_is_refused(llama, change):
    flow = logit_flow(*llama, PROMPTS, level=change.get("level", "neuron"), top_k=5)
    with pytest.raises(ValueError, match=r"unknown|starts from neurons"):
        flow_back(*llama, flow, route=change.get("route", "parts"))
    if "level" in change:
        with pytest.raises(ValueError, match="no neurons"):
            normaliser_diagnostics(*llama, flow)
