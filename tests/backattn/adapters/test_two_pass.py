"""The public promises of back attention, on a tiny random model of every family."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import PROMPTS
from transformers import DynamicCache, Trainer, TrainingArguments, pipeline

from backattn import BackAttentionConfig, BackAttentionModel, get_back_attention_model, load_model
from backattn.adapters.arms import make_arm
from backattn.adapters.saving import CONFIG_FILE, WEIGHTS_FILE
from backattn.models.activations import capture
from backattn.models.hooks import hooks
from backattn.models.lens import Lens
from backattn.models.tiny import tiny_names
from backattn.models.tokens import Batch, encode

ONE = BackAttentionConfig(source_layer=1, dim=8)
CONFIGS = {
    "one source": ONE,
    "two heads, per layer": replace(ONE, heads=2, softmax="per-layer"),
    "two sources": replace(ONE, source_layer=(0, 2)),
    "high states only, raw": replace(ONE, memory_layers=(3, 4), norm=False),
    "same layer only": replace(ONE, memory_layers=(1,)),
}


@pytest.fixture(params=tiny_names())
def fresh(request):
    """A model of its own, since an adapter stays on it."""
    return load_model(request.param)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def trained(model, config=ONE, **options):
    """Back attention as it might be after training: nothing is zero."""
    wrapped = get_back_attention_model(model, config, **options)
    for update in wrapped.updates.values():
        torch.nn.init.normal_(update.o_proj.weight, std=0.3)
    return wrapped


@pytest.fixture
def wrapped():
    return trained(load_model("tiny-llama")[0])


@pytest.fixture
def batch(llama):
    return encode(llama[1], PROMPTS, "left")


def loss(model, batch):
    return model(batch.input_ids, batch.attention_mask, labels=batch.input_ids).loss


def written(model, batch, count, **options):
    """What generation of `count` tokens returns."""
    options |= {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return model.generate(**inputs, **options, return_dict_in_generate=True)


def longer(mask, count):
    return torch.cat([mask, torch.ones(len(mask), count, dtype=mask.dtype)], 1)


def logits(model, batch, **options):
    with torch.no_grad():
        return model(**batch.inputs, use_cache=False, **options).logits


def test_untrained_changes_nothing_to_the_bit(fresh, config):
    model, tok = fresh
    batch = encode(tok, PROMPTS)
    before = logits(model, batch)
    assert torch.equal(logits(get_back_attention_model(model, config), batch), before)


def test_two_passes_equal_a_plain_reimplementation(fresh):
    """Against the definition: every layer by hand, the update written out with loops."""
    model, tok = fresh
    batch = encode(tok, PROMPTS[:1])
    wrapped = trained(model)
    arch, update, kept = wrapped._arch, wrapped.updates["1"], {}
    modules = [*(block.module for block in arch.blocks), arch.final_norm_module]
    with hooks(
        *((m, "arguments", lambda *got, t=t: kept.update({t: got})) for t, m in enumerate(modules))
    ):
        logits(model, batch)
    states = [(kept[t][0] or (kept[t][1]["hidden_states"],))[0][0] for t in range(5)]  # 5 of [T, D]

    def n(x):
        return x / (x.pow(2).mean() + 1e-6).sqrt()

    new = states[1].clone()
    for i in range(len(new)):
        pairs = [(t, j) for t in range(1, 5) for j in range(i + 1)]
        query = update.q_proj.weight @ n(states[1][i])
        scores = torch.stack(
            [query @ (update.k_proj.weight @ n(states[t][j])) / 8**0.5 for t, j in pairs]
        )
        values = torch.stack([update.v_proj.weight @ n(states[t][j]) for t, j in pairs])
        new[i] += update.o_proj.weight @ (scores.softmax(0) @ values)
    h = new[None]
    with torch.no_grad():
        for t in range(1, 4):
            args, kwargs = kept[t]
            others = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            h = arch.blocks[t].module(h, *args[1:], **others)
            h = h[0] if isinstance(h, tuple) else h
        expected = arch.unembedding_module(arch.final_norm_module(h))
    if arch.softcap:
        expected = arch.softcap * torch.tanh(expected / arch.softcap)
    assert torch.allclose(logits(wrapped, batch), expected, atol=1e-4)


def test_is_causal(fresh, config):
    model, tok = fresh
    wrapped = trained(model, config)
    batch = encode(tok, PROMPTS[1:2])
    before = logits(wrapped, batch)
    changed = batch.input_ids.clone()
    changed[:, 5:] = 7
    after = logits(wrapped, type(batch)(changed, batch.attention_mask))
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-5)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(fresh, config, side):
    model, tok = fresh
    wrapped = trained(model, config)
    together = encode(tok, PROMPTS, side)
    ends = together.at_last(logits(wrapped, together))
    for prompt, end in zip(PROMPTS, ends, strict=True):
        alone = encode(tok, [prompt])
        assert torch.allclose(alone.at_last(logits(wrapped, alone))[0], end, atol=1e-4)


def test_gradients_reach_the_adapter_and_nothing_else(fresh, config):
    model, tok = fresh
    weights = {name: p.clone() for name, p in model.named_parameters()}
    wrapped = trained(model, config)
    batch = encode(tok, PROMPTS, "left")
    optimiser = torch.optim.SGD(wrapped.updates.parameters(), lr=0.1)
    loss(wrapped, batch).backward()
    optimiser.step()
    assert all(
        p.grad is None and torch.equal(p, weights[name]) for name, p in model.named_parameters()
    )
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in wrapped.updates.parameters())


def test_a_base_model_from_scratch_gets_gradients_through_both_passes(fresh):
    model, tok = fresh
    wrapped = trained(model, freeze_base=False)
    batch = encode(tok, PROMPTS, "left")
    loss(wrapped, batch).backward()
    analytic = wrapped._arch.blocks[2].attention_out  # a weight that acts in both passes
    weight = wrapped._arch.blocks[2].get("attention_out").weight
    assert analytic.weight.shape[0] == wrapped._arch.width
    place = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
    step, ends = 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * step
            ends.append(loss(wrapped, batch).item())
            weight[place] -= sign * step
    slope = (ends[0] - ends[1]) / (2 * step)
    assert slope == pytest.approx(weight.grad[place].item(), rel=0.05, abs=1e-3)


def test_saved_and_loaded_is_the_same(fresh, config, tmp_path):
    model, tok = fresh
    batch = encode(tok, PROMPTS)
    wrapped = trained(model, config)
    expected = logits(wrapped, batch)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    again = BackAttentionModel.from_pretrained(wrapped.unload(), tmp_path / "adapter")
    assert again.back_attention_config == config
    assert torch.equal(logits(again, batch), expected)


def test_disable_enable_unload(fresh, config):
    model, tok = fresh
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    batch = encode(tok, PROMPTS)
    before = logits(model, batch)
    wrapped = trained(model, config)
    on = logits(wrapped, batch)
    assert not torch.allclose(on, before, atol=1e-3)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, batch), before)
    assert torch.equal(logits(wrapped, batch), on)
    assert torch.equal(logits(wrapped.unload(), batch), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    with pytest.raises(ValueError, match="taken off"), wrapped.attention_maps():
        pass


@pytest.mark.parametrize("side", ["left", "right"])
def test_given_first_pass_states_give_the_same(fresh, config, side):
    model, tok = fresh
    wrapped = trained(model, config)
    batch = encode(tok, PROMPTS, side)
    states = wrapped.first_pass_states(**batch.inputs)
    assert states.shape[0] == len(wrapped.needed)
    whole = logits(wrapped, batch)
    given = logits(wrapped, batch, first_pass=states)
    real = batch.attention_mask.bool()
    assert torch.allclose(whole[real], given[real], atol=1e-5)
    assert torch.allclose(logits(wrapped, batch)[real], whole[real])  # and the layers work again


def test_cached_generation_equals_full_recomputation(fresh, config):
    model, tok = fresh
    wrapped, batch = trained(model, config), encode(tok, PROMPTS, "left")
    made, start = written(wrapped, batch, 6, output_logits=True), batch.input_ids.shape[1]
    for step in range(6):
        whole = Batch(made.sequences[:, : start + step], longer(batch.attention_mask, step))
        full = logits(wrapped, whole)[:, -1]
        assert torch.allclose(made.logits[step], full, atol=1e-4), step


def test_new_tokens_in_one_pass_follow_their_definition(fresh, config):
    """Full recomputation in which new tokens do not see their own memory, but leave one."""
    model, tok = fresh
    wrapped = trained(model, config)
    batch, extra = encode(tok, PROMPTS, "left"), torch.arange(11, 20).view(3, 3)
    cache, start = DynamicCache(config=model.config), batch.input_ids.shape[1]
    memory = _states_before(wrapped, batch, first=True)  # [M, B, T, D]
    wrapped.one_pass = True
    with torch.no_grad():
        wrapped(**batch.inputs, past_key_values=cache)
        for step in range(3):
            ids = torch.cat([batch.input_ids, extra[:, step : step + 1]], 1)
            batch = Batch(ids, longer(batch.attention_mask, 1))
            new = {"input_ids": ids[:, -1:], "position_ids": batch.position_ids[:, -1:]}
            fast = wrapped(**batch.inputs | new, past_key_values=cache).logits[:, -1]
            memory = torch.cat([memory, torch.zeros_like(memory[:, :, :1])], 2)  # not seen
            order = torch.arange(ids.shape[1])
            cells = (order < start) | (order < order[:, None]) & (order[:, None] >= start)
            cells = (cells | (order[:, None] < start))[None, :, None]
            cells = cells.expand(-1, -1, len(wrapped.memory_layers), -1)
            edit = (cells, memory) if wrapped.two_passes else ()
            with wrapped.edited(*edit):
                full = logits(wrapped, batch)[:, -1]
                memory[:, :, -1] = _states_before(wrapped, batch)[:, :, -1]
            assert torch.allclose(fast, full, atol=1e-4)
    wrapped.one_pass = False  # two passes give something else
    assert torch.allclose(logits(wrapped, batch)[:, -1], fast, atol=1e-4) != wrapped.two_passes


def _states_before(wrapped, batch, first=False):
    """The memory layers' states of the first or the last pass, before an update: [M, B, T, D]."""
    seen, blocks = {}, [block.module for block in wrapped._arch.blocks]

    def note(layer, h):
        seen[layer] = seen.get(layer, h) if first or layer == 0 else h

    taps = [(m, "output", partial(note, layer)) for layer, m in enumerate(blocks, 1)]
    with hooks((blocks[0], "input", partial(note, 0)), *taps):
        logits(wrapped, batch)
    return torch.stack([seen[t] for t in wrapped.memory_layers])


