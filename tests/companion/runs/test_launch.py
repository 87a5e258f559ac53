"""What training takes is said before."""

from dataclasses import replace

import pytest
import torch

from backattn import BackAttentionConfig, get_back_attention_model, load_model, runtime
from backattn.models.tiny import TINY
from backattn.training.evaluation import FirstPasses
from companion.runs import launch
from companion.runs.as_asked import questions
from companion.runs.launch import _timed, estimate
from companion.runs.plans import adapter_runs, found, main_runs, tried

CPU = torch.device("cpu")


def test_an_estimate_counts_what_is_unfinished(store, monkeypatch):
    monkeypatch.setattr(runtime, "multiplies_bf16", lambda device: True)
    plan = main_runs("tiny-llama", ["1DC"], ["1DC"], source_layer=1, dim=4, steps=4)
    first = estimate(plan, store)
    assert first.runs == 6 * 3 + 8 * 3 and first.seconds > 0  # arms × rates, and × seeds
    model, tokenizer = load_model("tiny-llama")
    assert first.weights == (2 + 4) * model.num_parameters()  # trained on in bf16, tested in fp32
    wrapped = get_back_attention_model(model, BackAttentionConfig(1, 4))
    run = next(one.run for one in plan if one.run.arm == "back attention")
    states = FirstPasses.gigabytes(wrapped, questions(run, tokenizer, "train"))
    wrapped.unload()
    assert first.states == pytest.approx(states * 2**30 / 2, rel=0.01)
    half = [replace(one, run=replace(one.run, tested_in="bfloat16"), trials=()) for one in plan]
    assert estimate(half, store).weights == 2 * model.num_parameters()
    while waiting := [run for run in tried(plan, store) if store.result(run) is None]:
        for run in waiting:  # the lowest rate does best: there are more to try than at first
            store.keep(run, {"validation": 0.5, "validation_loss": run.learning_rate}, {})
    assert estimate(plan, store).runs == 8 * 3
    for run in found(plan, store):
        store.keep(run, {"validation": 0.5}, {})
    assert estimate(plan, store).runs == 0


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_timed_and_more_layers_need_more(name, tiny_run):
    config = load_model(name)[0].config
    one, two, three = (_timed(config, layers, tiny_run, 8, CPU) for layers in (1, 2, 3))
    assert min(three) > 0 and one[2] < two[2] < three[2]
    assert three[2] - two[2] == pytest.approx(two[2] - one[2], rel=0.1)


def test_the_launcher_says_what_it_takes_and_stops(folder, monkeypatch, capsys):
    seen = {}

    def plan(model, **sizes):
        seen.update(sizes)
        return adapter_runs(model, ["1DC"], ["bias"], **sizes)

    monkeypatch.setattr(launch, "main_runs", plan)
    options = ["--dtype", "bfloat16", "--device", "cpu", "--source-layer", "2", "--estimate"]
    assert launch.main(["--model", str(folder), *options]) == 0
    assert seen == {"source_layer": 2, "dim": 64, "steps": 100, "tested_in": "bfloat16"}
    said = capsys.readouterr().out
    assert "12 runs to make" in said and "GiB are free, so that it fits" in said


def test_a_folder_without_a_model_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.main(["--model", "./nothing"])
    assert stopped.value.code == 2 and "no folder with a model" in capsys.readouterr().err
