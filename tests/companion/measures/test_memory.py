"""Another memory, and the question that a prompt ends with."""

import pytest
import torch

from backattn.training.evaluation import align_to_length
from companion.measures.memory import mean_of_others, question_spans


def test_memory_is_counted_from_the_end():
    memory = torch.arange(5.0)[None, :, None]
    by_length = {3: [2, 3, 4], 5: [0, 1, 2, 3, 4], 7: [0, 0, 0, 1, 2, 3, 4]}
    for length, expected in by_length.items():
        assert align_to_length(memory, length).flatten().tolist() == expected


def test_the_mean_leaves_a_question_itself_out():
    draw = torch.Generator().manual_seed(0)
    memory = [torch.randn(2, length, 3, generator=draw) for length in (4, 4, 6)]
    means = mean_of_others(memory)
    assert torch.allclose(means[0], (memory[1] + memory[2][:, 2:]) / 2, atol=1e-6)
    first, second = (torch.cat([x[:, :1].expand(-1, 2, -1), x], dim=1) for x in memory[:2])
    assert torch.allclose(means[2], (first + second) / 2, atol=1e-6)


def test_spans_are_those_of_the_question_where_facts_come_before_it():
    facts = "Tom's country is Chad. Ann's country is Peru. "
    asks = "Ann's country's capital is"
    spans = question_spans(facts + asks, "Ann", "country", "capital")
    inside = {name: (begin - len(facts), end - len(facts)) for name, (begin, end) in spans.items()}
    assert inside == {"e1_span": (0, 3), "r1_span": (6, 13), "r2_span": (16, 23)}
    with pytest.raises(ValueError, match="does not end with"):
        question_spans("What is the capital of Ann's country?", "Ann", "country", "capital")
