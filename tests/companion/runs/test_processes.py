"""Runs under `accelerate launch`."""

import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

SHARED = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from backattn import runtime
from backattn.training.loop import _Batches
from companion.questions import datasets
from companion.runs import perform
from companion.runs.as_asked import questions
from companion.runs.plans import sweep
from companion.runs.run import Run
from companion.runs.store import Store

frame = datasets.one_digit_composite().assign(prompt="one plus two is", answer=" 3")
datasets.DATASETS["tiny"] = datasets.Dataset("tiny", lambda: frame)
perform.perplexity = lambda *_: 1.0
run = Run("tiny", "back attention", 0, 0.01, 6, "tiny-llama", 1, 4, 4, 12, 8, 8, "float32")
world, folder = runtime.process_state(), Path(sys.argv[1])
with perform.with_adapter(run, "float32") as (model, tokenizer):
    items = questions(run, tokenizer, "train")
    torch.nn.init.normal_(model.updates["1"].o_proj.weight)  # else three of four gradients are zero
    weights = [p for p in model.parameters() if p.requires_grad]
    _Batches(model, items, run.recipe, None).gradients([1, 2, 5, 7], weights)
    if world.is_main_process:
        folder.mkdir()
        torch.save([p.grad for p in weights], folder / "gradients.pt")
runs = [run, replace(run, arm="zero-shot", steps=0), replace(run, learning_rate=1e30)]
store = Store(folder, shipped=None)
sweep(runs, store)
made = sum(store.result(run) is not None for run in runs)
(folder / f"said-{world.process_index}").write_text(f"{world.num_processes} {made}")
"""
SEVERAL = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
SEVERAL += " --mixed_precision no --dynamo_backend no"


def test_two_processes_train_together(tmp_path):
    (tmp_path / "runs.py").write_text(SHARED)
    results, said = {}, {}  # said: "processes, finished runs", as each process sees it
    for name, how in (("one", ""), ("two", SEVERAL)):
        command = [sys.executable, *how.split(), tmp_path / "runs.py", tmp_path / name]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        said[name] = [path.read_text() for path in sorted((tmp_path / name).glob("said-*"))]
        files = sorted((tmp_path / name).rglob("result.json"))
        results[name] = {path.parent.name: pd.read_json(path, typ="series") for path in files}
    assert said == {"one": ["1 3"], "two": ["2 3", "2 3"]}
    alone, shared = (torch.load(tmp_path / name / "gradients.pt") for name in said)
    assert min(g.abs().max() for g in alone) > 1e-4
    torch.testing.assert_close(shared, alone, rtol=1e-3, atol=1e-6)
    assert results["one"].keys() == results["two"].keys() and len(results["one"]) == 3
    for key, one in results["one"].items():
        other = results["two"][key]
        assert ("diverged" in one) == ("diverged" in other)
        if "curve" in one:
            assert one["right"] == other["right"] and len(one["curve"]) == len(other["curve"])
            for row, same in zip(one["curve"], other["curve"], strict=True):
                assert row["losses"] == pytest.approx(same["losses"], abs=2e-4)
