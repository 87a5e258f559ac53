"""Another memory, and whom answers name: on a tiny model whose module is made to matter."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from ledger_rows import held

from backattn.adapters.back_attention import get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from companion.measures.memory import MemoryProbes, high_layers
from companion.questions.asking import OUTCOMES
from companion.questions.datasets import TWO_HOP_KEYS, load
from companion.runs.as_asked import asked
from companion.runs.perform import load_trained, trained_weights, with_adapter
from companion.studies import controls as study


def test_memory_of_another_text_is_read(llama):
    model, _ = llama
    wrapped = get_back_attention_model(model, BackAttentionConfig(1, 4))
    for p in wrapped.updates.parameters():
        torch.nn.init.normal_(p, std=0.3)
    one, two = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 9, 10, 8]])
    about = torch.ones_like(one), torch.arange(4)[None]
    with torch.no_grad():
        states = [wrapped.first_pass_states(ids, *about) for ids in (one, two)]
        plain = wrapped(one, use_cache=False).logits
        with wrapped.edited(memory=states[0]):
            assert torch.allclose(wrapped(one, use_cache=False).logits, plain, atol=1e-5)
        with wrapped.edited(memory=states[1]):
            other = wrapped(one, use_cache=False).logits
        # By hand: the source layer's update from the other's keys, then the layers once more.
        update, h = wrapped.updates["1"], states[0][0]
        visible = torch.ones(1, 4, 4, dtype=torch.bool).tril()
        h = h + update(h, *update.remember(states[1]), visible)
        wrapped.enabled = False
        layer = model.model.layers[1]
        handle = layer.register_forward_pre_hook(lambda module, args: (h, *args[1:]))
        by_hand = model(one, use_cache=False).logits
        handle.remove()
    wrapped.unload()
    assert torch.allclose(other, by_hand, atol=1e-4) and (other - plain).abs().max() > 1e-3


def test_memory_of_another_shape_is_refused(llama):
    wrapped = get_back_attention_model(llama[0], BackAttentionConfig(1, 4))
    memory, cells = torch.zeros(4, 1, 3, 32), torch.ones(1, 1, 4, 3, dtype=torch.bool)
    for edit, length, use_cache, message in (
        ({"memory": memory[1:]}, 3, False, "4 memory layers"),
        ({"memory": memory}, 3, True, "use_cache=False"),
        ({"memory": memory}, 2, False, "this pass has"),
        ({"cells": cells}, 2, False, "this pass has"),
    ):
        with pytest.raises(ValueError, match=message), wrapped.edited(**edit):
            wrapped(torch.ones(1, length, dtype=torch.long), use_cache=use_cache)
    wrapped.unload()


def test_every_edit_is_what_it_says(probe):
    made = study.memory_tests([probe], load("facts"))
    log_prob = made.pivot(index="question", columns="key", values="log_prob")
    trained = probe.ask()[0]
    assert np.allclose(log_prob["trained"], trained)
    assert np.allclose(probe.ask(memory=probe.states())[0], trained, atol=1e-5)
    probe.wrapped.enabled = False
    with torch.no_grad():
        logits = probe.wrapped(torch.tensor([probe.items.prompts[0]]), use_cache=False).logits
    plain = logits[0, -1].log_softmax(-1)[probe.items.answers[0][0]].item()
    assert log_prob["off"][0] == pytest.approx(plain, abs=1e-4)
    assert np.allclose(made["type"] + made["choice"], made["log_prob"], atol=1e-5)
    edits = log_prob.drop(columns=["trained", "off"])
    assert edits.shape[1] == 12
    assert (edits.sub(log_prob["trained"], axis=0).abs().max() > 1e-3).all()


def test_other_ways_are_asked_the_same_questions(kept):
    run, store = kept
    zero = dataclasses.replace(run, arm="zero-shot", learning_rate=0.0, steps=0)
    ways = study.other_ways([zero, run], store, load("facts"), count=5)
    assert set(ways["key"]) == {"zero-shot", "hop by hop", "back attention"}
    made = study.memory_tests(MemoryProbes([run], store, 5), load("facts"))
    for key, same in (("zero-shot", "off"), ("back attention", "trained")):
        pair = [x[x["key"] == k] for x, k in ((ways, key), (made, same))]
        for value in ("log_prob", "type", "choice", "right", "closed"):
            assert np.allclose(*(x[value] for x in pair), atol=1e-4)
        assert pair[0]["seen"].tolist() == pair[1]["seen"].tolist()


def test_edits_leave_to_be_read_what_they_name(probe):
    """What the first question's queries may read, by the name of the edit: cells [T, M, T]."""
    labels, layers = probe.labels[0], np.array(probe.memory_layers)  # 1 … 4
    visible = {}
    for key, _, edit in study.memory_edits(probe):
        visible[key] = np.ones((len(labels), len(layers), len(labels)), dtype=bool)
        if "hidden" in edit:
            affected = np.isin(labels, edit["queries"])[:, None, None]
            visible[key] &= ~(affected & edit["hidden"][0])
    everywhere = np.ones((len(labels), len(layers), 1), dtype=bool)
    for place in ("r1", "e1"):
        assert (visible[f"{place} hidden"] == (everywhere & (labels != place))).all()
        route, high = visible[f"{place} route"], np.isin(layers, high_layers(4))
        assert not route[:-1].any() and (route[-1] == high[:, None] & (labels == place)).all()
    assert (visible["only r1"] == (everywhere & (labels == "r1"))).all()
    low = np.isin(layers, (1, 2))[:, None] & np.ones(len(labels), dtype=bool)
    assert (visible["third low"] == low).all()
    assert not visible["last reads"][:-1].any() and visible["last reads"][-1].all()
    assert visible["trained"].all() and not visible["off"].any()


