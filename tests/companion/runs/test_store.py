from dataclasses import replace

import pytest

from companion.runs.perform import train_and_test
from companion.runs.store import Store


def test_shipped_results_stand_in_for_runs(tiny_run, store, tmp_path, monkeypatch):
    data = tmp_path / "data"
    checkpoint = data / "checkpoints" / f"{tiny_run.key}.safetensors"
    result = train_and_test(tiny_run, store)
    store.export([tiny_run], [tiny_run], data)
    monkeypatch.setattr("companion.runs.store.CHECKPOINTS", data / "checkpoints")
    fresh = Store(tmp_path / "elsewhere", data / "runs.jsonl")
    assert fresh.result(tiny_run)["right"] == result["right"]
    assert set(fresh.weights(tiny_run)) == set(store.weights(tiny_run))
    fresh.export([tiny_run], [], data)  # and stays what it was
    assert len((data / "runs.jsonl").read_text().splitlines()) == 1
    with pytest.raises(FileNotFoundError, match="profile full"):
        fresh.weights(replace(tiny_run, seed=5))
    checkpoint.write_bytes(b"something else")
    with pytest.raises(OSError, match="is not the file that"):
        fresh.weights(tiny_run)
