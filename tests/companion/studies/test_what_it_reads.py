"""What trained back attention reads, and needs: on a tiny model whose module matters."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from ledger_rows import held

from backattn import load_model
from backattn.training.evaluation import FirstPasses, answer_logits
from companion.measures.memory import PLACES, MemoryProbes, high_layers, memory_places
from companion.questions.prompts import two_hop_spans
from companion.runs.perform import trained_weights, with_adapter
from companion.studies import what_it_reads as study


def test_places_follow_the_words(probe):
    fact, labels = probe.frame.iloc[0], probe.labels[0]
    pieces = probe.tokenizer(fact["two_hop"], return_offsets_mapping=True)["offset_mapping"]
    said = dict.fromkeys(PLACES, "")
    for (start, end), place in zip(pieces, labels, strict=True):
        said[place] += fact["two_hop"][start:end]
    assert said["e1"].strip() == fact["e1"]
    assert fact["r1"] in said["r1"] and fact["r2"] in said["r2"]
    assert "'s" in said["after e1"] and "'s" in said["after r1"] and not said["start"]


def test_what_a_tokenizer_puts_in_front_is_a_place_of_its_own():
    prompt = ": Bach's mother's city is"
    spans = two_hop_spans(prompt, "Bach", "mother", "city")
    frame = pd.DataFrame([{"two_hop": prompt, **spans}])
    labels = memory_places(load_model("tiny-llama")[1], frame)[0]
    assert labels[0] == "start" and list(dict.fromkeys(labels)) == list(PLACES)


def test_weights_are_those_of_the_model_and_sum_to_one(probe):
    read, *outcomes = probe.read()
    for weights, prompt in zip(read, probe.items.prompts, strict=True):
        assert weights.shape == (len(prompt), len(probe.memory_layers), len(prompt))
        assert np.allclose(weights.sum((1, 2)), 1, atol=1e-5)
        assert np.triu(weights.sum(1), 1).max() == 0  # nothing later is read
    with probe.wrapped.attention_maps() as maps, torch.no_grad():
        probe.wrapped(torch.tensor([probe.items.prompts[3]]), use_cache=False)
    assert np.allclose(maps[1][0, 0].numpy(), read[3], atol=1e-5)
    assert np.allclose(outcomes, probe.ask(), atol=1e-5)


def test_hiding_everything_everywhere_is_no_adapter(probe):
    log_probs, _ = probe.ask(probe.block(PLACES), PLACES)
    probe.wrapped.enabled = False
    for row, prompt in enumerate(probe.items.prompts):
        with torch.no_grad():
            logits = probe.wrapped(torch.tensor([prompt]), use_cache=False).logits[0, -1]
        plain = logits.log_softmax(-1)[probe.items.answers[row][0]].item()
        assert log_probs[row] == pytest.approx(plain, abs=1e-4)


def test_only_the_queries_that_are_named_lose_sight(probe):
    before, e1 = probe.ask()[0], probe.block(["e1"])
    nothing = [np.zeros_like(cells) for cells in e1]
    assert np.allclose(probe.ask(nothing, PLACES)[0], before, atol=1e-5)
    last, everywhere = probe.ask(e1)[0], probe.ask(e1, PLACES)[0]
    assert abs(last - before).max() > 1e-3 and abs(last - everywhere).max() > 1e-3
    early = probe.ask(probe.block(["last"]), PLACES[:-1])[0]
    assert np.allclose(early, before, atol=1e-5)  # no earlier query sees the last position


def test_what_is_not_changed_is_not_asked_again(probe, monkeypatch):
    """After `read` the last positions alone give what whole questions give."""
    widths = []

    def watched(model, batch, first, cache):
        widths.append(first.shape[2])
        return answer_logits(model, batch, first, cache)

    monkeypatch.setattr("companion.measures.memory.answer_logits", watched)
    hidden, whole = probe.block(["e1", "r1"]), max(map(len, probe.items.prompts))
    plans = (("last",), ("r2",), ("r2", "last"), ("e1",), ("last",))
    slow = [probe.ask(hidden, queries) for queries in plans]
    probe.read()
    quick = [probe.ask(hidden, queries) for queries in plans]
    assert widths[:5] == [whole] * 5 and widths[5] == widths[9] == 1 < widths[6] < widths[8]
    for (a, right), (b, same) in zip(quick, slow, strict=True):
        assert np.allclose(a, b, atol=1e-5) and np.array_equal(right, same)
    assert abs(quick[0][0] - quick[1][0]).max() > 1e-3


@pytest.mark.parametrize("silent", [False, True])
def test_positions_that_read_nothing_are_not_asked_again(probe, monkeypatch, silent):
    """After `read`, what runs again begins where something is read, or is hidden from sight."""
    widths = []

    def watched(model, batch, first, cache):
        widths.append(first.shape[2])
        return answer_logits(model, batch, first, cache)

    monkeypatch.setattr("companion.measures.memory.answer_logits", watched)
    everything, r1 = probe.block(PLACES), probe.block(["r1"])
    only_r1 = [~cells for cells in r1]
    plans = [(everything, PLACES), (everything, PLACES[:-1]), (only_r1, PLACES), (r1, PLACES)]
    slow = [probe.ask(cells, queries, silent=silent) for cells, queries in plans]
    trained = probe.ask()
    probe.read()
    widths.clear()
    quick = [probe.ask(cells, queries, silent=silent) for cells, queries in plans]
    whole = max(map(len, probe.items.prompts))
    assert widths[:2] == [1, 1] and 1 < widths[2] < whole and 1 < widths[3] < whole
    for (a, right), (b, same) in zip(quick, slow, strict=True):
        assert np.allclose(a, b, atol=1e-5) and np.array_equal(right, same)
        assert abs(a - trained[0]).max() > 1e-3
    assert np.allclose(probe.ask()[0], trained[0], atol=1e-5) and len(widths) == 4


def test_probes_asked_again_go_on_from_what_they_computed(kept, monkeypatch):
    """The same numbers and no pass made twice; another run's weights have their own."""
    run, store = kept
    other, asked = replace(run, seed=run.seed + 1), []
    with with_adapter(other, "float32") as (model, _):
        for p in model.updates.parameters():
            torch.nn.init.normal_(p, std=0.3)
        store.keep(other, {"run": {}}, trained_weights(model))
    probes = MemoryProbes([run, other], store, 4)
    once = [(probe.read()[1], probe.ask(probe.block(["r1"]))[0]) for probe in probes]
    with monkeypatch.context() as patch:
        patch.setattr(FirstPasses, "_compute", lambda *_: asked.append(1))
        again = [(probe.read()[1], probe.ask(probe.block(["r1"]))[0]) for probe in probes]
    fresh = [probe.read()[1] for one in (run, other) for probe in MemoryProbes([one], store, 4)]
    assert not asked and abs(once[0][0] - once[1][0]).max() > 1e-3
    for (read, hidden), (read_again, hidden_again), alone in zip(once, again, fresh, strict=True):
        assert np.array_equal(read, read_again) and np.array_equal(hidden, hidden_again)
        assert np.allclose(read, alone, atol=1e-5)


