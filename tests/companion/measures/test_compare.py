"""Arms compared on a stranger's questions: what is dropped is said, what cannot be is refused."""

import json

import numpy as np
import pandas as pd
import pytest

from backattn.models.load import load_model
from companion import paths
from companion.measures.compare import MOST_TRIED, _register, compare, positive_control, prepared
from companion.questions.datasets import DATASETS
from companion.questions.facts import two_hop_facts
from companion.questions.prompts import TEMPLATES
from companion.questions.splits import FOLDS, split
from companion.runs.store import Store

WORDS = ("Paris", "Rome", "Berlin", "Madrid")
SMALL = {"model": "tiny-llama", "source_layer": 1, "dim": 4, "steps": 4, "batch_size": 4}


@pytest.fixture(autouse=True)
def _forgotten():
    """What `compare` registers is gone after the test."""
    before = dict(DATASETS)
    yield
    DATASETS.clear()
    DATASETS.update(before)


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("tiny-llama")[1]


def frame(count: int = 60, **columns) -> pd.DataFrame:
    rows = [(f"thing {k} is", WORDS[k % 4], f"g{k // 2}") for k in range(count)]
    return pd.DataFrame(rows, columns=["prompt", "answer", "group"]).assign(**columns)


def why(dropped: pd.DataFrame) -> dict[str, int]:
    return {w: n for w, n in dropped.itertuples(index=False) if n}


def left_out(dropped: pd.DataFrame) -> dict[str, int]:
    told = why(dropped)
    assert told.pop("for validation, never tested") > 0
    return told


