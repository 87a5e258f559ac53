"""A gain in two parts, on logits that are made up and on a tiny model."""

import numpy as np
import pandas as pd
import pytest
import torch

from companion.measures import closed_set
from companion.measures.memory import last_logits
from companion.questions.prompts import TEMPLATES
from companion.runs.as_asked import questions
from companion.runs.perform import load_trained

FACTS = pd.DataFrame(
    {
        "r1": ["city", "city"],
        "e2": ["Rome", "Oslo"],
        "r2": ["capital", "mother"],
        "e3": ["Paris", "Anna"],
        "e3_aliases": ["Lutetia", ""],
    }
).assign(e2_aliases="")


def test_first_tokens_lead_back_to_the_answer(llama):
    tokenizer = llama[1]
    tokens = closed_set.first_tokens_of(tokenizer, FACTS, "e3", "r2")
    assert set(tokens) == {"capital", "mother"} and set(tokens["capital"].values()) == {"Paris"}
    assert len(tokens["capital"]) == 2  # the alias begins otherwise


def test_type_and_choice_add_up_and_tell_kinds_from_words():
    """Raising all of C alike is the type part; raising one of them, and none but C, the choice."""
    plain, sets, own = torch.zeros(1, 20), [[3, 4, 5, 6]], [4]
    kind, word = plain.clone(), plain.clone()
    kind[0, sets[0]] += 2.0
    word[0, 4], word[0, [3, 5, 6]] = np.log(1 + 3 * 0.5), np.log(0.5)  # their sum is as it was
    before, typed, chosen = (
        closed_set.in_parts(x, sets, own, [frozenset([4, 7])]).iloc[0] for x in (plain, kind, word)
    )
    for row in (before, typed, chosen):
        assert row["type"] + row["choice"] == pytest.approx(row["log_prob"], abs=1e-6)
    assert typed["type"] > before["type"] + 1 and typed["choice"] == pytest.approx(np.log(1 / 4))
    assert chosen["type"] == pytest.approx(before["type"]) and chosen["choice"] > -0.5
    assert (chosen["closed"], before["closed"]) == (1.0, 0.0) and chosen["right"] == 1.0


def test_an_answer_that_is_none_of_them_is_refused():
    with pytest.raises(ValueError, match="Token 9 of the answer"):
        closed_set.in_parts(torch.zeros(1, 20), [[3, 4]], [9], [frozenset([9])])


def test_questions_keep_their_order(kept):
    run, store = kept
    with load_trained(run, store) as (model, tokenizer):
        items = questions(run, tokenizer, "test")
        logits = last_logits(model, items)
        with torch.no_grad():
            alone = [model(torch.tensor([prompt])).logits[0, -1] for prompt in items.prompts]
    assert torch.allclose(logits, torch.stack(alone), atol=1e-4)


def test_the_second_hop_is_asked_of_the_models_own_answer(llama):
    frame = pd.DataFrame(
        {"e1": ["Bach", "Mozart"], "r1": ["city"] * 2, "r2": ["capital", "mother"]}
    )
    asked = closed_set.asked_by_hops(*llama, frame, FACTS)
    say = TEMPLATES["possessive"].say
    names = {say(name, r2) for name in ("Rome", "Oslo") for r2 in ("capital", "mother")}
    assert len(asked) == 2 and set(asked) <= names and "mother" in asked[1]
