"""What trained back attention reads: on a tiny model whose module is made to read what the test
knows."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from backattn import load_model
from backattn.training.evaluation import answer_logits
from companion.measures.memory import PLACES, high_layers, memory_places, memory_probes
from companion.questions.prompts import two_hop_spans
from companion.studies import what_it_reads
from companion.studies.what_it_reads import (
    brings_high_states,
    brought_forward,
    case_tests,
    forward_lines,
    forward_table,
    high_share,
    knock_out_table,
    knock_out_tests,
    knock_outs,
    most_read,
    query_table,
    random_cells,
    rank_correlations,
    weight_against_fall,
    weight_table,
)


def one(kept):
    run, store = kept
    return memory_probes([run], store)


def test_places_follow_the_words(kept):
    reader = next(one(kept))
    prompt, labels = reader.frame["two_hop"][0], reader.labels[0]
    pieces = reader.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    said = {
        place: "".join(
            prompt[a:b] for (a, b), own in zip(pieces, labels, strict=True) if own == place
        )
        for place in PLACES
    }
    fact = reader.frame.iloc[0]
    assert (
        said["e1"].strip() == fact["e1"] and fact["r1"] in said["r1"] and fact["r2"] in said["r2"]
    )
    assert "'s" in said["after e1"] and "'s" in said["after r1"] and not said["start"]


def test_what_a_tokenizer_puts_in_front_is_a_place_of_its_own():
    _, tokenizer = load_model("tiny-llama")
    prompt = ": Bach's mother's city is"
    spans = two_hop_spans(prompt, "Bach", "mother", "city")
    labels = memory_places(tokenizer, pd.DataFrame([{"two_hop": prompt, **spans}]))[0]
    assert labels[0] == "start" and list(dict.fromkeys(labels)) == list(PLACES)


def test_weights_are_those_of_the_model_and_sum_to_one(kept):
    for reader in one(kept):
        for own, prompt in zip(reader.read()[0], reader.items.prompts, strict=True):
            assert own.shape == (len(prompt), len(reader.memory_layers), len(prompt))
            assert np.allclose(own.sum((1, 2)), 1, atol=1e-5)
            assert np.triu(own.sum(1), 1).max() == 0  # nothing later is read
        ids = torch.tensor([reader.items.prompts[3]])
        with reader.wrapped.attention_maps() as maps, torch.no_grad():
            reader.wrapped(ids, use_cache=False)
        assert all(
            np.allclose(a, b, atol=1e-5)
            for a, b in zip(reader.read()[1:], reader.ask(), strict=True)
        )
        assert np.allclose(maps[1][0, 0].numpy(), reader.read()[0][3], atol=1e-5)


def test_hiding_everything_everywhere_is_no_adapter(kept):
    for reader in one(kept):
        log_probs, _ = reader.ask(reader.block(PLACES), PLACES)
        reader.wrapped.enabled = False
        for row, prompt in enumerate(reader.items.prompts):
            with torch.no_grad():
                plain = (
                    reader.wrapped(torch.tensor([prompt]), use_cache=False)
                    .logits[0, -1]
                    .log_softmax(-1)
                )
            assert log_probs[row] == pytest.approx(
                plain[reader.items.answers[row][0]].item(), abs=1e-4
            )


def test_only_the_queries_that_are_named_lose_sight(kept):
    for reader in one(kept):
        before, _ = reader.ask()
        nothing = [np.zeros_like(cells) for cells in reader.block(["r1"])]
        assert np.allclose(reader.ask(nothing, PLACES)[0], before, atol=1e-5)
        last, everywhere = (
            reader.ask(reader.block(["e1"]))[0],
            reader.ask(reader.block(["e1"]), PLACES)[0],
        )
        assert abs(last - before).max() > 1e-3 and abs(last - everywhere).max() > 1e-3
        early = reader.ask(reader.block(["last"]), PLACES[:-1])[0]
        assert np.allclose(early, before, atol=1e-5)  # no earlier query sees the last position


def test_what_is_not_changed_is_not_asked_again(kept, monkeypatch):
    """After `read` the last positions alone give what whole questions give."""
    asked, ordinary = [], answer_logits
    monkeypatch.setattr(
        "companion.measures.memory.answer_logits",
        lambda *given: (asked.append(given), ordinary(*given))[1],
    )
    for reader in one(kept):
        hidden, plans = (
            reader.block(["e1", "r1"]),
            (("last",), ("r2",), ("r2", "last"), ("e1",), ("last",)),
        )
        slow = [reader.ask(hidden, queries) for queries in plans]
        reader.read()
        quick = [reader.ask(hidden, queries) for queries in plans]
    widths = [first.shape[2] for _, _, first, _ in asked]
    assert (
        widths[:5] == [asked[0][1].input_ids.shape[1]] * 5
        and widths[5] == widths[9] == 1 < widths[6] < widths[8]
    )
    for (a, right), (b, same) in zip(quick, slow, strict=True):
        assert np.allclose(a, b, atol=1e-5) and np.array_equal(right, same)
    assert abs(quick[0][0] - quick[1][0]).max() > 1e-3


def test_cells_are_chosen_by_weight_and_by_count():
    weights = np.array([[0.4, 0.1], [0.3, 0.2]])
    most = most_read(weights, 0.7)
    assert most.tolist() == [[True, False], [True, False]]
    assert most_read(weights, 0.41).sum() == 2 and most_read(weights, 0.4).sum() == 1
    draw = np.random.default_rng(0)
    assert random_cells(weights, most, "count", draw).tolist() == [[False, True], [False, True]]
    one = most_read(weights, 0.4)
    for _ in range(20):
        assert random_cells(weights, one, "count", draw).sum() == 1
        other = random_cells(weights, one, "weight", draw)
        assert weights[other].sum() >= 0.4 and not (other & one).any()
    assert not random_cells(weights, most, "weight", draw).any()  # the others hold less
    with pytest.raises(ValueError, match="count"):
        random_cells(weights, one, "size", draw)


def test_tables_cover_what_was_asked(kept):
    run, store = kept
    read = what_it_reads.attention_summary([run], store)
    occurs = read.weights.sum((0, 2, 3)) > 0
    assert read.weights[:, occurs].sum((2, 3)) == pytest.approx(1)
    assert query_table(read).groupby("query")["weight"].sum().to_numpy() == pytest.approx(1)
    assert weight_table(read).groupby("case")["weight"].sum().to_numpy() == pytest.approx(1)
    share = high_share(read, [3]).set_index("questions").loc[["all", "training 0"]]
    cells = read.of("last")[0][:, read.layers.index(3), PLACES.index("r1")]
    assert share["share"].to_list() == pytest.approx([cells.mean()] * 2)
    tests = case_tests(dataclasses.replace(read, right=np.arange(8) % 2 == 0), [3])
    row = tests.set_index(["place", "layers"]).loc[("r1", "3–3")]
    assert (row["right"], row["wrong"]) == pytest.approx((cells[::2].mean(), cells[1::2].mean()))


def test_without_a_query_all_cells_are_read_alike(kept):
    run, store = kept
    weights = store.weights(run)
    store.keep(
        run,
        {"run": {}},
        {k: torch.zeros_like(w) if "q_proj" in k else w for k, w in weights.items()},
    )
    read = what_it_reads.attention_summary([run], store)
    assert np.allclose(read.weights, read.chance, atol=1e-5) and read.chance.max() > 0.1


def test_hidden_cells_are_tabled(kept):
    run, store = kept
    made = knock_outs([run], store, draws=2)
    means = knock_out_table(made).set_index("hidden")
    assert (
        means.loc["everything, at last", "weight"] == pytest.approx(1)
        and "everything, at start" not in means.index
    )
    assert np.isnan(means.loc["everything, at e1", "weight"])
    only = (
        means.loc["everything, but at last", "fall"] - means.loc["everything, everywhere", "fall"]
    )
    assert abs(only) > 1e-3  # the last position reads on
    assert means.loc["most read", "weight"] >= 0.25
    assert means.loc["random, same count as most read", "cells"] == means.loc["most read", "cells"]
    assert (
        means.loc["random, same weight as most read", "weight"] >= means.loc["most read", "weight"]
    )
    row = knock_out_tests(made).iloc[0]
    assert row["more"] == pytest.approx(
        means.loc[row["hidden"], "fall"] - means.loc[row["control"], "fall"]
    )
    blocks = weight_against_fall([run], store)
    rank = rank_correlations(blocks)
    assert len(blocks.groupby(["query", "place"])) == 21
    assert rank["query"].tolist() == ["after r1", "r2", "last"]
    assert ((rank["low"] >= -1) & (rank["low"] <= rank["mean"]) & (rank["high"] <= 1)).all()


def test_readable_states_are_those_of_both_models(kept, monkeypatch):
    run, store = kept
    monkeypatch.setattr("companion.measures.two_hop.READABLE", 60)
    made = brought_forward([run], store)
    wide = made.pivot(index=["question", "entity"], columns="adapter", values="readable")
    low = [np.array_equal(off[:1], on[:1]) for off, on in zip(wide["off"], wide["on"], strict=True)]
    assert all(low)  # states below the source layer are the same
    assert not all(np.array_equal(off, on) for off, on in zip(wide["off"], wide["on"], strict=True))
    lines = forward_lines(made)
    assert len(lines) == 8 * 5 and lines["share"].between(0, 1).all()


def test_earlier_counts_questions_readable_both_ways():
    rows = [
        ("a", "off", [0, 0, 0, 1]),
        ("a", "on", [0, 1, 0, 1]),
        ("b", "off", [0, 0, 1, 1]),
        ("b", "on", [0, 0, 1, 1]),
    ]
    rows += [("c", "off", [0, 0, 0, 0]), ("c", "on", [1, 1, 1, 1])]
    made = pd.DataFrame(rows, columns=["e2", "adapter", "readable"]).assign(
        seed=0, question=0, entity="e3"
    )
    made["readable"] = [np.array(row, dtype=bool) for row in made["readable"]]
    row = forward_table(made).iloc[0]
    assert (row["n"], row["both"], row["off"], row["on"], row["earlier"]) == (3, 2, 2.5, 1.5, 1.0)
    assert (row["ever_off"], row["ever_on"]) == pytest.approx((2 / 3, 1))


def test_high_layers_lie_as_deep_as_in_the_paper():
    assert high_layers(32) == (27, 28, 29, 30)
    assert high_layers(30) == (25, 26, 27, 28)


@pytest.mark.parametrize(
    "over, more, trainings, verdict",
    [
        ((0.1, 0.3), (0.1, 0.2), (0.1, 0.2), "reproduced"),
        ((0.1, 0.3), (0.001, 0.02), (0.1, 0.2), "partly"),
        ((0.1, 0.3), (-0.1, 0.2), (0.1, -0.2), "not at this scale"),
        ((-0.1, 0.3), (-0.1, 0.2), (0.1, 0.2), "not at this scale"),
        ((-0.2, -0.1), (-0.1, 0.01), (-0.1, -0.2), "contradicted"),
    ],
)
def test_c10_follows_its_rule(over, more, trainings, verdict):
    share = pd.DataFrame(
        [{"questions": "all", "share": 0.1, "low": 0, "high": 0.2, "chance": 0.02, "n": 9}]
    )
    share = share.assign(over=0.1, over_low=over[0], over_high=over[1])
    single = pd.DataFrame({"questions": ["training 0", "training 1"], "over": trainings})
    row = {"key": "r1 high", "more": 0.0, "n": 9}
    tests = pd.DataFrame([{**row, "low": more[0], "high": more[1]}])
    model = pd.concat([share, single]), tests, (25, 28)
    assert brings_high_states({"one": model})["verdict"] == verdict
    one_more = brings_high_states(
        {"one": model, "two": (*model[:1], tests.assign(low=0.1, high=0.2), (3, 4))}
    )
    assert (
        one_more["verdict"] in ("reproduced", "partly")
        and "two: weight of r1's layers 3–4" in one_more["ours"]
    )