def test_one_call_gives_every_table(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.runs.perform.perplexity", lambda *a: 1.0)
    store = Store(tmp_path / "runs", shipped=None)
    found = compare(frame(), ["back attention", "same layer"], store=store, **SMALL)
    arms = {"zero-shot", "few-shot", "back attention", "same layer"}
    assert set(found.accuracies["arm"]) == arms
    by = found.accuracies.query("answers == 'all'").set_index("arm")
    parts = found.accuracies.query("answers != 'all'").groupby("arm")["n"].sum()
    assert parts.to_dict() == by["n"].to_dict() and by["seeds"].eq(FOLDS).all()
    assert found.differences["other"].tolist() == ["same layer", "zero-shot", "few-shot"]
    assert found.memory["n"].item() == by.loc["back attention", "n"]
    assert set(found.rates["arm"]) == {"back attention", "same layer"}
    for rates in found.rates.itertuples():  # bracketed, or all that may be tried
        assert not rates.at_edge or len(rates.tried) == MOST_TRIED
    assert set(why(found.dropped)) == {"for validation, never tested"}
    finished = sorted(store.folder.rglob("result.json"))
    again = compare(frame(), ["back attention", "same layer"], store=store, **SMALL)
    assert again.accuracies.equals(found.accuracies)
    assert finished == sorted(store.folder.rglob("result.json"))
    assert [path.stem for path in found.save(tmp_path / "out")] == [
        *("accuracies", "differences", "memory", "control", "dropped", "rates")
    ]


def test_the_exchange_sees_flow_where_there_is_some():
    control = positive_control()
    assert control["reads"].eq("flow").all() and len(control) == 2
    assert (control["low"] > 0.02).all()


def test_a_file_keeps_its_text_and_numbers_are_judged_as_written(tmp_path, tokenizer):
    rows = [f"item {k} costs,{price}" for k, price in enumerate(["-50", "150", "7", "007"] * 15)]
    path = tmp_path / "my.csv"
    path.write_text("\n".join(["prompt,answer", *rows]) + "\n", encoding="utf-8")
    questions, judge, dropped = prepared(path, tokenizer, memory=False)
    assert judge == "number" and not left_out(dropped)
    assert questions["answer"].unique().tolist() == [" -50", " 150", " 7", " 007"]
    assert (questions["group"] == questions["prompt"]).all()


def test_what_is_dropped_is_said(tokenizer):
    odd = pd.DataFrame(
        [
            ("thing 0 is", "Paris", "g0"),  # again
            ("what is it", None, "x"),
            ("  ", "Paris", "x"),
            ("sky is", "Rome", "y"),
            ("sky is", "Berlin", "y"),
            ("a ball is", "Parisian", "z"),
        ],
        columns=["prompt", "answer", "group"],
    )
    questions, judge, dropped = prepared(pd.concat([frame(), odd]), tokenizer)
    told = left_out(dropped)
    assert judge == "first token" and told["no prompt or no answer"] == 2
    assert (told["asked twice"], told["one prompt, several answers"]) == (1, 2)
    assert len(questions) == len(frame()) + len(odd) - sum(told.values())


@pytest.mark.parametrize(
    "questions, message",
    [
        (frame().drop(columns="answer"), "lack column 'answer'"),
        (frame(4), "too few"),
        (frame(group="one"), "too few"),
        (frame().iloc[:0], "too few"),
        (frame(answer=1.5), "floats"),
        (frame(answer=["1.50", "2"] * 30), "Decimals cannot be judged"),
        (frame().rename(columns={"group": "Groups"}), "no 'group': rename it"),
        (frame(answer=["United States", "United Kingdom"] * 30), "one letter or a space: 60"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(questions, message, tmp_path):
    store = Store(tmp_path / "runs", shipped=None)
    with pytest.raises(ValueError, match=message):
        compare(questions, store=store, **SMALL)
    assert not store.folder.exists()


def test_a_column_that_is_not_read_is_named(tokenizer):
    with pytest.warns(UserWarning, match="'note' is not read"):
        prepared(frame(note="mine"), tokenizer)


def test_a_setting_must_be_known(tmp_path):
    with pytest.raises(ValueError, match="no setting 'stepz'; choose of dataset"):
        compare(frame(), store=Store(tmp_path, shipped=None), stepz=3)


@pytest.mark.parametrize(
    "arms, message", [(["magic"], "There is no arm 'magic'; choose of"), ([], "No arm is given")]
)
def test_an_arm_must_be_known(tmp_path, arms, message):
    with pytest.raises(ValueError, match=message):
        compare(frame(), arms, store=Store(tmp_path, shipped=None), **SMALL)


def test_no_question_reads_its_own_memory_as_another_s(tokenizer):
    """Else an exchange would change nothing, and show no flow where there is some."""
    kinds = ["alike" if k % 4 == 0 else "others" for k in range(60)]  # all alike answer Paris
    questions, _, dropped = prepared(frame(kind=kinds), tokenizer)
    assert left_out(dropped) == {"no other memory to read": 15}
    assert set(questions["kind"]) == {"others"}
    told = DATASETS[f"{_register(questions, 'first token', True)}, another's memory"].load()
    assert (told["memory"] != told["prompt"]).all()
    assert len(prepared(frame(kind=kinds), tokenizer, memory=False)[0]) == 60


def test_numbers_that_a_test_would_cut_are_left_out(tokenizer):
    long = frame(answer=["1234567", "-12345678"] * 30)
    questions, judge, dropped = prepared(long, tokenizer, memory=False)
    assert judge == "number" and set(questions["answer"]) == {" 1234567"}
    assert left_out(dropped) == {"number of more than 7 characters": 30}


@pytest.mark.parametrize("between", ["|", " | ", "| ", " |"])
def test_no_name_of_a_group_is_in_training_and_in_the_test(tokenizer, between):
    groups = [f"n{k % 20}{between}m{k % 9}" for k in range(180)]
    questions, *_ = prepared(frame(180, group=groups), tokenizer, memory=False)
    for fold in range(FOLDS):
        _apart(split(questions, fold))


def test_a_question_in_two_groups_is_held_out_by_both(tokenizer):
    once = frame(120)
    twice = once.head(60).assign(group=[f"g{59 - k // 2}" for k in range(60)])
    questions, _, dropped = prepared(pd.concat([once, twice]), tokenizer, memory=False)
    assert why(dropped)["asked twice"] == 60 and len(questions) == 120
    assert questions["group"].iloc[0] == "g0|g59"
    for fold in range(FOLDS):
        _apart(split(questions, fold))


def _apart(parts: pd.DataFrame) -> None:
    names = parts.assign(name=parts["group"].str.split("|")).explode("name")
    assert names.groupby("name")["split"].nunique().max() == 1


def test_a_question_without_a_group_is_one_by_itself(tokenizer, tmp_path):
    some = frame(group=["g", "", None, "  "] * 15)
    some.to_csv(tmp_path / "some.csv", index=False)
    for questions in (some, tmp_path / "some.csv"):
        made, *_ = prepared(questions, tokenizer, memory=False)
        alone = made["group"] == made["prompt"]
        assert alone.sum() == 45 and set(made.loc[~alone, "group"]) == {"g"}


def test_an_answer_that_begins_with_a_bare_letter_is_left_out(tokenizer):
    assert tokenizer.tokenize(" yellow")[0] == "Ġ"
    words = ["Paris", "Rome", "Berlin", "yellow"] * 15
    questions, _, dropped = prepared(frame(answer=words), tokenizer, memory=False)
    assert left_out(dropped) == {"answer begins with one letter or a space": 15}
    assert " yellow" not in set(questions["answer"])


def test_a_number_reads_the_memory_of_one_as_long(tokenizer):
    sums = [(f"{'so ' * (k % 3)}{k} and {k % 4} make", str(k + k % 4)) for k in range(240)]
    questions = pd.DataFrame(sums, columns=["prompt", "answer"])
    questions, judge, _ = prepared(questions, tokenizer)
    told = DATASETS[f"{_register(questions, judge, True)}, another's memory"].load()
    answer = told["memory"].str.split().str[-1]
    assert (answer.str.len() == told["answer"].str.strip().str.len()).all()
    assert (answer != told["answer"].str.strip()).all()


def test_the_other_memory_is_of_the_same_fold(tokenizer):
    groups = [f"n{k % 40}|m{k % 23}" for k in range(400)]
    questions, judge, _ = prepared(frame(400, group=groups), tokenizer)
    told = DATASETS[f"{_register(questions, judge, True)}, another's memory"].load()
    for fold in range(FOLDS):
        parts = split(told, fold)
        test = set(parts.loc[parts["split"] == "test", "prompt"])
        assert test and {p for p in told.set_index("prompt").loc[list(test), "memory"]} <= test


def test_memories_can_be_exchanged_after_a_comparison_without(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.runs.perform.perplexity", lambda *a: 1.0)
    store, arms = Store(tmp_path, shipped=None), ["back attention"]
    without = compare(frame(), arms, memory=False, store=store, **SMALL)
    assert without.memory.empty and without.control.empty
    assert len(compare(frame(), arms, store=store, **SMALL).memory) == 1
    with pytest.raises(ValueError, match="named twice"):
        compare(frame(), arms * 2, store=store, **SMALL)


def test_rates_are_chosen_where_no_kind_of_validation_is_taught(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.runs.perform.perplexity", lambda *a: 1.0)
    kinds = [f"g{k // 2}" for k in range(60)]
    store = Store(tmp_path, shipped=None)
    compare(frame(kind=kinds), ["bias"], memory=False, store=store, **SMALL)
    results = [json.loads(path.read_text()) for path in store.folder.rglob("result.json")]
    tried = [result["validation"] for result in results if "validation" in result]
    assert tried and np.isfinite(tried).all()


def test_the_example_on_the_page_is_one(smollm2):
    file, page = paths.ROOT / "docs/example.csv", paths.ROOT / "docs/your_own_data.md"
    facts = two_hop_facts().query("pair == 'city-country-continent'").groupby("e2").head(3)
    facts = facts[facts["e2"].isin(facts["e2"].drop_duplicates().head(48))]
    asked = [TEMPLATES["possessive"].say(*row) for row in facts[["e1", "r1", "r2"]].to_numpy()]
    questions, judge, dropped = prepared(file, smollm2[1])
    assert questions["prompt"].tolist() == asked and not left_out(dropped)
    assert questions["answer"].str.strip().tolist() == facts["e3"].tolist()
    assert judge == "first token" and questions["group"].tolist() == facts["e2"].tolist()
    assert f"{len(questions)} questions about cities of {questions['group'].nunique()} " in (
        page.read_text(encoding="utf-8")
    )
    assert "".join(file.open(encoding="utf-8").readlines()[:4]) in page.read_text(encoding="utf-8")
