"""Datasets without leakage: every record, and what makes each of them."""

import hashlib
import json
import os
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from companion.paths import DATA
from companion.questions.compositions import ENTITIES, RELATIONS, compositions
from companion.questions.datasets import (
    AGAIN,
    DATASETS,
    ONE_HOP,
    OTHER_PROMPTS,
    PLANTED,
    WIDE,
    Dataset,
    held_out_text,
    in_context,
    load,
    majority_baseline,
    near_duplicate_groups,
    two_hop,
)
from companion.questions.facts import two_hop_facts
from companion.questions.splits import FOLDS, SPLITS, draw, fold_of, place_of, split

OFFLINE = ["2-digit", "1DC", "two-hop", "legs, one kind", "legs, two kinds", *OTHER_PROMPTS]
HOPS = ["e1", "r1", "e2", "r2"]
TWICE = ("two-hop", "question", "code")  # ask the capital of a country of a city, of a company


@pytest.mark.parametrize("name", OFFLINE)
def test_no_name_is_in_two_splits_and_every_question_is_tested_once(name):
    whole = load(name)
    parts = [split(whole, fold) for fold in (None, *range(FOLDS))]
    for frame in parts:
        assert set(frame["split"]) == set(SPLITS)
        assert not frame["prompt"].duplicated().any() or name in TWICE
        names = frame.assign(name=frame["group"].str.split("|")).explode("name")
        assert (names.groupby("name")["split"].nunique() == 1).all()
        assert frame.loc[frame["split"] == "test", "tested"].all()
    tested = pd.concat([part[part["split"] == "test"] for part in parts[1:]])["prompt"]
    held_out = [set(part.loc[part["split"] == "validation", "prompt"]) for part in parts[1:]]
    assert all(one == other for one, other in pairwise(held_out)) and not held_out[0] & set(tested)
    if name != "legs, two kinds":  # whose animals may fall into different folds
        alone = whole[whole["tested"] & ~whole["prompt"].isin(held_out[0])]
        assert sorted(tested) == sorted(alone["prompt"])


@given(st.text(min_size=1))
def test_places_depend_on_the_name_alone(name):
    """A salted hash would shuffle the splits with every start of Python."""
    assert 0 <= place_of(name) < 1
    places = [round(place_of(name), 4) for name in ("Spain", "3,4", "ant")]
    assert places == [0.5584, 0.3624, 0.4048]


def test_bad_requests_are_named_and_draws_are_seeded():
    for message, ask in {
        "folds 0 to 2": lambda: split(load("1DC"), 3),
        "no questions in split 'dev'": lambda: draw(split(load("1DC")), "dev", 3),
        "Unknown dataset 'gsm'; choose one of 2-digit, 1DC": lambda: load("gsm"),
        "only 224 questions of kind OOD/OOD": lambda: compositions(1),
    }.items():
        with pytest.raises(ValueError, match=message):
            ask()
    frame = split(load("1DC"), 0)
    assert draw(frame, "test", 20).equals(draw(frame, "test", 20))
    assert len(draw(frame, "test")) == (frame["split"] == "test").sum()


def test_records_know_what_runs_need():
    for name, record in DATASETS.items():
        assert name == record.name and record.judge in ("number", "first token")
        assert DATASETS[record.tuned_on]
        assert bool(record.published) == (name in ("SVAMP", "MultiArith"))
    names = ("prompt", "answer", "group", "tested", "e3_aliases", "split")
    for name in [*OFFLINE, "two-hop, unknown", "compositions"]:
        assert DATASETS[name].columns == tuple(pd.Index(names).intersection(load(name).columns))


@pytest.mark.parametrize(("name", "count"), [("2-digit", 20_000), ("1DC", 6_561)])
def test_arithmetic_is_right(name, count):
    frame = load(name)
    assert len(frame) == count
    for row in frame.sample(300, random_state=0).itertuples():
        assert int(row.answer) == eval(row.prompt.rstrip("="))


