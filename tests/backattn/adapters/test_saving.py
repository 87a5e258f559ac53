"""Saved adapters: what is not whole, or not of this model, is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from backattn import BackAttentionConfig, BackAttentionModel, get_back_attention_model, load_model
from backattn.adapters.saving import CONFIG_FILE, WEIGHTS_FILE, AdapterError

CONFIG = BackAttentionConfig(1, dim=8)


@pytest.fixture
def saved(tmp_path):
    """(a free base model, the folder of its adapter)."""
    wrapped = get_back_attention_model(load_model("tiny-llama")[0], CONFIG)
    wrapped.save_pretrained(tmp_path / "adapter")
    return wrapped.unload(), tmp_path / "adapter"


def cut(weights, config):
    weights.write_bytes(weights.read_bytes()[:-100])


def no_number(weights, config):
    tensors = load_file(weights)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, weights)


def other(**options):
    def damage(weights, config):
        config.write_text(json.dumps({**json.loads(config.read_text()), **options}))

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, "damaged"),
        (lambda weights, config: weights.unlink(), "lacks adapter_model"),
        (lambda weights, config: torch.save({"a": torch.ones(1)}, weights), "damaged"),
        (lambda weights, config: config.write_text("{"), "damaged"),
        (other(peft_type="LORA"), "type 'LORA'"),
        (other(dim=4), "misshapen"),
        (other(source_layer=9), "does not fit"),
        (no_number, "not finite"),
    ],
)
def test_a_bad_folder_is_refused_and_leaves_the_model_free(saved, damage, message):
    model, folder = saved
    damage(folder / WEIGHTS_FILE, folder / CONFIG_FILE)
    with pytest.raises(AdapterError, match=message):
        BackAttentionModel.from_pretrained(model, folder)
    get_back_attention_model(model, CONFIG)


def test_another_folder_is_refused(saved):
    with pytest.raises(AdapterError, match="lacks adapter_config"):
        BackAttentionModel.from_pretrained(saved[0], saved[1] / "nowhere")


def test_saving_leaves_other_files_alone(saved):
    model, folder = saved
    (folder / "notes.txt").write_text("mine")
    BackAttentionModel.from_pretrained(model, folder).save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, "notes.txt"]
