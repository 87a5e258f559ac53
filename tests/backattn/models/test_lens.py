"""The lens reads what the model says, frozen or not."""

import numpy as np
import pytest
import torch
from conftest import PROMPTS

from backattn.models.activations import capture
from backattn.models.lens import Lens, read_states
from backattn.models.tokens import encode


@pytest.fixture(scope="module")
def stream(tiny):
    model, tokenizer = tiny
    return capture(model, encode(tokenizer, PROMPTS, side="left"))


def test_lens_of_the_last_state_is_the_models_log_softmax(stream):
    lens, last = Lens(stream.arch), stream.batch.at_last(stream.hidden[-1])
    expected = stream.logits.log_softmax(-1)
    assert torch.allclose(lens.log_probs(last), expected, atol=1e-5)
    assert torch.allclose(lens.log_probs(last, lens.scale(last)), expected, atol=1e-5)


def test_frozen_lens_is_affine_and_recomputed_lens_is_not(stream):
    lens, last = Lens(stream.arch), stream.batch.at_last(stream.hidden[-1])
    scale, middle = lens.scale(last), stream.batch.at_last(stream.hidden[2])
    whole = lens.raw_logits(last, scale)
    parts = lens.raw_logits(middle, scale) + lens.raw_logits(last - middle, scale) - lens.offset
    assert (parts - whole).norm() <= 1e-5 * whole.norm()
    assert (lens.raw_logits(2 * last) - 2 * lens.raw_logits(last)).abs().max() > 1e-3


def test_states_are_read_as_the_model_reads_its_last(tiny):
    model, tokenizer = tiny
    last = [[len(tokenizer(prompt)["input_ids"]) - 1] for prompt in PROMPTS]
    tokens = [[5, 40, 7]] * len(PROMPTS)
    logits, ranks = read_states(model, tokenizer, PROMPTS, last, tokens, ranks=True, batch_size=2)
    said = capture(model, encode(tokenizer, PROMPTS), detail=False).logits
    assert np.allclose(logits[:, 0, -1], said[:, tokens[0]], atol=1e-4)
    above = (said[:, None] > said[:, tokens[0], None]).sum(-1)
    assert np.array_equal(ranks[:, 0, -1], above)