def test_no_first_step_is_seen_before_and_two_hops_are_needed():
    frame = split(load("1DC"), 0)
    digits = frame["prompt"].str.findall(r"\d").str[:2].map(lambda pair: tuple(sorted(pair)))
    assert not set(digits[frame["split"] == "test"]) & set(digits[frame["split"] == "train"])
    frame = two_hop()
    assert 0.4 < frame["tested"].mean() < 0.7 and (frame["group"] == frame["e2"]).all()


def test_other_wordings_ask_the_same_questions():
    plain = load("two-hop")
    row = plain.index[plain["prompt"] == "Dubliners's author's country is"]
    prompts = {"question": "Question: What is the country of the author of Dubliners? Answer:"}
    prompts |= {"code": "country(author(Dubliners)) ="}
    for name, prompt in prompts.items():
        other = load(name)
        assert other["prompt"][row].tolist() == [prompt]
        assert other.drop(columns="prompt").equals(plain.drop(columns="prompt"))


def test_a_first_hop_in_context_is_said_once_and_needed():
    facts, frame = two_hop(), in_context()
    known = set(facts[["r1", "e2", "r2", "e3"]].itertuples(index=False, name=None))
    answers = two_hop_facts().set_index(["e2", "r2"])["e3"].to_dict()
    assert len(frame) > 800 and frame["tested"].all() and (frame["group"] == frame["e2"]).all()
    assert frame.groupby(["r1", "e2", "r2"]).size().nunique() == 1
    for row in frame.itertuples():
        *said, asked = re.split(r"(?<=\.) ", row.prompt)
        assert f"{row.e1}'s {row.r1} is {row.e2}." in said
        assert asked == f"{row.e1}'s {row.r1}'s {row.r2} is"
        people, bridges = zip(*(s.rstrip(".").split(f"'s {row.r1} is ") for s in said), strict=True)
        assert len(set(people)) == len(set(bridges)) == len(said) == 3
        assert len({fold_of(name) for name in bridges}) == 1
        assert row.e3 not in bridges and (row.r1, row.e2, row.r2, row.e3) in known
        assert all(answers.get((n, row.r2)) != row.e3 for n in bridges if n != row.e2)


def test_the_most_frequent_answer_is_guessed(monkeypatch):
    names = [f"g{i}" for i in range(400)]
    frame = pd.DataFrame({"prompt": names, "answer": ["seldom", *["often"] * 3] * 100})
    frame = frame.assign(group=names, r2="r", tested=True)
    monkeypatch.setitem(DATASETS, "invented", Dataset("invented", lambda: frame))
    assert majority_baseline("invented") == pytest.approx(0.75, abs=0.03)
    assert 0.1 < majority_baseline("in context") < 0.4
    by_kind = majority_baseline("compositions", by="kind")
    assert list(by_kind.index) == ["ID/ID", "ID/OOD", "OOD/ID", "OOD/OOD"]
    assert 0 < by_kind.min() < by_kind.max() < 0.15


def test_compositions_hold_out_what_they_say():
    frame = compositions()
    facts = dict(frame.loc[frame["kind"] == "fact", ["prompt", "answer"]].to_numpy())
    assert len(facts) == ENTITIES * RELATIONS / 2
    seen, trained, held_out = {"ID": set(), "OOD": set()}, set(), set()
    for row in frame[frame["kind"] != "fact"].itertuples():
        e1, r1, r2 = row.prompt.split()
        first, second = f"{e1} {r1}", f"{row.group} {r2}"
        assert facts[first] == f" {row.group}" and facts[second] == row.answer
        for kind, fact in zip(row.kind.split("/"), (first, second), strict=True):
            seen[kind].add(fact)
        if row.kind == "ID/ID":
            places = trained if row.split == "train" else held_out
            places.update([("first", first), ("second", second)])
        assert row.split != "train" or row.kind == "ID/ID"
    assert held_out <= trained  # each in its place
    assert not seen["ID"] & seen["OOD"] and 0.15 < len(seen["OOD"]) / len(facts) < 0.25
    counts = frame[frame["split"] != "train"].groupby(["split", "kind"]).size().unstack()
    assert (counts.loc["validation"] == 70).all() and (counts.loc["test"] == 200).all()
    assert len(counts.columns) == 4
    assert not frame["prompt"].duplicated().any() and split(frame, 1).equals(frame)


