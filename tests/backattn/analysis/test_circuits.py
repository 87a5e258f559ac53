"""Circuits: what is kept, what is exchanged, attributions that agree where all is linear."""

import copy
import itertools
import threading

import numpy as np
import pytest
import torch
from torch import nn

from backattn import BackAttentionConfig, get_back_attention_model, load_model
from backattn.analysis.attributions import METHODS, attribute
from backattn.analysis.circuits import BASES, SIZES, Circuit, Pairs, areas, pair_up
from backattn.models.decoder import describe
from backattn.models.families import UnsupportedModelError
from backattn.models.tokens import encode

PROMPTS = ["France's capital is", "Spain's capital is", "the mother of Anna is"]
OTHERS = ["Italy's capital is", "France's capital is", "the father of Anna is"]


@pytest.fixture
def pairs(llama):
    return pair_up(llama[1], PROMPTS, OTHERS, [5, 6, 7], [8, 9, 10])


@pytest.mark.parametrize("units", ["nodes", "neurons"])
def test_all_kept_is_the_model_and_nothing_kept_the_counterfactual(tiny, units):
    model, tokenizer = tiny
    pairs = pair_up(tokenizer, PROMPTS, OTHERS, [5, 6, 7], [8, 9, 10])
    circuit, rows = Circuit(model, units), range(3)
    count = len(circuit.nodes)
    with torch.no_grad():
        plain = [
            batch.at_last(model(**batch.inputs).logits) for batch in (pairs.clean, pairs.other)
        ]
    m = [(x[rows, pairs.right] - x[rows, pairs.wrong]).numpy() for x in plain]
    np.testing.assert_allclose(circuit.kept(pairs, np.full(count, True)), m[0], atol=1e-5)
    if units == "nodes":  # all but the embedding, which is the prompt's own
        embed = model.get_input_embeddings()
        assert not np.allclose(circuit.kept(pairs, np.full(count, False)), m[0], atol=1e-3)
        same = pair_up(tokenizer, PROMPTS, PROMPTS, [5, 6, 7], [8, 9, 10])
        np.testing.assert_allclose(circuit.kept(same, np.full(count, False)), m[0], atol=1e-5)
        assert embed is model.get_input_embeddings()


def linear(tiny_gpt2):
    """Linear in what nodes put out: no norms, no activation, fixed attention patterns."""
    model = copy.deepcopy(tiny_gpt2)
    for block in describe(model).blocks:
        block.module.ln_1, block.module.ln_2 = nn.Identity(), nn.Identity()
        block.module.mlp.act = nn.Identity()
        with torch.no_grad():
            block.module.attn.c_attn.weight[:, : 2 * 32] = 0
            block.module.attn.c_attn.bias[: 2 * 32] = 0
    model.transformer.ln_f = nn.Identity()
    return model


