"""What using back attention costs, counted on tiny models."""

import pandas as pd
import pytest
import torch

from backattn.adapters.back_attention import get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from companion.report import tables
from companion.runs.perform import forward_flops
from companion.studies.other_reasoning_and_cost import costs
from companion.studies.other_reasoning_and_cost.costs import costs_as_computed


@pytest.fixture(scope="module")
def table():
    from backattn import load_model

    model, _ = load_model("tiny-llama")
    return costs.cost_table(
        model, source_layers=[1, 3], contexts=[4, 12], dim=4, new_tokens=3, repeats=2
    )


def test_every_setting_has_every_way(table):
    assert len(table) == 3 * 2 * 2 and set(table["way"]) == {way.label for way in costs.WAYS}
    assert (table[["timed_first", "timed_each", "cache"]] > 0).all().all()
    plain = table[table["way"] == costs.PLAIN.label]
    assert (
        (plain[["first_ratio", "each_ratio", "first_layers", "each_layers", "bound"]] == 1)
        .all()
        .all()
    )
    assert table[table["way"] == costs.TWO_PASSES.label]["bound"].tolist() == pytest.approx(
        [1.75, 1.75, 1.25, 1.25]
    )


def test_operations_are_those_of_the_model(table, llama):
    model, _ = llama
    ids = torch.arange(12)[None]
    plain = forward_flops(model, ids)
    wrapped = get_back_attention_model(model, BackAttentionConfig(1, 4))
    twice = forward_flops(wrapped, ids)
    wrapped.unload()
    at = table.set_index(["way", "source_layer", "context"])["first_flops"]
    once = 2 * model.config.hidden_size * model.config.vocab_size
    layers = table.set_index(["way", "source_layer", "context"])["first_layers"][
        costs.TWO_PASSES.label, 1, 12
    ]
    assert layers == pytest.approx((twice - once) / (plain - once)) and layers > 1.75
    assert (
        at[costs.PLAIN.label, 1, 12] == plain
        and at[costs.TWO_PASSES.label, 1, 12] == at[costs.ONE_PASS.label, 1, 12] == twice
    )


def test_one_pass_saves_the_second_run_of_the_layers(table, llama):
    """A new token: what the layers that run again do, and nothing else, is the difference."""
    each = table.set_index(["way", "source_layer", "context"])["each_flops"]
    width, heads, kv, head, ffn, context = 32, 4, 2, 8, 48, 12
    linear = width * heads * head * 2 + 2 * width * kv * head + 3 * width * ffn
    for layer in (1, 3):
        again = (4 - layer) * (2 * linear + 2 * 2 * heads * (context + 1) * head)
        states = 5 - layer
        own = 2 * 2 * states * 4  # the new token's own cells, which one pass does not read
        assert (
            each[costs.TWO_PASSES.label, layer, 12] - each[costs.ONE_PASS.label, layer, 12]
            == again + own
        )


def test_thought_is_what_fits_into_the_time(table):
    thought = costs.tokens_of_thought(table, answer=5).set_index(["way", "source_layer", "context"])
    by = table.set_index(["way", "source_layer", "context"])
    mine, plain = by.loc[(costs.TWO_PASSES.label, 1, 12)], by.loc[(costs.PLAIN.label, 1, 12)]
    longer = (
        mine["first_flops"]
        + 4 * mine["each_flops"]
        - plain["first_flops"]
        - 4 * plain["each_flops"]
    )
    assert thought.loc[(costs.TWO_PASSES.label, 1, 12), "thought"] == pytest.approx(
        longer / plain["each_flops"]
    )
    assert (
        thought.loc[costs.ONE_PASS.label, "thought"]
        < thought.loc[costs.TWO_PASSES.label, "thought"]
    ).all()


def test_answers_in_one_pass(kept, monkeypatch):
    run, store = kept
    store.keep(run, {"run": {}, "right": "1" * 8}, store.weights(run))
    seen = []
    monkeypatch.setattr(
        costs,
        "written",
        lambda model, *_: seen.append(model.one_pass) or torch.tensor([1, 0] * 4).numpy(),
    )
    answered = costs.one_pass_answers([run], store, count=8)
    assert seen == [False, True] and len(answered) == 8
    answered = answered.assign(one=[1.0, 1.0] * 4, difference=[0.0, 1.0] * 4)
    row = costs.one_pass_table(answered).iloc[0]
    assert (row["two"], row["one"], row["difference"], row["n"], row["seeds"]) == (
        0.5,
        1,
        0.5,
        8,
        1,
    )
    assert row["low"] <= 0.5 <= row["high"]


def test_measured_times_are_not_compared(tmp_path, table):
    tables.save(table, tmp_path / "one", "t")
    tables.save(table.assign(timed_first=9.0), tmp_path / "two", "t")
    tables.save(table.assign(first_flops=1), tmp_path / "three", "t")
    assert tables.compare(tmp_path / "two", tmp_path / "one") == []
    assert len(tables.compare(tmp_path / "three", tmp_path / "one")) == 1


@pytest.mark.parametrize(
    "first, each, verdict",
    [(1.8, 1.75, "reproduced"), (1.8, 1.6, "partly"), (2.2, 1.3, "contradicted")],
)
def test_q3_follows_its_rule(first, each, verdict):
    ways = [
        (costs.PLAIN.label, 1.0, 1.0, 1.0),
        (costs.TWO_PASSES.label, first, each, 1.8),
        (costs.ONE_PASS.label, first, 1.0, 1.8),
    ]
    table = pd.DataFrame(ways, columns=["way", "first_layers", "each_layers", "bound"])
    table = table.assign(source_layer=6, context=64, first_ratio=1.7, each_ratio=1.5)
    answered = pd.DataFrame(
        [{"dataset": "1DC", "difference": -0.01, "low": -0.03, "high": 0.01, "n": 90, "seeds": 3}]
    )
    assert costs_as_computed(table, answered)["verdict"] == verdict