def test_legs_add_up():
    """The stand-in's answers are linear in the counts, with one number of legs for each kind."""
    one, two = load("legs, one kind"), load("legs, two kinds")
    count = one["prompt"].str.extract(r"have (\d+) ")[0].astype(int)
    legs = (one["answer"].astype(int) / count).groupby(one["group"]).agg(["min", "max"])
    assert (legs["min"] == legs["max"]).all()
    for row in two.sample(200, random_state=0).itertuples():
        total = 0
        for number, word in re.findall(r"(\d+) ([^,?]+)", row.prompt):
            kind = next(kind for kind in row.group.split("|") if kind in word)
            total += int(number) * legs.loc[kind, "min"]
        assert total == int(row.answer)


def test_texts_that_say_nearly_the_same_are_twins():
    pens = "{} has N pens and then buys N more at a shop"
    texts = [pens.format("ann"), pens.format("bob"), "how tall is a tree of N years"]
    groups = near_duplicate_groups([text.split() for text in texts])
    assert groups[0] == groups[1] != groups[2]


def test_published_files_are_read_and_checked(tmp_path, monkeypatch):
    items = [{"Body": "Tom has 3 pens .", "Question": "How many?", "Answer": 3.0}] * 2
    path = tmp_path / "svamp" / "SVAMP.json"
    path.parent.mkdir()
    path.write_text(json.dumps(items))
    monkeypatch.setenv("BACKATTN_DATASETS", str(tmp_path))
    with pytest.raises(ValueError, match="another sha256"):
        load("SVAMP")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    file = replace(DATASETS["SVAMP"].published, sha256=digest, url="http://127.0.0.1:9/none")
    monkeypatch.setitem(DATASETS, "SVAMP", replace(DATASETS["SVAMP"], published=file))
    row = load("SVAMP").iloc[0]
    assert (row["prompt"], row["answer"]) == ("Tom has 3 pens. How many? Answer:", " 3")
    with pytest.raises(FileNotFoundError, match="unset BACKATTN_DATASETS"):
        load("MultiArith")
    monkeypatch.delenv("BACKATTN_DATASETS")
    monkeypatch.setattr("companion.questions.facts.CACHE", tmp_path / "cache")
    with pytest.raises(OSError, match="Put the file into"):
        load("SVAMP")


FOLDER = Path(os.environ.get("BACKATTN_DATASETS", "nowhere"))


@pytest.mark.skipif(not (FOLDER / "svamp").exists(), reason="set BACKATTN_DATASETS")
@pytest.mark.parametrize(("name", "count"), [("SVAMP", 1000), ("MultiArith", 600)])
def test_published_datasets_as_they_are(name, count):
    frame = split(load(name), 0)
    assert len(frame) == count and set(frame["split"]) == set(SPLITS)
    assert (frame.groupby("group")["split"].nunique() == 1).all()
    assert frame["answer"].str.fullmatch(r" -?\d+(\.\d+)?").all()
    assert frame["prompt"].str.endswith("? Answer:").mean() > 0.9


def test_the_held_out_text_is_what_it_was():
    """Every perplexity is of these bytes."""
    content = (DATA / "held_out.txt").read_bytes()
    expected = "c9d2b5442d32dd1f9bfbfd3e40745eca126e979ceb0dddb50d1521cff2ad96c2"
    assert hashlib.sha256(content).hexdigest() == expected
    assert held_out_text().encode() == content


def test_planted_memories_tell_e2_or_anothers():
    plain, own, other = (load(n) for n in ("two-hop", *PLANTED))
    for frame in (own, other):
        assert frame[["prompt", "answer", "group"]].equals(plain[["prompt", "answer", "group"]])
    told = own["e1"] + "'s " + own["r1"] + " is " + own["e2"]
    assert own["memory"].equals(told)
    assert (other["memory"] != told).mean() > 0.99
    same_r1 = set(zip(own["r1"], own["e2"], strict=True))
    pairs = zip(other["r1"], other["memory"].str.split(" is ").str[-1], strict=True)
    assert all(pair in same_r1 for pair in pairs)


