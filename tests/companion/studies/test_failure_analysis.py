"""Notebook 02: the census, the conflict inside, back-patching, and the verdicts on C3 to C6 and
B2."""

import numpy as np
import pandas as pd
import pytest

from companion.measures.two_hop import PLACES, read_conflict
from companion.questions.asking import OUTCOMES, candidates
from companion.questions.facts import two_hop_facts
from companion.questions.prompts import TEMPLATES, two_hop_prompts
from companion.studies.failure_analysis import census, conflict, patching_grid

FACTS = pd.DataFrame(
    [
        ("Milan", "Italy", "Rome"),
        ("Lyon", "France", "Paris"),
        ("Munich", "Germany", "Berlin"),
        ("Osaka", "Japan", "Tokyo"),
        ("Bergen", "Norway", "Oslo"),
        ("Nice", "France", "Paris"),
    ],
    columns=["e1", "e2", "e3"],
).assign(pair="x", r1="country", r2="capital", shortcut="", e2_aliases="", e3_aliases="")


@pytest.fixture(scope="module")
def asked(llama):
    return candidates(llama[1], two_hop_prompts(FACTS))


# ---------------------------------------------------------------- census


def test_what_is_written_is_matched_by_words_and_aliases():
    row = next(FACTS.assign(e3_aliases="Urbs Aeterna", shortcut="Milano").head(1).itertuples())
    texts = {
        "the Urbs Aeterna": "e3",
        "Romeo": "other",
        "Italy, whose capital is Rome": "e2",
        "Milano": "shortcut",
    }
    assert {text: census._named(text, row) for text in texts} == texts


def test_generation_names_somebody_or_other(llama, asked):
    assert set(census.generated(*llama, asked, new_tokens=3)["named"]) <= set(OUTCOMES)


def test_shares_add_up_and_an_empty_set_is_an_error():
    frame = pd.DataFrame({"outcome": ["e3", "e2", "e2", "other"], "by": list("aaab")})
    table = census.shares(frame).set_index("outcome")
    assert table["share"].sum() == 1 and table.loc["e2", "count"] == 2
    assert table["share"].between(table["low"], table["high"]).all()
    by = census.shares(frame, ["by"], least=2)
    assert set(by["by"]) == {"a"} and by["n"].eq(3).all() and len(by) == len(OUTCOMES)
    with pytest.raises(ValueError, match="analysis set is empty"):
        census.shares(frame.head(0))


def test_the_filter_asks_step_by_step(asked, monkeypatch):
    """A stand-in knows some answers: every step asks only what the one before let through."""
    frame, asked_of = asked.head(4).assign(collides=False), []
    knows = {
        "first": [True, True, True, False],
        "second": [True, True, False, True],
        "shortcut_prompt": [False, True] * 2,
    }

    def ask(model, tokenizer, prompts, keys):
        form = next(form for form in knows if set(prompts) <= set(frame[form]))
        asked_of.append((form, len(prompts)))
        names = frame["e2_ids" if form == "first" else "e3_ids"]
        rows = [frame[form].tolist().index(prompt) for prompt in prompts]
        return np.array([min(names[row]) if knows[form][row] else -5 for row in rows]), None

    monkeypatch.setattr("companion.studies.failure_analysis.census.ask", ask)
    found = census.hops(None, None, frame)
    assert found["knows_first"].tolist() == [True, True, True, False]
    assert found["known"].tolist() == [True, True, False, False]
    assert found["kept"].tolist() == [True, False, False, False]
    assert asked_of == [("first", 4), ("second", 3), ("shortcut_prompt", 2)]
    table = census.filter_table(found).set_index("pair")
    assert table.loc["all"].tolist() == table.loc["x"].tolist() == [4, 4, 3, 2, 1]
    with pytest.raises(ValueError, match="No fact is left to ask for 'first'"):
        census.hops(None, None, frame.assign(collides=True))


def test_the_order_of_facts_stays_when_one_goes():
    facts = two_hop_facts().head(50)
    whole, less = census.shuffled(facts), census.shuffled(facts.drop(index=7))
    assert whole["e1"].tolist() != facts["e1"].tolist()
    gone = facts.loc[7, ["pair", "e1"]].tolist()
    left = whole[(whole[["pair", "e1"]] != gone).any(axis=1)].reset_index(drop=True)
    assert left.equals(less)


def test_the_lead_of_e2_is_over_failures():
    outcomes = ["e2"] * 6 + ["e1"] * 2 + ["other"] * 2
    frame = pd.DataFrame({"w": "x", "outcome": outcomes, "e2": range(10)})
    row = census.bridge_lead(frame, "w").iloc[0]
    assert (row["share"], round(row["lead"], 9), row["n"]) == (0.6, 0.4, 10)
    assert row["lead_low"] < 0.4 < row["lead_high"]