def test_one_pass_says_what_it_cannot_do(wrapped):
    ids, cache = torch.tensor([[5, 6, 7]]), DynamicCache(config=wrapped.config)
    wrapped(ids, past_key_values=cache)
    wrapped.one_pass = True
    with pytest.raises(ValueError, match="neither edited nor mapped"), wrapped.attention_maps():
        wrapped(ids[:, :1], past_key_values=cache)
    loop, cache = make_arm("loop LoRA", wrapped.unload(), 1, 4), DynamicCache(config=wrapped.config)
    loop.one_pass = True
    loop(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="own final state"):
        loop(ids[:, :1], past_key_values=cache)


def test_beams_follow_their_memory(fresh):
    """Beam search reorders the cache; its scores must be those of the sequences it returns."""
    model, tok = fresh
    wrapped, batch = trained(model), encode(tok, PROMPTS[:2], "left")
    options = {"num_beams": 3, "length_penalty": 0.0, "output_scores": True}
    made, start = written(wrapped, batch, 4, **options), batch.input_ids.shape[1]
    whole = Batch(made.sequences, longer(batch.attention_mask, 4))
    logs = logits(wrapped, whole)[:, start - 1 : -1].log_softmax(-1)
    scores = logs.gather(-1, made.sequences[:, start:, None]).sum((1, 2))
    assert torch.allclose(made.sequences_scores, scores, atol=1e-3)


