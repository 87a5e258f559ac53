"""Questions as token ids."""

import pandas as pd
import pytest

from backattn.training.batches import IGNORED, collate, numbers


def test_batches_are_padded_on_the_left_and_labelled_at_the_end(llama, sums):
    items = numbers(llama[1], sums)
    batch = collate(items, [0, 2])
    assert batch.attention_mask[:, -1].all()
    assert (batch.input_ids[batch.attention_mask == 0] == 0).all()
    for place, row in enumerate([0, 2]):
        labels = batch.labels[place][batch.labels[place] != IGNORED].tolist()
        assert labels == items.answers[row]
        text = batch.input_ids[place][batch.attention_mask[place].bool()].tolist()
        assert text == items.prompts[row] + items.answers[row][:-1]


def test_empty_questions_are_refused(llama, sums):
    with pytest.raises(ValueError, match="no questions"):
        numbers(llama[1], sums[:0])


@pytest.mark.parametrize("answer", [" Paris", " 1.5", " 3 apples", ""])
def test_what_is_no_number_is_refused_as_one(llama, answer):
    frame = pd.DataFrame({"prompt": ["two is"] * 2, "answer": [" 12", answer]})
    with pytest.raises(ValueError, match="is no whole number"):
        numbers(llama[1], frame)
