"""Shared fixtures."""

import pytest
import torch

from backattn import load_model, runtime
from backattn.models import tiny_names

runtime.use_threads()
PROMPTS = ["France's capital is", "The mother of Anna was born in Tokyo and lives in the", "Mozart's mother is"]


@pytest.fixture(scope="session", params=tiny_names())
def tiny(request):
    """(model, tokenizer) of every supported family, random weights."""
    return load_model(request.param)


@pytest.fixture(scope="session")
def llama():
    return load_model("tiny-llama")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2():
    """The embedded default model, fetched on first use."""
    return load_model("smollm2")