# ---------------------------------------------------------------- the conflict inside


def test_r1_is_the_same_and_the_last_position_is_not(llama, asked):
    table = conflict.causality(*llama, asked, batch_size=2)
    assert table["r1"].max() < 1e-4 < table["last"].max()


def test_a_leak_from_the_future_would_be_seen(llama, asked, monkeypatch):
    """Were attention not causal, r1's states would differ, and C5 would say so."""
    module = type(llama[0].model)
    original = module.forward

    def open_mask(self, *args, attention_mask=None, **kwargs):
        time = kwargs["input_ids"].shape[1]
        mask = attention_mask.new_zeros(len(attention_mask), 1, time, time).float()
        return original(self, *args, attention_mask=mask, **kwargs)

    monkeypatch.setattr(module, "forward", open_mask)
    table = conflict.causality(*llama, asked)
    assert table["r1"].max() > 1e-4
    assert conflict.same_states(table, len(asked))["verdict"] == "contradicted"


def test_readings_and_flows_have_their_shapes(smollm2):
    model, tokenizer = smollm2
    asked = candidates(tokenizer, two_hop_prompts(FACTS))
    states, n = model.config.num_hidden_layers + 1, len(asked)
    reading = read_conflict(model, tokenizer, asked)
    assert reading.difference.shape == (n, len(PLACES), states)
    assert set(reading.wins) == {"e3", "e2"} and reading.readable["e2"].dtype == bool
    asked["outcome"] = ["e3", "e2"] * (n // 2)
    table = conflict.conflict_table(reading, asked)
    assert len(table) == 2 * len(PLACES) * states and table["p"].between(0, 1).all()
    assert len(conflict.readable_table(reading)) == 2 * len(PLACES) * states
    assert len(conflict.first_readable(reading, asked)) == 2 * len(PLACES)
    flow = conflict.flows(model, tokenizer, asked)
    tests = conflict.flow_tests(flow, asked, permutations=20)
    assert tests["holds"].dtype == bool and len(tests) == 3
    assert len(conflict.flow_bands(flow, asked)) == 2 * 2 * 2 * (states - 1)
    windows = conflict.hide_windows(model, tokenizer, asked, width=15)
    assert len(windows) == 2 * 2 * 2 * 2


# ---------------------------------------------------------------- back-patching


def answered(right) -> pd.DataFrame:
    """Prompts of a bridge entity each, answered right or not."""
    outcomes = np.where(right, "e3", "e2")
    return pd.DataFrame({"outcome": outcomes, "e2": [f"e{i}" for i in range(len(outcomes))]})


def test_the_honest_pair_is_chosen_on_the_other_half():
    success, first = np.zeros((8, 3, 4), dtype=bool), np.arange(8) < 4
    success[:4, 0, 2] = True  # repairs the whole first half and nothing else
    success[4:6, 1, 3] = True  # repairs half of the second
    chosen, pairs = patching_grid.cross_fitted_choice(success, first)
    assert pairs == [(0, 2), (1, 3)]
    assert not chosen.any()  # neither pair helps the half on which it was not chosen
    nothing = patching_grid.cross_fitted_choice(np.zeros_like(success), first)[1]
    assert all(target < source for target, source in nothing)
    none, most = (
        patching_grid.repair_table({"r1": success}, answered(right)).iloc[0]
        for right in (np.arange(8) < 0, np.arange(8) > 0)
    )
    assert none["oracle"] == 6 / 8
    assert most["net"] < 0 and most["broken"] > 0  # what was right is broken by the pair


def test_halves_never_share_a_bridge_entity():
    bridges = np.array(["a", "b", "a", "c", "b", "d"])
    first = patching_grid.halves(bridges)
    assert set(bridges[first]) == {"a", "c"} and set(bridges[~first]) == {"b", "d"}


def test_a_donor_is_compared_on_wrong_cases_only():
    same, none = np.zeros((8, 2, 3), dtype=bool), np.zeros((8, 2, 3), dtype=bool)
    same[:, 0, 1] = True
    success = dict(zip(patching_grid.PATCHES, (same, none, none, none), strict=True))
    table = patching_grid.against_donor(success, answered(np.arange(8) < 2))
    table = table.set_index(["place", "how"])
    assert table.loc[("r1", "oracle"), ["mean", "n"]].tolist() == [1, 6]
    assert table.loc[("last", "honest"), "mean"] == 0


def test_a_grid_is_kept_read_and_compared(llama, asked, tmp_path):
    model, tokenizer = llama
    whole = patching_grid.back_patching(model, tokenizer, asked, range(len(asked)))
    path = tmp_path / "grid.safetensors"
    fresh = patching_grid.back_patching(model, tokenizer, asked, [1])
    keys = patching_grid.grid_keys(asked)
    merged, compared = patching_grid.merge_grids(fresh, whole, keys)
    patching_grid.save_grid(merged, path, "tiny-llama")
    assert patching_grid.load_grid(path, "another") is None
    assert patching_grid.load_grid(tmp_path / "none", "x") is None
    shipped = patching_grid.load_grid(path, "tiny-llama")
    assert shipped.keys == keys and (shipped.said == whole.said).all()
    assert np.allclose(shipped.log_prob, whole.log_prob, atol=1e-2, equal_nan=True)
    assert compared["prompts"] == compared["said"] == 1 and compared["log_prob"] < 1e-2
    shipped.said[0, 1] += 1
    assert patching_grid.merge_grids(fresh, shipped, keys)[1]["said"] < 1  # a change is seen
    alone, compared = patching_grid.merge_grids(fresh, None, keys)
    assert alone.keys == keys[1:2] and compared["prompts"] == 0
    repaired = patching_grid.repaired(whole, [frozenset(whole.said[0, 0].ravel())] * len(asked))
    assert repaired["r1"].shape == whole.said.shape[1:] and repaired["r1"][0].all()
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        patching_grid.load_grid(path, "tiny-llama")


def test_the_staircase_is_right(llama, asked):
    assert patching_grid.staircase_error(*llama, asked, [0, 1], pairs=3) < 1e-3


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("means", "ps", "verdict"),
    [
        ([1, 1, 1], [0.001] * 3, "reproduced"),
        ([1, 1, 1], [0.001, 0.5, 0.5], "partly"),
        ([1, 1, 1], [0.04, 0.5, 0.5], "not at this scale"),  # one of three at 0.05 is chance
        ([-1, -1, -1], [0.001] * 3, "contradicted"),
    ],
)
def test_c4_by_rule(means, ps, verdict):
    table = pd.DataFrame({"question": list("abc"), "mean": means, "p": ps, "n": 9})
    table = table.assign(holds=(table["mean"] > 0) & (table["p"] < 0.05 / 3))
    assert conflict.late_influence(table)["verdict"] == verdict


