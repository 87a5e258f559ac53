"""Two-hop facts, their prompts, the census, and the statistics of notebook 02."""

import hashlib
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from companion import paths
from companion.measures.two_hop import contrast, donors, first_token_pairs, read_conflict
from companion.questions import asking
from companion.questions.asking import OUTCOMES, candidates, outcome
from companion.questions.facts import published_two_hop, two_hop_facts
from companion.questions.prompts import TEMPLATES, Template, label_tokens, two_hop_prompts
from companion.questions.prompts import span as the_span
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


# ---------------------------------------------------------------- facts


def test_the_facts_are_what_the_script_makes(tmp_path):
    target = tmp_path / "two_hop.csv"
    script = paths.DATA / "build_two_hop.py"
    subprocess.run([sys.executable, str(script), str(target)], check=True, capture_output=True)
    assert target.read_bytes() == (paths.DATA / "two_hop.csv").read_bytes()


def test_the_facts_are_many_and_split_by_bridge_entity():
    frame = two_hop_facts()
    assert len(frame) >= 3000 and frame["pair"].nunique() >= 6
    assert frame.groupby("e2")["split"].nunique().max() == 1
    assert set(frame["split"]) == {"train", "validation", "test"}
    same = frame["type2"] == frame["type3"]
    assert frame.loc[same, "pair"].nunique() >= 2 and frame.loc[~same, "pair"].nunique() >= 6
    assert (
        (frame["e1"] != frame["e2"]) & (frame["e2"] != frame["e3"]) & (frame["e1"] != frame["e3"])
    ).all()


