import ast
import hashlib
import json
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest

from backattn import runtime
from backattn.adapters.arms import UNTRAINED
from companion.paths import NOTEBOOKS
from companion.questions.datasets import OTHER_PROMPTS, PLANTED
from companion.runs.perform import train_and_test
from companion.runs.plans import (
    CORE_ARMS,
    MOST_RATES,
    SEEDS,
    TRIED,
    Planned,
    adapter_runs,
    best_of,
    complete,
    composing_runs,
    found,
    kl_runs,
    lead_runs,
    main_runs,
    rival_runs,
    scratch_runs,
    ship,
    sweep,
    tried,
    varied_runs,
    wide_runs,
)
from companion.runs.plans import _keeps_weights as keeps_weights
from companion.runs.premise import premise_runs
from companion.runs.run import OWN
from companion.runs.scratch import COMPOSING_ARMS
from companion.runs.store import CHECKPOINTS, Store


def pretend(store, run, validation):
    store.keep(run, {"run": {}, "validation": validation, "validation_loss": 1.0, "right": "1"}, {})


def parameters(notebook: str) -> dict:
    path = next(NOTEBOOKS.glob(f"{notebook}_*.ipynb"))
    cells = nbformat.read(path, as_version=4).cells
    cell = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    return {
        node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body
    }


def plans(notebook: str) -> list[list[Planned]]:
    """What the notebook of a number completes."""
    p, core = parameters(notebook), {"arms": CORE_ARMS}
    if notebook == "03":
        rivals = rival_runs() + kl_runs()
        main = main_runs(every_arm_on=p["every_arm_on"], core_arms_on=p["core_arms_on"])
        gemma = adapter_runs(model="gemma3-270m", **core)
        return [scratch_runs(), main, gemma, rivals, wide_runs()]
    if notebook == "04":
        second, layers = p["second_dataset"], [("two-hop", layer) for layer in p["retuned"]]
        memories = [tuple(range(first, last + 1)) for first, last in p["memories"]]
        return [
            varied_runs("source_layer", range(30)),
            varied_runs("memory_layers", [None, *memories], ["back attention"]),
            varied_runs("source_layer", p["second_layers"], dataset=second),
            *(
                adapter_runs(names=[name], source_layer=layer, **core)
                for name, layer in [*layers, *((second, n) for n in p["second_retuned"])]
            ),
        ]
    if notebook == "06":
        at = {"source_layer": p["source_layer"], "steps": p["steps"]}
        return [
            *(adapter_runs(names=[p["dataset"]], dim=dim, **core, **at) for dim in p["dims"]),
            adapter_runs(names=[p["dataset"]], arms=["bias"], **at),
            varied_runs("dim", p["dims"], dataset=p["dataset"], **at),
            scratch_runs(SEEDS, p["scratch_widths"], p["scratch_dims"], tried_for=750),
        ]
    if notebook == "07":
        arms, memories = ["back attention", "residual LoRA"], [("two-hop", "shuffled memory")]
        memories += [(name, "back attention") for name in PLANTED]
        told = [one for name, arm in memories for one in adapter_runs(names=[name], arms=[arm])]
        return [
            [one for one in told if one.trials],
            *(varied_runs("steps", [1000], arms[:1], name) for name in PLANTED),
            lead_runs(),
            *(
                adapter_runs(source_layer=tuple(layers), dim=dim, arms=arms)
                for layers, dim in p["several"]
            ),
        ]
    if notebook == "08":
        return [composing_runs(), *map(premise_runs, OWN)]
    plan = scratch_runs([p["scratch_seed"]], [p["scratch_width"]], tried_for=750)
    other = adapter_runs(names=OTHER_PROMPTS, batch_size=16, **core)
    return [other, [one for one in plan if one.run.arm == "2 layers"]]


@pytest.mark.parametrize("notebook", ["03", "04", "06", "07", "08", "09"])
def test_shipped_runs_are_all_that_a_notebook_asks_for(notebook, tmp_path):
    """A renamed field or another default would orphan them, and notebooks would train for hours."""
    store = Store(tmp_path)
    for plan in plans(notebook):
        assert all(store.result(run) for run in tried(plan, store) + found(plan, store))


