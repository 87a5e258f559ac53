"""Hooks edit what they are to, on each side."""

import torch
from conftest import PROMPTS

from backattn.models.activations import capture
from backattn.models.decoder import describe
from backattn.models.hooks import hooks
from backattn.models.tokens import encode


def test_hook_functions_can_edit_on_every_side(llama):
    model, tokenizer = llama
    batch, block = encode(tokenizer, PROMPTS[:1]), describe(model).blocks[1]
    plain = capture(model, batch, detail=False).logits

    def in_arguments(args, kwargs):
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 1.0}

    for target, side, edit in (
        (block.module, "input", lambda x: x + 1.0),
        (block.get("attention"), "output", lambda x: x + 1.0),
        (block.result("ffn"), "output", lambda x: x + 1.0),
        (block.get("attention"), "arguments", in_arguments),
        (block.get("attention"), "whole output", lambda output: (output[0] + 1.0, *output[1:])),
    ):
        with hooks((target, side, edit)):
            changed = capture(model, batch, detail=False).logits
        assert not torch.allclose(changed, plain, atol=1e-3)
        with hooks((target, side, lambda *_: None)):  # nothing returned: nothing changed
            assert torch.equal(capture(model, batch, detail=False).logits, plain)
