"""Loading a folder or a tiny model, and each way in which it can go wrong."""

import json

import pytest
import torch
from conftest import same
from harm import harmful_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from backattn import load_model, runtime
from backattn.models.families import FAMILIES, UnsupportedModelError
from backattn.models.packaged import ModelLoadError
from backattn.models.tiny import TINY


def test_every_supported_family_has_a_tiny_model_of_at_least_three_layers(tiny):
    model, tokenizer = tiny
    assert {family for family, _ in TINY.values()} == set(FAMILIES)
    assert model.config.num_hidden_layers >= 3 and not model.training
    assert tokenizer.pad_token_id is not None
    vectors = [p for p in model.parameters() if p.dim() == 1]  # biases and norms are random
    assert vectors and all(p.std() > 0.01 for p in vectors)


def test_tiny_models_are_seeded_and_leave_the_callers_seed_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, tokenizer = load_model("tiny-qwen3")
    assert torch.equal(torch.rand(3), expected)
    assert same(first, load_model("tiny-qwen3")[0])
    text = "Mozart's mother — naïve 漢字 🎼"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_unknown_tiny_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="tiny-llama, tiny-mistral"):
        load_model("tiny-mamba")


def test_a_local_folder_loads(tmp_path):
    model, tokenizer = load_model("tiny-gemma3")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokens = load_model(str(tmp_path))
    assert same(model, again)
    assert tokens("Paris")["input_ids"] == tokenizer("Paris")["input_ids"]


def test_an_unsupported_family_is_named_with_the_supported_ones_before_weights_are_read(tmp_path):
    with pytest.raises(ModelLoadError, match=r"neither a local folder with config.json.*smollm2"):
        load_model(tmp_path)
    AutoConfig.for_model("opt", hidden_size=8).save_pretrained(tmp_path)  # no weights at all
    with pytest.raises(UnsupportedModelError, match=r"'opt' is not supported.*gemma2.*llama"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "frobnicator"}))
    with pytest.raises(UnsupportedModelError, match="Supported families"):
        load_model(tmp_path)


def test_weights_that_are_pickled_truncated_or_missing_are_refused(folder):
    file = folder / "model.safetensors"
    weights, whole = load_file(file), file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(ModelLoadError, match="damaged"):
        load_model(folder)
    lacking = {k: v for k, v in weights.items() if k != "model.layers.2.mlp.up_proj.weight"}
    save_file(lacking, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 tensors \(model.layers.2.mlp.up_proj.wei"):
        load_model(folder)
    file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="safetensors"):
        load_model(folder)


def test_models_made_to_do_harm_are_refused(folder, tmp_path):
    for content in harmful_tensors(tmp_path / "harm"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelLoadError):
            load_model(folder)
    assert not (tmp_path / "harm").exists()


def test_a_model_that_brings_code_is_refused(folder, tmp_path):
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'harm')!r}).touch()\n"
    (folder / "modeling_own.py").write_text(code)
    brought = {name: "modeling_own.Own" for name in ("AutoConfig", "AutoModelForCausalLM")}
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": brought}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ModelLoadError, UnsupportedModelError)):
        load_model(folder)
    assert not (tmp_path / "harm").exists()


def test_the_environment_says_the_dtype_where_nothing_else_does(monkeypatch):
    for name in ("float32", "bfloat16"):
        monkeypatch.setenv(runtime.DTYPE, name)
        assert load_model("tiny-llama")[0].dtype == getattr(torch, name)
        assert load_model("tiny-llama", dtype=torch.float16)[0].dtype == torch.float16
    monkeypatch.setenv(runtime.DTYPE, "float8")
    with pytest.raises(ValueError, match="BACKATTN_DTYPE is 'float8'"):
        load_model("tiny-llama")
