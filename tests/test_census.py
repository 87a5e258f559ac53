"""Two-hop facts, their prompts, the census, and the statistics of notebook 02."""

import numpy as np
import pandas as pd
import pytest

from companion.measures.two_hop import contrast, donors, first_token_pairs, read_conflict
from companion.questions.asking import OUTCOMES, candidates
from companion.questions.facts import two_hop_facts
from companion.questions.prompts import TEMPLATES, two_hop_prompts
from companion.report import intervals
from companion.studies.failure_analysis.census import (
    _named,
    bridge_lead,
    failures_say_bridge,
    filter_table,
    generated,
    hops,
    shares,
    shuffled,
)
from companion.studies.failure_analysis.conflict import (
    causality,
    conflict_table,
    first_readable,
    flow_tests,
    flows,
    hide_windows,
    late_influence,
    same_states,
)
from companion.studies.failure_analysis.patching_grid import (
    PATCH_ARMS,
    against_donor,
    back_patching,
    back_patching_helps,
    cross_fitted_choice,
    grid_keys,
    halves,
    load_grid,
    merge_grids,
    repair_table,
    save_grid,
    staircase_error,
)

FACTS = pd.DataFrame(
    [
        ("x", "Milan", "country", "Italy", "capital", "Rome"),
        ("x", "Lyon", "country", "France", "capital", "Paris"),
        ("x", "Munich", "country", "Germany", "capital", "Berlin"),
        ("x", "Osaka", "country", "Japan", "capital", "Tokyo"),
        ("x", "Bergen", "country", "Norway", "capital", "Oslo"),
        ("x", "Nice", "country", "France", "capital", "Paris"),
    ],
    columns=["pair", "e1", "r1", "e2", "r2", "e3"],
).assign(
    shortcut="",
    type1="city",
    type2="country",
    type3="city",
    e2_aliases="",
    e3_aliases="",
    split="train",
)


# ---------------------------------------------------------------- census


def test_what_is_written_is_matched_by_words_and_aliases():
    row = next(FACTS.assign(e3_aliases="Urbs Aeterna", shortcut="Milano").head(1).itertuples())
    texts = {
        "the Urbs Aeterna": "e3",
        "Romeo": "other",
        "Italy, whose capital is Rome": "e2",
        "Milano": "shortcut",
    }
    assert {text: _named(text, row) for text in texts} == texts


def test_shares_add_up_and_an_empty_set_is_an_error():
    table = shares(pd.Series(["e3", "e2", "e2", "other"]))
    assert table["share"].sum() == 1 and table.set_index("outcome").loc["e2", "count"] == 2
    assert ((table["low"] <= table["share"]) & (table["share"] <= table["high"])).all()
    with pytest.raises(ValueError, match="analysis set is empty"):
        shares(pd.Series([], dtype=object))


def test_wilson_is_the_textbooks():
    low, high = intervals.wilson(8, 10)
    z, p, n = 1.959964, 0.8, 10
    middle, half = (
        (p + z**2 / 2 / n) / (1 + z**2 / n),
        z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5,
    )
    assert np.allclose((low, high), (middle - half, middle + half), atol=1e-5)


def test_the_filter_asks_step_by_step(llama, monkeypatch):
    """With a stand-in that knows some answers: every step asks only what the one before let
    through."""
    frame = candidates(llama[1], two_hop_prompts(FACTS)).assign(collides=False)
    knows = {
        "first": [True, True, True, False],
        "second": [True, True, False, True],
        "shortcut_prompt": [False, True] * 2,
    }
    asked_of = []

    def ask(model, tokenizer, prompts, keys):
        form = next(form for form in knows if set(prompts) <= set(frame[form]))
        asked_of.append((form, len(prompts)))
        entity = "e2" if form == "first" else "e3"
        rows = [frame[form].tolist().index(prompt) for prompt in prompts]
        return np.array(
            [min(frame[f"{entity}_ids"][r]) if knows[form][r] else -5 for r in rows]
        ), None

    monkeypatch.setattr("companion.studies.failure_analysis.census.ask", ask)
    monkeypatch.setattr("companion.questions.asking.ask", ask)
    found = hops(None, None, frame)
    assert found["knows_first"].tolist() == [True, True, True, False]
    assert found["known"].tolist() == [True, True, False, False]
    assert found["kept"].tolist() == [True, False, False, False]
    assert asked_of == [("first", 4), ("second", 3), ("shortcut_prompt", 2)]
    table = filter_table(found).set_index("pair").loc["all"]
    assert table.tolist() == [4, 4, 3, 2, 1]
    with pytest.raises(ValueError, match="No fact is left to ask for 'first'"):
        hops(None, None, frame.assign(collides=True))