@pytest.mark.parametrize("off", [False, True])
def test_several_tokens_on_a_filled_cache(wrapped, llama, off):
    """They continue it; one that was filled without the adapter is refused."""
    batch, cache = encode(llama[1], PROMPTS[1:2]), DynamicCache()
    with torch.no_grad(), wrapped.disable_adapter() if off else nullcontext():
        wrapped(batch.input_ids[:, :4], past_key_values=cache)
    expected = pytest.raises(ValueError, match="while the adapter was off")
    with expected if off else nullcontext(), torch.no_grad():
        rest = wrapped(batch.input_ids[:, 4:], past_key_values=cache).logits
        assert torch.allclose(rest, logits(wrapped, batch)[:, 4:], atol=1e-4)


ROW = torch.tensor([[5, 9, 30, 41, 7]])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(ROW, torch.ones(1, 4)), "covers 4 tokens"),
        (lambda m: m(ROW, output_attentions=True), "both passes"),
        (
            lambda m: m.generate(ROW, max_new_tokens=2, cache_implementation="static"),
            r"DynamicCache|\[batch, time\]",  # older ones mask it first
        ),
        (lambda m: m(ROW, first_pass=torch.ones(2, 1, 5, 32)), "the 4 states"),
    ],
)
def test_what_cannot_be_right_is_refused_and_leaves_nothing(wrapped, call, message):
    plain = wrapped.base_model(ROW).logits
    with pytest.raises(ValueError, match=message):
        call(wrapped)
    assert torch.equal(wrapped.base_model(ROW).logits, plain)
    assert not torch.equal(wrapped(ROW).logits, plain)


