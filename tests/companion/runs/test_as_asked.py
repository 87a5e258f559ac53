from dataclasses import replace

import pytest

from companion.questions.datasets import DATASETS, Dataset, load, one_digit_composite
from companion.questions.splits import split
from companion.runs.as_asked import questions, test_groups
from companion.runs.perform import train_and_test

test_groups.__test__ = False  # it is no test


def test_worked_examples_come_from_training_only(tiny_run, llama):
    run = replace(tiny_run, dataset="1DC", arm="few-shot")
    plain = questions(replace(run, arm="zero-shot"), llama[1], "test").prompts[0]
    shown = questions(run, llama[1], "test").prompts[0]
    assert len(shown) > 4 * len(plain) and shown[-len(plain) + 1 :] == plain[1:]
    frame = split(load("1DC"), run.fold)
    examples = [f"{part}=" for part in llama[1].decode(shown).split("=")[:-2]]
    trained = set(frame.loc[frame["split"] == "train", "prompt"])
    assert all(example.split(". ")[-1].strip() in trained for example in examples)


def test_results_on_a_published_dataset_can_be_read_without_it(tiny_run, store, monkeypatch):
    frame = one_digit_composite().assign(prompt="one plus two is", answer=" 3", group="text 7")
    frame["split"] = ["train", "validation", "test"] * 2187
    svamp = DATASETS["SVAMP"]
    monkeypatch.setitem(DATASETS, "SVAMP", replace(svamp, load=lambda: frame))
    run = replace(tiny_run, dataset="SVAMP")
    train_and_test(run, store)
    monkeypatch.setitem(DATASETS, "SVAMP", replace(svamp, load=lambda: pytest.fail("loaded")))
    assert test_groups(replace(run), store.result(run)).tolist() == ["text 7"] * 8


def test_only_arms_that_read_a_memory_are_given_one(tiny_run, llama):
    run = replace(tiny_run, dataset="two-hop, planted")
    told = questions(replace(run, arm="back attention"), llama[1], "test")
    same = questions(replace(run, arm="same layer"), llama[1], "test")
    assert same.memories == told.memories
    other = questions(replace(run, arm="residual LoRA"), llama[1], "test")
    assert other.memories is None and other.prompts == told.prompts
    assert len(told.memories) == len(told) and told.memories[0] != told.prompts[0]


@pytest.mark.parametrize("judge", ["number", "first token"])
def test_an_answer_without_its_space_is_refused(tiny_run, llama, monkeypatch, judge):
    frame = load("1DC").assign(answer=lambda x: x["answer"].str.strip())
    monkeypatch.setitem(DATASETS, "bare", Dataset("bare", lambda: frame, judge=judge))
    with pytest.raises(ValueError, match="does not begin with a space"):
        questions(replace(tiny_run, dataset="bare"), llama[1], "train")


def test_a_dataset_tries_rates_on_its_own_questions():
    assert Dataset("mine", one_digit_composite).tuned_on == "mine"
    assert DATASETS["2-digit"].tuned_on == "1DC"
