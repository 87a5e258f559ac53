"""Notebooks 02 and 02b: the census, the conflict inside, back-patching; their claims."""

import numpy as np
import pandas as pd
import pytest
from ledger_rows import held

from companion.measures.two_hop import PLACES, read_conflict
from companion.questions.asking import OUTCOMES, candidates
from companion.questions.facts import two_hop_facts
from companion.questions.prompts import TEMPLATES, two_hop_prompts
from companion.studies.failure_analysis import census, conflict, patching_grid

NAMES = {
    "e1": ["Milan", "Lyon", "Munich", "Osaka", "Bergen", "Nice"],
    "e2": ["Italy", "France", "Germany", "Japan", "Norway", "France"],
    "e3": ["Rome", "Paris", "Berlin", "Tokyo", "Oslo", "Paris"],
}
NONE = {"shortcut": "", "e2_aliases": "", "e3_aliases": ""}
FACTS = pd.DataFrame(NAMES).assign(pair="x", r1="country", r2="capital", **NONE)


@pytest.fixture(scope="module")
def asked(llama):
    return candidates(llama[1], two_hop_prompts(FACTS))


def test_what_is_written_is_matched_by_words_and_aliases(llama, asked):
    row = next(FACTS.assign(e3_aliases="Urbs Aeterna", shortcut="Milano").head(1).itertuples())
    texts = {"the Urbs Aeterna": "e3", "Romeo": "other", "Milano": "shortcut"}
    texts["Italy, whose capital is Rome"] = "e2"
    assert {text: census._named(text, row) for text in texts} == texts
    assert set(census.generated(*llama, asked, new_tokens=3)["named"]) <= set(OUTCOMES)


def test_shares_add_up_and_an_empty_set_is_an_error():
    frame = pd.DataFrame({"outcome": ["e3", "e2", "e2", "other"], "by": list("aaab")})
    table = census.shares(frame).set_index("outcome")
    assert table["share"].sum() == 1 and table.loc["e2", "count"] == 2
    assert table["share"].between(table["low"], table["high"]).all()
    by = census.shares(frame, ["by"])
    assert by.groupby("by")["n"].agg(set).to_dict() == {"a": {3}, "b": {1}}
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
    steps = found[["knows_first", "known", "kept"]].to_numpy().tolist()
    assert steps == [[True] * 3, [True, True, False], [True, False, False], [False] * 3]
    assert asked_of == [("first", 4), ("second", 3), ("shortcut_prompt", 2)]
    with pytest.raises(ValueError, match="No fact is left to ask for 'first'"):
        census.hops(None, None, frame.assign(collides=True))


def test_a_list_of_known_facts_stands_for_asking(llama, tmp_path, monkeypatch):
    """The same analysis set, from the list or from the model; nothing known is an error."""
    known, listed = tmp_path / "known.csv", FACTS.assign(shortcut_right=["True", *["False"] * 5])
    listed[["pair", "e1", "r1", "r2", "shortcut_right"]].iloc[:5].to_csv(known, index=False)

    def collide(tokenizer, frame):
        return candidates(tokenizer, frame).assign(collides=lambda t: t["e1"] == "Nice")

    monkeypatch.setattr(census, "candidates", collide)
    from_list = census.analysed(*llama, FACTS, per_pair=9, seed=0, known=known)
    assert set(from_list["e1"]) == {"Lyon", "Bergen"}

    def hops(model, tokenizer, frame):
        return frame.assign(kept=frame["e1"].isin(from_list["e1"]) & ~frame["collides"])

    monkeypatch.setattr(census, "hops", hops)
    asked = census.analysed(*llama, FACTS, per_pair=9, seed=0)
    assert asked[[*from_list]].equals(from_list)
    plain = census.plain_cases(llama[1], from_list.assign(said="Par", outcome="e1", named="e3"))
    assert plain.empty  # it writes e3 after all
    plain = census.plain_cases(llama[1], from_list.assign(outcome="e1", named="other"))
    assert len(plain) == 2
    monkeypatch.setattr(census, "hops", lambda m, t, frame: frame.assign(kept=False))
    with pytest.raises(ValueError, match="No fact is left"):
        census.analysed(*llama, FACTS, per_pair=9, seed=0)


