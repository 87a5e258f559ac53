"""Flow back: conservation, both routes, what each is meant to be, and the streams a flow keeps."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PROMPTS

from backattn import flow_back, load_model, logit_flow
from backattn.analysis.flow_back import flow_backs
from backattn.models.activations import capture
from backattn.models.lens import Lens
from backattn.models.tokens import encode


def linear_start(model, tokenizer, prompts, flow):
    """(stream, what enters on the linear route: covector [B, D] and state [B, D] at the end)."""
    stream = capture(model, encode(tokenizer, prompts))
    lens, last = Lens(stream.arch), stream.batch.at_last(stream.hidden[-1])
    row = lens.weight[torch.tensor(flow.answer_ids)] - lens.weight.mean(0)
    return stream, lens.norm.adjoint(row, lens.scale(last)), last


@pytest.mark.parametrize("route", ["parts", "linear"])
@pytest.mark.parametrize("method", ["exact", "screen"])
def test_what_enters_leaves(tiny, route, method):
    model, tokenizer = tiny
    flow = logit_flow(model, tokenizer, PROMPTS, method=method, top_k=40)
    back = flow_back(model, tokenizer, flow, route=route)
    assert back.check() <= 1e-4
    assert set(back.frame["prompt"]) == {0, 1, 2}
    lengths = [len(tokenizer(p)["input_ids"]) for p in PROMPTS]
    assert back.frame.groupby("prompt")["position"].max().tolist() == [n - 1 for n in lengths]


def test_parts_start_from_the_neurons_importances(tiny):
    flow = logit_flow(*tiny, PROMPTS, top_k=40)
    back = flow_back(*tiny, flow)
    neurons = flow.frame[flow.frame["neuron"].notna()]
    keys = ["prompt", "layer", "kind", "position"]
    expected = neurons.groupby(keys, observed=True)["increase"].sum()
    found = back.frame.set_index(keys)["direct"].reindex(expected.index)
    withheld = back.conservation["withheld"].abs().max()
    assert np.abs(found - expected).max() <= 1e-5 + withheld


def test_linear_starts_from_the_centred_logit(tiny):
    flow = logit_flow(*tiny, PROMPTS, level="layer")
    back = flow_back(*tiny, flow, route="linear")
    stream, gradient, last = linear_start(*tiny, PROMPTS, flow)
    lens = Lens(stream.arch)
    raw = lens.raw_logits(last) - lens.offset
    expected = raw.gather(1, torch.tensor(flow.answer_ids)[:, None])[:, 0] - raw.mean(-1)
    assert np.allclose(back.conservation["entering"], expected, atol=1e-4)
    assert torch.allclose((gradient * last).sum(-1), expected, atol=1e-4)


def test_linear_is_one_backward_pass_of_the_frozen_model(llama):
    """Autograd on a hand-written frozen copy of tiny-llama gives the same embedding flow.

    Direct flow needs no sweep: it is the answer's direction times the contribution at the end.
    """
    model, tokenizer = llama
    flow = logit_flow(model, tokenizer, PROMPTS[:1], level="layer")
    frame = flow_back(model, tokenizer, flow, route="linear").frame
    stream, (direction,), _ = linear_start(model, tokenizer, PROMPTS[:1], flow)
    state = stream.hidden[0, 0].clone().requires_grad_()
    h, direct = state, []
    for layer, block in enumerate(stream.arch.blocks):
        norm = block.norm("attention_norm")
        x = norm.linear(h, norm.scale(stream.hidden[layer, 0]))
        v = x @ block.value.weight.T + block.value.bias
        v = v.unflatten(-1, (block.kv_heads, -1))
        v = v.repeat_interleave(block.heads // block.kv_heads, dim=1)
        mixed = torch.einsum("hqk,khd->qhd", stream.weights[layer][0], v).flatten(1)
        h = h + mixed @ block.attention_out.weight.T + block.attention_out.bias
        norm, (_, up) = block.norm("ffn_norm"), block.ffn_in
        x = norm.linear(h, norm.scale(stream.middle(layer)[0]))
        gate = torch.nn.functional.silu(block.neurons(stream.middle(layer))[1][0])
        added = (gate * (x @ up.weight.T + up.bias)) @ block.ffn_out.weight.T
        direct.append((added[-1] @ direction).item())
        h = h + added + block.ffn_out.bias
    assert torch.allclose(h, stream.hidden[-1, 0], atol=1e-4)
    (gradient,) = torch.autograd.grad((direction * h[-1]).sum(), state)
    embedding = frame[frame["kind"] == "embedding"]
    assert np.allclose(embedding["flow"], (gradient * state).sum(-1).detach(), atol=1e-4)
    ffn = frame[(frame["kind"] == "ffn") & (frame["position"] == len(state) - 1)]
    assert np.allclose(ffn["direct"], direct, atol=1e-5)


def test_no_flow_reaches_positions_from_which_nothing_is_read(llama):
    """Causality: the last FFN of an earlier position reaches no output."""
    model, tokenizer = llama
    frame = flow_back(model, tokenizer, logit_flow(model, tokenizer, PROMPTS, top_k=40)).frame
    last = frame.groupby("prompt")["position"].transform("max")
    top = (frame["kind"] == "ffn") & (frame["layer"] == model.config.num_hidden_layers - 1)
    assert frame.loc[top & (frame["position"] < last), "flow"].abs().max() == 0


def test_neurons_with_a_vanishing_coefficient_are_withheld_and_counted():
    model, tokenizer = load_model("tiny-gpt2")
    with torch.no_grad():  # a neuron that is off: its coefficient is gelu(0) = 0
        model.transformer.h[1].mlp.c_fc.weight[:, 7] = 0
        model.transformer.h[1].mlp.c_fc.bias[7] = 0
    flow = logit_flow(model, tokenizer, PROMPTS[:1], method="exact")
    frame = flow.frame
    off = (frame["kind"] == "ffn") & (frame["layer"] == 1) & (frame["neuron"] == 7)
    frame.loc[off, "increase"] = 0.5
    back = flow_back(model, tokenizer, flow)
    assert back.conservation.loc[0, "withheld"] == pytest.approx(0.5, abs=0.01)
    assert back.conservation.loc[0, "error"] < 1e-4
    frame.loc[off, "increase"] = 5.0
    with pytest.raises(ValueError, match="withheld"):
        flow_back(model, tokenizer, flow).check()
    back.conservation.loc[0, "error"] = 0.1 * back.conservation.loc[0, "scale"]
    with pytest.raises(ValueError, match="not conserved"):
        back.check()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_bfloat16_is_conserved_within_its_own_rounding(name):
    model, tokenizer = load_model(name, dtype=torch.bfloat16)
    flow = logit_flow(model, tokenizer, PROMPTS, top_k=40)
    flow.check()
    for route in ("parts", "linear"):
        assert 0 < flow_back(model, tokenizer, flow, route=route).check() < 5e-2


def test_wrong_use_is_refused(llama):
    flow = logit_flow(*llama, PROMPTS, level="layer")
    for route, message in (("both", "unknown"), ("parts", "starts from neurons")):
        with pytest.raises(ValueError, match=message):
            flow_back(*llama, flow, route=route)


@pytest.mark.parametrize("route", ["parts", "linear"])
def test_kept_streams_give_what_a_second_pass_gives(tiny, route, monkeypatch):
    kept = logit_flow(*tiny, PROMPTS, top_k=40, batch_size=2)
    monkeypatch.setattr("backattn.analysis.logit_flow.KEEP_BYTES", 1000)
    dropped = logit_flow(*tiny, PROMPTS, top_k=40, batch_size=2)
    again = flow_back(*tiny, dropped, route=route, batch_size=2)
    monkeypatch.setattr("backattn.analysis.flow_back.capture", None)  # no pass needs to run
    back = flow_back(*tiny, kept, route=route)
    pd.testing.assert_frame_equal(back.frame, again.frame, check_exact=True)
    pd.testing.assert_frame_equal(back.conservation, again.conservation, check_exact=True)
    with pytest.raises(TypeError):
        flow_back(*tiny, dropped, route=route)


def test_flows_of_the_same_prompts_are_traced_together(tiny, monkeypatch):
    """One forward pass a batch; each flow gives what it gives alone."""
    flow = logit_flow(*tiny, PROMPTS, top_k=40)
    other = logit_flow(*tiny, PROMPTS, [5, 6, 7], level="layer")
    traced = [(flow, "parts"), (flow, "linear"), (other, "linear")]
    flow.streams, passes = [], []
    alone = [flow_back(*tiny, *each, batch_size=2) for each in traced]
    monkeypatch.setattr(
        "backattn.analysis.flow_back.capture", lambda *x: passes.append(1) or capture(*x)
    )
    together = flow_backs(*tiny, traced, batch_size=2)
    assert len(passes) == 2 and [back.route for back in together] == ["parts", "linear", "linear"]
    for back, single in zip(together, alone, strict=True):
        values = (x.frame[["flow", "direct"]].to_numpy() for x in (back, single))
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)
        assert back.check() < 1e-3
    assert (together[1].frame["flow"] - together[2].frame["flow"]).abs().max() > 1e-3
    reverse = logit_flow(*tiny, PROMPTS[::-1], level="layer")
    with pytest.raises(ValueError, match="different prompts"):
        flow_backs(*tiny, [(flow, "parts"), (reverse, "linear")])


class Backwards:
    """A tokenizer that reads from the end."""

    pad_token_id = 0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, **options):
        return {"input_ids": [ids[::-1] for ids in self.tokenizer(text, **options)["input_ids"]]}


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
def test_a_flow_of_another_model_or_tokenizer_is_refused(llama, keep_bytes, monkeypatch):
    monkeypatch.setattr("backattn.analysis.logit_flow.KEEP_BYTES", keep_bytes)
    model, tokenizer = load_model("tiny-llama")
    flow = logit_flow(model, tokenizer, PROMPTS, top_k=5)
    flow_back(*llama, flow)  # the same weights
    changed = load_model("tiny-llama")[0]
    changed.model.layers[1].mlp.up_proj.weight.data[3] *= 2
    pairs = (load_model("tiny-qwen2")[0], tokenizer), (model, Backwards(tokenizer))
    for other in (*pairs, (changed, tokenizer)):
        with pytest.raises(ValueError, match="another model"):
            flow_back(*other, flow)