def test_shipped_weights_are_those_of_the_results(tmp_path):
    store, files = Store(tmp_path), sorted(CHECKPOINTS.iterdir())
    assert sum(path.stat().st_size for path in files) < 40e6
    for path in files:
        assert store.shipped[path.stem]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    [run] = found(plans("09")[-1], store)
    assert store.weights(run)  # the notebook reads it
    for plan in plans("08")[1:]:
        of_premise = [one for one in found(plan, store) if one.arm == "back attention"]
        assert len(of_premise) == 3 and all(store.weights(one) for one in of_premise)
    asked_again = [one for one in found(lead_runs(), store) if keeps_weights(one)]
    assert [(one.arm, one.seed) for one in asked_again] == [("back attention", 0)]
    assert store.weights(asked_again[0])  # the demo asks it again
    runs = found(plans("04")[0], store)
    assert all("losses" in row for run in runs for row in store.result(run)["curve"])


def test_wide_questions_are_answered_by_three_trainings_of_each_arm():
    plan, store = wide_runs(), Store()
    trained = [one for one in plan if one.trials]
    assert len(trained) == 27 and len({one.run.key for one in plan}) == len(plan) == 33
    by_arm = pd.Series([one.run.fold for one in trained]).groupby([one.run.arm for one in trained])
    assert all(folds.value_counts().tolist() == [3, 3, 3] for _, folds in by_arm)
    assert all(run.learning_rate for run in found(trained, store))  # those of "two-hop", shipped


def test_a_plan_is_completed_and_shipped(tiny_run, store, tmp_path, monkeypatch):
    sizes = dict(source_layer=1, dim=4, batch_size=4, train_items=8, steps=2)
    sizes |= dict(validation_items=4, test_items=4, dtype="float32")
    plan = adapter_runs("tiny-llama", ["tiny"], ["back attention", "bias"], **sizes)
    of_tiny = {"dataset": "tiny", "steps": 1}
    plan = [
        replace(one, trials=tuple(replace(trial, **of_tiny) for trial in one.trials), most=3)
        for one in plan
    ]
    runs = complete(plan, store)
    assert [run.arm for run in runs[:4]] == ["zero-shot", "few-shot", "back attention", "bias"]
    assert {run.fold for run in runs} == {0, 1, 2} and all(store.result(run) for run in runs)
    assert runs[0].dim != runs[2].dim  # the untrained are the same for every size of a trained arm
    data = tmp_path / "data"
    assert ship([plan], store, data) == 6 + 12  # 2 arms × 3 rates, 4 arms × 3 seeds
    assert len(list((data / "checkpoints").iterdir())) == 3 + 1
    shipped = Store(tmp_path / "empty", data / "runs.jsonl")
    assert ship([plan], shipped, tmp_path / "none") == 0 and not (tmp_path / "none").exists()

    monkeypatch.setattr("companion.runs.plans.CHECKPOINTS", data / "checkpoints")
    monkeypatch.setattr("companion.runs.store.CHECKPOINTS", data / "checkpoints")
    assert ship([plan], store, tmp_path / "later", weights=False) == 18 - 4
    lines = (tmp_path / "later" / "runs.jsonl").read_text().splitlines()
    keys = {json.loads(line)["key"] for line in lines}
    assert len(lines) == 18 - 4 and not (tmp_path / "later" / "checkpoints").exists()
    assert keys.isdisjoint(path.stem for path in (data / "checkpoints").iterdir())


def test_where_and_how_long_rates_are_tried():
    plan = adapter_runs(names=["two-hop", "2-digit", "SVAMP"], arms=["bias"], steps=10)
    trained = [one for one in plan if one.trials and one.run.seed == 0]
    runs = [[one.run, *one.trials] for one in trained]
    assert [[(run.dataset, run.steps) for run in each] for each in runs] == [
        [("two-hop", 10), ("two-hop", 5)],
        [("2-digit", 30), ("1DC", 15)],
        [("SVAMP", 10), ("1DC", 15)],
    ]
    assert {run.test_items for _, run in runs} == {0}
    rivals = [*rival_runs(), *kl_runs()]
    rivals = {(r.run.dataset, r.run.arm, r.run.kl, r.trials[0].kl) for r in rivals}
    assert len(rivals) == 7 and all(kl == tried for _, _, kl, tried in rivals)
    none = main_runs(core_arms_on=[])
    assert {one.run.dataset for one in none} == {"two-hop"}
    assert len(none) == len([*TRIED, *UNTRAINED]) * 3
    varied = varied_runs("source_layer", [1, 3], arms=["bias"], seed=0)
    assert [one.run.source_layer for one in varied] == [1] * 3 + [3] * 3
    assert {trial.source_layer for one in varied for trial in one.trials} == {6}