@pytest.mark.parametrize(
    ("name", "alike"),
    [("chains", ["split", "kind"]), (AGAIN[0], ["r1", "r2"]), (AGAIN[1], [])],
)
def test_another_questions_memory_is_of_the_same_kind_and_has_another_answer(name, alike):
    frame, other = load(name), load(DATASETS[name].exchanged)
    assert (other["prompt"] == frame["prompt"]).all()
    texts = frame["prompt"] + (frame["answer"] if name == AGAIN[1] else "")
    donors = frame.set_index(texts).loc[other["memory"]]
    itself = (texts == other["memory"]).to_numpy()  # where all that are alike have one answer
    assert itself.mean() < 0.01
    assert ((donors["answer"].to_numpy() != frame["answer"]) | itself).all()
    for column in alike:
        assert (donors[column].to_numpy() == frame[column]).all()
    if name == AGAIN[1]:  # what is read at a token of the answer counts from the end
        assert (other["memory"].str.len() == texts.str.len()).all()


def test_single_hops_are_taught_and_two_hops_asked():
    frame, usual = load(ONE_HOP), load("two-hop")
    for fold in range(FOLDS):
        parts, asked = split(frame, fold), split(usual, fold)
        taught = parts[parts["split"] == "train"]
        assert taught["taught"].all() and not taught["prompt"].isin(usual["prompt"]).any()
        for name in ("validation", "test"):
            mine, theirs = (x.loc[x["split"] == name, "prompt"] for x in (parts, asked))
            assert mine.tolist() == theirs.tolist()
        said = dict(zip(taught["prompt"], taught["group"], strict=True))
        tested = set(asked.loc[asked["split"] != "train", "group"])
        assert not tested & set("|".join(said.values()).split("|"))
        wanted = {  # both hops of each question that is trained on otherwise
            (f"{e1}'s {r1} is", f"{e2}'s {r2} is")
            for e1, r1, e2, r2 in asked.loc[asked["split"] == "train", HOPS].to_numpy()
        }
        wanted = {prompt for pair in wanted for prompt in pair}
        assert said.keys() <= wanted and len(said) > 0.9 * len(wanted)


def test_wide_questions_share_neither_a_bridge_nor_an_answer(monkeypatch):
    monkeypatch.syspath_prepend(DATA)
    import build_two_hop_wide as script

    frame = load(WIDE)
    tests = []
    for fold in range(FOLDS):
        parts = split(frame, fold)
        test, rest = parts[parts["split"] == "test"], parts[parts["split"] != "test"]
        assert not set(test["answer"]) & set(rest["answer"]) and test["tested"].all()
        assert not set(test["e2"]) & set(rest["e2"]) and (rest["split"] == "train").sum() > 200
        tests.append(test)
    test = pd.concat(tests)
    assert len(test) == frame["tested"].sum() == test["prompt"].nunique()
    assert test["r1"].nunique() >= 8
    assert test["r1"].value_counts(normalize=True).max() <= script.RELATION
    assert test["e2"].value_counts(normalize=True).max() <= script.BRIDGE
    joined = script.joined()
    assert len(frame.merge(joined, on=[*HOPS, "e3"])) == len(frame)  # nothing else is asked
    told = {(row.e1, row.r1): row.e2 for row in joined.itertuples()}
    assert len(joined.drop_duplicates(["e1", "r1"])) == len(told)
    assert script.capped(joined.head(0)).empty


def test_facts_by_hand_have_one_answer_each(monkeypatch):
    monkeypatch.syspath_prepend(DATA)
    import build_two_hop_wide as script

    for relations in yaml.safe_load((DATA / "wide_facts.yml").read_text("utf-8")).values():
        for answers in relations.values():
            subjects = [name for names in answers.values() for name in names]
            assert len(set(subjects)) == len(subjects)
            assert all(isinstance(name, str) for name in [*answers, *subjects])
    assert {r1 for _, r1 in script.single_hops()} >= set(script.KINDS)
