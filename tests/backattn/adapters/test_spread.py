"""Adapters on models that one place cannot hold."""

import pandas as pd
import torch

from backattn import (
    BackAttentionConfig,
    BackAttentionModel,
    get_back_attention_model,
    load_model,
)
from backattn.adapters.arms import make_arm
from backattn.training import loop
from backattn.training.batches import numbers
from backattn.training.loop import Recipe

PROMPT = "Mozart 's mother 's father is"


def test_back_attention_on_a_spread_model_is_the_same(spread, tmp_path):
    model, tokenizer = spread
    whole, _ = load_model("tiny-llama")
    outs, states, made = [], [], []
    batch = tokenizer([PROMPT], return_tensors="pt")
    places = torch.arange(batch["input_ids"].shape[1])[None]
    for base in (whole, model):
        torch.manual_seed(0)
        wrapped = get_back_attention_model(base, BackAttentionConfig(1, dim=8))
        torch.nn.init.normal_(wrapped.updates["1"].o_proj.weight, std=0.3)
        first = wrapped.first_pass_states(batch["input_ids"], batch["attention_mask"], places)
        out = wrapped(**batch, position_ids=places, first_pass=first).logits
        out.sum().backward()
        outs.append(
            (wrapped(**batch, use_cache=False).logits, out, wrapped.updates["1"].q_proj.weight.grad)
        )
        states.append(first)
        made.append(wrapped.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0))
        wrapped.save_pretrained(
            tmp_path / "adapter"
        )  # the hash of the unembedding is that of the whole model
        wrapped.unload()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*outs, strict=True))
    assert torch.equal(*states) and torch.equal(*made)
    BackAttentionModel.from_pretrained(whole, tmp_path / "adapter").unload()


def test_an_arm_is_trained_on_a_spread_model(spread):
    model, tokenizer = spread
    items = numbers(
        tokenizer, pd.DataFrame({"prompt": ["one plus two is"] * 4, "answer": [" 3"] * 4})
    )
    wrapped = make_arm("back attention", model, 1, 4)
    curve = loop.train(wrapped, items, Recipe(8, 0.01, batch_size=2), items, keep_first_passes=1.0)
    wrapped.unload()
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0]
