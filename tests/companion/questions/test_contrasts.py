"""Pairs of prompts: what differs, what is right, and that no group both scores and evaluates."""

import re

import numpy as np
import pandas as pd
import pytest

from backattn import load_model
from companion.questions import contrasts
from companion.questions.contrasts import TASKS, drawn, fit, pairs_of


@pytest.mark.parametrize("task", TASKS)
def test_every_pair_differs_and_has_two_answers(task):
    frame = TASKS[task]()
    assert list(frame.columns) == ["prompt", "other", "right", "wrong", "group"]
    assert (frame["prompt"] != frame["other"]).all() and (frame["right"] != frame["wrong"]).all()
    assert len(frame) >= 700 and not frame.isna().any().any()
    pd.testing.assert_frame_equal(frame, TASKS[task]())  # drawn the same each time


def test_the_indirect_object_is_named_once_and_the_counterfactual_asks_for_the_other():
    for row in contrasts.indirect_object().itertuples():
        right, wrong = row.right.strip(), row.wrong.strip()
        names = re.findall(r"\w+", row.prompt)
        assert names.count(right) == 1 and names.count(wrong) == 2
        names = re.findall(r"\w+", row.other)
        assert names.count(right) == 2 and names.count(wrong) == 1
        assert row.group == "|".join(sorted((right, wrong)))
    first = [
        row.prompt.find(row.right.strip()) < row.prompt.find(row.wrong.strip())
        for row in contrasts.indirect_object().itertuples()
    ]
    assert 0.4 < np.mean(first) < 0.6


def test_the_right_year_is_later_and_any_year_is_on_the_counterfactual():
    for row in contrasts.greater_than().itertuples():
        begins, again = (int(re.findall(r"\d{4}", x)[0][2]) for x in (row.prompt, row.other))
        assert int(row.wrong) < begins < int(row.right) and again == 0 < int(row.wrong)
        assert row.prompt.endswith(re.findall(r"\d{4}", row.prompt)[0][:2])


def test_the_verb_agrees_with_the_subject_and_not_with_what_stands_beside_it():
    for row in contrasts.agreement().itertuples():
        plural = row.group + "s" in row.prompt.split()
        assert row.right == (" are" if plural else " is")
        assert (row.group + "s" in row.other.split()) != plural


def test_facts_are_asked_against_another_answer():
    for task in ("capitals", "two-hop"):
        frame = TASKS[task]()
        answers = dict(zip(frame["prompt"], frame["right"], strict=True))
        both = frame[frame["other"].isin(answers)]
        assert len(both) > 500 and (both["other"].map(answers) == both["wrong"]).all()


def test_pairs_that_fit_are_preferred_and_of_equal_length(monkeypatch):
    model, tokenizer = load_model("tiny-llama")
    monkeypatch.setattr(contrasts, "ASKED", 60)
    monkeypatch.setattr(contrasts, "ENOUGH", 5)
    frame = fit(model, tokenizer, "agreement")
    assert 5 <= len(frame) < 65  # as soon as there are enough
    pairs = pairs_of(tokenizer, frame)
    assert len(pairs) == len(frame) and (pairs.right != pairs.wrong).all()


def test_what_scores_does_not_evaluate():
    frame = pd.DataFrame({"group": np.repeat(np.arange(90), 4), "prompt": np.arange(360)})
    for seed in range(3):
        parts = drawn(frame, seed)
        assert len(parts["score"]) == 100 and len(parts["evaluate"]) == 200
        assert not set(parts["score"]["group"]) & set(parts["evaluate"]["group"])
    assert not drawn(frame, 0)["score"].equals(drawn(frame, 1)["score"])
    with pytest.raises(ValueError, match="too few"):
        drawn(frame.head(290), 0)
