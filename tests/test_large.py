"""Models that one place cannot hold, training in several processes or in pieces, and what it takes before it begins."""

import os
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from backattn import (
    BackAttentionConfig,
    BackAttentionModel,
    get_back_attention_model,
    load_model,
    runtime,
)
from backattn.adapters.arms import make_arm
from backattn.models.tiny import TINY
from backattn.training import loop
from backattn.training.batches import collate, numbers
from backattn.training.evaluation import FirstPasses, answer_logits
from backattn.training.loop import Recipe, _Batches
from companion.runs import estimate, launch
from companion.runs.as_asked import questions
from companion.runs.perform import trained_weights
from companion.runs.plans import main_runs
from companion.runs.store import Store

PROMPT = "Mozart 's mother 's father is"


# ---------------------------------------------------------------- layers in several places


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


# ---------------------------------------------------------------- a batch in pieces


@pytest.fixture
def learnt():
    """Trains fresh back attention on ten questions; returns (curve, weights)."""

    def train(**options):
        torch.manual_seed(0)
        model, tokenizer = load_model("tiny-llama")
        rows = [
            (f"{a} plus {b} is", f" {n}")
            for n, (a, b) in enumerate([(a, b) for a in "12345" for b in "67"])
        ]
        items = numbers(tokenizer, pd.DataFrame(rows, columns=["prompt", "answer"]))
        wrapped = make_arm("back attention", model, 1, 4)
        curve = loop.train(wrapped, items, Recipe(10, 0.01, batch_size=6), items, **options)
        return curve, trained_weights(wrapped)

    return train


def same(one, other) -> bool:
    columns = ["step", "loss", "train", "validation"]
    pd.testing.assert_frame_equal(one[0][columns], other[0][columns], atol=1e-4)
    return all(torch.allclose(one[1][name], other[1][name], atol=1e-3) for name in one[1])


def test_a_batch_that_does_not_fit_is_taken_in_pieces(learnt, monkeypatch, capsys):
    whole, ordinary, sizes = learnt(), answer_logits, []

    def tight(model, batch, *args):
        if torch.is_grad_enabled():
            sizes.append(len(batch.input_ids))
        if len(batch.input_ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return ordinary(model, batch, *args)

    monkeypatch.setattr("backattn.training.loop.answer_logits", tight)
    monkeypatch.setattr("backattn.training.evaluation.answer_logits", tight)
    assert same(learnt(), whole)
    assert sizes[:3] == [6, 3, 2] and set(sizes[3:]) == {1, 2}  # tried once, then in four pieces
    assert "4 pieces" in capsys.readouterr().err


def gradients(pieces: int):
    """(those that a batch of six leaves, those of its mean loss)."""
    torch.manual_seed(0)
    model, tokenizer = load_model("tiny-llama")
    rows = [
        (f"{a} plus {b} is", f" {n}")
        for n, (a, b) in enumerate([(a, b) for a in "12345" for b in "67"])
    ]
    items = numbers(tokenizer, pd.DataFrame(rows, columns=["prompt", "answer"]))
    wrapped = make_arm("LoRA q,v", model, 1, 4)
    weights = [p for p in wrapped.parameters() if p.requires_grad]
    batches = _Batches(wrapped, items, Recipe(1, 0.01, batch_size=6), None)
    batches.pieces = pieces
    loss, _ = batches.gradients([0, 3, 4, 5, 8, 9], weights)
    batch = collate(items, [0, 3, 4, 5, 8, 9])
    logits = answer_logits(wrapped, batch)
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert loss == pytest.approx(mean.item(), abs=1e-5)
    return [p.grad for p in weights if p.grad is not None], torch.autograd.grad(
        mean, weights, allow_unused=True
    )


@pytest.mark.parametrize("pieces", [1, 2, 4, 6])
def test_pieces_add_up_to_the_gradient_of_the_mean_loss(pieces):
    made, whole = gradients(pieces)
    assert made and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(made, whole, strict=True))
    assert max(g.abs().max() for g in whole) > 1e-3


