from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

from backattn import load_model
from companion.runs import run as module
from companion.runs.perform import train_and_test
from companion.runs.run import Run, located


def test_keys_tell_runs_apart_and_defaults_do_not_count(tiny_run):
    @dataclass(frozen=True)
    class Later(Run):
        more: int = 1

    changes = {"seed": 1, "arm": "bias", "learning_rate": 0.1, "steps": 7, "tested_in": "bfloat16"}
    changes |= {"memory_layers": (3, 4)}
    others = [replace(tiny_run, **{name: value}) for name, value in changes.items()]
    assert len({run.key for run in [tiny_run, *others]}) == 7
    assert Later(**asdict(tiny_run)).key == tiny_run.key != Later(**asdict(tiny_run), more=2).key


def test_other_weights_in_a_folder_or_a_hub_are_another_run(tiny_run, folder, store, monkeypatch):
    run = replace(tiny_run, arm="zero-shot", model=str(folder), steps=0, learning_rate=0)
    first, weights = train_and_test(run, store), folder / "model.safetensors"
    assert store.result(run) == first
    model, _ = load_model(folder)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    before, size = run.key, weights.stat().st_size
    model.save_pretrained(folder)
    assert weights.stat().st_size == size and run.key != before and store.result(run) is None
    assert train_and_test(run, store)["perplexity"] != first["perplexity"]  # not a kept model
    (folder / ".lock").write_text("")  # decides nothing
    assert store.result(run) is not None
    keys = set()
    for commit in ("a" * 40, "b" * 40):
        module._commit.cache_clear()
        path = f"cache/snapshots/{commit}/config.json"
        monkeypatch.setattr(module, "cached_file", lambda *_, path=path: path)
        keys.add(replace(tiny_run, model="some/model").key)
    assert len(keys) == 2
    module._commit.cache_clear()


def test_a_folder_has_one_name_and_must_hold_a_model(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "smollm2").mkdir()
    for name in ("model", "./model", "../" + tmp_path.name + "/model", "link", str(folder)):
        assert located(name, tmp_path) == str(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert located("~/model", Path("/")) == str(folder)
    for name in ("smollm2", "tiny-llama", "meta-llama/Llama-3.1-8B"):
        assert located(name, tmp_path) == name
    for name in ("./nothing", "/nothing", "~/nothing", "."):
        with pytest.raises(ValueError, match="is no folder with a model"):
            located(name, tmp_path)