# ---------------------------------------------------------------- statistics


def test_contrast_finds_a_difference_within_strata_and_none_between():
    draw = np.random.default_rng(0)
    strata, clusters = np.repeat(["a", "b"], 60), np.arange(120)
    right = np.r_[draw.random(60) < 0.8, draw.random(60) < 0.2]
    values = np.stack(
        [draw.normal(size=120) + 5 * (strata == "a"), draw.normal(size=120) + 1.5 * right], axis=1
    )
    test = contrast(values, right, strata, clusters, permutations=400)
    assert abs(test["difference"][0]) < 0.6 and test["p"][0] > 0.05
    assert abs(test["difference"][1] - 1.5) < 0.6 and test["p"][1] < 0.05
    with pytest.raises(ValueError, match="both right and wrong"):
        contrast(values, strata == "a", strata, clusters)


def test_contrast_is_not_fooled_by_copies_of_one_bridge_entity():
    """Ten prompts about each of four entities, all of an entity alike: four points, which can show
    nothing at 5 %."""
    clusters = np.repeat(np.arange(4), 10)
    right = clusters < 2
    values = right[:, None] + np.random.default_rng(0).normal(size=4)[clusters][:, None] / 100
    assert contrast(values, right, np.zeros(40), clusters, permutations=400)["p"][0] > 0.05
    alone = contrast(values, right, np.zeros(40), np.arange(40), permutations=400)["p"][0]
    assert alone < 0.05


def test_the_honest_pair_is_chosen_on_the_other_half():
    success = np.zeros((8, 3, 4), dtype=bool)
    first = np.array([True] * 4 + [False] * 4)
    right = np.zeros(8, dtype=bool)  # without a patch
    success[:4, 0, 2] = True  # mends the whole first half and nothing else
    success[4:6, 1, 3] = True  # mends half of the second
    chosen, pairs = cross_fitted_choice(success, first)
    assert pairs == [(0, 2), (1, 3)]
    assert not chosen.any()  # neither pair helps the half on which it was not chosen
    nothing = cross_fitted_choice(np.zeros_like(success), first)[1]
    assert all(target < source for target, source in nothing)
    table = repair_table({"r1": success}, right, [f"e{i}" for i in range(8)]).iloc[0]
    assert table["oracle"] == 6 / 8
    most = np.arange(8) > 0
    everyone = repair_table({"r1": success}, most, [f"e{i}" for i in range(8)]).iloc[0]
    assert everyone["net"] < 0 and everyone["broken"] > 0  # what was right is broken by the pair


def test_halves_never_share_a_bridge_entity():
    bridges = ["a", "b", "a", "c", "b", "d"]
    first = halves(bridges)
    assert {b for b, f in zip(bridges, first, strict=True) if f}.isdisjoint(
        b for b, f in zip(bridges, first, strict=True) if not f
    )


def test_donors_know_none_of_the_right_answers():
    frame = FACTS.copy()
    frame.loc[4, "e3"] = "Rome"  # a Norwegian donor would bring Milan's answer
    frame.loc[3, "e3_aliases"] = "Berlin"
    other = donors(frame)
    for row, donor in enumerate(other):
        answers = {frame["e3"][row], frame["e2"][row], *frame["e3_aliases"][row].split("|")}
        assert not {frame["e2"][donor], frame["e3"][donor]} & answers
    with pytest.raises(ValueError, match="No other prompt is about other entities"):
        donors(frame[frame["e2"] == "France"])
    with pytest.raises(ValueError, match='choose "same" or "any"'):
        donors(frame, relations="none")


