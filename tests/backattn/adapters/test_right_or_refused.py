"""A right number or one clear error: threads, faults, other bases, and what a module must do."""

import copy
import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi
from torch import nn
from torch.nn.modules import module as torch_hooks
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainingArguments

from backattn import BackAttentionConfig, BackAttentionModel, get_back_attention_model, load_model
from backattn.adapters.arms import make_arm
from backattn.adapters.saving import CONFIG_FILE, AdapterError
from backattn.models.decoder import describe
from backattn.models.tiny import tiny_names

CONFIG = BackAttentionConfig(source_layer=1, dim=8)
ROW, PLACES = torch.tensor([[5, 9, 30, 41, 7, 12, 5, 9, 30]]), torch.arange(9)[None]
WHOLE = {"attention_mask": torch.ones_like(ROW), "position_ids": PLACES}
families = pytest.mark.parametrize("name", tiny_names())


def trained(name="tiny-llama", config=CONFIG, freeze_base=True):
    """Back attention as it might be after training, on a model of its own."""
    wrapped = get_back_attention_model(load_model(name)[0], config, freeze_base)
    torch.manual_seed(0)
    for p in wrapped.updates.parameters():
        nn.init.normal_(p, std=0.3)
    return wrapped


def logits(model, row=ROW, block=nullcontext, **options):
    with torch.no_grad(), block():
        return model(row, use_cache=False, **options).logits


def greedy(model, **options):
    return model.generate(ROW, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)


