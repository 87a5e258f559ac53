"""The tokens with which all prompts begin can run once for all."""

import torch

from backattn.models.next_token import next_log_probs
from backattn.models.tokens import encode


def test_a_shared_beginning_changes_nothing(tiny):
    model, tokenizer = tiny
    rests = ("France's capital is", "My old friend Anna's is", "A b")
    prompts = [f"Spain's capital is Madrid. {rest}" for rest in rests]
    batch = encode(tokenizer, prompts, side="left")
    shared = next_log_probs(model, batch, share=True)
    assert torch.allclose(next_log_probs(model, batch), shared, atol=1e-4)
