"""Second turns without training: the one that changes nothing, the choice, what is kept."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from companion.measures import second_turns
from companion.measures.second_turns import (
    Turn,
    best_turns,
    kept_turns,
    right_after,
    turn_answers,
    turns_for,
)
from companion.runs.as_asked import asked, questions
from companion.runs.perform import base_model
from companion.runs.run import Run
from companion.runs.store import Store, answers_right

RUN = Run("two-hop", "zero-shot", test_items=12)


def test_a_turn_of_no_step_answers_as_the_model_does():
    model, tokenizer = base_model("smollm2")
    frame, items = asked(RUN, "test"), questions(RUN, tokenizer, "test")
    right = right_after(Turn("damped loop", 6, 9, 0.0), model, tokenizer, frame, items)
    assert (right == answers_right(Store().result(replace(RUN, test_items=300)))[:12]).all()
    rows = second_turns.second_turns(model, tokenizer, RUN, "test", turns_for(30)[::20])
    kept = kept_turns().query("split == 'test' and seed == 0")
    for row in rows.itertuples():  # two of those that come with the repository, again
        fits = (kept[["arm", "begin", "end", "how"]] == list(row[1:5])).all(axis=1)
        assert kept.loc[fits, "right"].item()[:12] == row.right


def test_all_turns_were_tried_on_all_questions():
    kept = kept_turns()
    lengths = kept.assign(n=kept["right"].str.len()).groupby(["split", "seed"])["n"]
    assert lengths.nunique().eq(1).all() and lengths.first().tolist() == [143, 196, 97, 144]
    for _, part in kept.groupby(["split", "seed"]):
        assert {Turn(*row) for row in part.iloc[:, :4].itertuples(index=False)} == set(
            turns_for(30)
        )


def test_the_best_on_validation_is_what_is_tested(answers_of):
    rows = [("validation", 0, 0.5, "0011"), ("validation", 0, 1.0, "0111")]
    rows += [("test", seed, how, f"{how > 0.5:d}0") for seed in (0, 1) for how in (0.5, 1.0)]
    turns = pd.DataFrame(rows, columns=["split", "seed", "how", "right"])
    turns = turns.assign(arm="damped loop", begin=6, end=9)
    turns["accuracy"] = [right.count("1") / len(right) for right in turns["right"]]
    assert best_turns(turns) == {"damped loop": Turn("damped loop", 6, 9, 1.0)}
    usual = answers_of(np.zeros((2, 2)), arm="zero-shot")
    made = turn_answers(turns, usual)
    assert made["right"].tolist() == [1, 0, 1, 0] and set(made["arm"]) == {"damped loop"}
    with pytest.raises(ValueError, match="4 answers were kept for 6 questions"):
        turn_answers(turns, answers_of(np.zeros((2, 3)), arm="zero-shot"))


@pytest.mark.parametrize("layers", [4, 12, 18, 30, 80])
def test_settings_fit_a_model_of_any_depth(layers):
    for turn in turns_for(layers):
        assert 0 <= turn.begin < layers and turn.begin < turn.end
        assert turn.end < layers or (turn.arm == "realigned" and turn.end == layers)


def test_the_question_is_realigned_and_not_what_stands_before_it(monkeypatch):
    model, tokenizer = base_model("smollm2")
    run, seen = Run("in context", "zero-shot", test_items=4), []

    def see(model, tokenizer, prompts, positions, **_):
        seen.extend(zip(prompts, positions, strict=True))
        return [torch.zeros(len(prompts))]

    monkeypatch.setattr(second_turns, "realign", see)
    second_turns.second_turns(model, tokenizer, run, "test", [Turn("realigned", 6, 30, 0)])
    for prompt, place in seen:
        told = tokenizer.decode(tokenizer(prompt)["input_ids"][: place + 1])
        assert told.count(".") == prompt.count(".")  # all facts stand before it
    with pytest.raises(ValueError, match="zero-shot"):
        second_turns.second_turns(model, tokenizer, replace(run, arm="few-shot"), "test", [])