def test_the_card_counts_what_is_there():
    card = (paths.DATA / "README.md").read_text(encoding="utf-8")
    for pair, count in two_hop_facts()["pair"].value_counts().items():
        assert f"| {pair} | {count:,} |" in card
    counted = pd.read_csv(paths.DATA / "hand_facts.csv")
    assert f"{len(counted):,} facts" in card


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pair,e1,r1,e2,r2,e3,type2,split\n", "lacks column 'type3'"),
        ("pair,e1,e1,r1,e2,r2,e3,type2,type3,split\n", "repeats column 'e1'"),
        (
            "pair,e1,r1,e2,r2,e3,type2,type3,split\np,a,r,b,s,c,t,t,train\np,a,r,,s,c,t,t,train\n",
            "empty 'e2' in row 3",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_column_or_row(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.csv.*{message}"):
        two_hop_facts(path)


# ---------------------------------------------------------------- TwoHop as published

PUBLISHED = (
    ",id,e1_label,e2_label,e3_label,e1_aliases,e2_aliases,e3_aliases,"
    "e2_type,e3_type,r1_type,r2_type,r1_template,r2_template,source_prompt\n"
    "0,0,Mozart,Anna,Leopold,\"['M']\",\"['Anna Maria', 'A']\",[],"
    "human,human,mother,spouse,the mother of {},the spouse of {},p\n"
)


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "twohop" / "two_hop.csv"
    path.parent.mkdir()
    path.write_text(PUBLISHED)
    return path


def test_twohop_is_read_from_a_folder(published, monkeypatch):
    row = published_two_hop(published.parents[1]).iloc[0]
    assert (row["e1"], row["e2"], row["e3"], row["pair"]) == (
        "Mozart",
        "Anna",
        "Leopold",
        "human-mother-spouse",
    )
    assert row["e2_aliases"] == "Anna Maria"
    assert (
        TEMPLATES["of"].say(row["e1"], row["r1"], row["r2"])
        == "The spouse of the mother of Mozart is"
    )
    monkeypatch.setenv("BACKATTN_DATASETS", str(published.parents[1]))
    assert len(published_two_hop()) == 1


def test_twohop_is_asked_in_every_wording(published):
    people = (
        ("Bach", "Elisabeth", "Ambrosius"),
        ("Verdi", "Luigia", "Carlo"),
        ("Liszt", "Maria", "Adam"),
    )
    more = [
        f"{i},{i},{a},{b},{c},[],[],[],human,human,mother,spouse,the mother of {{}},the spouse of {{}},p\n"
        for i, (a, b, c) in enumerate(people, 1)
    ]
    published.write_text(PUBLISHED + "".join(more))
    facts = published_two_hop(published.parents[1])
    for wording in TEMPLATES:
        asked = two_hop_prompts(facts, wording)
        assert len(asked) == 2
        for row in asked.itertuples():
            spans = (row.two_hop[slice(*span)] for span in (row.e1_span, row.r1_span, row.r2_span))
            assert [text.lower() for text in spans] == [
                row.e1.lower(),
                "the mother of",
                "the spouse of",
            ]


def test_twohop_with_another_checksum_column_or_template_is_refused(published):
    folder = published.parents[1]
    right = hashlib.sha256(published.read_bytes()).hexdigest()
    assert len(published_two_hop(folder, sha256=right)) == 1
    with pytest.raises(ValueError, match="sha256 differs"):
        published_two_hop(folder, sha256="0" * 64)
    published.write_text(PUBLISHED.replace("the mother of {}", "the mother of"))
    with pytest.raises(
        ValueError, match=r"row 2: the template 'the mother of' must have the slot \{\} once"
    ):
        published_two_hop(folder)
    published.write_text(PUBLISHED.replace("e3_label", "e3"))
    with pytest.raises(ValueError, match="lacks column 'e3_label'"):
        published_two_hop(folder)


def test_twohop_is_fetched_once_and_must_stay_the_same(tmp_path, monkeypatch, published):
    monkeypatch.delenv("BACKATTN_DATASETS", raising=False)
    monkeypatch.setattr("companion.questions.facts.CACHE", tmp_path / "cache")
    monkeypatch.setattr("companion.questions.facts.TWO_HOP_URL", published.as_uri())
    assert len(published_two_hop()) == 1
    kept = tmp_path / "cache" / "datasets" / "twohop" / "two_hop.csv"
    kept.write_text(PUBLISHED + "\n")
    with pytest.raises(ValueError, match="is not the file it was"):
        published_two_hop()


def test_twohop_that_cannot_be_fetched_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("BACKATTN_DATASETS", raising=False)
    monkeypatch.setattr("companion.questions.facts.CACHE", tmp_path)
    monkeypatch.setattr(
        "companion.questions.facts.TWO_HOP_URL", (tmp_path / "nowhere.csv").as_uri()
    )
    with pytest.raises(OSError, match="set BACKATTN_DATASETS to that folder"):
        published_two_hop()
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("examples", ["one-hop", "two-hop", "none"])
def test_prompts_hold_their_spans_and_no_answer(template, examples):
    written = two_hop_prompts(FACTS, template, examples)
    assert len(written)
    for row in written.itertuples():
        for name in ("e1", "r1", "r2"):
            begin, end = getattr(row, f"{name}_span")
            assert row.two_hop[begin:end] == getattr(row, name) and begin >= len(row.head)
        assert row.e3 not in row.two_hop and row.e2 not in row.two_hop
        assert row.e2 not in row.first and row.e3 not in row.second + row.shortcut_prompt


def test_no_real_prompt_shows_its_answer_in_the_examples():
    """Over many facts: no name or alias of e1, e2 or e3 stands in front of the question."""
    written = two_hop_prompts(two_hop_facts(), per_pair=200)
    for row in written.itertuples():
        names = {row.e1, row.e2, row.e3, *row.e2_aliases.split("|"), *row.e3_aliases.split("|")} - {
            ""
        }
        front = (
            row.head + row.first.rpartition(". ")[0] + "." + row.second.rpartition(". ")[0] + "."
        )
        shown = [name for name in names if re.search(rf"\b{re.escape(name)}\b", front)]
        assert not shown, (shown, front)


def test_the_head_of_a_pair_keeps_the_files_order():
    facts = two_hop_facts()
    kin = facts[facts["pair"] == "person-kin-kin"]
    order = {tuple(row): index for index, row in enumerate(kin[["e1", "r1", "r2"]].to_numpy())}
    places = [
        order[tuple(row)]
        for row in two_hop_prompts(kin, per_pair=20)[["e1", "r1", "r2"]].to_numpy()
    ]
    assert places == sorted(places)


def test_aliases_are_whole_names():
    frame = two_hop_facts()
    words = {
        word
        for name in ("e2_aliases", "e3_aliases")
        for cell in frame[name]
        for word in cell.split("|")
    } - {""}
    assert "Holland" in words and "UAE" in words and min(map(len, words)) > 1


def test_an_entity_that_is_not_in_its_prompt_is_named_with_its_row():
    frame = FACTS.assign(e1=[*FACTS["e1"][:-1], "iPhone"])  # the sentence begins with a capital
    with pytest.raises(
        ValueError,
        match=rf"Fact {len(FACTS) - 1} \(.*iPhone\): 'iPhone' does not occur in the prompt",
    ):
        two_hop_prompts(frame, examples="none")


def test_equal_relation_words_are_told_apart():
    frame = FACTS.assign(r1="father", r2="father")
    for template, order in (("possessive", 1), ("of", -1)):
        row = two_hop_prompts(frame, template).iloc[0]
        assert order * (row["r2_span"][0] - row["r1_span"][0]) > 0


@pytest.mark.parametrize(
    ("phrase", "sentence", "slot"),
    [
        ("{entity} of", "{phrase} is", "relation"),
        ("{entity} {relation}", "so is", "phrase"),
        ("{relation}", "{phrase}", "entity"),
    ],
)
def test_a_template_without_its_slot_is_named(phrase, sentence, slot):
    with pytest.raises(ValueError, match=f"must have the slot {{{slot}}} once"):
        Template(phrase, sentence)


def test_bad_requests_for_prompts_are_named():
    with pytest.raises(ValueError, match="Unknown template 'haiku'"):
        two_hop_prompts(FACTS, "haiku")
    with pytest.raises(ValueError, match="Unknown examples 'many'"):
        two_hop_prompts(FACTS, examples="many")
    with pytest.raises(ValueError, match="give more facts"):
        two_hop_prompts(FACTS.head(1))
    with pytest.raises(ValueError, match="'Milan' does not occur in the prompt"):
        the_span("Rome is", "Milan")


def test_an_entity_without_a_token_of_its_own_is_named(llama):
    with pytest.raises(ValueError, match="No token of 'Rome is' belongs to 'e1' alone"):
        label_tokens(llama[1], ["Rome is"], {"e1": [(5, 7)]})


# ---------------------------------------------------------------- census


class Words:
    """A tokenizer of one token per word, to make collisions by hand."""

    def __init__(self):
        self.known = {}

    def __call__(self, text, add_special_tokens=False):
        return {
            "input_ids": [self.known.setdefault(word, len(self.known)) for word in text.split()]
        }


def test_collisions_are_found_and_aliases_cleaned():
    words = Words()
    frame = FACTS.copy()
    frame.loc[0, ["e3", "e3_aliases"]] = (
        "New Rome",
        "Eternal|Berlin|Tokyo City",
    )  # an answer, and like one
    frame.loc[1, "e3"] = "New Paris"  # begins like New Rome
    frame.loc[3, "e2"] = "Tokyo Land"  # e2 begins like its own e3
    frame.loc[4, "shortcut"] = "Oslo"  # same as e3: no outcome of its own
    found = candidates(words, frame)
    assert found["collides"].tolist() == [True, True, False, True, False, False]
    first = {
        words.known[word] for word in ("New", "Eternal", "Berlin")
    }  # Tokyo City begins like Tokyo: left out
    assert found["e3_ids"][0] == first
    assert found["shortcut_ids"][4] == frozenset()


def test_outcomes():
    ids = {
        "e3": frozenset([1, 2]),
        "e2": frozenset([3]),
        "shortcut": frozenset(),
        "e1": frozenset([4]),
    }
    assert [outcome(token, ids) for token in (2, 3, 4, 9)] == ["e3", "e2", "e1", "other"]


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
    with pytest.raises(ValueError, match="set is empty"):
        asking.ask(None, None, pd.Series([], dtype=str), pd.Series([], dtype=str))


def test_wilson_is_the_textbooks():
    low, high = intervals.wilson(8, 10)
    z, p, n = 1.959964, 0.8, 10
    middle, half = (
        (p + z**2 / 2 / n) / (1 + z**2 / n),
        z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5,
    )
    assert np.allclose((low, high), (middle - half, middle + half), atol=1e-5)


def test_the_filter_asks_step_by_step(llama, monkeypatch):
    """With a stand-in that knows some answers: every step asks only what the one before let through."""
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
    """Ten prompts about each of four entities, all of an entity alike: four points, which can show nothing at 5 %."""
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