def test_donors_of_any_relations_stay_when_a_prompt_goes():
    facts = two_hop_facts().sample(200, random_state=0).reset_index(drop=True)
    whole, less = (f["e1"].to_numpy()[donors(f, 0, "any")] for f in (facts, facts.drop(index=7)))
    kept = np.delete(whole, 7)
    assert (kept == less).mean() > 0.95 and len(set(whole)) > 60
    pairs = facts.set_index("e1")["pair"]
    pairs = pairs[~pairs.index.duplicated()]
    assert (pairs[whole].to_numpy() != facts["pair"].to_numpy()).mean() > 0.7


def test_the_order_of_facts_stays_when_one_goes():
    facts = two_hop_facts().head(50)
    whole, less = shuffled(facts), shuffled(facts.drop(index=7))
    assert whole["e1"].tolist() != facts["e1"].tolist()
    gone = facts.loc[7, ["pair", "e1"]].tolist()
    left = whole[(whole[["pair", "e1"]] != gone).any(axis=1)].reset_index(drop=True)
    assert left.equals(less)


def test_own_against_donor_counts_wrong_cases_only():
    own, donor = np.zeros((8, 2, 3), dtype=bool), np.zeros((8, 2, 3), dtype=bool)
    own[:, 0, 1] = True
    success = {"r1": own, "r1 donor": donor, "last": donor, "last donor": donor}
    right = np.arange(8) < 2
    table = against_donor(success, right, [f"e{i}" for i in range(8)]).set_index(["place", "how"])
    assert table.loc[("r1", "oracle"), "mean"] == 1 and table.loc[("r1", "oracle"), "n"] == 6
    assert table.loc[("last", "honest"), "mean"] == 0


# ---------------------------------------------------------------- verdicts


def flow_table(means, ps):
    table = pd.DataFrame({"question": list("abc"), "mean": means, "p": ps, "n": 9})
    return table.assign(holds=(table["mean"] > 0) & (table["p"] < 0.05 / 3))


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
    assert late_influence(flow_table(means, ps)).verdict == verdict


def patched(net, honest, oracle):
    row = {
        "oracle": 0.5,
        "oracle_low": 0.4,
        "oracle_high": 0.6,
        "honest": 0.1,
        "honest_low": 0.05,
        "honest_high": 0.2,
    }
    row |= {"net": net, "net_low": net - 0.1, "net_high": net + 0.1, "wrong": 50}
    mending = pd.DataFrame([{"arm": arm, **row} for arm in PATCH_ARMS])
    rows = [
        {"place": "r1", "how": how, "low": x - 0.1, "high": x + 0.1}
        for how, x in (("honest", honest), ("oracle", oracle))
    ]
    return back_patching_helps(mending, pd.DataFrame(rows)).verdict


def test_c6_by_rule():
    assert patched(0.2, 0.2, 0.2) == "reproduced"
    assert patched(0, 0.2, 0) == "partly"
    assert patched(0, 0, 0) == "not at this scale"
    assert patched(-0.2, -0.2, -0.2) == "contradicted"


def bridged(lead, share):
    rows = [
        {"wording": w, "outcome": o, "share": 0.2, "low": 0.1, "high": 0.3}
        for w in TEMPLATES
        for o in OUTCOMES
    ]
    around = {
        "lead": lead,
        "lead_low": lead - 0.1,
        "lead_high": lead + 0.1,
        "share_low": share - 0.1,
        "share_high": share + 0.1,
    }
    leads = pd.DataFrame([{"wording": w, **around} for w in TEMPLATES])
    return failures_say_bridge(pd.DataFrame(rows), leads, pd.DataFrame(rows), n=9).verdict


def test_c3_by_rule():
    assert bridged(0.3, 0.8) == "reproduced"
    assert bridged(0.3, 0.3) == "partly"
    assert bridged(0, 0.5) == "not at this scale"
    assert bridged(-0.3, 0.2) == "contradicted"


def test_the_lead_of_e2_is_over_failures():
    rows = [("x", "e2")] * 6 + [("x", "e1")] * 2 + [("x", "other")] * 2
    table = bridge_lead(
        pd.DataFrame(rows, columns=["w", "outcome"]).assign(e2=range(10)), "w"
    ).iloc[0]
    assert (table["share"], round(table["lead"], 9), table["n"]) == (0.6, 0.4, 10)
    assert table["lead_low"] < 0.4 < table["lead_high"]