def test_the_order_of_facts_stays_when_one_goes():
    facts = two_hop_facts().head(50)
    whole, less = census.shuffled(facts), census.shuffled(facts.drop(index=7))
    assert whole["e1"].tolist() != facts["e1"].tolist()
    gone = facts.loc[7, ["pair", "e1"]].tolist()
    left = whole[(whole[["pair", "e1"]] != gone).any(axis=1)].reset_index(drop=True)
    assert left.equals(less)


def test_r1_is_the_same_unless_the_future_leaks(llama, asked, monkeypatch):
    """Were attention not causal, r1's states would differ, and C5 would say so."""
    table = conflict.causality(*llama, asked)
    assert table["r1"].max() < 1e-4 < table["last"].max()
    assert held(conflict.same_states(table, len(asked))) == "all"
    module = type(llama[0].model)
    original = module.forward

    def open_mask(self, *args, attention_mask=None, **kwargs):
        time = kwargs["input_ids"].shape[1]
        mask = attention_mask.new_zeros(len(attention_mask), 1, time, time).float()
        return original(self, *args, attention_mask=mask, **kwargs)

    monkeypatch.setattr(module, "forward", open_mask)
    table = conflict.causality(*llama, asked)
    assert table["r1"].max() > 1e-4
    assert held(conflict.same_states(table, len(asked))) == "none"


