"""The public promises of back attention, on a tiny random model of every family."""

import pytest
import torch
from conftest import PROMPTS
from transformers import DynamicCache, Trainer, TrainingArguments, pipeline

from backattn import BackAttentionConfig, BackAttentionModel, get_back_attention_model, load_model
from backattn.adapters.arms import make_arm
from backattn.adapters.saving import CONFIG_FILE, WEIGHTS_FILE
from backattn.models.activations import capture
from backattn.models.lens import Lens
from backattn.models.tiny import tiny_names
from backattn.models.tokens import Batch, encode

CONFIGS = {
    "one source": BackAttentionConfig(source_layer=1, dim=8),
    "two heads, per layer": BackAttentionConfig(
        source_layer=1, dim=8, heads=2, softmax="per-layer"
    ),
    "two sources": BackAttentionConfig(source_layer=(0, 2), dim=8),
    "high states only, raw": BackAttentionConfig(
        source_layer=1, dim=8, memory_layers=(3, 4), norm=False
    ),
    "own layer only": BackAttentionConfig(source_layer=1, dim=8, memory_layers=(1,)),
}


@pytest.fixture(params=tiny_names())
def fresh(request):
    """A model of its own, since an adapter stays on it."""
    return load_model(request.param)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def trained(model, config, size=0.3, **options):
    """Back attention as it might be after training: nothing is zero."""
    wrapped = get_back_attention_model(model, config, **options)
    with torch.no_grad():
        for update in wrapped.updates.values():
            update.o_proj.weight.normal_(std=size)
    return wrapped


def tensors(batch):
    return {n: getattr(batch, n) for n in ("input_ids", "attention_mask", "position_ids")}


def loss(model, batch):
    return model(batch.input_ids, batch.attention_mask, labels=batch.input_ids).loss


def written(model, batch, count, **options):
    """What generation of `count` tokens returns."""
    ids, mask = batch.input_ids, batch.attention_mask
    at_most = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return model.generate(
        ids, attention_mask=mask, **at_most, **options, return_dict_in_generate=True
    )


def longer(mask, count):
    return torch.cat([mask, torch.ones(len(mask), count, dtype=mask.dtype)], 1)


def logits(model, batch, **options):
    with torch.no_grad():
        return model(
            **tensors(batch),
            use_cache=False,
            **options,
        ).logits


def test_untrained_changes_nothing_to_the_bit(fresh, config):
    model, tok = fresh
    batch = encode(tok, PROMPTS)
    before = logits(model, batch)
    assert torch.equal(logits(get_back_attention_model(model, config), batch), before)


def test_two_passes_equal_a_plain_reimplementation(fresh):
    """Against the definition: every layer by hand, the update written out with loops."""
    model, tok = fresh
    batch = encode(tok, PROMPTS[:1])
    wrapped = trained(model, CONFIGS["one source"])
    arch, update = wrapped._arch, wrapped.updates["1"]
    kept, handles = {}, []
    for t, module in enumerate([*(block.module for block in arch.blocks), arch.final_norm_module]):

        def keep(module, args, kwargs, t=t):
            kept[t] = (args, kwargs)

        handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    with wrapped.disable_adapter(), torch.no_grad():
        logits(model, batch)
    for handle in handles:
        handle.remove()
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
    with torch.no_grad(), wrapped.disable_adapter():
        for t in range(1, 4):
            args, kwargs = kept[t]
            h = arch.blocks[t].module(
                h, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"}
            )
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


def test_an_untrained_adapter_can_begin_to_learn(llama):
    wrapped = get_back_attention_model(load_model("tiny-llama")[0], CONFIGS["one source"])
    loss(wrapped, encode(llama[1], PROMPTS, "left")).backward()
    assert wrapped.updates["1"].o_proj.weight.grad.abs().max() > 0


