"""The memory switch: what the page shows is what the adapter says with each memory."""

import json
import re

import numpy as np
import pytest
from matplotlib import pyplot as plt

from backattn import load_model, logit_flow
from backattn.models.tokens import continuation_ids
from companion.measures.memory import PLACES
from companion.report import moving
from companion.runs.as_asked import asked
from companion.runs.perform import load_trained
from companion.runs.store import Store
from companion.studies import demo_memory_switch as demo


def shown(kept, monkeypatch):
    run, store = kept
    monkeypatch.setattr(demo, "Store", lambda: store)
    monkeypatch.setitem(demo.SETS, run.dataset, "a kind")
    return demo.memory_switch([run], count=3)


@pytest.fixture
def records(kept, monkeypatch):
    monkeypatch.setattr(demo, "_of_one_token", lambda _, frame: np.arange(len(frame)))
    return shown(kept, monkeypatch)


def test_probabilities_are_those_with_each_memory(records, probe):
    memories = {"own": None, "another": probe.exchanged(), "mean": probe.averaged()}
    logits = {key: probe.logits(memory=memory) for key, memory in memories.items()}
    logits["off"] = probe.logits(probe.block(PLACES), PLACES)
    changed = 0
    for record in records:
        row = probe.frame["two_hop"].tolist().index(record["prompt"])
        for place, key in enumerate(demo.MEMORIES):
            p = logits[key][row].softmax(-1)
            said = np.array(record["probabilities"])[:, place]
            assert record["words"][said.argmax()] == probe.tokenizer.decode([int(p.argmax())])
            assert said.max() == pytest.approx(p.max().item(), abs=1e-4)
            changed += said.tolist() != [one[0] for one in record["probabilities"]]
    assert len(records) == 3 and changed  # a memory matters


def test_the_flow_is_the_plain_models(records):
    model, tokenizer = load_model("tiny-llama")
    for record in records:
        layers, tokens = model.config.num_hidden_layers, len(record["tokens"])
        assert "".join(record["tokens"]).split() == record["prompt"].split()
        assert {np.shape(grid) for grid in record["flow"].values()} == {(tokens, layers)}
        assert np.shape(record["reads"]) == (tokens, len(record["memory_layers"]))
        assert np.sum(record["reads"]) == pytest.approx(1, abs=0.05)
        assert record["sink"]
        first = continuation_ids(tokenizer, record["e3"])[0]
        last = {name: steps[-1] for name, steps in record["running"].items()}
        own = logit_flow(model, tokenizer, record["prompt"], [first], "layer").log_prob[0]
        assert last["e3"] == pytest.approx(own, abs=0.02)


def test_the_table_names_who_is_said_and_the_figure_has_every_answer(records):
    table = demo.switch_table(records)
    assert list(table["memory"]) == list(demo.MEMORIES) * 3
    assert not table.loc[table["memory"] == "own", "changed"].any()
    words = {"words": [" Paris", " France", " Lyon", " Rome"], "right": [True, False, False, False]}
    record = records[0] | words | {"e1": "Lyon", "e2": "France", "probabilities": np.eye(4)}
    assert list(demo.switch_table([record])["names"]) == ["e3", "e2", "e1", "other"]
    assert list(demo.switch_table([record])["changed"]) == [False, True, True, True]
    figure = demo.switch_figure(table)
    assert sum(len(line.get_xdata()) for line in figure.axes[0].lines) == len(table)
    plt.close(figure)


def test_invented_facts_are_asked_as_the_others_are():
    runs = demo.switched_runs()
    assert [run.dataset for run in runs] == list(demo.SETS)
    (record, *_) = demo.memory_switch(runs[-1:], count=2)
    assert record["tokens"] == [record["e1"], *record["prompt"].split()[1:]]
    assert record["second"] == f"{record['e2']} {record['tokens'][-1]}"
    assert not record["sink"]  # the first token is e1
    with load_trained(runs[-1], Store(), "cpu") as (wrapped, tokenizer):
        ids = tokenizer(record["prompt"], return_tensors="pt")["input_ids"]
        own = wrapped(ids, use_cache=False).logits[0, -1].softmax(-1)
    told = {word: p[0] for word, p in zip(record["words"], record["probabilities"], strict=True)}
    assert told[record["e3"]] == pytest.approx(
        own[tokenizer.encode(record["e3"])[0]].item(), abs=1e-4
    )
    assert max(told.values()) == pytest.approx(own.max().item(), abs=1e-4)


def test_words_of_several_tokens_are_not_shown(kept, monkeypatch):
    tokenizer, [run, _] = load_model("tiny-llama")[1], kept
    frame = asked(run, "test")
    assert set(demo._of_one_token(tokenizer, frame)) <= set(range(len(frame)))
    monkeypatch.setattr(demo, "_of_one_token", lambda *_: np.empty(0, int))
    with pytest.raises(ValueError, match="one token each"):
        shown(kept, monkeypatch)


def test_the_page_holds_everything_and_is_the_same_again(records):
    records[0]["prompt"] = "</script><b>Ann"
    page = moving.page(records, demo.MEMORIES, demo.SETS, "A & B")
    assert page == moving.page(records, demo.MEMORIES, demo.SETS, "A & B")
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="?http', page)
    data = page.partition('id="records">')[2].partition("</script>")[0]
    read = json.loads(data)
    assert [one["prompt"] for one in read] == [one["prompt"] for one in records]
    grid = np.array(read[1]["flow"]["ffn"]) / 100
    assert np.allclose(grid, records[1]["flow"]["ffn"], atol=0.006)
    assert "<b>Ann" not in page.replace(data, "") and "A &amp; B" in page
    for label in demo.MEMORIES.values():
        assert label.replace("'", "&#39;") in page
