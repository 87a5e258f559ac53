"""Prompts and answers as token ids."""

import warnings

import pytest
import torch

from backattn.models.tokens import answer_ids, encode


@pytest.mark.parametrize("prompts", [[], [""], ["  "], ["fine", ""], [3]])
def test_encode_refuses_empty_or_wrong_prompts(llama, prompts):
    with pytest.raises(ValueError, match=r"empty|no words|strings"):
        encode(llama[1], prompts)


def test_answers_may_be_words_or_token_ids(llama):
    tokenizer = llama[1]
    paris, rome = answer_ids(tokenizer, ["Paris", "Rome"], 2)
    assert tokenizer.decode([paris]) == " Paris"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ids in ([paris, rome], torch.tensor([paris, rome]), ["Paris", rome]):
            assert answer_ids(tokenizer, ids, 2) == [paris, rome]
        assert answer_ids(tokenizer, 0, 1) == [0]


@pytest.mark.parametrize("answer", [-1, 10**6, True, 1.5, None, ""])
def test_an_answer_that_is_no_word_and_no_token_is_refused(llama, answer):
    with pytest.raises(ValueError, match=r"no token id|no text|empty"):
        answer_ids(llama[1], [answer], 1)
