from dataclasses import replace

import numpy as np
import pytest
import torch

from backattn import load_model
from backattn.adapters.arms import make_arm
from backattn.training.evaluation import evaluate
from backattn.training.loop import train
from companion.questions.datasets import AGAIN, DATASETS, PLANTED
from companion.runs.as_asked import questions
from companion.runs.perform import (
    answer_test,
    forward_flops,
    load_trained,
    own_text,
    put_weights,
    train_and_test,
    with_adapter,
)
from companion.runs.plans import _keeps_weights, sweep
from companion.runs.run import Run
from companion.runs.store import answers_right


def test_a_run_is_kept_and_not_made_twice(tiny_run, store, monkeypatch):
    runs = [tiny_run, replace(tiny_run, arm="zero-shot", steps=0)]
    sweep(runs, store)
    results = [store.result(run) for run in runs]
    assert [result["run"]["arm"] for result in results] == ["back attention", "zero-shot"]
    assert [result["trained"] for result in results] == [4 * 32 * 4, 0]
    assert set(store.weights(tiny_run)) == {f"updates.1.{n}_proj.weight" for n in "qkvo"}
    monkeypatch.setattr("companion.runs.perform.with_adapter", lambda *a: pytest.fail("made twice"))
    assert train_and_test(tiny_run, store)["right"] == results[0]["right"]


def test_kept_weights_give_the_kept_answers(mixed_run, store):
    result = train_and_test(mixed_run, store)
    assert set(result["right"]) == {"0", "1"}
    with load_trained(mixed_run, store) as (model, tok):
        again = answer_test(mixed_run, model, tok, questions(mixed_run, tok, "test"))
    assert (again == answers_right(result)).all()
    with with_adapter(mixed_run, "float32") as (model, tok):
        assert not evaluate(model, questions(mixed_run, tok, "test"))[0].any()  # untrained
    narrow = with_adapter(replace(mixed_run, dim=2), "float32")
    with narrow as (model, _), pytest.raises(ValueError, match="another"):
        put_weights(model, store.weights(mixed_run))


def test_a_run_that_diverges_is_a_result(tiny_run, store, monkeypatch):
    def diverging(*_, **__):
        raise FloatingPointError("lower the learning rate")

    monkeypatch.setattr("companion.runs.perform.train", diverging)
    assert train_and_test(tiny_run, store)["diverged"] == "lower the learning rate"
    assert set(store.result(tiny_run)) == {"run", "diverged"}


def test_a_run_that_tries_a_learning_rate_never_sees_the_test(tiny_run, store, monkeypatch):
    monkeypatch.setattr("companion.runs.perform.answer_test", lambda *a: pytest.fail("tested"))
    result = train_and_test(replace(tiny_run, test_items=0), store)
    assert "right" not in result and 0 <= result["validation"] <= 1
    assert result["validation_loss"] > 0


def test_a_run_is_tested_in_its_dtype(tiny_run, store, monkeypatch):
    def answer(run, model, *_):
        assert model.dtype == torch.bfloat16
        return np.array([True])

    monkeypatch.setattr("companion.runs.perform.answer_test", answer)
    assert train_and_test(replace(tiny_run, tested_in="bfloat16"), store)["right"] == "1"
    assert store.result(tiny_run) is None


