from dataclasses import replace

import pytest
import torch

from backattn import BackAttentionConfig, get_back_attention_model, load_model
from backattn.models.tiny import TINY
from backattn.training.evaluation import FirstPasses
from companion.runs import launch
from companion.runs.as_asked import questions
from companion.runs.estimate import _timed, estimate
from companion.runs.plans import adapter_runs, found, main_runs, tried


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch):
    monkeypatch.setattr("companion.runs.estimate.REPEATS", 1)


def test_an_estimate_counts_what_is_unfinished(store):
    sizes = {"source_layer": 1, "dim": 4, "steps": 4}
    plan = main_runs("tiny-llama", ["1DC"], ["1DC"], **sizes)
    first = estimate(plan, store)
    assert first.runs == 6 * 3 + 8 * 3 and first.seconds > 0  # arms × rates, and × seeds
    model, tokenizer = load_model("tiny-llama")
    assert first.weights == (2 + 4) * model.num_parameters()  # trained on in bf16, tested in fp32
    wrapped = get_back_attention_model(model, BackAttentionConfig(1, 4))
    run = next(one.run for one in plan if one.run.arm == "back attention")
    states = FirstPasses.gigabytes(wrapped, questions(run, tokenizer, "train"))
    wrapped.unload()
    assert first.states == pytest.approx(states * 2**30 / 2, rel=0.01)
    while waiting := [run for run in tried(plan, store) if store.result(run) is None]:
        for run in waiting:  # the lowest rate does best: there are more to try than at first
            store.keep(run, {"validation": 0.5, "validation_loss": run.learning_rate}, {})
    assert estimate(plan, store).runs == 8 * 3
    for run in found(plan, store):
        store.keep(run, {"validation": 0.5}, {})
    assert estimate(plan, store).runs == 0


def test_a_batch_of_more_layers_needs_more():
    model, _ = load_model("tiny-llama")
    about = (3, 8, 4, torch.device("cpu"), torch.float32)
    one, two, three = (_timed(model.config, layers, *about)[2] for layers in (1, 2, 3))
    assert one < two < three and three - two == pytest.approx(two - one, rel=0.1)


@pytest.mark.parametrize("name", TINY)
def test_every_family_can_be_timed_at_another_depth(name):
    model, _ = load_model(name)
    assert min(_timed(model.config, 3, 2, 6, 4, torch.device("cpu"), torch.float32)) > 0


def test_the_launcher_says_what_it_takes_and_stops(tmp_path, monkeypatch, capsys):
    model, tokenizer = load_model("tiny-llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    seen = {}

    def plan(model, **sizes):
        seen.update(sizes)
        return adapter_runs(model, ["1DC"], ["bias"], **sizes)

    monkeypatch.setattr(launch, "main_runs", plan)
    options = ["--dtype", "bfloat16", "--device", "cpu", "--source-layer", "2", "--estimate"]
    assert launch.main(["--model", str(tmp_path / "model"), *options]) == 0
    assert seen == {"source_layer": 2, "dim": 64, "steps": 100, "tested_in": "bfloat16"}
    said = capsys.readouterr().out
    assert "12 runs to make" in said and "GiB are free, so that it fits" in said


def test_an_unpackaged_model_counts_its_copies(store):
    plan = adapter_runs("tiny-llama", ["1DC"], ["bias"], source_layer=1, dim=4, steps=4)
    size = load_model("tiny-llama")[0].num_parameters()
    for tested_in, copies in (("float32", 2 + 4), ("bfloat16", 2)):
        runs = [replace(one, run=replace(one.run, tested_in=tested_in)) for one in plan]
        runs = [replace(one, trials=()) for one in runs]
        assert estimate(runs, store).weights == copies * size