def test_what_is_refused_with_the_adapter_works_without(wrapped):
    with wrapped.disable_adapter():
        out = wrapped(ROW, position_ids=torch.tensor([[0, 1, 0, 1, 2]]), output_hidden_states=True)
    assert len(out.hidden_states) == 5


def test_attention_maps_sum_to_one_and_are_those_of_the_update(fresh, config):
    model, tok = fresh
    wrapped, batch = trained(model, config), encode(tok, PROMPTS, "left")
    with wrapped.attention_maps() as maps:
        logits(wrapped, batch)
    assert sorted(maps) == list(config.sources)
    for weights in maps.values():
        assert weights.shape[-2:] == (len(wrapped.memory_layers), batch.input_ids.shape[1])
        assert torch.allclose(weights.sum((-1, -2)), torch.ones(()), atol=1e-5)
        hidden = weights[2, :, -1, :, : int(batch.start[2])]
        assert hidden.abs().max() == 0  # padding is not read


def test_cells_that_are_hidden_are_not_read(fresh, config):
    model, tok = fresh
    wrapped, batch = trained(model, config), encode(tok, PROMPTS, "left")
    shape = 1, 1, len(wrapped.memory_layers), batch.input_ids.shape[1]
    everything, before = torch.ones(shape, dtype=torch.bool), logits(wrapped, batch)
    with wrapped.edited(everything):
        assert torch.allclose(logits(wrapped, batch), before, atol=1e-5)
    with wrapped.edited(~everything):
        emptied = logits(wrapped, batch)
    assert torch.equal(logits(wrapped, batch), before)
    assert torch.allclose(emptied, logits(model, batch), atol=1e-5)
    everything[..., -1] = False
    with wrapped.edited(everything), wrapped.attention_maps() as maps:
        logits(wrapped, batch)
    for weights in maps.values():
        assert weights[..., -1].abs().max() == 0
        assert torch.allclose(weights[:, :, -1].sum((-1, -2)), torch.ones(()), atol=1e-5)


def test_cells_are_silenced_without_the_others_taking_over(fresh, config):
    """What is added is linear in the numbers, and a map has what is left of each weight."""
    wrapped, batch = trained(fresh[0], config), encode(fresh[1], PROMPTS, "left")
    shape = 1, 1, len(wrapped.memory_layers), batch.input_ids.shape[1]
    half = torch.zeros(shape).bernoulli_(0.5)
    with wrapped.attention_maps() as plain:
        before = logits(wrapped, batch)
    h, added = torch.randn(2, 3, 32), []
    update = next(iter(wrapped.updates.values()))
    memory = torch.randn(shape[2], 2, shape[3], 32)
    with torch.no_grad():
        q, (k, v) = update.query(h), update.remember(memory)
        cells = half.expand(2, 3, -1, -1)
        for numbers in (cells, 1 - cells, torch.ones_like(cells), torch.full_like(cells, -1)):
            added.append(update.write(update.mix(q, k, v, numbers)))
        every = torch.ones(2, 3, shape[3], dtype=torch.bool)
        assert torch.allclose(added[2], update.write(update.mix(q, k, v, every)), atol=1e-5)
    assert torch.allclose(added[0] + added[1], added[2], atol=1e-5)
    assert added[3].abs().max() == 0 and added[0].abs().max() > 1e-4
    with wrapped.edited(torch.ones(shape)):
        assert torch.allclose(logits(wrapped, batch), before, atol=1e-5)
    with wrapped.edited(torch.zeros(shape)):
        assert torch.allclose(logits(wrapped, batch), logits(fresh[0], batch), atol=1e-5)
    first = wrapped.sources[0]
    with wrapped.edited(half), wrapped.attention_maps() as maps:
        logits(wrapped, batch)
    assert torch.allclose(maps[first], plain[first] * half[0, 0], atol=1e-5)
    for wrong in (half.long(), half * 2, half - 1):
        with pytest.raises(ValueError, match="from 0 to 1"):
            wrapped.edited(wrong)


