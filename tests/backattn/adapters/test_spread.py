"""Adapters on models that one place cannot hold."""

import pandas as pd
import torch

from backattn import BackAttentionConfig, BackAttentionModel, get_back_attention_model, load_model
from backattn.adapters.arms import make_arm
from backattn.models.tokens import encode
from backattn.training import loop
from backattn.training.batches import numbers
from backattn.training.loop import Recipe

PROMPT = "Mozart 's mother 's father is"


def test_back_attention_on_a_spread_model_is_the_same(spread, tmp_path):
    (model, tokenizer), (whole, _), outs = spread, load_model("tiny-llama"), []
    batch = encode(tokenizer, [PROMPT]).inputs
    for base in (whole, model):
        torch.manual_seed(0)
        wrapped = get_back_attention_model(base, BackAttentionConfig(1, dim=8))
        torch.nn.init.normal_(wrapped.updates["1"].o_proj.weight, std=0.3)
        first = wrapped.first_pass_states(**batch)
        out = wrapped(**batch, first_pass=first).logits
        out.sum().backward()
        gradient, plain = wrapped.updates["1"].q_proj.weight.grad, wrapped(**batch).logits
        made = wrapped.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
        outs.append((plain, out, gradient, first, made))
        wrapped.save_pretrained(tmp_path / "adapter")  # the unembedding's hash is the whole's
        wrapped.unload()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*outs, strict=True))
    BackAttentionModel.from_pretrained(whole, tmp_path / "adapter").unload()


def test_an_arm_is_trained_on_a_spread_model(spread):
    model, tokenizer = spread
    frame = pd.DataFrame({"prompt": ["one plus two is"] * 4, "answer": [" 3"] * 4})
    items = numbers(tokenizer, frame)
    wrapped = make_arm("back attention", model, 1, 4)
    curve = loop.train(wrapped, items, Recipe(8, 0.01, batch_size=2), items, keep_first_passes=1.0)
    wrapped.unload()
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0]