def around(name: str, middle: float) -> dict[str, float]:
    """A column with the ends of its interval."""
    return {name: middle, f"{name}_low": middle - 0.1, f"{name}_high": middle + 0.1}


@pytest.mark.parametrize(
    ("net", "honest", "oracle", "verdict"),
    [
        (0.2, 0.2, 0.2, "reproduced"),
        (0, 0.2, 0, "partly"),
        (0, 0, 0, "not at this scale"),
        (-0.2, -0.2, -0.2, "contradicted"),
    ],
)
def test_c6_by_rule(net, honest, oracle, verdict):
    row = {**around("oracle", 0.5), **around("honest", 0.1), **around("net", net), "wrong": 50}
    repairs = pd.DataFrame([{"arm": arm, **row} for arm in patching_grid.PATCHES])
    less = pd.DataFrame({"place": "r1", "how": ["honest", "oracle"], "mean": [honest, oracle]})
    less = less.assign(low=less["mean"] - 0.1, high=less["mean"] + 0.1)
    assert patching_grid.back_patching_helps(repairs, less)["verdict"] == verdict


@pytest.mark.parametrize(
    ("lead", "share", "verdict"),
    [
        (0.3, 0.8, "reproduced"),
        (0.3, 0.3, "partly"),
        (0, 0.5, "not at this scale"),
        (-0.3, 0.2, "contradicted"),
    ],
)
def test_c3_by_rule(lead, share, verdict):
    pairs = pd.MultiIndex.from_product([TEMPLATES, OUTCOMES], names=["wording", "outcome"])
    table = pd.DataFrame({"share": 0.2, "low": 0.1, "high": 0.3}, index=pairs).reset_index()
    leads = pd.DataFrame([{**around("lead", lead), **around("share", share)}] * len(TEMPLATES))
    leads = leads.assign(wording=list(TEMPLATES))
    assert census.failures_say_bridge(table, leads, table, n=9)["verdict"] == verdict


@pytest.mark.parametrize(
    ("right", "bridge", "other", "verdict"),
    [
        ((0.1, 0.3), (0.4, 0.6), (0.1, 0.3), "reproduced"),
        ((0.1, 0.3), (0.2, 0.6), (0.1, 0.3), "partly"),
        ((0.4, 0.6), (0.2, 0.6), (0.1, 0.3), "not at this scale"),
        ((0.6, 0.9), (0.0, 0.1), (0.2, 0.3), "contradicted"),
    ],
)
def test_b2_by_rule(right, bridge, other, verdict):
    table = pd.DataFrame(
        [right, bridge, other], columns=["low", "high"], index=["e3", "e2", "other"]
    )
    table = table.rename_axis("outcome").reset_index()
    table = table.assign(wording="possessive", examples="one-hop", share=0.3, n=9)
    assert census.conflict_not_ignorance(table)["verdict"] == verdict