def test_threads_do_not_mix(tmp_path):
    """Every public function of an adapter, 8 threads at once."""
    wrapped, cells, (free, _) = trained(), torch.rand(1, 9, 4, 9) < 0.5, load_model("tiny-llama")
    weight = wrapped.updates["1"].q_proj.weight

    def maps(row):
        with wrapped.attention_maps() as found:
            logits(wrapped, row)
        return found[1]

    def saved(row):
        folder, base = tmp_path / str(int(row[0, 0])), copy.deepcopy(free)
        wrapped.save_pretrained(folder)
        return logits(BackAttentionModel.from_pretrained(base, folder), row)

    def loaded(row):
        twin = copy.deepcopy(wrapped)
        twin.load_state_dict(wrapped.state_dict())
        return logits(twin, row)

    def first(row):
        return wrapped.first_pass_states(row, **WHOLE)

    jobs = [
        *(maps, saved, loaded, first),
        lambda row: logits(wrapped, row),
        lambda row: logits(wrapped.base_model, row),
        lambda row: logits(wrapped, row, **WHOLE, first_pass=first(row)),
        lambda row: wrapped.generate(row, max_new_tokens=2, do_sample=False),
        lambda row: torch.autograd.grad(wrapped(row, labels=row).loss, weight)[0],
        lambda row: logits(wrapped.base_model, row, wrapped.applied),
        lambda row: logits(wrapped, row, wrapped.disable_adapter),
        lambda row: logits(wrapped, row, lambda: wrapped.edited(cells)),
    ]
    rows = torch.randint(3, 300, (4, 1, 9))
    right = [job(row) for job in jobs for row in rows]
    asked = torch.randint(0, len(right), (200,)).tolist()
    with ThreadPoolExecutor(8) as pool:
        outs = pool.map(lambda k: jobs[k // 4](rows[k % 4]), asked)
        assert all(torch.equal(out, right[k]) for k, out in zip(asked, outs, strict=True))


@families
def test_a_fault_at_any_module_of_either_pass_leaves_nothing_behind(name):
    wrapped, count, at = trained(name), [0], [None]
    before, plain = logits(wrapped), logits(wrapped.base_model)

    def drill(*_):
        count[0] += 1
        if count[0] == at[0]:
            raise KeyboardInterrupt

    def run(job, place=None):
        count[0], at[0] = 0, place
        with nullcontext() if place is None else pytest.raises(KeyboardInterrupt):
            job()
        at[0] = None
        return count[0]

    jobs = {
        lambda: logits(wrapped): 1,  # at every module, then at one of 13
        lambda: wrapped.first_pass_states(ROW, **WHOLE): 13,
        lambda: wrapped(ROW, labels=ROW).loss.backward(): 13,
        lambda: wrapped.generate(ROW, max_new_tokens=2, do_sample=False): 13,
    }
    for side in ("register_module_forward_pre_hook", "register_module_forward_hook"):
        handle = getattr(torch_hooks, side)(drill)
        for job, step in jobs.items():
            for place in range(1, run(job) + 1, step):
                run(job, place)
                assert place % 7 or torch.equal(logits(wrapped), before)
        handle.remove()
        assert torch.equal(logits(wrapped), before)
        assert torch.equal(logits(wrapped.base_model), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in wrapped.modules())
    assert not any("forward" in vars(m) for m in wrapped.modules())


@families
@pytest.mark.parametrize("freeze_base", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name, freeze_base):
    found = []
    for reentrant in (None, False, True):
        wrapped = trained(name, freeze_base=freeze_base).train()
        for module in wrapped.modules():
            module.p = 0.0  # no dropout
        if reentrant is not None:
            wrapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
        wrapped(ROW, labels=ROW).loss.backward()
        grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
        found.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.allclose(found[0], found[2], atol=1e-5)


@families
@pytest.mark.parametrize("one_pass", [False, True])
def test_guessing_ahead_is_greedy_decoding_or_refused(name, one_pass):
    wrapped, draft = trained(name), load_model("tiny-llama")[0]
    wrapped.one_pass, settings = one_pass, wrapped.base_model.generation_config
    right, refused = greedy(wrapped), pytest.raises(ValueError, match="cannot generate with")
    wrong = one_pass or getattr(wrapped.config, "sliding_window", None)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
        with refused if wrong else nullcontext():
            assert torch.equal(greedy(wrapped, **options), right)
    with refused if one_pass else nullcontext():
        assert torch.equal(greedy(wrapped, prefill_chunk_size=4), right)
    settings.assistant_early_exit = 2
    with refused:
        greedy(wrapped)
    settings.assistant_early_exit = None
    with wrapped.applied(), pytest.raises(ValueError, match="Early exit"):
        greedy(wrapped.base_model, assistant_early_exit=2)
    assert wrapped.config.num_hidden_layers == 4 and torch.equal(greedy(wrapped), right)


AGAIN, FOUR = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), torch.ones(1, 1, 9, 9).tril()
PACKED = {"position_ids": AGAIN, "cu_seq_lens_q": AGAIN, "seq_idx": AGAIN, "attention_mask": FOUR}


@families
@pytest.mark.parametrize("given", PACKED)
def test_several_texts_in_a_row_are_refused(name, given):
    wrapped = trained(name)
    before = logits(wrapped)
    with pytest.raises(ValueError, match=r"Several texts in one row|\[batch, time\]"):
        wrapped(ROW, **{given: PACKED[given]})
    assert torch.equal(logits(wrapped), before)


@families
def test_wishes_in_the_config_are_those_of_the_call(name):
    wrapped = trained(name)
    config, right = wrapped.config, logits(wrapped)
    for wish, value in (("return_dict", False), ("use_cache", True), ("use_cache", False)):
        called, old = wrapped(ROW, **{wish: value}), getattr(config, wish)
        setattr(config, wish, value)
        configured = wrapped(ROW)
        setattr(config, wish, old)
        assert type(called) is type(configured)
        assert torch.equal(called[0], right) and torch.equal(configured[0], right)
    config.output_hidden_states = True
    for options in ({}, {"output_hidden_states": None}):
        with pytest.raises(ValueError, match="both passes"):
            wrapped(ROW, **options)
    assert torch.equal(logits(wrapped, output_hidden_states=False), right)


def test_layers_that_were_replaced_are_the_new_ones():
    wrapped, other = trained(), load_model("tiny-llama")[0].model.layers[2]
    nn.init.normal_(other.mlp.down_proj.weight)
    wrapped.base_model.model.layers[2] = other
    out, base = logits(wrapped), wrapped.unload()
    again = get_back_attention_model(base, CONFIG)
    again.updates.load_state_dict(wrapped.updates.state_dict())
    assert torch.equal(logits(again), out)
    del base.model.layers[-1]
    with pytest.raises(ValueError, match="3 layers now"):
        again(ROW)


# ---------------------------------------------------------------- identities


def noisy(scale):
    """Moves weights by a share of their own size."""

    def change(model):
        for p in model.parameters():
            p.data += scale * (p.std() + 1e-3) * torch.randn_like(p)

    return change


def cut_off(model):
    del model.get_submodule(describe(model).family.layers)[-1]
    model.config.num_hidden_layers -= 1


SAME, TUNED, OTHER = nullcontext(), "fine-tuned or edited", "was trained on"
CHANGES = {
    "nothing": (lambda model: None, SAME),
    "bf16": (lambda model: model.to(torch.bfloat16), SAME),
    "fp16": (lambda model: model.to(torch.float16), SAME),
    "a pad token": (lambda model: model.resize_token_embeddings(700, mean_resizing=False), SAME),
    "a little noise": (noisy(1e-4), TUNED),
    "noise": (noisy(0.2), TUNED),
    "other weights": (noisy(9.0), OTHER),
    "other tokens": (lambda model: nn.init.normal_(model.get_input_embeddings().weight), OTHER),
    "another layer": (lambda model: noisy(9.0)(describe(model).blocks[2].module), OTHER),
    "a layer less": (cut_off, OTHER),
}


@families
@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_knows_its_base_model(name, change, tmp_path):
    wrapped, (base, _), (change, verdict) = trained(name), load_model(name), CHANGES[change]
    wrapped.save_pretrained(tmp_path)
    change(base)
    tuned, other = pytest.warns(UserWarning, match=TUNED), pytest.raises(AdapterError, match=OTHER)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if verdict == SAME else "always")
        with {SAME: SAME, TUNED: tuned, OTHER: other}[verdict]:
            again = BackAttentionModel.from_pretrained(base, tmp_path)
    if verdict == SAME:
        tokens = wrapped.config.vocab_size
        assert (logits(again)[..., :tokens].float() - logits(wrapped)).abs().max() < 0.5
    get_back_attention_model(base if verdict == OTHER else again.unload(), CONFIG)


