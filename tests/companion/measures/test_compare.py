"""Arms compared on a stranger's questions: what is dropped is said, what cannot be is refused."""

import pandas as pd
import pytest

from backattn.models.load import load_model
from companion.measures.compare import _register, compare, prepared
from companion.questions.datasets import DATASETS
from companion.questions.splits import FOLDS
from companion.runs.store import Store

COLOURS = ("red", "blue", "green", "black")
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
    rows = [(f"thing {k} is", COLOURS[k % 4], f"g{k // 2}") for k in range(count)]
    return pd.DataFrame(rows, columns=["prompt", "answer", "group"]).assign(**columns)


def why(dropped: pd.DataFrame) -> dict[str, int]:
    return {w: n for w, n in dropped.itertuples(index=False) if n}


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
    assert found.dropped["questions"].sum() == 0
    finished = sorted(store.folder.rglob("result.json"))
    again = compare(frame(), ["back attention", "same layer"], store=store, **SMALL)
    assert again.accuracies.equals(found.accuracies)
    assert finished == sorted(store.folder.rglob("result.json"))
    assert [path.stem for path in found.save(tmp_path / "out")] == [
        *("accuracies", "differences", "memory", "dropped", "rates")
    ]


def test_a_file_keeps_its_text_and_numbers_are_judged_as_written(tmp_path, tokenizer):
    rows = [f"item {k} costs,{price}" for k, price in enumerate(["-50", "150", "7", "007"] * 15)]
    path = tmp_path / "my.csv"
    path.write_text("\n".join(["prompt,answer", *rows]) + "\n", encoding="utf-8")
    questions, judge, dropped = prepared(path, tokenizer, memory=False)
    assert judge == "number" and not why(dropped)
    assert questions["answer"].unique().tolist() == [" -50", " 150", " 7", " 007"]
    assert (questions["group"] == questions["prompt"]).all()


def test_what_is_dropped_is_said(tokenizer):
    odd = pd.DataFrame(
        [
            ("thing 0 is", "red", "g0"),  # again
            ("what is it", None, "x"),
            ("  ", "red", "x"),
            ("sky is", "blue", "y"),
            ("sky is", "green", "y"),
            ("a ball is", "reddish", "z"),
        ],
        columns=["prompt", "answer", "group"],
    )
    questions, judge, dropped = prepared(pd.concat([frame(), odd]), tokenizer)
    told = why(dropped)
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
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(questions, message, tmp_path):
    store = Store(tmp_path / "runs", shipped=None)
    with pytest.raises(ValueError, match=message):
        compare(questions, store=store, **SMALL)
    assert not store.folder.exists()


@pytest.mark.parametrize(
    "arms, message", [(["magic"], "There is no arm 'magic'; choose of"), ([], "No arm is given")]
)
def test_an_arm_must_be_known(tmp_path, arms, message):
    with pytest.raises(ValueError, match=message):
        compare(frame(), arms, store=Store(tmp_path, shipped=None), **SMALL)


def test_no_question_reads_its_own_memory_as_another_s(tokenizer):
    """Else an exchange would change nothing, and show no flow where there is some."""
    kinds = ["alike" if k % 4 == 0 else "others" for k in range(60)]  # all alike answer red
    questions, _, dropped = prepared(frame(kind=kinds), tokenizer)
    assert why(dropped) == {"no other memory to read": 15} and set(questions["kind"]) == {"others"}
    told = DATASETS[f"{_register(questions, 'first token', True)}, another's memory"].load()
    assert (told["memory"] != told["prompt"]).all()
    assert len(prepared(frame(kind=kinds), tokenizer, memory=False)[0]) == 60


def test_numbers_that_a_test_would_cut_are_left_out(tokenizer):
    long = frame(answer=["1234567", "-12345678"] * 30)
    questions, judge, dropped = prepared(long, tokenizer, memory=False)
    assert judge == "number" and set(questions["answer"]) == {" 1234567"}
    assert why(dropped) == {"number of more than 7 characters": 30}