def test_one_memory_layer_has_no_layers_to_choose_from(kept):
    run, store = kept
    own = dataclasses.replace(run, arm="same layer")
    with with_adapter(own, "float32") as (model, _):
        for p in model.updates.parameters():
            torch.nn.init.normal_(p, std=0.3)
        store.keep(own, {"run": {}}, trained_weights(model))
    assert study.memory_tests(MemoryProbes([own], store), load("facts"))["test"].nunique() == 8


def of_tests(log_probs: dict[str, list[float]]) -> pd.DataFrame:
    """`memory_tests` about six bridge entities."""
    whole = pd.DataFrame(log_probs).assign(seed=0, alike=lambda table: table.index % 2 == 0)
    whole["e2"] = "e" + (whole.index % 6).astype(str)
    about = ["question", "seed", "e2", "alike"]
    made = whole.rename_axis("question").reset_index().melt(about, None, "key", "log_prob")
    return made.assign(test=made["key"].str.upper(), right=1.0)


def test_kept_is_a_share_of_the_gain():
    draw = np.random.default_rng(0)
    off, gain = draw.normal(-4, 0.1, 24), draw.uniform(1, 3, 24)
    tests = {"trained": off + gain, "off": off, "half": off + gain / 2}
    tests["all"] = off + gain + draw.normal(0, 1e-3, 24)
    table = study.memory_table(of_tests(tests))
    assert table.loc["half", ["kept", "low", "high"]].to_list() == pytest.approx([0.5] * 3)
    assert table.loc["all", "kept"] == pytest.approx(1, abs=0.01)
    assert np.isnan(table.loc["off", "p"]) and table.loc["all", "alike"] == 0.5
    # Six names, all lower: the smallest p of a two-sided signed rank test, twice for two tests.
    assert table.loc["half", "p"] == pytest.approx(2 * 2 / 2**6)
    assert table.loc["all", "p"] > table.loc["half", "p"]
    with pytest.raises(ValueError, match="no share"):
        study.memory_table(of_tests({"trained": off, "off": off}))


def test_transitions_follow_the_model(kept):
    run, store = kept
    made = study.transitions([run], store)
    assert len(made) == 8 and set(made["before"]) | set(made["after"]) <= set(OUTCOMES)
    with load_trained(run, store) as (model, tokenizer), torch.no_grad():
        for row, fact in zip(made.itertuples(), asked(run, "test").itertuples(), strict=True):
            ids = tokenizer(fact.prompt, return_tensors="pt")["input_ids"]
            said = tokenizer.decode(model(ids, use_cache=False).logits[0, -1].argmax())
            e2, e3 = (
                tokenizer.decode(tokenizer(f" {name}")["input_ids"][:1])
                for name in (fact.e2, fact.e3)
            )
            assert (row.after == "e3") == (said == e3) and (row.after != "e2" or said == e2)


def named(arm: str, before: str, after: str) -> pd.DataFrame:
    """One letter per question: 3 (e3), 2 (e2), o (other)."""
    names = {"3": "e3", "2": "e2", "o": "other"}
    table = pd.DataFrame({"before": [*before], "right": [letter == "3" for letter in after]})
    table = table.replace({"before": names}).assign(arm=arm, seed=0, question=table.index)
    return table.assign(pair="one", e2="b" + (table.index % 5).astype(str))


