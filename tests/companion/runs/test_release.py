"""What is published of adapters loads again, and its card says what its test found."""

import importlib.util
import zipfile

import pytest
import torch

from backattn import BackAttentionModel, load_model
from companion import paths
from companion.runs.perform import load_trained
from companion.runs.store import Store


@pytest.fixture
def release():
    spec = importlib.util.spec_from_file_location("release", paths.ROOT / "data/build_release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_adapter_is_loaded_again_and_says_the_same(release, kept, tmp_path):
    run, store = kept
    ids = torch.arange(5)[None]
    with load_trained(run, store) as (wrapped, _), torch.no_grad():
        expected = wrapped(ids, use_cache=False).logits
    result = {"right": "1101", "perplexity": 12.4}
    made = release.publish(run, result, store, tmp_path, "https://example.org")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "there")
    folder = tmp_path / "there" / made.stem
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "3 of 4 test questions" in card and "perplexity is 12 " in card.replace("\n", " ")
    model, _ = load_model("tiny-llama")
    again = BackAttentionModel.from_pretrained(model, folder)
    with torch.no_grad():
        assert torch.allclose(again(ids, use_cache=False).logits, expected, atol=1e-6)
    again.unload()


def test_one_adapter_of_each_model_and_dataset_is_published(release):
    runs = [run for run, _ in release.released(Store())]
    assert {("smollm2", "two-hop"), ("gemma3-270m", "two-hop")} <= {
        (run.model, run.dataset) for run in runs
    }
    assert len({(run.model, run.dataset) for run in runs}) == len(runs)