def test_a_base_model_from_scratch_gets_gradients_through_both_passes(fresh):
    model, tok = fresh
    wrapped = trained(model, CONFIGS["one source"], freeze_base=False)
    batch = encode(tok, PROMPTS, "left")
    loss(wrapped, batch).backward()
    analytic = wrapped._arch.blocks[2].attention_out  # a weight that acts in both passes
    weight = wrapped._arch.blocks[2].get(wrapped._arch.family.attention_out).weight
    assert analytic.weight.shape[0] == wrapped._arch.width
    place = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
    step = 1e-2
    ends = []
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
    states = wrapped.first_pass_states(**tensors(batch))
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
    batch, extra = (
        encode(tok, PROMPTS, "left"),
        torch.tensor([[11, 12, 13], [14, 15, 16], [17, 18, 19]]),
    )
    ids, ones = batch.input_ids, torch.ones(3, 1, dtype=batch.attention_mask.dtype)
    cache, mask, start = DynamicCache(config=model.config), batch.attention_mask, ids.shape[1]
    memory = _states_before(wrapped, ids, mask, first=True)  # [M, B, T, D]
    wrapped.one_pass = True
    with torch.no_grad():
        wrapped(
            input_ids=ids,
            attention_mask=mask,
            position_ids=batch.position_ids,
            past_key_values=cache,
        )
        for step in range(3):
            ids, mask = torch.cat([ids, extra[:, step : step + 1]], 1), torch.cat([mask, ones], 1)
            place = (mask.cumsum(-1) - 1).clamp(min=0)
            fast = wrapped(
                input_ids=ids[:, -1:],
                attention_mask=mask,
                position_ids=place[:, -1:],
                past_key_values=cache,
            ).logits[:, -1]
            memory = torch.cat([memory, torch.zeros_like(memory[:, :, :1])], 2)  # not seen
            cells = torch.ones(1, ids.shape[1], 1, ids.shape[1], dtype=torch.bool)
            for new in range(start, ids.shape[1]):
                cells[:, new, :, new:] = False
            cells = cells.expand(-1, -1, len(wrapped.memory_layers), -1)
            with wrapped.edited(
                cells if wrapped.two_passes else None, memory if wrapped.two_passes else None
            ):
                full = wrapped(
                    input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False
                ).logits[:, -1]
                memory[:, :, -1] = _states_before(wrapped, ids, mask)[:, :, -1]
            assert torch.allclose(fast, full, atol=1e-4)
    wrapped.one_pass = False
    kept = wrapped(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False).logits[
        :, -1
    ]
    assert (
        torch.allclose(kept, fast, atol=1e-4) != wrapped.two_passes
    )  # two passes give something else