def test_another_model_is_tested_in_the_dtype_that_is_asked_for(monkeypatch):
    def dtypes(model, **sizes):
        return {one.run.tested_in for one in adapter_runs(model, **sizes)}

    assert dtypes("tiny-llama") == dtypes("smollm2") == {"float32"}
    monkeypatch.setenv(runtime.DTYPE, "bfloat16")
    assert dtypes("tiny-llama") == {"bfloat16"}
    assert dtypes("tiny-llama", tested_in="float16") == {"float16"}
    assert dtypes("smollm2") == {"float32"}  # whose results are shipped


def test_compositions_are_tuned_alike(store):
    """Each arm tries the same decays and rates, and is trained at what does best on ID/ID."""
    plan = composing_runs()
    trials = tried(plan, store)
    assert {run.arm for run in trials} == set(COMPOSING_ARMS) and len(trials) == 8 * 3 * 3
    for run in trials:
        pretend(store, run, run.weight_decay - abs(np.log(run.learning_rate / 1e-3)))
    assert tried(plan, store) == trials
    runs = found(plan, store)
    assert len(runs) == 8 * 3
    assert {(run.weight_decay, run.learning_rate) for run in runs} == {(1.0, 1e-3)}
    assert {(run.steps, run.test_items) for run in runs} == {(1600, None)}
    assert {run.recipe.weight_decay for run in runs} == {1.0}


def test_rates_go_on_while_the_best_is_at_an_end(tiny_run, store):
    plan, best = [Planned(tiny_run, (replace(tiny_run, steps=3, test_items=0),))], 6e-5
    while waiting := [run for run in tried(plan, store) if store.result(run) is None]:
        assert found(plan, store)[0].learning_rate == tiny_run.learning_rate  # not known yet
        for run in waiting:
            pretend(store, run, 1 - abs(np.log(run.learning_rate / best)))
    runs = tried(plan, store)
    rates = sorted(run.learning_rate for run in runs)
    assert rates == pytest.approx([6.25e-5, 2.5e-4, 1e-3, 4e-3]) and len(rates) == MOST_RATES
    assert found(plan, store) == [replace(tiny_run, learning_rate=rates[0])]
    assert {(run.steps, run.test_items) for run in runs} == {(3, 0)}
    store.keep(runs[-1], {"run": {}, "diverged": "the loss is nan"}, {})  # which is never the best
    assert found(plan, store)[0].learning_rate != runs[-1].learning_rate
    with pytest.raises(ValueError, match="None of 1 runs"):
        best_of(runs[-1:], store)


def test_a_plan_may_try_more_rates(tiny_run, store):
    plan = [Planned(tiny_run, (replace(tiny_run, steps=3, test_items=0),), most=6)]
    while waiting := [run for run in tried(plan, store) if store.result(run) is None]:
        for run in waiting:
            pretend(store, run, run.learning_rate)  # the higher the better
    rates = [run.learning_rate for run in tried(plan, store)]
    assert len(rates) == 6 and found(plan, store)[0].learning_rate == max(rates) == rates[-1]


def test_runs_are_made_on_a_cluster(tiny_run, store, tmp_path, monkeypatch):
    from distributed import LocalCluster

    run = replace(tiny_run, dataset="1DC")
    with monkeypatch.context() as here:
        here.setattr("companion.runs.plans.train_and_test", lambda *a: pytest.fail("made here"))
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
            here.setenv(runtime.CLUSTER, cluster.scheduler_address)
            sweep([run, replace(run, seed=1)], store)
            assert store.result(run) and store.result(replace(run, seed=1))
        for threads in (2, 1):
            sizes = {"n_workers": 1, "threads_per_worker": threads, "processes": False}
            with LocalCluster(**sizes, dashboard_address=None) as cluster:
                here.setenv(runtime.CLUSTER, cluster.scheduler_address)
                with pytest.raises(OSError, match="two workers or more"):
                    sweep([replace(run, seed=2)], store)
    again = train_and_test(run, Store(tmp_path / "again", shipped=None))
    assert again["right"] == store.result(run)["right"]
    monkeypatch.setenv(runtime.CLUSTER, "nowhere")
    with pytest.raises(OSError, match="No dask scheduler"):
        sweep([replace(tiny_run, seed=2)], store)
