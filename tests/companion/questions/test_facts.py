"""Facts as they are shipped, as the scripts make them, and as others publish them."""

import csv
import os
import runpy
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from companion import paths
from companion.questions import facts as module
from companion.questions.facts import facts, published_two_hop, two_hop_facts
from companion.questions.prompts import TEMPLATES, single_hop, two_hop_prompts


@pytest.mark.parametrize("name", ["facts", "two_hop"])
def test_the_shipped_facts_are_what_the_script_makes(tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(paths.DATA)
    runpy.run_path(str(paths.DATA / f"build_{name}.py"))["main"](tmp_path / "made.csv")
    assert (tmp_path / "made.csv").read_bytes() == (paths.DATA / f"{name}.csv").read_bytes()


def test_facts_are_unique_and_do_not_echo():
    frame = facts()
    assert not frame.duplicated(["relation", "subject"]).any() and frame["relation"].nunique() >= 4
    for subject, answer in frame[["subject", "answer"]].to_numpy():
        assert answer.lower() not in subject.lower() and subject.lower() not in answer.lower()


def test_two_hop_facts_are_many_and_split_by_bridge_entity():
    frame = two_hop_facts()
    assert len(frame) >= 3000 and frame["pair"].nunique() >= 6
    assert frame.groupby("e2")["split"].nunique().max() == 1
    assert set(frame["split"]) == {"train", "validation", "test"}
    same = frame["type2"] == frame["type3"]
    assert frame.loc[same, "pair"].nunique() >= 2 and frame.loc[~same, "pair"].nunique() >= 6
    assert (frame[["e1", "e2", "e3"]].nunique(axis=1) == 3).all()
    aliases = frame[["e2_aliases", "e3_aliases"]].stack().str.split("|").explode()
    words = set(aliases) - {""}
    assert "Holland" in words and "UAE" in words and min(map(len, words)) > 1  # whole names
    card = (paths.DATA / "README.md").read_text(encoding="utf-8")
    for pair, count in frame["pair"].value_counts().items():
        assert f"| {pair} | {count:,} |" in card
    assert f"{len(pd.read_csv(paths.DATA / 'hand_facts.csv')):,} facts" in card


TWO_HOP = "pair,e1,r1,e2,r2,e3,type2,type3,split\n"


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (facts, "relation,subject\ncapital,France\n", "lacks column 'answer'"),
        (facts, "relation,subject,answer,answer\na,b,c,c\n", "repeats column 'answer'"),
        (facts, "relation,subject,answer\na,b,c\na,d,\n", "empty 'answer' in row 3"),
        (facts, "", "lacks column 'relation'"),
        (facts, "relation,subject,answer\n", "a header and no row"),
        (facts, "relation;subject;answer\na;b;c\n", "lacks column 'relation'"),
        (facts, "relation,subject,answer\na,b,c\n\na,Korea, South,d\n", "4 cells in row 4"),
        (facts, "relation,subject,answer\na,b,c,\n", "4 cells in row 2"),
        (facts, "relation,subject,answer\na,b\n", "2 cells in row 2"),
        (facts, "relation,subject,answer\na, b,c\n", "spaces around 'subject' in row 2"),
        (facts, 'relation,subject,answer\na,b,"c\na,b,c\n', "no CSV in UTF-8 after row 3"),
        (facts, "relation,subject,answer\na,Orléans,c\n".encode("latin-1"), "no CSV in UTF-8"),
        (two_hop_facts, TWO_HOP.replace(",type3", ""), "lacks column 'type3'"),
        (two_hop_facts, TWO_HOP + "p,a,r,,s,c,t,t,train\n", "empty 'e2' in row 2"),
    ],
)
def test_a_bad_table_names_its_column_or_row(tmp_path, read, text, message):
    (tmp_path / "bad.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"bad\.csv.*{message}"):
        read(tmp_path / "bad.csv")
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv is missing"):
        read(tmp_path / "nothing.csv")


GUESSED = ["0020", "007", "1.50", "1e5", "1_000", "+7", "-0", "TRUE", "False", "NA", "None", "nan"]
GUESSED += [
    "null",
    "N/A",
    "inf",
    "2024-01-02",
    "12:30",
    "5 %",
    "१२",
    "a,b",
    'a "b"',
    "a\nb",
    "#NAME?",
]


@given(st.lists(st.sampled_from(GUESSED) | st.text("01.eE+-NAa ,\"'", min_size=1), min_size=6))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_stays_text_from_the_file_to_the_prompt(tmp_path, cells):
    cells = [
        f"{k}{c.strip() or 'x'}" if k % 3 == 0 else c.strip() or "x" for k, c in enumerate(cells)
    ]
    rows = [cells[k : k + 3] for k in range(0, len(cells) - 2, 3)]
    with (tmp_path / "own.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["subject", "answer", "relation"], *rows])
    frame = facts(tmp_path / "own.csv")
    assert frame.to_numpy().tolist() == rows
    asked = single_hop(frame.assign(relation="code", answer=range(len(rows))).astype(str), shots=1)
    for row in asked.itertuples():
        assert row.prompt.endswith(f". {row.subject}'s code is")


@pytest.mark.parametrize("cell", [20, 1.5, True, None, float("nan"), " "])
def test_a_frame_whose_cells_are_no_text_is_refused(cell):
    rows = [("code", name, name) for name in "abc"]
    frame = pd.DataFrame(rows, columns=["relation", "subject", "answer"], dtype=object)
    frame.loc[1, "answer"] = cell
    with pytest.raises(ValueError, match=r"'answer' of fact 1 is .*no text"):
        single_hop(frame, shots=1)
    with pytest.raises(ValueError, match=r"'e3' of fact 1 is .*no text"):
        two_hop_prompts(two_hop_facts().head(3).astype(object).assign(e3=frame["answer"]))


# ---------------------------------------------------------------- TwoHop as published

PUBLISHED = (
    ",id,e1_label,e2_label,e3_label,e1_aliases,e2_aliases,e3_aliases,"
    "e2_type,e3_type,r1_type,r2_type,r1_template,r2_template,source_prompt\n"
    "0,0,Mozart,Anna,Leopold,\"['M']\",\"['Anna Maria', 'A']\",[],"
    "human,human,mother,spouse,the mother of {},the spouse of {},p\n"
)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The file in the folder BACKATTN_DATASETS."""
    path = tmp_path / "twohop" / "two_hop.csv"
    path.parent.mkdir()
    path.write_text(PUBLISHED)
    monkeypatch.setenv("BACKATTN_DATASETS", str(tmp_path))
    return path


def test_twohop_is_read_from_a_folder_and_asked_in_every_wording(published):
    row = published_two_hop().iloc[0]
    named = (row["e1"], row["e2"], row["e3"], row["pair"], row["e2_aliases"])
    assert named == ("Mozart", "Anna", "Leopold", "human-mother-spouse", "Anna Maria")
    question = TEMPLATES["of"].say(row["e1"], row["r1"], row["r2"])
    assert question == "The spouse of the mother of Mozart is"
    more = [("Bach", "Elisabeth", "Ambrosius"), ("Verdi", "Luigia", "Carlo"), ("Liszt", "Ann", "A")]
    line, text = PUBLISHED.splitlines()[1].replace("\"['Anna Maria', 'A']\"", "[]"), PUBLISHED
    for e1, e2, e3 in more:
        text += line.replace("Mozart", e1).replace("Anna", e2).replace("Leopold", e3) + "\n"
    published.write_text(text)
    for wording in TEMPLATES:
        asked = two_hop_prompts(published_two_hop(), wording)
        assert len(asked) == 2
        for row in asked.itertuples():
            spans = (row.two_hop[slice(*span)] for span in (row.e1_span, row.r1_span, row.r2_span))
            found = [text.lower() for text in spans]
            assert found == [row.e1.lower(), "the mother of", "the spouse of"]


def test_twohop_of_another_form_is_refused(published):
    for old, new, message in (
        ("mother of {}", "mother of", r"row 2: the template 'the mother of' must have the slot"),
        ("e3_label", "e3", "lacks column 'e3_label'"),
    ):
        published.write_text(PUBLISHED.replace(old, new))
        with pytest.raises(ValueError, match=message):
            published_two_hop()


def test_twohop_is_fetched_once_and_must_stay_the_same(tmp_path, monkeypatch, published):
    monkeypatch.delenv("BACKATTN_DATASETS")
    monkeypatch.setattr("companion.questions.facts.CACHE", tmp_path / "cache")
    file = replace(module.TWO_HOP, url=(tmp_path / "nowhere.csv").as_uri())
    monkeypatch.setattr(module, "TWO_HOP", file)
    with pytest.raises(OSError, match="set BACKATTN_DATASETS to that folder"):
        published_two_hop()
    assert os.listdir(tmp_path) == ["twohop"]
    monkeypatch.setattr(module, "TWO_HOP", replace(file, url=published.as_uri()))
    assert len(published_two_hop()) == 1
    (tmp_path / "cache" / "datasets" / "twohop" / "two_hop.csv").write_text(PUBLISHED + "\n")
    with pytest.raises(ValueError, match="another sha256"):
        published_two_hop()


def test_a_file_of_one_s_own_needs_no_split_and_no_aliases(tmp_path):
    names = ["pair", "e1", "r1", "e2", "r2", "e3", "type2", "type3"]
    two_hop_facts()[names].head(9).to_csv(tmp_path / "mine.csv", index=False)
    mine = two_hop_facts(str(tmp_path / "mine.csv"))
    assert len(mine) == 9 and mine[["shortcut", "e2_aliases", "e3_aliases"]].eq("").all(axis=None)
    with pytest.raises(FileNotFoundError, match=r"other\.csv is missing\.$"):
        facts(tmp_path / "other.csv")
    with pytest.raises(FileNotFoundError, match="comes with the repository"):
        facts(paths.DATA / "other.csv")
    (tmp_path / "semicolons.csv").write_text("relation;subject;answer\nr;s;a\n")
    with pytest.raises(ValueError, match="Put commas between cells"):
        facts(tmp_path / "semicolons.csv")