@pytest.mark.parametrize(
    "known", ["e8d517b8f3d9347d1fa52ca630e14e35058ce784e028a849e259f9f9d2fb1315", "another"]
)
def test_adapters_saved_before_fingerprints_load_still(known, tmp_path):
    trained().save_pretrained(tmp_path)
    about = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"unembedding_hash": known}
    about.pop("base_model_fingerprint")
    (tmp_path / CONFIG_FILE).write_text(json.dumps(about))
    refused = pytest.raises(AdapterError, match="unembedding")
    with refused if known == "another" else nullcontext():
        BackAttentionModel.from_pretrained(load_model("tiny-llama")[0], tmp_path)


# ---------------------------------------------------------------- as any module


def kept_by_trainer(wrapped, folder):
    row = {"input_ids": ROW[0].tolist(), "labels": ROW[0].tolist()}
    options = {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": True}
    settings = TrainingArguments(str(folder), disable_tqdm=True, **options)
    Trainer(wrapped, settings, train_dataset=[row] * 4).train()
    return folder / "checkpoint-2"


def kept_by_accelerate(wrapped, folder):
    accelerator = Accelerator(cpu=True)
    prepared, before = accelerator.prepare(wrapped), logits(wrapped)
    accelerator.save_state(str(folder))
    nn.init.zeros_(wrapped.updates["1"].o_proj.weight)
    accelerator.load_state(str(folder))
    assert torch.equal(logits(prepared), before)
    return folder


def kept_on_the_hub(wrapped, folder):
    wrapped.base_model.config.name_or_path = str(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_repo", lambda *_, **__: type("", (), {"repo_id": "me/it"}))
        copied = lambda _, folder_path, **__: shutil.copytree(folder_path, folder / "hub")  # noqa: E731
        patch.setattr(HfApi, "upload_folder", copied)
        wrapped.push_to_hub("it", private=True)
    card = (folder / "hub" / "README.md").read_text()
    assert '"me/it"' in card and str(folder) not in card
    assert "| source_layer | 1 |" in card and "| weights | 1,024 |" in card
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (folder / "hub").iterdir()) == files
    return folder / "hub"


@pytest.mark.parametrize("keep", [kept_by_trainer, kept_by_accelerate, kept_on_the_hub])
def test_what_others_keep_is_the_adapter(keep, tmp_path):
    wrapped = trained()
    folder = keep(wrapped, tmp_path)
    again = BackAttentionModel.from_pretrained(load_model("tiny-llama")[0], folder)
    assert torch.equal(logits(again), logits(wrapped))
    with pytest.raises(AdapterError, match=OTHER):
        BackAttentionModel.from_pretrained(load_model("tiny-qwen2")[0], folder)
    with pytest.raises(AttributeError, match="without the adapter"):
        make_arm("bias", again.unload(), 1, 4).push_to_hub("it")


def test_state_dicts_are_checked_and_nested():
    wrapped, two = trained(), trained(config=BackAttentionConfig(1, dim=8, heads=2))
    with pytest.raises(ValueError, match="heads=2"):
        wrapped.load_state_dict(two.state_dict())
    with pytest.raises(AdapterError, match=OTHER):
        trained("tiny-qwen2").load_state_dict(wrapped.state_dict())
    nested = nn.ModuleDict({"answers": wrapped, "head": nn.Linear(2, 2)})
    state = nested.state_dict()
    assert len(state) == 4 + 1 + 2  # the adapter, what tells its base model, and the head
    nested.load_state_dict(state)
    state.pop("head.weight")
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        nested.load_state_dict(state)
    assert torch.equal(logits(AveragedModel(wrapped)), logits(wrapped))
    copied = copy.deepcopy(wrapped)
    with pytest.raises(ValueError, match="carries an adapter already"):
        get_back_attention_model(copied.base_model, CONFIG, freeze_base=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_dtypes_and_modes(dtype, mode, tmp_path):
    trained().save_pretrained(tmp_path)
    whole = logits(trained())
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
            model, _ = load_model("tiny-llama", dtype=dtype)
            wrapped = BackAttentionModel.from_pretrained(model, tmp_path)
            with wrapped.attention_maps() as maps:
                assert (logits(wrapped).float() - whole).abs().max() < 0.5
            assert maps[1].isfinite().all() and greedy(wrapped).shape == (1, 15)
            assert all(p.dtype == torch.float32 for p in wrapped.updates.parameters())
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError, match="dtype is 'half'"):
        load_model("tiny-llama", dtype="half")