def test_last_tokens_alone_are_asked_again_with_a_cache(fresh, config):
    """Given first pass and cache of whole texts, the last tokens give what the whole texts give."""
    wrapped = trained(fresh[0], config)
    batch = Batch(torch.randint(5, 50, (2, 3)), torch.tensor([[0, 1, 1], [1, 1, 1]]))
    width, memory = batch.input_ids.shape[1], len(wrapped.memory_layers)
    cells = torch.rand(2, width, memory, width) < 0.5
    cells[:, :-2] = True
    states = wrapped.first_pass_states(**batch.inputs)
    with torch.no_grad():
        cache = wrapped(**batch.inputs, use_cache=True).past_key_values
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        with wrapped.edited(cells):
            whole = logits(wrapped, batch, first_pass=states)
        last = {name: batch.inputs[name][:, -2:] for name in ("input_ids", "position_ids")}
        last |= {"attention_mask": batch.attention_mask, "first_pass": states[:, :, -2:]}
        for _ in range(2):  # it leaves the cache as it is
            with wrapped.edited(cells[:, -2:]):
                out = wrapped(**last, past_key_values=cache)
            assert torch.allclose(out.logits, whole[:, -2:], atol=1e-5)
            assert out.past_key_values is None
    assert (whole[:, -2:] - logits(wrapped, batch)[:, -2:]).abs().max() > 1e-4
    for layer, (k, v) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, k) and torch.equal(layer.values, v)


@pytest.mark.parametrize(
    "name, cached, masked, message",
    [
        ("tiny-gemma3", None, True, "sliding window"),  # what it has dropped is not made up
        ("tiny-llama", 2, False, "attention_mask"),
        ("tiny-llama", 2, True, "holds 2 tokens"),
    ],
)
def test_a_cache_of_other_texts_is_refused(name, cached, masked, message):
    model, tok = load_model(name)
    wrapped, batch = trained(model), encode(tok, PROMPTS[1:2])
    states = wrapped.first_pass_states(**batch.inputs)[:, :, -1:]
    cache = wrapped(batch.input_ids[:, :cached], use_cache=True).past_key_values
    mask = batch.attention_mask if masked else None
    with pytest.raises(ValueError, match=message):
        wrapped(batch.input_ids[:, -1:], mask, first_pass=states, past_key_values=cache)


def test_cells_of_another_shape_are_refused(llama):
    wrapped = trained(load_model("tiny-llama")[0], CONFIGS["high states only, raw"])
    with pytest.raises(ValueError, match="2 memory layers"):
        wrapped.edited(torch.ones(1, 1, 3, 5, dtype=bool))
    ids, first = torch.tensor([[1, 2, 3]]), torch.ones(1, 1, 2, 2, dtype=bool)
    cache = wrapped(ids[:, :2]).past_key_values
    with pytest.raises(ValueError, match="3 positions"), wrapped.edited(first):
        wrapped(ids[:, 2:], past_key_values=cache)


def test_states_of_the_second_pass_are_captured(fresh, config):
    model, tok = fresh
    wrapped, batch = trained(model, config), encode(tok, PROMPTS, "left")
    stream = capture(wrapped, batch, detail=False)
    assert len(stream.hidden) == wrapped.layers + 1
    read = Lens(stream.arch).log_probs(batch.at_last(stream.hidden[-1]))
    said = batch.at_last(logits(wrapped, batch)).float().log_softmax(-1)
    assert torch.allclose(read, said, atol=1e-4)