@pytest.mark.parametrize("capability, dtype", [("AVX2", "float32"), ("AVX512", "bfloat16")])
def test_a_processor_without_bf16_trains_in_fp32(tiny_run, store, monkeypatch, capability, dtype):
    """Its result says so, and its key is the same."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    seen, run = [], replace(tiny_run, dtype="bfloat16")

    def watched(model, *args, **options):
        seen.append(next(model.base_model.parameters()).dtype)
        return train(model, *args, **options)

    monkeypatch.setattr("companion.runs.perform.train", watched)
    result = train_and_test(run, store)
    assert seen == [getattr(torch, dtype)]
    assert result.get("trained_in", "bfloat16") == dtype and store.result(run) == result


def test_planted_memories_are_exchanged_in_the_test(store):
    sizes = dict(train_items=40, validation_items=4, test_items=20, batch_size=4, steps=6)
    run = Run(PLANTED[0], "back attention", model="tiny-llama", source_layer=1, dim=4, **sizes)
    run = replace(run, learning_rate=0.05, tested_in="float32")
    result, weights = train_and_test(run, store), store.weights(run)
    assert len(result["right_exchanged"]) == len(result["right"]) > 0
    with with_adapter(run, "float32") as (model, tokenizer):
        put_weights(model, weights)
        own, other = (questions(replace(run, dataset=name), tokenizer, "test") for name in PLANTED)
        assert own.prompts == other.prompts and own.memories != other.memories
        exchanged = evaluate(model, other)[0]
    assert result["right_exchanged"] == "".join(map(str, exchanged.astype(int)))
    assert "right_exchanged" not in train_and_test(replace(run, dataset=PLANTED[1]), store)
    assert not _keeps_weights(run)


def test_memory_layers_of_a_run_are_read(tiny_run):
    run = replace(tiny_run, memory_layers=(3, 4))
    with with_adapter(run, "float32") as (model, _):
        assert model.memory_layers == (3, 4)
    bias = with_adapter(replace(run, arm="bias"), "float32")
    with pytest.raises(ValueError, match="no memory"), bias:
        pass


def test_operations_are_counted_by_hand():
    """Of a layer of the tiny Llama, attention's scores and sums included."""
    model, _ = load_model("tiny-llama")
    time, width, heads, kv, head, ffn = 7, 32, 4, 2, 8, 48
    linear = width * heads * head * 2 + 2 * width * kv * head + 3 * width * ffn
    layer = 2 * time * linear + 2 * 2 * heads * time * time * head
    total = 4 * layer + 2 * width * model.config.vocab_size
    ids = torch.arange(5, 5 + time)[None]
    counted = forward_flops(model, ids)
    assert counted in (total, total + time * head)  # older transformers multiply rotary angles
    wrapped = make_arm("back attention", model, 1, 4)
    states, dim = 4, 4
    update = 2 * time * width * dim * (2 + 2 * states) + 2 * 2 * time * time * states * dim
    assert forward_flops(wrapped, ids) == counted + 3 * layer + update


def test_the_same_layer_reads_the_exchanged_memory(store):
    """An arm whose memory can be exchanged is asked with it, not with its own a second time."""
    sizes = dict(train_items=8, validation_items=4, test_items=20, batch_size=4, steps=1)
    run = Run(AGAIN[0], "same layer", model="tiny-llama", source_layer=1, dim=4, **sizes)
    run = replace(run, learning_rate=0.05, tested_in="float32")
    assert "right_exchanged" in train_and_test(run, store)
    with with_adapter(run, "float32") as (model, tokenizer):
        put_weights(model, store.weights(run))
        names = (AGAIN[0], DATASETS[AGAIN[0]].exchanged)
        own, other = (questions(replace(run, dataset=name), tokenizer, "test") for name in names)
        assert own.prompts == other.prompts and own.memories is None
        assert len(other.memories) == len(other.prompts)
        assert evaluate(model, own)[1] != evaluate(model, other)[1]  # mean losses
        bias = questions(replace(run, arm="bias", dataset=names[1]), tokenizer, "test")
    assert bias.memories is None


@pytest.mark.parametrize("arm", ["back attention", "LoRA q,v"])
def test_ordinary_text_is_the_frozen_models_own(arm):
    model, tokenizer = load_model("tiny-llama")
    tokenizer.bos_token_id = 1
    wrapped = make_arm(arm, model, 1, 4)
    for p in wrapped.parameters():
        if p.requires_grad:  # an adapter that would say something else
            torch.nn.init.normal_(p)
    text = own_text(wrapped, tokenizer, seed=0, windows=3, length=6)
    tokenizer.bos_token_id, tokenizer.eos_token_id = None, 2  # GPT-2, Qwen
    assert set(own_text(wrapped, tokenizer, 0, windows=2, length=3)[:, 0].tolist()) == {2}
    assert text.shape == (3, 6) and set(text[:, 0].tolist()) == {1}
    model = wrapped.unload()
    torch.manual_seed(0)
    begins = torch.full((3, 1), 1)
    count = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "top_k": 0}
    assert torch.equal(text, model.generate(begins, do_sample=True, **count))
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="this tokenizer marks none"):
        own_text(wrapped, tokenizer, seed=0)


def test_a_run_may_keep_to_what_the_model_writes(tiny_run, store, monkeypatch):
    seen = []
    text = torch.ones(4, 5, dtype=torch.long)
    monkeypatch.setattr("companion.runs.perform.own_text", lambda *a: seen.append(a[2]) or text)
    kept = replace(tiny_run, kl=1.0)
    assert kept.key != tiny_run.key and kept.recipe.kl == 1.0
    assert train_and_test(kept, store)["trained"] and seen == [kept.seed]
