"""What a model says to prompts, and whom it names."""

import warnings

import numpy as np
import pandas as pd
import pytest

from backattn.models.next_token import next_log_probs
from backattn.models.tokens import encode
from companion.questions.asking import answerable, ask, candidates, outcome, score
from companion.questions.facts import facts
from companion.questions.prompts import single_hop


def test_score_agrees_with_asking_one_by_one(llama):
    model, tokenizer = llama
    prompts = single_hop(facts(), per_relation=4)
    for row in score(model, tokenizer, prompts, batch_size=7).itertuples():
        logs = next_log_probs(model, encode(tokenizer, [row.prompt]))[0]
        assert row.log_prob == pytest.approx(logs[row.answer_id].item(), abs=1e-4)
        assert row.correct == (logs.argmax().item() == row.answer_id)


def test_answerable_is_what_the_first_token_can_tell():
    scored = pd.DataFrame({"relation": "r", "correct": [True, True, True, False]})
    scored = scored.assign(shared=[False, True, False, False], tokens=[1, 1, 2, 1])
    assert len(answerable(scored)) == 1
    with pytest.raises(ValueError, match="answers none"):
        answerable(scored.assign(correct=False))
    with pytest.raises(ValueError, match="set is empty"):
        ask(None, None, pd.Series([], dtype=str), pd.Series([], dtype=str))


def test_the_paper_notebook_has_its_two_hundred_prompts(smollm2):
    """What notebook 01 rests on: 200 known prompts over at least four relations (a third here)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = answerable(score(*smollm2, single_hop(facts(), per_relation=40)))
    assert known["relation"].nunique() >= 4
    assert len(known) >= 200 / 3
    assert np.isfinite(known["log_prob"]).all()


class Words:
    """A tokenizer of one token per word, to make collisions by hand."""

    def __init__(self):
        self.known = {}

    def __call__(self, text, add_special_tokens=False):
        ids = [self.known.setdefault(word, len(self.known)) for word in text.split()]
        return {"input_ids": ids}


def test_collisions_are_found_and_aliases_cleaned():
    words = Words()
    rows = [  # e1, e2, e3, e3_aliases, shortcut
        ("Milan", "Italy", "New Rome", "Eternal|Berlin|Tokyo City", ""),  # an answer, and like one
        ("Lyon", "France", "New Paris", "", ""),  # begins like New Rome
        ("Munich", "Germany", "Berlin", "", ""),
        ("Osaka", "Tokyo Land", "Tokyo", "", ""),  # e2 begins like its own e3
        ("Bergen", "Norway", "Oslo", "", "Oslo"),  # same as e3: no outcome of its own
    ]
    frame = pd.DataFrame(rows, columns=["e1", "e2", "e3", "e3_aliases", "shortcut"])
    found = candidates(words, frame.assign(r1="country", r2="capital", e2_aliases=""))
    assert found["collides"].tolist() == [True, True, False, True, False]
    first = {words.known[word] for word in ("New", "Eternal", "Berlin")}  # not Tokyo City
    assert found["e3_ids"][0] == first
    assert found["shortcut_ids"][4] == frozenset()


def test_outcomes():
    ids = {"e3": {1, 2}, "e2": {3}, "shortcut": set(), "e1": {4}}
    assert [outcome(token, ids) for token in (2, 3, 4, 9)] == ["e3", "e2", "e1", "other"]


def test_a_prompt_without_a_key_is_refused(llama):
    prompts = pd.Series(["one", "two"])
    with pytest.raises(ValueError, match="has no key"):
        ask(*llama, prompts, pd.Series(["a", None]))


def test_lists_are_asked_like_columns(llama):
    prompts, keys = ["France's capital is", "Spain's capital is"], ["a", "a"]
    said, _ = ask(*llama, prompts, keys)
    assert (said == ask(*llama, pd.Series(prompts), pd.Series(keys))[0]).all()
    with pytest.raises(ValueError, match="2 prompts and 1 keys"):
        ask(*llama, prompts, keys[:1])