def test_cells_are_chosen_by_weight_and_by_count():
    weights = np.array([[0.4, 0.1], [0.3, 0.2]])
    most, one = study.most_read(weights, 0.7), study.most_read(weights, 0.4)
    assert most.tolist() == [[True, False], [True, False]]
    assert study.most_read(weights, 0.41).sum() == 2 and one.sum() == 1
    draw = np.random.default_rng(0)
    assert (study.random_cells(weights, most, draw) == ~most).all()
    for _ in range(20):
        assert study.random_cells(weights, one, draw).sum() == 1
        other = study.random_cells(weights, one, draw, "weight")
        assert weights[other].sum() >= 0.4 and not (other & one).any()
    assert not study.random_cells(weights, most, draw, "weight").any()  # the others hold less


def test_tables_cover_what_was_asked(probe):
    read, examples = study.attention([probe])
    questions = read.groupby(["question", "query"], observed=True)
    assert questions["weight"].sum().to_numpy() == pytest.approx(1)
    queries = study.query_table(read).groupby("query", observed=True)
    assert queries["weight"].sum().to_numpy() == pytest.approx(1)
    share = study.high_share(read, [3]).set_index("questions").loc[["all", "training 0"]]
    cells = read[(read["query"] == "last") & (read["place"] == "r1") & (read["layer"] == 3)]
    assert share["share"].to_list() == pytest.approx([cells["weight"].mean()] * 2)
    assert len(cells) == 8 and examples[0].to_numpy().sum() == pytest.approx(1)