def test_where_not_one_question_fits_it_is_an_error(learnt, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("backattn.training.loop.answer_logits", never)
    monkeypatch.setattr("backattn.training.evaluation.answer_logits", never)
    with pytest.raises(torch.OutOfMemoryError):
        learnt()


def test_first_passes_are_kept_where_there_is_room(learnt, monkeypatch, capsys):
    roomy = learnt()
    monkeypatch.setattr(runtime, "free_bytes", lambda device="cpu": 1000)
    assert same(learnt(), roomy)
    assert "it runs each time" in capsys.readouterr().err


# ---------------------------------------------------------------- several processes

SHARED = """
import sys
from pathlib import Path
import torch
from backattn import datasets, experiments, runtime, training
frame = datasets.one_digit_composite()
frame = frame.assign(prompt="one plus two is", answer=" 3")
datasets.DATASETS["tiny"] = datasets.Dataset("tiny", lambda: frame)
experiments.perplexity = lambda *_: 1.0
run = experiments.Run("tiny", "back attention", 0, 0.01, 6, "tiny-llama", 1, 4, 4, 12, 8, 8, "float32")
with experiments.armed(run, "float32") as (model, tokenizer):
    items = experiments.questions(run, tokenizer, "train")
    torch.nn.init.normal_(model.updates["1"].o_proj.weight)  # else three of four gradients are zero
    weights = [p for p in model.parameters() if p.requires_grad]
    training._Batches(model, items, run.recipe, None).gradients([1, 2, 5, 7], weights)
    if runtime.world().is_main_process:
        Path(sys.argv[1]).mkdir()
        torch.save([p.grad for p in weights], Path(sys.argv[1]) / "gradients.pt")
runs = [run, experiments.replace(run, arm="zero-shot", steps=0), experiments.replace(run, learning_rate=1e30)]
store = experiments.Store(Path(sys.argv[1]), shipped=None)
experiments.sweep(runs, store)
world, made = runtime.world(), sum(store.result(run) is not None for run in runs)
(Path(sys.argv[1]) / f"said-{world.process_index}").write_text(f"{world.num_processes} {made}")
"""


def test_two_processes_train_together(tmp_path):
    (tmp_path / "runs.py").write_text(SHARED)
    several = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    several += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    results, said = [], []  # "processes, finished runs", as each process sees it
    for name, how in (("one", []), ("two", several)):
        command = [sys.executable, *how, str(tmp_path / "runs.py"), str(tmp_path / name)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        said.append([path.read_text() for path in sorted((tmp_path / name).glob("said-*"))])
        files = sorted((tmp_path / name).rglob("result.json"))
        results.append({path.parent.name: pd.read_json(path, typ="series") for path in files})
    assert said == [["1 3"], ["2 3", "2 3"]]
    alone, shared = (
        torch.load(tmp_path / name / "gradients.pt", weights_only=True) for name in ("one", "two")
    )
    assert min(g.abs().max() for g in alone) > 1e-4
    assert all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(alone, shared, strict=True)
    )
    assert results[0].keys() == results[1].keys() and len(results[0]) == 3
    for key, one in results[0].items():
        other = results[1][key]
        assert ("diverged" in one) == ("diverged" in other)
        if "curve" in one:
            assert one["right"] == other["right"] and len(one["curve"]) == len(other["curve"])
            for mine, theirs in zip(one["curve"], other["curve"], strict=True):
                assert mine["losses"] == pytest.approx(theirs["losses"], abs=2e-4)


def test_more_processes_than_questions_is_an_error(learnt, monkeypatch):
    class Many:
        num_processes, process_index, is_main_process = 7, 0, True

    monkeypatch.setattr(runtime, "world", Many)
    with pytest.raises(ValueError, match="7 processes cannot share a batch of 6"):
        learnt()


# ---------------------------------------------------------------- what it takes


@pytest.fixture
def sizes(monkeypatch):
    """A plan on one small dataset."""
    monkeypatch.setattr("companion.runs.estimate.REPEATS", 1)
    return {
        "every_arm_on": ["1DC"],
        "core_arms_on": ["1DC"],
        "source_layer": 1,
        "dim": 4,
        "steps": 4,
    }


def test_an_estimate_counts_what_is_unfinished(tmp_path, sizes):
    store = Store(tmp_path, shipped=None)
    told = estimate.estimate("tiny-llama", store, **sizes)
    tried, _ = main_runs(store, "tiny-llama", **sizes)
    assert told.runs > len(tried) and told.seconds > 0
    model, tokenizer = load_model("tiny-llama")
    assert told.weights == (2 + 4) * model.num_parameters()  # trained on in bf16, tested in fp32
    wrapped = get_back_attention_model(model, BackAttentionConfig(1, 4))
    run = replace(tried[0], arm="back attention")
    kept = FirstPasses.gigabytes(wrapped, questions(run, tokenizer, "train"))
    wrapped.unload()
    assert told.states == pytest.approx(kept * 2**30 / 2, rel=0.01)
    while True:  # the lowest rate does best, so that there are more to try than at first
        tried, final = main_runs(store, "tiny-llama", **sizes)
        for run in [run for run in tried if store.result(run) is None]:
            store.keep(run, {"validation": 0.5, "validation_loss": run.learning_rate}, {})
        if final:
            break
    left = estimate.estimate("tiny-llama", store, **sizes)
    assert left.runs == len({run.key for run in final}) < told.runs
    for run in final:
        store.keep(run, {"validation": 0.5}, {})
    assert estimate.estimate("tiny-llama", store, **sizes).runs == 0


def test_a_batch_of_more_layers_keeps_more(sizes):
    model, _ = load_model("tiny-llama")
    about = (3, 8, 4, torch.device("cpu"), torch.float32)
    kept = [estimate._timed(model.config, layers, *about)[2] for layers in (1, 2, 3)]
    assert kept[0] < kept[1] < kept[2] and kept[2] - kept[1] == pytest.approx(
        kept[1] - kept[0], rel=0.1
    )


@pytest.mark.parametrize("name", TINY)
def test_every_family_can_be_timed_at_another_depth(name):
    model, _ = load_model(name)
    assert min(estimate._timed(model.config, 3, 2, 6, 4, torch.device("cpu"), torch.float32)) > 0


def test_the_launcher_says_what_it_takes_and_stops(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("companion.runs.store.BUILD", tmp_path)
    monkeypatch.setenv("BACKATTN_DTYPE", "float32")
    plan = main_runs
    monkeypatch.setattr(
        "companion.runs.estimate.main_runs",
        lambda *a, **sizes: plan(*a, **{**sizes, "every_arm_on": ["1DC"], "core_arms_on": []}),
    )
    assert (
        launch.main(["--model", str(folder), "--dtype", "float32", "--device", "cpu", "--estimate"])
        == 0
    )
    said = capsys.readouterr().out
    assert "runs to make" in said and "GiB are free, so that it fits" in said
