"""Odd input and files that somebody made to do harm: nothing wrong is used."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from harm import Harm, harmful_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backattn import (
    BackAttentionConfig,
    BackAttentionModel,
    get_back_attention_model,
    load_model,
    logit_flow,
)
from backattn.adapters.arms import make_arm
from backattn.adapters.saving import AdapterError
from backattn.models.tokens import encode
from backattn.training.batches import numbers
from backattn.training.loop import Recipe, train

STRANGE = ["\u200b.", "a\u0301" * 9, "🧑‍🚀 says", "مرحبا بالعالم", "\x00\x01\x7f", "\n\n\t x"]
STRANGE += ["x" * 90, "e " * 60, "<pad>"]
ODD = st.one_of(
    st.text(min_size=1, max_size=30),
    st.sampled_from(STRANGE),
    st.binary(min_size=1, max_size=12).map(lambda raw: raw.decode("latin-1")),
).filter(str.strip)
FUZZ = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def wrapped(llama):
    """The tiny Llama with back attention whose weights are not zero."""
    model = get_back_attention_model(load_model("tiny-llama")[0], BackAttentionConfig(1, dim=8))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.updates["1"].o_proj.weight, std=0.3)
    yield model
    model.unload()


@FUZZ
@given(prompts=st.lists(ODD, min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_back_attention_takes_any_text(llama, wrapped, prompts, side):
    """Finite, and each text alone is what it is in a padded batch."""
    batch = encode(llama[1], prompts, side)
    with torch.no_grad():
        options = {"position_ids": batch.position_ids, "use_cache": False}
        together = wrapped(batch.input_ids, batch.attention_mask, **options).logits
        assert together[batch.attention_mask.bool()].isfinite().all()
        for row, prompt in enumerate(prompts):
            alone = encode(llama[1], [prompt])
            own = wrapped(alone.input_ids, alone.attention_mask, use_cache=False).logits[0, -1]
            assert torch.allclose(own, batch.at_last(together)[row], atol=2e-4)


@FUZZ
@given(prompt=ODD, count=st.integers(1, 4))
def test_cached_generation_is_recomputation_for_any_text(llama, wrapped, prompt, count):
    batch = encode(llama[1], [prompt])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    made = wrapped.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
    with torch.no_grad():
        whole = wrapped(made[:, :-1], use_cache=False).logits[0, batch.input_ids.shape[1] - 1 :]
    chosen = whole.gather(-1, made[0, batch.input_ids.shape[1] :, None])[:, 0]
    assert (whole.max(-1).values - chosen < 1e-3).all()  # what recomputation writes, or a tie


@FUZZ
@given(prompts=st.lists(ODD, min_size=1, max_size=3))
def test_logit_flow_telescopes_on_any_text(llama, prompts):
    flow = logit_flow(*llama, prompts, level="neuron", top_k=5)
    assert flow.check() <= 1e-4 and np.isfinite(flow.frame["increase"]).all()


@pytest.mark.parametrize("prompts", [[], [""], ["a", ""], [3], ["a", None], ["word " * 400]])
def test_what_is_no_prompt_or_too_long_is_refused(llama, prompts):
    with pytest.raises((ValueError, TypeError), match=r"[Pp]rompt|str|Shorten it"):
        logit_flow(*llama, prompts)


def test_a_checkpoint_that_runs_code_is_refused(llama, tmp_path):
    """As torch writes it, and as a bare pickle."""
    model, tokenizer = load_model("tiny-llama")
    wrapped = make_arm("bias", model, 1, 4)
    items = numbers(tokenizer, pd.DataFrame({"prompt": ["one plus two is"], "answer": [" 3"]}))
    checkpoint, proof = tmp_path / "training.pt", tmp_path / "harm"
    torch.save({"recipe": Harm(proof)}, checkpoint)
    whole = checkpoint.read_bytes()
    for content in (whole, pickle.dumps(Harm(proof)), whole[: len(whole) // 2], b""):
        checkpoint.write_bytes(content)
        with pytest.raises(OSError, match="was not used"):
            train(wrapped, items, Recipe(1, 0.01, batch_size=1), checkpoint=checkpoint)
    assert not proof.exists()
    wrapped.unload()


def test_adapters_made_to_do_harm_are_refused(llama, wrapped, tmp_path):
    model, _ = load_model("tiny-llama")
    proof = tmp_path / "harm"
    wrapped.save_pretrained(tmp_path / "adapter")
    for content in harmful_tensors(proof):
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(AdapterError):
            BackAttentionModel.from_pretrained(model, tmp_path / "adapter")
    assert not proof.exists()