def test_tables_of_the_conflict_have_their_rows(llama, asked):
    states, n = llama[0].config.num_hidden_layers + 1, len(asked)
    reading = read_conflict(*llama, asked)
    assert reading.difference.shape == (n, len(PLACES), states)
    assert set(reading.wins) == {"e3", "e2"} and reading.readable["e2"].dtype == bool
    asked = asked.assign(outcome=["e3", "e2"] * (n // 2))
    means = conflict.by_case(reading.difference, asked, PLACES).set_index(["case", "place"])
    wrong = reading.difference[1::2, PLACES.index("r1")].mean(0)
    assert np.allclose(means.loc[("wrong", "r1"), "mean"], wrong) and set(means["n"]) == {n // 2}
    assert len(conflict.first_readable(reading, asked)) == 2 * len(PLACES)
    e3, e2 = np.random.default_rng(0).normal(size=(2, n, states - 1))
    tests = conflict.flow_tests(e3, e2, asked, permutations=20)
    assert tests["holds"].dtype == bool and len(tests) == 3
    windows = conflict.hide_windows(*llama, asked, width=2, seed=0)
    assert len(windows) == 2 * 2 * 2 * 2


def test_the_honest_pair_is_chosen_on_the_other_half():
    """Halves take bridge entities in turn; a pair counts what it breaks, too."""
    first = np.arange(8) % 2 == 0
    hits = np.zeros((8, 3, 4), dtype=bool)
    hits[first, 0, 2] = True  # repairs the whole first half and nothing else
    hits[[1, 3], 1, 3] = True  # repairs half of the second
    asked = pd.DataFrame({"e2": [f"e{i}" for i in range(8)], "outcome": ["e3"] + ["e2"] * 7})
    tried = patching_grid.attempts({"r1": hits}, asked)
    assert (
        set(tried["pairs"]) == {"0 ← 2, 1 ← 3"} and tried["right"].tolist() == [True] + [False] * 7
    )
    assert not tried["honest"].any()  # neither pair helps the half on which it was not chosen
    assert tried["oracle"].tolist() == hits.any((1, 2)).tolist()
    both = np.concatenate([hits, hits])  # an entity is never in both halves
    assert not patching_grid.attempts({"r1": both}, pd.concat([asked, asked]))["honest"].any()


def test_a_grid_is_saved_and_read(llama, asked, tmp_path):
    whole = patching_grid.back_patching(*llama, asked, count=len(asked))
    path = tmp_path / "grid.safetensors"
    patching_grid.save_grid(whole, path, "tiny-llama")
    assert patching_grid.load_grid(path, "another") == {}
    assert patching_grid.load_grid(tmp_path / "none", "x") == {}
    shipped = patching_grid.load_grid(path, "tiny-llama")
    assert list(shipped) == patching_grid.grid_keys(asked)
    for new, old in zip(whole.values(), shipped.values(), strict=True):
        assert np.array_equal(new, old, equal_nan=True)
    ((key, first),) = patching_grid.back_patching(*llama, asked, count=1).items()
    assert key == next(iter(whole)) and (first.said == whole[key].said).all()
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        patching_grid.load_grid(path, "tiny-llama")


def by_verdict(*columns) -> list[tuple]:
    """Cases in which all, some and none of the checks hold, and one the other way round."""
    return list(zip(*columns, ("all", "some", "none", "none"), strict=True))


def around(name: str, middle: float) -> dict[str, float]:
    """A column with the ends of its interval."""
    return {name: middle, f"{name}_low": middle - 0.1, f"{name}_high": middle + 0.1}


LOW = [0.001] * 3
P = LOW, [0.001, 0.5, 0.5], [0.04, 0.5, 0.5], LOW  # one of three at 0.05 is chance


@pytest.mark.parametrize("mean, p, verdict", by_verdict([1, 1, 1, -1], P))
def test_c4_by_rule(mean, p, verdict):
    table = pd.DataFrame({"question": list("abc"), "mean": mean, "p": p, "n": 9})
    table = table.assign(low=table["mean"] - 0.1, high=table["mean"] + 0.1)
    table = table.assign(holds=(table["mean"] > 0) & (table["p"] < 0.05 / 3))
    assert held(conflict.late_influence(table)) == verdict


@pytest.mark.parametrize("net, honest, verdict", by_verdict([0.2, 0, 0, -0.2], [0.2, 0.2, 0, -0.2]))
def test_c6_by_rule(net, honest, verdict):
    row = {**around("oracle", 0.5), **around("honest", 0.1), **around("net", net), "wrong": 50}
    repairs = pd.DataFrame([{"arm": arm, **row} for arm in patching_grid.PATCHES])
    less = pd.DataFrame({"place": "r1", "how": ["honest", "oracle"], "mean": [honest, net]})
    less = less.assign(low=less["mean"] - 0.1, high=less["mean"] + 0.1)
    assert held(patching_grid.back_patching_helps(repairs, less)) == verdict


@pytest.mark.parametrize(
    "lead, share, verdict", by_verdict([0.3, 0.3, 0, -0.3], [0.8, 0.3, 0.5, 0.2])
)
def test_c3_by_rule(lead, share, verdict):
    pairs = pd.MultiIndex.from_product([TEMPLATES, OUTCOMES], names=["wording", "outcome"])
    table = pd.DataFrame({"share": 0.2, "low": 0.1, "high": 0.3}, index=pairs).reset_index()
    table["count"] = 20
    leads = pd.DataFrame([{**around("lead", lead), **around("share", share)}] * len(TEMPLATES))
    leads = leads.assign(wording=list(TEMPLATES))
    types = pd.DataFrame([{"types": "same type", "n": 15, **around("share", share)}])
    types = types.rename(columns={"share": "mean", "share_low": "low", "share_high": "high"})
    assert held(census.failures_say_bridge(table, leads, table, types, n=9)) == verdict


@pytest.mark.parametrize(
    "right, bridge, verdict, control",
    [
        (0.8, 0.0, "verified", "ahead"),
        (0.5, 0.0, "inconclusive", "ahead"),
        (0.2, 0.3, "falsified", "undecided"),
        (0.2, 0.7, "falsified", "behind"),
    ],
)
def test_b2_by_rule(right, bridge, verdict, control):
    """Ignorance is met where those who know both hops are right, and failures do not say e2."""
    table = pd.DataFrame({"outcome": ["e3", "e2", "other"], "share": [right, bridge, 0.25]})
    table = table.assign(low=table["share"] - 0.1, high=table["share"] + 0.1, n=9)
    table = table.assign(wording="possessive", examples="one-hop")
    row = census.ignorance_not_conflict(table)
    assert (row["verdict"], row["control"]) == (verdict, control)
