"""Attributions: held gradients against autograd, flows as scores, exact against brute force."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from backattn import flow_back, load_model, logit_flow
from backattn.analysis.attributions import as_graph, attribute, from_flow, stability
from backattn.analysis.circuits import Circuit, Pairs, areas, pair_up
from backattn.models.activations import capture
from backattn.models.decoder import describe
from backattn.models.hooks import hooks

PROMPTS = ["France's capital is", "Spain's capital is", "the mother of Anna is"]
OTHERS = ["Italy's capital is", "France's capital is", "the father of Anna is"]
RIGHT, WRONG = [5, 6, 7], [8, 9, 10]


@pytest.fixture
def pairs(llama):
    return pair_up(llama[1], PROMPTS, OTHERS, RIGHT, WRONG)


def held(model, half: bool) -> list:
    """Hooks under which autograd sees attention patterns, norm scales and gates as constants."""
    found = []
    for block in describe(model).blocks:
        module = block.module
        for name in ("q_proj", "k_proj"):
            found.append((getattr(module.self_attn, name), "output", torch.Tensor.detach))
        act = block.get("activation")
        if half:  # act(g) as g times a constant; then half of the product's gradient

            def slope(x):
                return x * (torch.nn.functional.silu(x) / x).detach()

            found.append((act, "input", lambda x, kept=[]: kept.append(x) or None))
            found[-1] = (act, "whole output", lambda y: None)
            module.mlp.act_fn = torch.nn.Identity()
            module.mlp.act_fn.forward = slope
            found.append((module.mlp.down_proj, "input", lambda m: m / 2 + m.detach() / 2))
        else:
            found.append((act, "output", torch.Tensor.detach))
    return found


@pytest.mark.parametrize("method, half", [("linear", False), ("half", True)])
@pytest.mark.parametrize("base", ["counterfactual", "zero", "mean"])
def test_the_sweep_is_the_gradient_with_patterns_scales_and_gates_held(method, half, base):
    model, tokenizer = load_model("tiny-llama")
    pairs, other = pair_up(tokenizer, PROMPTS, OTHERS, RIGHT, WRONG), copy.deepcopy(model)
    frozen = held(other, half)
    for module in other.modules():
        if type(module).__name__ == "LlamaRMSNorm":

            def scaled(x, norm=module):
                scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
                return norm.weight * x * scale.detach()

            module.forward = scaled
    with hooks(*frozen):
        wanted = attribute(Circuit(other), pairs, "gradient", base)
    found = attribute(Circuit(model), pairs, method, base)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(wanted).max() > 1e-3


def test_linear_flow_by_head_is_the_same_scale():
    """Flow back from the right answer less that from the wrong one, both from zero; what ends in
    biases is no neuron's, but is an FFN's."""
    model, tokenizer = load_model("tiny-llama")
    for block in describe(model).blocks:
        for name in ("ffn_out", "attention_out"):
            if block.get(name).bias is not None:
                torch.nn.init.zeros_(block.get(name).bias)
    pairs, circuit, scores = (
        pair_up(tokenizer, PROMPTS, OTHERS, RIGHT, WRONG),
        Circuit(model),
        [],
    )
    for answers in (RIGHT, WRONG):
        flow = logit_flow(model, tokenizer, PROMPTS, answers, level="layer")
        back = flow_back(model, tokenizer, flow, "linear", heads=True)
        whole = flow_back(model, tokenizer, flow, "linear").frame
        keys = ["prompt", "layer", "kind", "position"]
        sums = back.frame.groupby(keys, sort=False, observed=True)["flow"].sum()
        np.testing.assert_allclose(
            sums, whole.set_index(keys)["flow"].loc[sums.index], atol=1e-5, rtol=1e-4
        )
        scores.append(from_flow(circuit, back.frame))
    found = attribute(circuit, pairs, "linear", base="zero")
    np.testing.assert_allclose(scores[0] - scores[1], found, atol=1e-4)


def test_exact_is_all_but_one_kept(tiny):
    model, tokenizer = tiny
    pairs, circuit = pair_up(tokenizer, PROMPTS, OTHERS, RIGHT, WRONG), Circuit(model)
    count = len(circuit.nodes)
    for base in ("counterfactual", "mean"):
        m = circuit.kept(
            pairs, np.vstack([np.full((1, count), True), ~np.eye(count, dtype=bool)]), base
        )
        wanted = (m[0] - m[1:]).T
        np.testing.assert_allclose(attribute(circuit, pairs, "exact", base), wanted, atol=2e-5)


def test_what_stands_before_the_difference_may_be_computed_once(llama):
    """Prompts that differ late, in one batch with some that differ early, and with padding."""
    model, tokenizer = llama
    prompts = ["the capital of Spain is", "France's capital is", "Anna is the mother of Spain"]
    others = ["the capital of Italy is", "Italy's capital is", "Anna is the mother of Italy"]
    pairs, circuit = pair_up(tokenizer, prompts, others, RIGHT, WRONG), Circuit(model)
    assert len(set(pairs.start.tolist())) > 1
    keep = np.random.default_rng(0).random((5, len(circuit.nodes))) < 0.5
    alone = np.stack(
        [circuit.kept(pairs.part([k]), keep)[:, 0] for k in range(3)], axis=1
    )  # [5, 3]
    np.testing.assert_allclose(circuit.kept(pairs, keep), alone, atol=1e-5)
    with hooks(*((x.module, "input", lambda h: None) for x in circuit.arch.blocks)):
        for row in range(3):
            part, values = pairs.part([row]), circuit.values(pairs.part([row]).other)
            mask = keep[0]
            changes, at = [], 0
            for (_, _, channels, count), value in zip(circuit.places, values, strict=True):
                kept = torch.from_numpy(mask[at : at + count]).repeat_interleave(channels)
                changes.append(lambda x, k=kept, v=value: torch.where(k, x, v))
                at += count
            placed = zip(circuit.places, changes, strict=True)
            with torch.no_grad(), hooks(*((*where[:2], change) for where, change in placed)):
                logits = model(**part.clean.inputs).logits[0, int(part.clean.lengths[0]) - 1]
            m = float(logits[RIGHT[row]] - logits[WRONG[row]])
            assert m == pytest.approx(alone[0, row], abs=1e-5)


def test_flows_as_scores(llama):
    model, tokenizer = llama
    circuit, neurons = Circuit(model), Circuit(model, "neurons")
    by_head = logit_flow(model, tokenizer, PROMPTS, RIGHT, level="head").frame
    scores = from_flow(circuit, by_head, "increase")
    node = circuit.nodes.query("layer == 1 and head == 2").index[0]
    rows = by_head.query("prompt == 1 and layer == 1 and head == 2 and kind == 'attention'")
    assert scores[1, node] == pytest.approx(rows["increase"].sum(), abs=1e-6)
    flow = logit_flow(model, tokenizer, PROMPTS, RIGHT, method="exact")
    each = from_flow(neurons, flow.frame, "increase")
    assert each.shape == (3, 4 * 48) and np.count_nonzero(each) > 4 * 48
    back = flow_back(model, tokenizer, flow, heads=True)
    assert from_flow(circuit, back.frame).shape == (3, 20)
    for frame, column in (
        (flow_back(model, tokenizer, flow).frame, "flow"),
        (flow.layers, "increase"),
    ):
        with pytest.raises(ValueError, match="heads=True"):
            from_flow(circuit, frame, column)


def test_order_of_both_prompts_turns_the_sign_of_what_is_held_at_both_ends(llama, pairs):
    circuit = Circuit(llama[0])
    turned = Pairs(pairs.other, pairs.clean, pairs.right, pairs.wrong)
    there, back = (attribute(circuit, x, "both ends") for x in (pairs, turned))
    np.testing.assert_allclose(there, -back, atol=1e-5)
    with pytest.raises(ValueError, match="second prompt"):
        attribute(circuit, pairs, "both ends", base="zero")


def test_stability_is_one_for_agreement_and_small_for_noise():
    same = np.tile(np.arange(50.0), (20, 1))
    noise = np.random.default_rng(0).normal(size=(20, 500))
    assert stability(same, 5).min() == 1 and len(stability(same, 5)) == 100
    assert stability(noise, 5).mean() < 0.7


def test_a_curve_over_nothing_is_refused(llama):
    model, tokenizer = llama
    same = pair_up(tokenizer, PROMPTS, PROMPTS, RIGHT, WRONG)
    with pytest.raises(ValueError, match="change nothing"):
        Circuit(model).curve(same, np.arange(20))


def test_curve_asks_each_set_once_and_in_order(llama, pairs):
    circuit = Circuit(llama[0])
    score = attribute(circuit, pairs, "exact").mean(0)
    curve = circuit.curve(pairs, score, sizes=(1, 5, 50, 100))
    assert curve["nodes"].tolist() == [0, 1, 10, 20]
    assert curve["faithfulness"].tolist()[0] == pytest.approx(0)
    alone = circuit.curve(pairs, score, sizes=(50,))
    assert alone["faithfulness"].iloc[0] == pytest.approx(curve["faithfulness"].iloc[2], abs=1e-5)
    assert isinstance(areas(pd.DataFrame(curve)), tuple)


def test_the_leaderboards_form_names_every_node_once(tiny):
    import json

    circuit = Circuit(tiny[0])
    score = np.random.default_rng(0).normal(size=len(circuit.nodes))
    graph = json.loads(json.dumps(as_graph(circuit, score, size=20)))
    heads, layers = circuit.arch.blocks[0].heads, len(circuit.arch.blocks)
    assert list(graph) == ["cfg", "nodes", "edges"] and graph["edges"] == {}
    assert {"n_layers", "n_heads", "d_model", "parallel_attn_mlp"} == set(graph["cfg"])
    names = {f"a{layer}.h{head}" for layer in range(layers) for head in range(heads)}
    assert set(graph["nodes"]) == names | {f"m{k}" for k in range(layers)} | {"input", "logits"}
    scored = {name: x for name, x in graph["nodes"].items() if "score" in x}
    kept = [x["score"] for x in scored.values() if x["in_graph"]]
    rest = [x["score"] for x in scored.values() if not x["in_graph"]]
    assert len(kept) == round(0.2 * len(scored)) and min(kept) > max(rest)
    with pytest.raises(ValueError, match="nodes"):
        as_graph(Circuit(tiny[0], "neurons"), score, size=20)


def test_heads_are_scored_as_by_a_softmax_of_their_own(tiny):
    """The shared directions against equation 3 with the whole vocabulary, in float64."""
    from backattn.analysis.neuron_scores import Reading, sublayers
    from backattn.models.activations import capture
    from backattn.models.tokens import encode

    model, tokenizer = tiny
    frame = logit_flow(model, tokenizer, PROMPTS, RIGHT, level="head").frame
    reading = Reading(capture(model, encode(tokenizer, PROMPTS)), "final", RIGHT)
    lens = reading.lens
    for sub in sublayers(reading.stream):
        if sub.kind == "ffn":
            continue
        parts = (sub.coefficient[..., None] * sub.vectors).unflatten(2, (-1, sub.head_dim)).sum(3)
        for b, answer in enumerate(RIGHT):

            def read(state, b=b, answer=answer):
                scaled = lens.norm.linear(state, reading.frozen[b]).double()
                logits = lens.cap(scaled @ lens.weight.double().T + lens.offset.double())
                return logits.log_softmax(-1)[..., answer]

            rows = frame.query(f"prompt == {b} and layer == {sub.layer} and kind == 'attention'")
            grid = rows.pivot(index="position", columns="head", values="increase").to_numpy()
            wanted = (read(sub.base[b] + parts[b]) - read(sub.base[b])).numpy()
            np.testing.assert_allclose(grid, wanted[: len(grid)], atol=1e-5)


def test_what_is_written_is_measured_behind_the_sandwich_norm(tiny):
    """Heads one by one, and neurons, by the vectors that they add to the stream."""
    model, tokenizer = tiny
    pairs = pair_up(tokenizer, PROMPTS[:1], OTHERS[:1], RIGHT[:1], WRONG[:1])
    stream = capture(model, pairs.clean)
    for units in ("nodes", "neurons"):
        found = attribute(Circuit(model, units), pairs, "activation", base="zero")[0]
        wanted = []
        for layer, block in enumerate(stream.arch.blocks):
            ffn = block.norm("ffn_post"), stream.scales["ffn"][layer], block.ffn_out.weight
            if units == "neurons":
                norm, scale, weight = ffn
                for neuron in range(weight.shape[1]):
                    part = stream.neurons[layer][0, :, [neuron]] * weight[:, neuron]
                    wanted.append(norm.linear(part, scale[0]).norm(dim=-1).sum())
                continue
            norm, scale = block.norm("attention_post"), stream.scales["attention"][layer]
            values = block.per_head(stream.values[layer])[0]  # [T, H, d]
            for head in range(block.heads):
                z = stream.weights[layer][0, head] @ values[:, head]
                columns = slice(head * block.head_dim, (head + 1) * block.head_dim)
                part = z @ block.attention_out.weight[:, columns].T
                wanted.append(norm.linear(part, scale[0]).norm(dim=-1).sum())
            wanted.append(stream.ffn[layer][0].norm(dim=-1).sum())
        np.testing.assert_allclose(found, torch.stack(wanted), rtol=1e-4)


def test_prompts_without_rows_keep_their_place(llama):
    model, tokenizer = llama
    neurons = Circuit(model, "neurons")
    flow = logit_flow(model, tokenizer, PROMPTS, RIGHT, top_k=1)
    assert from_flow(neurons, flow.frame, "increase").shape == (3, 4 * 48)
    heads = logit_flow(model, tokenizer, PROMPTS, RIGHT, level="head")
    with pytest.raises(ValueError, match="no rows of nodes"):
        from_flow(neurons, heads.frame.assign(neuron=pd.NA), "increase")


@pytest.mark.parametrize("method", ["gradient", "integrated", "midpoint", "linear", "exact"])
def test_bf16_gives_what_fp32_gives_within_its_rounding(method):
    model, tokenizer = load_model("tiny-llama")
    pairs = pair_up(tokenizer, PROMPTS, OTHERS, RIGHT, WRONG)
    whole = attribute(Circuit(model), pairs, method)
    rounded = attribute(Circuit(model.to(torch.bfloat16)), pairs, method)
    assert np.corrcoef(whole.ravel(), rounded.ravel())[0, 1] > 0.98


def test_no_steps_are_refused(llama, pairs):
    with pytest.raises(ValueError, match="at least one"):
        attribute(Circuit(llama[0]), pairs, "integrated", steps=0)