def test_repaired_failures_are_compared():
    before = "2222222222oooooooooo3"
    made = pd.concat(
        [
            named("back attention", before, "33333333222222223333o"),
            named("same layer", before, "3333222222oooooooooo3"),
        ]
    )
    more = study.repaired_differences(made).set_index("more")
    assert more.loc["than other failures", ["difference", "n"]].tolist() == pytest.approx([0.4, 10])
    assert more.loc["than same layer", ["difference", "n"]].tolist() == pytest.approx([0.4, 10])
    assert (more["low"] <= more["difference"]).all()
    # Within pairs: "two" has no failure that says e2.
    split = made.assign(pair=np.where(made["question"] < 15, "one", "two"))
    within = study.repaired_differences(split).set_index("more").loc["than other failures"]
    assert within["difference"] == pytest.approx(0.8 - made["right"][:20][10:15].mean())
    with pytest.raises(ValueError, match="same questions"):
        study.repaired_differences(made[(made["arm"] != "same layer") | (made["question"] > 3)])
    with pytest.raises(ValueError, match="no pair"):
        study.repaired_differences(made[made["before"] != "e2"])


def less(low: float, high: float, **more) -> dict:
    return {"difference": (low + high) / 2, "low": low, "high": high, "n": 9, **more}


@pytest.mark.parametrize(
    "ends, verdict",
    [
        ([(0.01, 0.1), (0.02, 0.1)], "all"),
        ([(0.01, 0.1), (-0.02, 0.1)], "some"),
        ([(-0.1, 0.1), (-0.2, -0.1)], "none"),
        ([(-0.1, -0.05), (-0.2, -0.1)], "none"),
    ],
)
def test_q1_follows_its_rule(ends, verdict):
    table = pd.DataFrame([less(*end, sources=str(k)) for k, end in enumerate(ends)])
    claim = study.several_layers_help(table.assign(accuracy=0.4), table, table)
    assert held(claim) == verdict


@pytest.mark.parametrize(
    "other, same, verdict",
    [
        ((0.1, 0.3), (0.1, 0.3), "all"),
        ((0.1, 0.3), (-0.1, 0.3), "some"),
        ((-0.1, 0.3), (-0.1, 0.3), "none"),
        ((-0.3, -0.1), (-0.3, -0.1), "none"),
    ],
)
def test_n2_follows_its_rule(other, same, verdict):
    repaired = less(0, 1, arm="back attention", before="e2", share=0.5, names=4)
    rows = [less(*other, more="than other failures"), less(*same, more="than same layer")]
    claim = study.bridge_failures_repaired(pd.DataFrame([repaired]), pd.DataFrame(rows))
    assert held(claim) == verdict


def kept_rows(**ends) -> pd.DataFrame:
    keys = ["same relations", "mean", "r1 route", "e1 route", "r1 hidden", "e1 hidden", "only r1"]
    table = pd.DataFrame({"test": [key.upper() for key in keys], "kept": 0.5, "n": 9}, index=keys)
    table = table.assign(low=0.4, high=0.6)
    for key, (low, high) in ends.items():
        table.loc[key.replace("_", " "), ["low", "high"]] = low, high
    return table


@pytest.mark.parametrize(
    "route, hidden, verdict",
    [
        ((0.6, 0.9), (0.2, 0.8), "all"),
        ((0.6, 0.9), (0.8, 1.0), "some"),
        ((0.4, 0.9), (0.95, 1.0), "none"),
        ((0.1, 0.4), (0.95, 1.0), "none"),
    ],
)
def test_n3_follows_its_rule(route, hidden, verdict):
    def claim(**more):
        ends = {"r1_route": route, "e1_route": (0.1, 0.3), "r1_hidden": hidden}
        table = kept_rows(**{**ends, "e1_hidden": (0.9, 1), **more})
        return study.high_states_of_r1_matter({"one": table})

    assert held(claim()) == verdict
    assert "one: R1 ROUTE" in claim()["ours"] and "E1 HIDDEN" in claim()["ours"]
    if verdict == "all":  # what holds of e1 too is not r1's
        assert held(claim(e1_hidden=hidden)) == held(claim(e1_route=route)) == "some"


