"""Shared fixtures."""

import pandas as pd
import pytest
import torch

from backattn import load_model, runtime
from backattn.models.devices import weight_bytes
from backattn.models.tiny import tiny_names
from companion.questions.datasets import DATASETS, Dataset
from companion.runs.as_asked import _folded
from companion.runs.perform import trained_weights, with_adapter
from companion.runs.run import Run, data_hash
from companion.runs.store import Store

runtime.use_threads()
PROMPTS = [
    "France's capital is",
    "The mother of Anna was born in Tokyo and lives in the",
    "Mozart's mother is",
]


def same(model, other) -> bool:
    """Whether two models have the same weights."""
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for (_, a), b in pairs)


@pytest.fixture(scope="session", params=tiny_names())
def tiny(request):
    """(model, tokenizer) of every supported family, random weights."""
    return load_model(request.param)


@pytest.fixture(scope="session")
def llama():
    return load_model("tiny-llama")


@pytest.fixture(autouse=True)
def _alone():
    """No test knows what another drew or called a dataset."""
    torch.manual_seed(0)
    data_hash.cache_clear()
    _folded.cache_clear()


@pytest.fixture(scope="session")
def smollm2():
    """The embedded default model, fetched on first use."""
    return load_model("smollm2")


@pytest.fixture
def folder(tmp_path):
    """The tiny Llama as saved in a folder."""
    for part in load_model("tiny-llama"):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def spread(folder, tmp_path, monkeypatch):
    """The saved model, half of which fits into memory: the rest is on the disk until it is used."""
    monkeypatch.setattr("backattn.models.load.CACHE", tmp_path)
    whole = weight_bytes(load_model("tiny-llama")[0].config, torch.float32)
    monkeypatch.setattr(runtime, "free_bytes", lambda device="cpu": whole)  # MEMORY_SHARE of it
    return load_model(folder)


FACTS = [
    ("Bach", "mother", "Anna", "city", "Rome"),
    ("Mozart", "father", "Leo", "capital", "Paris"),
]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A run of back attention on eight questions, with weights that are not zero, and its store."""
    rows = [
        (f"{e1}{k}", r1, f"{e2}{k}", r2, e3) for k, (e1, r1, e2, r2, e3) in enumerate(FACTS * 60)
    ]
    frame = pd.DataFrame(rows, columns=["e1", "r1", "e2", "r2", "e3"]).assign(
        pair="made", tested=True
    )
    prompt = frame["e1"] + "'s " + frame["r1"] + "'s " + frame["r2"] + " is"
    frame = frame.assign(
        prompt=prompt,
        answer=" " + frame["e3"],
        group=frame["e2"],
        e2_aliases="",
        e3_aliases="",
        shortcut="",
    )
    monkeypatch.setitem(DATASETS, "facts", Dataset("facts", lambda: frame, judge="first token"))
    run = Run("facts", "back attention", 0, 0.01, 2, "tiny-llama", 1, 4, 4, 12, 8, 8, "float32")
    store = Store(tmp_path, shipped=None)
    with with_adapter(run, "float32") as (model, _):
        for name, p in model.updates.named_parameters():
            torch.nn.init.normal_(p, std=0.2 if name[2] in "qk" else 0.5)
        store.keep(run, {"run": {}}, trained_weights(model))
    return run, store