def test_without_a_query_all_cells_are_read_alike(probe):
    for name, p in probe.wrapped.updates.named_parameters():
        p.data *= "q_proj" not in name
    read, _ = study.attention([probe])
    assert np.allclose(read["weight"], read["chance"], atol=1e-5) and read["chance"].max() > 0.1


def test_hidden_cells_are_tabled(probe):
    made = study.knock_outs([probe], draws=2)
    by = study.knock_out_table(made).set_index("hidden")
    assert by.loc["everything, at last", "weight"] == pytest.approx(1)
    assert "everything, at start" not in by.index
    assert np.isnan(by.loc["everything, at e1", "weight"])
    fall, most = by["fall"], by.loc["most read"]
    only = fall["everything, but at last"] - fall["everything, everywhere"]
    assert abs(only) > 1e-3  # the last position reads on
    assert most["weight"] >= 0.25
    assert by.loc["random, same count as most read", "cells"] == most["cells"]
    assert by.loc["random, same weight as most read", "weight"] >= most["weight"]
    row = study.knock_out_tests(made).iloc[0]
    assert row["more"] == pytest.approx(fall[row["hidden"]] - fall[row["control"]])
    blocks = study.weight_against_fall([probe])
    assert len(blocks.groupby(["query", "place"])) == 21


def test_readable_states_are_those_of_both_models(probe, monkeypatch):
    monkeypatch.setattr("companion.measures.two_hop.READABLE", 60)
    keys = ["question", "entity", "layer"]
    wide = study.brought_forward([probe]).pivot(index=keys, columns="adapter", values="readable")
    same = wide["off"] == wide["on"]
    assert len(wide) == 8 * 4 * 5 and not same.all()
    assert same[wide.index.get_level_values("layer") == 0].all()  # below the source layer


def test_high_layers_lie_as_deep_as_in_the_paper():
    assert high_layers(32) == (27, 28, 29, 30)
    assert high_layers(30) == (25, 26, 27, 28)


@pytest.mark.parametrize(
    "over, more, trainings, verdict",
    [
        ((0.1, 0.3), (0.1, 0.2), (0.1, 0.2), "all"),
        ((0.1, 0.3), (0.001, 0.02), (0.1, 0.2), "some"),
        ((0.1, 0.3), (-0.1, 0.2), (0.1, -0.2), "none"),
        ((-0.1, 0.3), (-0.1, 0.2), (0.1, 0.2), "none"),
        ((-0.2, -0.1), (-0.1, 0.01), (-0.1, -0.2), "none"),
    ],
)
def test_c10_follows_its_rule(over, more, trainings, verdict):
    row = {"questions": "all", "share": 0.1, "low": 0, "high": 0.2, "chance": 0.02, "n": 9}
    rows = [{**row, "over": 0.1, "over_low": over[0], "over_high": over[1]}]
    rows += [{"questions": f"training {k}", "over": value} for k, value in enumerate(trainings)]
    row = {"key": "r1 high", "more": 0.0, "n": 9}
    tests = pd.DataFrame([{**row, "low": more[0], "high": more[1]}])
    model = pd.DataFrame(rows), tests, (25, 28)
    assert held(study.brings_high_states({"one": model})) == verdict
    other = (model[0], tests.assign(low=0.1, high=0.2), (3, 4))
    both = study.brings_high_states({"one": model, "two": other})
    assert held(both) in ("all", "some")
    assert "two: weight of r1's layers 3–4" in both["ours"]