@pytest.mark.parametrize(
    "same, mean, own, closed, verdict",
    [
        ((0.1, 0.3), (0.1, 0.4), (0.01, 0.1), (0.05, 0.2), "none"),
        ((0.1, 0.3), (0.1, 0.4), (0.01, 0.1), (0.0, 0.01), "some"),
        ((0.1, 0.3), (0.6, 0.9), (-0.01, 0.1), (0.0, 0.2), "some"),
        ((0.6, 0.9), (0.6, 0.9), (-0.01, 0.03), (-0.01, 0.01), "some"),
        ((0.6, 0.9), (0.6, 0.9), (-0.01, 0.01), (-0.01, 0.03), "some"),
        ((0.6, 0.9), (0.6, 0.9), (-0.01, 0.01), (-0.01, 0.01), "all"),
    ],
)
def test_b3_follows_its_rule(same, mean, own, closed, verdict):
    difference = pd.DataFrame([less(*own, other="same layer", dataset="all", names=8)])
    models = {"one": kept_rows(same_relations=same, mean=mean)}
    lost = less(*closed, value="closed", mean=0.0, low_90=closed[0], high_90=closed[1])
    control = kept_rows(mean=(0.7, 0.8))
    claim = study.gain_is_training(models, control, difference, pd.DataFrame([lost]))
    assert held(claim) == verdict
    assert "own layer: SAME" in claim["ours"] and "[70%, 80%]" in claim["ours"]


@pytest.mark.parametrize(
    "own, hidden, verdict",
    [
        ((-0.3, -0.1), (0.95, 1.0), "all"),
        ((-0.1, 0.3), (0.95, 1.0), "some"),
        ((-0.1, 0.3), (0.2, 0.8), "none"),
        ((0.1, 0.3), (0.2, 0.8), "none"),
    ],
)
def test_b4_follows_its_rule(own, hidden, verdict):
    row = {"place": "r1", "how": "oracle", "mean": 0.0, "low": own[0], "high": own[1]}
    claim = study.r1_is_irrelevant(pd.DataFrame([row]), {"one": kept_rows(r1_hidden=hidden)})
    assert held(claim) == verdict


def test_gains_are_compared_within_pairs_of_relations():
    """Pair "b" is left out: too few unknown. Of "a" and "c" each counts half, however many
    questions it has."""

    def rows(pair, before, after):
        table = named("back attention", before, after).assign(pair=pair, collides=False)
        return table.assign(e2=pair + table["e2"])

    known = pd.concat(
        [
            rows("a", "o" * 40, "3" * 40),
            rows("b", "o" * 20, "3" * 20),
            rows("c", "o" * 10, "o" * 10),
        ]
    )
    parts = [rows("a", "3" * 10, "o" * 10), rows("b", "oo", "33"), rows("c", "o" * 30, "3" * 30)]
    unknown = pd.concat([rows("c", "o", "o").assign(collides=True), *parts])
    table = study.knowledge_table(known, unknown).set_index("questions")
    assert table["pairs"].tolist() == [2] * 3 and table["n"].tolist() == [50, 40, 90]
    means = table[["before", "after", "gain"]]
    assert means.loc["known"].tolist() == pytest.approx([0, 0.5, 0.5])
    assert means.loc["unknown"].tolist() == pytest.approx([0.5, 0.5, 0])
    assert means.loc["known less unknown", "gain"] == pytest.approx(0.5)
    assert (table["low"] <= table["gain"]).all()
    with pytest.raises(ValueError, match="ask more"):
        study.knowledge_table(known, unknown, least=50)


@pytest.mark.parametrize(
    "more, unknown, verdict",
    [
        ((0.1, 0.3), (-0.01, 0.01), "all"),
        ((0.1, 0.3), (-0.01, 0.1), "some"),
        ((-0.1, 0.3), (-0.01, 0.1), "none"),
        ((-0.2, -0.1), (0.1, 0.2), "none"),
    ],
)
def test_b5_follows_its_rule(more, unknown, verdict):
    ends = {"known": (0.1, 0.3), "unknown": unknown, "known less unknown": more}
    rows = [less(*end, questions=name, gain=0.1) for name, end in ends.items()]
    table = pd.DataFrame(rows).assign(before=0.1, after=0.2, pairs=3)
    assert held(study.no_knowledge_no_gain(table)) == verdict


def test_known_and_unknown_facts_are_apart():
    known, unknown = (load(name) for name in ("two-hop", "two-hop, unknown"))
    keys = [set(map(tuple, frame[TWO_HOP_KEYS].to_numpy())) for frame in (known, unknown)]
    assert not keys[0] & keys[1] and unknown.groupby("pair").size().max() == 100
    assert not unknown["tested"].all() and list(known.columns) == list(unknown.columns)