def _states_before(wrapped, ids, mask, first=False):
    """The memory layers' states of the first or the last pass, before an update: [M, B, T, D]."""
    seen, blocks = {}, [block.module for block in wrapped._arch.blocks]

    def enters(module, args, kwargs):
        seen.setdefault(0, args[0] if args else kwargs["hidden_states"])

    def leaves(layer):
        def hook(module, args, out):
            h = out[0] if isinstance(out, tuple) else out
            seen[layer] = seen.get(layer, h) if first else h

        return hook

    handles = [blocks[0].register_forward_pre_hook(enters, with_kwargs=True, prepend=True)]
    handles += [
        block.register_forward_hook(leaves(layer + 1)) for layer, block in enumerate(blocks)
    ]
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        wrapped(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack([seen[t] for t in wrapped.memory_layers])


def test_one_pass_says_what_it_cannot_do(llama):
    model, _ = llama
    ids = torch.tensor([[5, 6, 7]])
    wrapped, cache = (
        get_back_attention_model(model, CONFIGS["one source"]),
        DynamicCache(config=model.config),
    )
    wrapped(ids, past_key_values=cache)
    wrapped.one_pass = True
    with pytest.raises(ValueError, match="neither edited nor mapped"), wrapped.attention_maps():
        wrapped(ids[:, :1], past_key_values=cache)
    wrapped.unload()
    loop, cache = make_arm("loop LoRA", model, 1, 4), DynamicCache(config=model.config)
    loop.one_pass = True
    loop(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="own final state"):
        loop(ids[:, :1], past_key_values=cache)
    loop.unload()


def test_beams_follow_their_memory(fresh):
    """Beam search reorders the cache; its scores must be those of the sequences it returns."""
    model, tok = fresh
    wrapped, batch = trained(model, CONFIGS["one source"]), encode(tok, PROMPTS[:2], "left")
    options = {"num_beams": 3, "length_penalty": 0.0, "output_scores": True}
    made, start = written(wrapped, batch, 4, **options), batch.input_ids.shape[1]
    whole = Batch(made.sequences, longer(batch.attention_mask, 4))
    logs = logits(wrapped, whole)[:, start - 1 : -1].log_softmax(-1)
    scores = logs.gather(-1, made.sequences[:, start:, None]).sum((1, 2))
    assert torch.allclose(made.sequences_scores, scores, atol=1e-3)


def test_several_tokens_at_once_on_a_filled_cache(llama):
    model, tok = load_model("tiny-llama")
    wrapped = trained(model, CONFIGS["one source"])
    batch = encode(tok, PROMPTS[1:2])
    cache = DynamicCache()
    with torch.no_grad():
        wrapped(input_ids=batch.input_ids[:, :4], past_key_values=cache, use_cache=True)
        rest = wrapped(
            input_ids=batch.input_ids[:, 4:], past_key_values=cache, use_cache=True
        ).logits
    assert torch.allclose(rest, logits(wrapped, batch)[:, 4:], atol=1e-4)


def test_a_cache_filled_without_the_adapter_is_refused(llama):
    model, tok = load_model("tiny-llama")
    wrapped = trained(model, CONFIGS["one source"])
    ids, cache = encode(tok, PROMPTS[1:2]).input_ids, DynamicCache()
    with wrapped.disable_adapter(), torch.no_grad():
        wrapped(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="while the adapter was off"):
        wrapped(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True)


def test_static_caches_and_odd_masks_are_refused(llama):
    model, tok = load_model("tiny-llama")
    wrapped = trained(model, CONFIGS["one source"])
    ids = encode(tok, PROMPTS[:1]).input_ids
    with pytest.raises(
        ValueError, match=r"DynamicCache|\[batch, time\]"
    ):  # older ones mask it first
        wrapped.generate(input_ids=ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match=r"\[batch, time\]"):
        wrapped(input_ids=ids, attention_mask=torch.ones(1, 1, ids.shape[1], ids.shape[1]))
    wrapped(input_ids=ids)  # nothing is left behind


def test_attention_maps_sum_to_one_and_are_those_of_the_update(fresh, config):
    model, tok = fresh
    wrapped = trained(model, config)
    batch = encode(tok, PROMPTS, "left")
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
    wrapped = trained(model, config)
    batch = encode(tok, PROMPTS, "left")
    shape = 1, 1, len(wrapped.memory_layers), batch.input_ids.shape[1]
    everything, nothing = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    before = logits(wrapped, batch)
    with wrapped.edited(everything):
        assert torch.allclose(logits(wrapped, batch), before, atol=1e-5)
    with wrapped.edited(nothing):
        emptied = logits(wrapped, batch)
    assert torch.equal(logits(wrapped, batch), before)
    with wrapped.disable_adapter():
        assert torch.allclose(emptied, logits(wrapped, batch), atol=1e-5)
    newest = everything.clone()
    newest[..., -1] = False
    with wrapped.edited(newest), wrapped.attention_maps() as maps:
        logits(wrapped, batch)
    for weights in maps.values():
        assert weights[..., -1].abs().max() == 0
        assert torch.allclose(weights[:, :, -1].sum((-1, -2)), torch.ones(()), atol=1e-5)


def test_last_tokens_alone_are_asked_again_with_a_cache(fresh, config):
    """Given first pass and cache of whole texts, the last tokens give what the whole texts give."""
    model, _ = fresh
    wrapped = trained(model, config)
    batch = Batch(
        torch.randint(5, 50, (2, 3)), torch.tensor([[0, 1, 1], [1, 1, 1]])
    )  # shorter than a sliding window
    width, memory = batch.input_ids.shape[1], len(wrapped.memory_layers)
    cells = torch.rand(len(batch.input_ids), width, memory, width) < 0.5
    cells[:, :-2] = True
    states = wrapped.first_pass_states(**tensors(batch))
    with torch.no_grad():
        known = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        cache = wrapped(batch.input_ids, **known, use_cache=True).past_key_values
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        with wrapped.edited(cells):
            whole = logits(wrapped, batch, first_pass=states)
        for _ in range(2):  # it leaves the cache as it is
            with wrapped.edited(cells[:, -2:]):
                given = {"first_pass": states[:, :, -2:], "past_key_values": cache}
                last = wrapped(
                    batch.input_ids[:, -2:],
                    batch.attention_mask,
                    position_ids=batch.position_ids[:, -2:],
                    **given,
                )
            assert (
                torch.allclose(last.logits, whole[:, -2:], atol=1e-5)
                and last.past_key_values is None
            )
    assert (whole[:, -2:] - logits(wrapped, batch)[:, -2:]).abs().max() > 1e-4
    assert all(
        torch.equal(layer.keys, k) and torch.equal(layer.values, v)
        for layer, (k, v) in zip(cache.layers, before, strict=True)
    )
    assert torch.allclose(
        logits(wrapped, batch, first_pass=states)[:, -2:], logits(wrapped, batch)[:, -2:], atol=1e-5
    )


def test_what_a_sliding_window_has_dropped_is_not_made_up():
    model, tok = load_model("tiny-gemma3")
    wrapped = trained(model, CONFIGS["one source"])
    batch = encode(tok, PROMPTS[1:2])
    states = wrapped.first_pass_states(**tensors(batch))
    cache = wrapped(batch.input_ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="sliding window"):
        wrapped(
            batch.input_ids[:, -1:],
            batch.attention_mask,
            first_pass=states[:, :, -1:],
            past_key_values=cache,
        )


def test_a_cache_of_other_texts_is_refused(llama):
    model, tok = llama
    wrapped = get_back_attention_model(model, CONFIGS["one source"])
    batch = encode(tok, PROMPTS[:1])
    states = wrapped.first_pass_states(**tensors(batch))[:, :, -1:]
    given = {
        "first_pass": states,
        "past_key_values": wrapped(batch.input_ids[:, :2], use_cache=True).past_key_values,
    }
    with pytest.raises(ValueError, match="attention_mask"):
        wrapped(batch.input_ids[:, -1:], **given)
    with pytest.raises(ValueError, match="holds 2 tokens"):
        wrapped(batch.input_ids[:, -1:], batch.attention_mask, **given)
    wrapped.unload()


def test_cells_of_another_shape_are_refused(llama):
    model, _ = llama
    wrapped = get_back_attention_model(model, CONFIGS["high states only, raw"])
    with (
        pytest.raises(ValueError, match="2 memory layers"),
        wrapped.edited(torch.ones(1, 1, 3, 5, dtype=bool)),
    ):
        pass
    ids, first = torch.tensor([[1, 2, 3]]), torch.ones(1, 1, 2, 2, dtype=bool)
    cache = wrapped(ids[:, :2]).past_key_values
    with pytest.raises(ValueError, match="3 positions"), wrapped.edited(first):
        wrapped(ids[:, 2:], past_key_values=cache)
    wrapped.unload()


def test_states_of_the_second_pass_are_captured(fresh, config):
    model, tok = fresh
    wrapped = trained(model, config)
    batch = encode(tok, PROMPTS, "left")
    stream = capture(wrapped, batch, detail=False)
    assert len(stream.hidden) == wrapped.layers + 1
    read = Lens(stream.arch).log_probs(batch.at_last(stream.hidden[-1]))
    said = batch.at_last(logits(wrapped, batch)).float().log_softmax(-1)
    assert torch.allclose(read, said, atol=1e-4)


def test_fp32_adapter_on_a_bf16_base():
    model, tok = load_model("tiny-llama", dtype=torch.bfloat16)
    batch = encode(tok, PROMPTS)
    before = logits(model, batch)
    wrapped = get_back_attention_model(model, CONFIGS["one source"])
    assert torch.equal(logits(wrapped, batch), before)
    assert all(p.dtype == torch.float32 for p in wrapped.updates.parameters())
    with torch.no_grad():
        wrapped.updates["1"].o_proj.weight.normal_()
    out = logits(wrapped, batch)
    assert out.dtype == torch.bfloat16 and out.isfinite().all() and not torch.equal(out, before)


def test_works_in_trainer_and_pipeline(tmp_path, caplog):
    model, tok = load_model("tiny-llama")
    wrapped = get_back_attention_model(model, CONFIGS["one source"])
    rows = [
        {"input_ids": ids, "labels": ids} for ids in encode(tok, PROMPTS[:1] * 8).input_ids.tolist()
    ]
    settings = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=12,
        learning_rate=0.05,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=wrapped, args=settings, train_dataset=rows)
    before = wrapped(
        input_ids=torch.tensor([rows[0]["input_ids"]]), labels=torch.tensor([rows[0]["labels"]])
    ).loss
    trainer.train()
    after = wrapped(
        input_ids=torch.tensor([rows[0]["input_ids"]]), labels=torch.tensor([rows[0]["labels"]])
    ).loss
    assert after < before - 0.1
    trainer.save_model(str(tmp_path / "kept"))
    kept = {p.name: p.stat().st_size for p in (tmp_path / "kept").iterdir()}
    assert kept["model.safetensors"] < 10_000  # the adapter only
    write = pipeline("text-generation", model=wrapped.base_model, tokenizer=tok)
    text = write(PROMPTS[0], max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith(PROMPTS[0]) and len(text) > len(PROMPTS[0])
    assert "not supported" not in caplog.text


def test_counts_weights(llama, capsys):
    model, _ = load_model("tiny-llama")
    wrapped = get_back_attention_model(model, CONFIGS["one source"])
    wrapped.print_trainable_parameters()
    assert wrapped.trainable()[0] == 4 * 32 * 8
    assert "trainable params: 1,024 ||" in capsys.readouterr().out


def test_a_wrapped_model_is_not_wrapped_again():
    model, _ = load_model("tiny-llama")
    wrapped = get_back_attention_model(model, CONFIGS["one source"])
    with pytest.raises(ValueError, match="unload"):
        get_back_attention_model(model, CONFIGS["one source"])
    get_back_attention_model(wrapped.unload(), CONFIGS["one source"])


def test_layers_with_a_forward_of_their_own_keep_it():
    """As accelerate puts on them for models larger than one GPU."""
    model, tok = load_model("tiny-llama")
    layer, calls = model.model.layers[2], []
    ordinary = layer.forward
    layer.forward = lambda *args, **kwargs: (calls.append(1), ordinary(*args, **kwargs))[1]
    wrapped = trained(model, CONFIGS["one source"])
    batch = encode(tok, PROMPTS)
    states = wrapped.first_pass_states(**tensors(batch))
    logits(wrapped, batch, first_pass=states)
    calls.clear()
    logits(wrapped, batch)
    assert len(calls) == 2


def test_an_interrupt_leaves_nothing_behind():
    model, tok = load_model("tiny-llama")
    batch = encode(tok, PROMPTS)
    before = logits(model, batch)
    wrapped = trained(model, CONFIGS["one source"])
    on = logits(wrapped, batch)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[3].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(wrapped, batch)
    with pytest.raises(KeyboardInterrupt):
        wrapped.first_pass_states(**tensors(batch))
    handle.remove()
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, batch), before)
    assert torch.equal(logits(wrapped, batch), on)


def test_outputs_that_would_mix_both_passes_are_refused(llama):
    model, tok = load_model("tiny-llama")
    wrapped = trained(model, CONFIGS["one source"])
    batch = encode(tok, PROMPTS)
    for what in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match="both passes"):
            wrapped(input_ids=batch.input_ids, **{what: True})
        with wrapped.disable_adapter(), torch.no_grad():
            wrapped(input_ids=batch.input_ids, **{what: True})
