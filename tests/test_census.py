"""Two-hop facts, their prompts, and what counts as an answer."""

import hashlib
import os
import re
import subprocess
import sys

import pandas as pd
import pytest

from companion import paths
from companion.questions import asking
from companion.questions.asking import candidates, outcome
from companion.questions.facts import published_two_hop, two_hop_facts
from companion.questions.prompts import TEMPLATES, Template, label_tokens, two_hop_prompts
from companion.questions.prompts import span as the_span

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


def test_an_empty_set_is_an_error():
    with pytest.raises(ValueError, match="set is empty"):
        asking.ask(None, None, pd.Series([], dtype=str), pd.Series([], dtype=str))