# ---------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def written(llama):
    return candidates(llama[1], two_hop_prompts(FACTS))


def test_r1_is_the_same_and_the_last_position_is_not(llama, written):
    table = causality(*llama, written)
    assert table["r1"].max() < 1e-4 < table["last"].max()


def test_a_leak_from_the_future_would_be_seen(llama, written, monkeypatch):
    """Were attention not causal, r1's states would differ, and C5 would say so."""
    module = type(llama[0].model)
    original = module.forward

    def open_mask(self, *args, attention_mask=None, **kwargs):
        time = kwargs["input_ids"].shape[1]
        return original(
            self,
            *args,
            attention_mask=attention_mask.new_zeros(len(attention_mask), 1, time, time).float(),
            **kwargs,
        )

    monkeypatch.setattr(module, "forward", open_mask)
    table = causality(*llama, written)
    assert table["r1"].max() > 1e-4
    assert same_states(table, len(written)).verdict == "contradicted"


def test_readings_and_flows_have_their_shapes(smollm2):
    model, tokenizer = smollm2
    written = candidates(tokenizer, two_hop_prompts(FACTS))
    layers, n = model.config.num_hidden_layers, len(written)
    reading = read_conflict(model, tokenizer, written)
    assert reading.difference.shape == (n, 4, layers + 1)
    assert set(reading.wins) == {"e3", "e2"} and reading.readable["e2"].dtype == bool
    right = np.arange(n) % 2 == 0
    table = conflict_table(reading, right, written["pair"], written["e2"])
    assert len(table) == 2 * 4 * (layers + 1) and table["p"].between(0, 1).all()
    assert len(first_readable(reading, written["e2"])) == 8
    flow = flows(model, tokenizer, written)
    tests = flow_tests(flow, right, written["pair"], written["e2"], permutations=20)
    assert tests["holds"].dtype == bool and len(tests) == 3
    windows = hide_windows(model, tokenizer, written, right, width=15)
    assert len(windows) == 2 * 2 * 2 * 2


def test_the_difference_read_is_the_models_own_at_the_end(llama, written):
    from backattn.models.next_token import next_log_probs
    from backattn.models.tokens import encode

    reading = read_conflict(*llama, written)
    logs = next_log_probs(
        llama[0], encode(llama[1], written["two_hop"].tolist(), side="left")
    ).numpy()
    ids = first_token_pairs(llama[1], written)
    expected = [row[e3] - row[e2] for row, (e3, e2) in zip(logs, ids, strict=True)]
    assert np.allclose(reading.difference[:, 3, -1], expected, atol=1e-3)


def test_a_grid_is_kept_read_and_compared(llama, written, tmp_path):
    model, tokenizer = llama
    whole = back_patching(model, tokenizer, written, range(len(written)))
    path = tmp_path / "grid.safetensors"
    save_grid(whole, path, "tiny-llama")
    assert load_grid(path, "another") is None and load_grid(tmp_path / "none", "x") is None
    shipped = load_grid(path, "tiny-llama")
    fresh = back_patching(model, tokenizer, written, [1])
    keys = grid_keys(written)
    merged, compared = merge_grids(fresh, shipped, keys)
    assert (
        merged.keys == keys
        and compared["prompts"] == 1
        and compared["said"] == 1.0
        and compared["log_prob"] < 1e-2
    )
    for arm in PATCH_ARMS:
        assert (merged.said[arm] == whole.said[arm]).all()
    shipped.said["r1"][1] += 1
    assert merge_grids(fresh, shipped, keys)[1]["said"] < 1.0  # a changed result is seen
    alone, compared = merge_grids(fresh, None, keys)
    assert alone.keys == keys[1:2] and compared["prompts"] == 0
    assert staircase_error(model, tokenizer, written, [0, 1], pairs=3) < 1e-3
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_grid(path, "tiny-llama")


def test_generation_names_somebody_or_other(llama, written):
    table = generated(*llama, written, new_tokens=3)
    assert set(table["named"]) <= set(OUTCOMES)