@pytest.mark.parametrize("arm", ["back attention", "residual LoRA", "loop LoRA", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_wrapped_model_changes_its_dtype(arm, dtype, batch):
    wrapped = make_arm(arm, load_model("tiny-llama")[0], 1, 4)
    for p in wrapped.updates.parameters():
        torch.nn.init.normal_(p, std=0.3)
    before, after = logits(wrapped, batch), logits(wrapped.to(dtype), batch)
    assert after.dtype == dtype
    assert (after.float() - before)[batch.attention_mask.bool()].abs().max() < 0.3


def test_works_in_trainer_and_pipeline(wrapped, llama, tmp_path, caplog):
    ids = encode(llama[1], PROMPTS[:1]).input_ids
    row = {"input_ids": ids[0].tolist(), "labels": ids[0].tolist()}
    row["position_ids"] = list(range(1, len(ids[0]) + 1))  # a column that Trainer must not drop
    settings = {"max_steps": 12, "learning_rate": 0.05, "report_to": "none", "use_cpu": True}
    settings = TrainingArguments(str(tmp_path / "run"), disable_tqdm=True, **settings)
    trainer, seen = Trainer(wrapped, settings, train_dataset=[row] * 8), []
    before = wrapped(input_ids=ids, labels=ids).loss
    taps = (wrapped.base_model.model, "arguments", lambda _, given: seen.append(given))
    with hooks(taps):
        trainer.train()
    assert all(given["position_ids"][0, 0] == 1 for given in seen)
    assert wrapped(input_ids=ids, labels=ids).loss < before - 0.1
    trainer.save_model(str(tmp_path / "kept"))
    assert (tmp_path / "kept" / "model.safetensors").stat().st_size < 10_000  # the adapter only
    with wrapped.applied():
        write = pipeline("text-generation", model=wrapped.base_model, tokenizer=llama[1])
        text = write(PROMPTS[0], max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith(PROMPTS[0]) and len(text) > len(PROMPTS[0])
    assert "not supported" not in caplog.text


@pytest.mark.parametrize("config", [ONE, CONFIGS["same layer only"]])
def test_copies_and_state_dicts_are_those_of_any_module(config, batch, tmp_path):
    wrapped = trained(load_model("tiny-llama")[0], config)
    expected, weights = logits(wrapped, batch), copy.deepcopy(wrapped.state_dict())
    twin = copy.deepcopy(wrapped)
    torch.save(wrapped, tmp_path / "whole.pt")
    for other in (twin, torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert torch.equal(logits(other, batch), expected)
    torch.nn.init.zeros_(twin.updates["1"].o_proj.weight)
    assert torch.equal(logits(wrapped, batch), expected)
    twin.load_state_dict(weights)
    assert torch.equal(logits(twin, batch), expected)
    weights.pop("updates.1.q_proj.weight")
    with pytest.raises(RuntimeError, match=r"q_proj"):
        twin.load_state_dict(weights)


def test_layers_with_a_forward_of_their_own_keep_it(wrapped, batch):
    """As accelerate puts on them for models larger than one GPU."""
    layer, calls = wrapped.base_model.model.layers[2], []
    ordinary = layer.forward
    layer.forward = lambda *args, **kwargs: (calls.append(1), ordinary(*args, **kwargs))[1]
    given = vars(layer)["forward"]
    logits(wrapped, batch)
    assert len(calls) == 2 and vars(layer)["forward"] is given


def test_a_model_carries_several_adapters():
    """Each answers as it does alone, one at a time, and the last one gives the model back."""
    model, _ = load_model("tiny-llama")
    model.lm_head.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    ids, configs = torch.tensor([[5, 9, 30, 41]]), [BackAttentionConfig(k, dim=8) for k in (1, 2)]

    def adapted(config, base):
        wrapped = get_back_attention_model(base, config)
        torch.manual_seed(config.source_layer)
        for p in wrapped.updates.parameters():
            torch.nn.init.normal_(p, std=0.3)
        return wrapped

    with torch.no_grad():
        plain = model(ids).logits
        alone = [adapted(config, load_model("tiny-llama")[0])(ids).logits for config in configs]
        one, two = (adapted(config, model) for config in configs)
        for wrapped, logits in zip((one, two, one), (*alone, alone[0]), strict=True):
            assert torch.equal(wrapped(ids).logits, logits)
        with one.applied(), pytest.raises(ValueError, match="Another adapter"):
            two(ids)
        assert torch.equal(model(ids).logits, plain)
        with pytest.raises(ValueError, match="carries an adapter already"):
            get_back_attention_model(model, configs[0], freeze_base=False)
        one.unload()
        assert torch.equal(two(ids).logits, alone[1]) and two.frozen
    assert two.unload() is model
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    whole = get_back_attention_model(model, configs[0], freeze_base=False)
    with pytest.raises(ValueError, match="carries an adapter already"):
        get_back_attention_model(model, configs[1])
    whole.unload()
