"""Models that one place cannot hold."""

import pytest
import torch
from conftest import PROMPTS, same

from backattn import load_model, logit_flow
from backattn.models.devices import in_one_place
from backattn.models.load import _spread_options
from backattn.models.packaged import ModelLoadError


def test_a_model_that_does_not_fit_is_spread_and_says_so(folder, request, capsys):
    model, _ = request.getfixturevalue("spread")
    assert "its layers are spread over" in capsys.readouterr().err
    assert {"cpu", "disk"} == set(model.hf_device_map.values()) and not in_one_place(model)
    assert any(p.is_meta for p in model.parameters())


def test_several_processes_do_not_each_spread_a_model(spread, monkeypatch):
    two = type("State", (), {"num_processes": 2})
    monkeypatch.setattr("backattn.runtime.process_state", two)
    with pytest.raises(ModelLoadError, match="start one process alone"):
        _spread_options("llama", spread[0].config, torch.float32, "cpu")


def test_logit_flow_refuses_a_spread_model(spread):
    with pytest.raises(ValueError, match="load it whole"):
        logit_flow(*spread, PROMPTS[:1], ["Paris"])


def test_a_model_that_fits_is_whole(folder):
    model, _ = load_model(folder)
    assert in_one_place(model)
    assert same(model, load_model(folder, device="auto")[0])
