"""Which tokens of a sum stand for what, what back attention costs, and the rules of Q2, Q3, N1."""

import pandas as pd
import pytest
import torch
from ledger_rows import held

from backattn.adapters.back_attention import get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from companion.report import tables
from companion.runs.perform import forward_flops
from companion.runs.run import Run
from companion.runs.scratch import scratch_model
from companion.studies import other_reasoning_and_cost as study
from companion.studies.other_reasoning_and_cost import ONE_PASS, PLAIN, TWO_PASSES


def test_tokens_of_a_sum(smollm2):
    tokenizer, prompt = smollm2[1], "2 - 1 = 1. 5 + 4 = "
    frame = pd.DataFrame([{"prompt": prompt, "start": 11, "operator": "+"}])
    tokens, (labels,) = tokenizer(prompt)["input_ids"], study.sum_labels(tokenizer, frame)
    words = pd.Series([tokenizer.decode([token]).strip() for token in tokens]).groupby(labels)
    said = words.agg(list)
    assert (said["entity"], said["relation"], said["last"]) == (["5", "4"], ["+"], [""])
    frame = pd.DataFrame([{"prompt": "07-83=-07", "start": 0, "operator": "-"}])
    expected = "entity entity relation entity entity context context context last"
    _, tokenizer = scratch_model(Run("2-digit", "1 layer", 0, model="scratch", width=40))
    assert study.sum_labels(tokenizer, frame)[0].tolist() == expected.split()


@pytest.fixture(scope="module")
def costs(llama):
    return study.cost_table(llama[0], [1, 3], contexts=[4, 12], dim=4, repeats=1)


@pytest.fixture
def by(costs):
    return costs.set_index(["way", "source_layer", "context"]).sort_index()


def test_every_setting_has_every_way(costs, by):
    assert len(costs) == 3 * 2 * 2 and set(costs["way"]) == set(study.WAYS)
    assert (costs[["timed_first", "timed_each", "cache"]] > 0).all(axis=None)
    ones = ["first_ratio", "each_ratio", "first_layers", "each_layers", "bound"]
    assert (by.loc[PLAIN, ones] == 1).all(axis=None)
    assert by.loc[TWO_PASSES, "bound"].tolist() == pytest.approx([1.75, 1.75, 1.25, 1.25])


def test_operations_are_those_of_the_model(by, llama):
    model, ids = llama[0], torch.arange(12)[None]
    plain = forward_flops(model, ids)
    wrapped = get_back_attention_model(model, BackAttentionConfig(1, 4))
    twice = forward_flops(wrapped, ids)
    wrapped.one_pass = True  # a prompt has two passes all the same
    assert forward_flops(wrapped, ids) == twice
    wrapped.unload()
    first = by.xs((1, 12), level=["source_layer", "context"])["first_flops"]
    assert first[[PLAIN, TWO_PASSES, ONE_PASS]].tolist() == [plain, twice, twice]
    once = 2 * model.config.hidden_size * model.config.vocab_size
    layers = by.loc[(TWO_PASSES, 1, 12), "first_layers"]
    assert layers == pytest.approx((twice - once) / (plain - once)) and layers > 1.75


@pytest.mark.parametrize("layer", [1, 3])
def test_one_pass_saves_the_second_run_of_the_layers(by, layer):
    """A new token: what the layers that run again do, and nothing else, is the difference."""
    width, heads, kv, head, ffn, context = 32, 4, 2, 8, 48, 12
    linear = width * heads * head * 2 + 2 * width * kv * head + 3 * width * ffn
    again = (4 - layer) * (2 * linear + 2 * 2 * heads * (context + 1) * head)
    unread = 2 * 2 * (5 - layer) * 4  # the new token's own cells, which one pass does not read
    two, one = (by.loc[(way, layer, context), "each_flops"] for way in (TWO_PASSES, ONE_PASS))
    assert two - one == again + unread


def test_measured_times_are_not_compared(tmp_path, costs):
    tables.save(costs, tmp_path / "one", "t")
    for column, differences in (("timed_first", 0), ("first_flops", 1)):
        tables.save(costs.assign(**{column: 9.0}), tmp_path / column, "t")
        assert len(tables.compare(tmp_path / column, tmp_path / "one")) == differences


@pytest.mark.parametrize(
    "first, each, verdict",
    [(1.8, 1.75, "all"), (1.8, 1.6, "some"), (2.2, 1.3, "none")],
)
def test_q3_follows_its_rule(first, each, verdict):
    ways = [(PLAIN, 1.0, 1.0), (TWO_PASSES, first, each), (ONE_PASS, first, 1.0)]
    table = pd.DataFrame(ways, columns=["way", "first_layers", "each_layers"])
    table = table.assign(bound=1.8, source_layer=6, context=64, first_ratio=1.7, each_ratio=1.5)
    row = {"dataset": "1DC", "difference": -0.01, "low": -0.03, "high": 0.01, "n": 90, "seeds": 3}
    assert held(study.costs_as_computed(table, pd.DataFrame([row]))) == verdict


def stages_of(gaps, needed, behind) -> tuple[dict, pd.DataFrame]:
    order = pd.DataFrame(gaps, columns=["low", "high"]).assign(gap=0.0, step=True)
    order = order.assign(earlier=list("ABC"), later=list("BCD"))
    knockouts = pd.DataFrame({"stage": list("ABCD"), "needed": needed, "n": 8, "draws": 9})
    ends = (-0.3, -0.2, -0.1) if behind else (0.1, -0.3, 0.5)
    names = ["difference", "difference_low", "difference_high"]
    return {"one": (order, 9)}, knockouts.assign(**dict(zip(names, ends, strict=True)))


AFTER, LEVEL, BEFORE = (1, 2), (0.1, 0.3), (-2, -1)
ALL, NONE = [True] * 4, [False] * 4


@pytest.mark.parametrize(
    "gaps, needed, behind, verdict",
    [
        ([AFTER, AFTER, AFTER], ALL, False, "all"),
        ([AFTER, AFTER, AFTER], [True, True, False, True], False, "some"),
        ([AFTER, BEFORE, AFTER], NONE, False, "some"),
        ([LEVEL, LEVEL, LEVEL], NONE, False, "none"),
        ([(-1, 2), BEFORE, BEFORE], NONE, True, "none"),
        ([BEFORE, BEFORE, BEFORE], NONE, False, "none"),
        ([BEFORE, BEFORE, BEFORE], NONE, True, "none"),
    ],
)
def test_q2_follows_its_rule(gaps, needed, behind, verdict):
    models, knockouts = stages_of(gaps, needed, behind)
    claim = study.arithmetic_has_stages(models, knockouts)
    assert held(claim) == verdict
    assert "n = 9" in claim["ours"] and "9 random sets" in claim["ours"]
    with pytest.raises(ValueError, match="stages A to D"):
        study.arithmetic_has_stages(models, knockouts.head(3))


def test_n1_says_how_many_questions_each_dataset_has():
    rows = [(data, other) for data in ("two-hop", "all") for other in ("zero-shot", "few-shot")]
    table = pd.DataFrame(rows, columns=["dataset", "other"])
    row = study.other_prompts_too(table.assign(difference=0.2, low=0.1, high=0.3, n=50), [])
    assert (row["id"], held(row)) == ("N1", "all")
    assert "n = 50 (two-hop)" in row["ours"]