@pytest.mark.parametrize("base", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("units", ["nodes", "neurons"])
def test_where_all_is_linear_gradients_equal_exact_patching(units, base):
    model, tokenizer = load_model("tiny-gpt2")
    pairs = pair_up(tokenizer, PROMPTS, OTHERS, [5, 6, 7], [8, 9, 10])
    circuit = Circuit(linear(model), units)
    exact = attribute(circuit, pairs, "exact", base)
    for method in ("gradient", "integrated"):
        np.testing.assert_allclose(attribute(circuit, pairs, method, base), exact, atol=1e-4)


def test_a_random_order_has_the_areas_of_a_straight_end(llama):
    """Of a model whose nodes all count: until all are kept, a random circuit gives nothing."""
    import pandas as pd

    flat = pd.DataFrame({"size": SIZES, "faithfulness": [0.0] * (len(SIZES) - 1) + [1.0]})
    assert areas(flat) == pytest.approx((0.25, 0.75))
    perfect = flat.assign(faithfulness=1.0)
    assert areas(perfect)[0] > 0.99 and areas(perfect)[1] < 0.01


def test_keeping_more_of_the_best_nodes_comes_nearer(llama, pairs):
    circuit = Circuit(llama[0])
    best = circuit.curve(pairs, attribute(circuit, pairs, "exact").mean(0))
    assert best["nodes"].tolist()[-1] == len(circuit.nodes) == 4 * 5
    assert best["faithfulness"].iloc[-1] == pytest.approx(1)
    removed = circuit.curve(pairs, attribute(circuit, pairs, "exact").mean(0), remove=True)
    assert removed["faithfulness"].iloc[-1] == pytest.approx(0)
    chance = [
        circuit.curve(pairs, attribute(circuit, pairs, "random", seed=s).mean(0)) for s in range(8)
    ]
    assert areas(best)[0] > np.mean([areas(x)[0] for x in chance])


def test_scores_do_not_depend_on_batches_or_leave_a_trace(llama, pairs):
    circuit, before = Circuit(llama[0]), llama[0](pairs.clean.input_ids).logits
    for method, base in itertools.product(METHODS, BASES):
        if method == "both ends" and base != "counterfactual":
            continue
        whole = attribute(circuit, pairs, method, base)
        if method != "random":
            alone = attribute(circuit, pairs, method, base, batch_size=1)
            np.testing.assert_allclose(alone, whole, atol=1e-5)
    assert torch.equal(llama[0](pairs.clean.input_ids).logits, before)
    assert all(p.grad is None for p in llama[0].parameters())


def test_padding_dropout_and_layers_that_run_twice():
    model, tokenizer = load_model("tiny-gpt2")
    prompts, others = ["France's capital is", "is"], ["Italy's capital is", "the"]
    pairs, circuit = pair_up(tokenizer, prompts, others, [5, 6], [8, 9]), Circuit(model)
    for method in ("activation", "gradient", "integrated", "exact"):
        alone = attribute(circuit, pairs, method, batch_size=1)
        model.train()  # GPT-2 has dropout
        np.testing.assert_allclose(attribute(circuit, pairs, method), alone, atol=1e-5)
        assert model.training and model.transformer.drop.training
        model.eval()
    wrapped = get_back_attention_model(model, BackAttentionConfig(1, dim=8))
    with wrapped.applied(), pytest.raises(UnsupportedModelError, match="ran twice"):
        attribute(circuit, pairs, "gradient")


def test_what_cannot_be_compared_is_refused(llama):
    model, tokenizer = llama
    with pytest.raises(ValueError, match="counterfactual 5"):
        pair_up(tokenizer, ["Rome is"], ["France's capital is"], [5], [6])
    with pytest.raises(ValueError, match="no contrast"):
        pair_up(tokenizer, ["Rome is"], ["Tokyo is"], [5], [5])
    circuit = Circuit(model)
    pairs = pair_up(tokenizer, ["Rome is"], ["Tokyo is"], [5], [6])
    for score in (np.ones(3), np.full(len(circuit.nodes), np.nan)):
        with pytest.raises(ValueError, match="finite numbers"):
            circuit.curve(pairs, score)
    for call in (
        lambda: Circuit(model, "edges"),
        lambda: attribute(circuit, pairs, "magic"),
        lambda: attribute(circuit, pairs, "gradient", "median"),
    ):
        with pytest.raises(ValueError, match="unknown"):
            call()


def test_lists_of_other_lengths_and_answers_that_are_no_tokens_are_refused(llama):
    model, tokenizer = llama
    for lists in (
        (PROMPTS, OTHERS, [5], [6]),
        (PROMPTS[:2], OTHERS[:2], [5, 6, 7], [8, 9, 10]),
        (PROMPTS, OTHERS[:2], [5, 6, 7], [8, 9, 10]),
    ):
        with pytest.raises(ValueError, match="not as many"):
            pair_up(tokenizer, *lists)
    for wrong in (-1, 10**6):
        pairs = pair_up(tokenizer, PROMPTS[:1], OTHERS[:1], [5], [wrong])
        with pytest.raises(IndexError, match="Answer"):
            attribute(Circuit(model), pairs, "gradient")


def test_parts_made_with_another_base_and_other_padding_are_refused(llama, pairs):
    circuit = Circuit(llama[0])
    with torch.no_grad():
        parts = list(circuit.parts(pairs, "counterfactual", 2))
    keep = np.arange(len(circuit.nodes)) < 9
    np.testing.assert_allclose(circuit.kept(parts, keep), circuit.kept(pairs, keep), atol=1e-5)
    with pytest.raises(ValueError, match="another base"):
        circuit.kept(parts, keep, base="zero")
    left = encode(llama[1], ["France's capital is", "is"], "left")
    with pytest.raises(ValueError, match="right"):
        Pairs(left, left, pairs.right[:2], pairs.wrong[:2])


def test_areas_need_all_sizes_and_kept_nodes(llama, pairs):
    circuit = Circuit(llama[0])
    score = attribute(circuit, pairs, "gradient").mean(0)
    with pytest.raises(ValueError, match="up to all"):
        areas(circuit.curve(pairs, score, sizes=(10, 50)))
    with pytest.raises(ValueError, match="up to all"):
        areas(circuit.curve(pairs, score, remove=True))
    for sizes in ((100, 50), (-5, 100), (50, 150), (0, 100)):
        with pytest.raises(ValueError, match="rise"):
            circuit.curve(pairs, score, sizes=sizes)


@pytest.mark.parametrize("base", BASES)
def test_layers_that_run_twice_are_refused_with_every_base(base):
    model, tokenizer = load_model("tiny-llama")
    pairs = pair_up(tokenizer, PROMPTS, OTHERS, [5, 6, 7], [8, 9, 10])
    wrapped = get_back_attention_model(model, BackAttentionConfig(1, dim=8))
    circuit = Circuit(model)
    with wrapped.applied(), pytest.raises(UnsupportedModelError, match="ran twice"):
        attribute(circuit, pairs, "exact", base)


def test_another_thread_sees_the_model_as_it_is(llama, pairs):
    model, circuit = llama[0], Circuit(llama[0])
    ids, stop, wrong = pairs.clean.input_ids, threading.Event(), []
    with torch.no_grad():
        before = model(ids).logits

    def ask():
        with torch.no_grad():
            while not stop.is_set():
                wrong.append(not torch.equal(model(ids).logits, before))

    thread = threading.Thread(target=ask)
    thread.start()
    keep = np.random.default_rng(0).random((40, len(circuit.nodes))) < 0.2
    circuit.kept(pairs, keep)
    stop.set()
    thread.join()
    assert wrong and not any(wrong)
