"""Small runs on made-up questions."""

from dataclasses import replace

import numpy as np
import pytest

from companion.questions.datasets import DATASETS, Dataset, one_digit_composite
from companion.runs.run import Run
from companion.runs.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs", shipped=None)


@pytest.fixture
def tiny_run(monkeypatch):
    words = one_digit_composite().assign(prompt="one plus two is", answer=" 3")
    monkeypatch.setitem(DATASETS, "tiny", Dataset("tiny", lambda: words))
    return Run("tiny", "back attention", 0, 0.01, 6, "tiny-llama", 1, 4, 4, 12, 8, 8, "float32")


@pytest.fixture
def mixed_run(tiny_run, monkeypatch):
    """A run that gets some questions right and some wrong, and none before training."""
    frame = one_digit_composite()
    two, one = np.arange(len(frame)) % 2 == 1, np.arange(len(frame)) % 3 > 0
    prompts = np.where(two, "two plus ", "five plus ") + np.where(one, "one is", "three is")
    frame = frame.assign(prompt=prompts, answer=np.where(two, " 3", " 6"))
    monkeypatch.setitem(DATASETS, "mixed", Dataset("mixed", lambda: frame))
    monkeypatch.setattr("companion.runs.perform.perplexity", lambda *a: 1.0)
    sizes = {"learning_rate": 0.05, "steps": 40, "train_items": 64, "test_items": 16}
    return replace(tiny_run, dataset="mixed", **sizes)
