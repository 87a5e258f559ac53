"""Datasets without leakage, the one training loop, the arms, and runs that can be stopped and resumed."""

import ast
import hashlib
import itertools
import json
import re
from dataclasses import asdict, dataclass, replace
from functools import partial

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from backattn import load_model, runtime
from backattn.adapters.arms import ARMS, make_arm
from backattn.adapters.two_pass import TwoPassModel
from backattn.training.batches import IGNORED, collate, first_tokens, numbers
from backattn.training.evaluation import (
    NUMBER,
    FirstPasses,
    answer_logits,
    evaluate,
    perplexity,
    right_answers,
    written,
)
from backattn.training.loop import Recipe, _rows_of, _save, train
from companion.paths import NOTEBOOKS
from companion.questions.datasets import (
    DATASETS,
    OTHER_PROMPTS,
    Dataset,
    load,
    one_digit_composite,
)
from companion.questions.splits import split
from companion.runs import as_asked
from companion.runs.as_asked import test_groups
from companion.runs.perform import (
    before_and_after,
    forward_flops,
    put_weights,
    recheck,
    train_and_test,
    with_adapter,
)
from companion.runs.plans import (
    CORE_ARMS,
    MOST_RATES,
    SEEDS,
    SIZED,
    adapter_runs,
    best_of,
    complete,
    composing_runs,
    main_runs,
    scratch_runs,
    search,
    ship,
    sweep,
    varied_runs,
)
from companion.runs.run import SCRATCH, Run
from companion.runs.scratch import COMPOSING_ARMS, SCRATCH_ARMS, scratch_model
from companion.runs.store import CHECKPOINTS, Store

NOTEBOOK_03 = NOTEBOOKS / "03_back_attention_training.ipynb"



# ---------------------------------------------------------------- batches and answers


@pytest.fixture
def sums():
    return pd.DataFrame(
        {"prompt": ["one plus two is", "five plus one is", "two is"], "answer": [" 3", " 6", " 12"]}
    )


def test_batches_are_padded_on_the_left_and_labelled_at_the_end(llama, sums):
    items = numbers(llama[1], sums)
    batch = collate(items, [0, 2])
    assert (
        batch.attention_mask[:, -1].all()
        and (batch.input_ids[batch.attention_mask == 0] == 0).all()
    )
    for place, row in enumerate([0, 2]):
        own = batch.labels[place][batch.labels[place] != IGNORED].tolist()
        assert own == items.answers[row]
        text = batch.input_ids[place][batch.attention_mask[place].bool()].tolist()
        assert text == items.prompts[row] + items.answers[row][:-1]


def test_right_means_what_greedy_generation_writes(tiny, sums):
    """`right_answers` against actual generation, with the model's own words as answers."""
    model, tok = tiny
    items = replace(numbers(tok, sums), number_continuations=frozenset())
    for row, prompt in enumerate(items.prompts):
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=3, eos_token_id=-1, do_sample=False
        )[0]
        items.answers[row] = made[len(prompt) :].tolist()
    assert evaluate(model, items)[0].all()
    items.answers[1][0] = (items.answers[1][0] + 1) % 100
    assert evaluate(model, items)[0].tolist() == [True, False, True]


def test_an_answer_that_goes_on_as_another_number_is_wrong(llama, sums):
    items = numbers(llama[1], sums)
    assert items.number_continuations and all(
        llama[1].decode([i]).strip()[:1].isdigit() for i in items.number_continuations
    )
    batch = collate(items, [0])
    logits = torch.zeros(1, batch.labels.shape[1], len(llama[1]))
    for place, token in enumerate(items.answers[0]):
        logits[0, place, token] = 1
    assert right_answers(logits, items, [0], batch).item()
    logits[0, -1, next(iter(items.number_continuations))] = 2
    assert not right_answers(logits, items, [0], batch).item()
    logits[0, -1, next(iter(items.number_continuations))] = 0
    logits[0, -1, llama[1](" red")["input_ids"][0]] = 2  # any other end is fine
    assert right_answers(logits, items, [0], batch).item()


def test_first_tokens_accept_aliases(llama, sums):
    accepted = [frozenset([5, 6]), frozenset([7]), frozenset([8])]
    items = first_tokens(llama[1], sums, accepted)
    batch = collate(items, [0, 1, 2])
    logits = torch.zeros(3, 1, 20)
    for row, said in enumerate([6, 5, 8]):
        logits[row, 0, said] = 1
    assert right_answers(logits, items, [0, 1, 2], batch).tolist() == [True, False, True]


def test_numbers_are_read_from_what_is_written(llama, sums, monkeypatch):
    items = numbers(llama[1], sums)
    texts = iter([" 3 pens", "\n6. And", " 12,5"])
    monkeypatch.setattr(
        type(llama[1]), "batch_decode", lambda self, rows: [next(texts) for _ in rows]
    )
    order = np.argsort([len(p) for p in items.prompts], kind="stable")
    right = written(llama[0], llama[1], items)
    said = dict(zip(order.tolist(), [" 3 pens", "\n6. And", " 12,5"], strict=True))
    expected = [
        bool(re.match(rf"\s*{a.strip()}(?![\d,])", said[row])) for row, a in enumerate(items.texts)
    ]
    assert right.tolist() == expected
    for text, number in (
        (" 75.", "75"),
        ("-12", "-12"),
        ("\n 4 pens", "4"),
        (" 75.89", "75"),
        ("1234", "1234"),
        ("x 3", None),
        ("7,5", None),
    ):
        found = NUMBER.match(text)
        assert (found and found[1]) == number


def test_perplexity_is_that_of_the_words(llama):
    model, tok = load_model("tiny-llama")
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    assert perplexity(model, tok, "one two three four " * 20, window=8) == pytest.approx(len(tok))


def test_empty_questions_are_refused(llama, sums):
    with pytest.raises(ValueError, match="no questions"):
        numbers(llama[1], sums[:0])


# ---------------------------------------------------------------- arms


@pytest.mark.parametrize("arm", ARMS)
def test_untrained_arms_change_nothing_and_learn(arm, sums):
    model, tok = load_model("tiny-llama")
    items = numbers(tok, sums)
    batch = collate(items, range(3))
    with torch.no_grad():
        before = answer_logits(model, batch)
        wrapped = make_arm(arm, model, 1, 4)
        assert torch.equal(answer_logits(wrapped, batch), before)
    curve = train(wrapped, items, Recipe(steps=30, learning_rate=0.03, evaluations=3))
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0] - 0.1
    assert torch.equal(answer_logits(wrapped.unload(), batch).detach(), before)


def test_arms_have_equal_weights():
    sizes = {}
    for arm in ARMS:
        model, _ = load_model("tiny-llama")
        wrapped = make_arm(arm, model, 1, 8)
        sizes[arm] = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    same = [sizes[arm] for arm in ("back attention", "same layer", "residual LoRA", "loop LoRA")]
    assert same == [4 * 32 * 8] * 4 and sizes["bias"] == 32
    assert abs(sizes["LoRA q,v"] - same[0]) / same[0] < 0.5
    with pytest.raises(ValueError, match="Unknown arm"):
        make_arm("magic", load_model("tiny-llama")[0], 1, 8)
    with pytest.raises(ValueError, match="q_proj"):
        make_arm("LoRA q,v", load_model("tiny-gpt2")[0], 1, 8)


def test_the_control_reads_its_own_layer_in_one_pass():
    same = make_arm("same layer", load_model("tiny-llama")[0], 1, 4)
    assert same.memory_layers == (1,) and not same.two_passes
    full = make_arm("back attention", load_model("tiny-llama")[0], 1, 4)
    assert full.memory_layers == (1, 2, 3, 4) and full.two_passes


def test_the_loop_reads_its_own_position_only():
    model, _ = load_model("tiny-llama")
    wrapped = make_arm("loop LoRA", model, 1, 4)
    assert wrapped.two_passes and wrapped.memory_layers == (4,)
    seen = {}
    update = wrapped.updates["1"]
    torch.nn.init.normal_(update.up.weight)
    update.register_forward_hook(lambda m, args, out: seen.update(out=out, h=args[0]))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wrapped(ids, use_cache=False)
        final = wrapped.first_pass_states(ids, torch.ones_like(ids), torch.arange(4)[None])[
            -1
        ]  # h_L [B, T, D]
    expected = update.up(update.down(final / (final.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()))
    assert torch.allclose(seen["out"], expected, atol=1e-5)


# ---------------------------------------------------------------- training


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def many(tok, count=24):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        (f"{words[i % 10]} plus {words[i // 10]} is", f" {i % 10 + i // 10 + 2}")
        for i in range(count)
    ]
    return numbers(tok, pd.DataFrame(rows, columns=["prompt", "answer"]))


@pytest.mark.parametrize("arm", ["back attention", "LoRA q,v"])
def test_a_stopped_run_goes_on_to_the_same_result(arm, tmp_path, monkeypatch):
    recipe = Recipe(steps=12, learning_rate=0.01, batch_size=5, evaluations=3)

    def fresh():
        torch.manual_seed(0)
        model, tok = load_model("tiny-llama")
        return make_arm(arm, model, 1, 4), many(tok)

    model, items = fresh()
    curve, whole = train(model, items, recipe, items), weights_of(model)

    class Stop(Exception):
        pass

    stopped, items = fresh()
    path, ordinary = tmp_path / "training.pt", right_answers
    calls = iter(range(100))

    def failing(*args):
        if next(calls) == 10:
            raise Stop
        return ordinary(*args)

    monkeypatch.setattr("backattn.training.loop.right_answers", failing)
    monkeypatch.setattr("backattn.training.evaluation.right_answers", failing)
    with pytest.raises(Stop):
        train(stopped, items, recipe, items, path, save_every=2)
    monkeypatch.setattr("backattn.training.loop.right_answers", ordinary)
    monkeypatch.setattr("backattn.training.evaluation.right_answers", ordinary)
    assert path.exists()
    resumed, items = fresh()
    again = train(resumed, items, recipe, items, path, save_every=2)
    columns = ["step", "loss", "train", "validation", "losses"]
    pd.testing.assert_frame_equal(curve[columns], again[columns])
    assert all(torch.equal(whole[name], p) for name, p in weights_of(resumed).items())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model, tok = load_model("tiny-llama")
    wrapped, items, path = make_arm("bias", model, 1, 4), many(tok), tmp_path / "training.pt"
    recipe = Recipe(steps=4, learning_rate=0.01)
    optimiser = torch.optim.AdamW(wrapped.updates.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0)
    weights = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    _save(path, recipe, weights, optimiser, schedule, {"step": 1, "seconds": 0.0})
    with pytest.raises(ValueError, match="another training run"):
        train(wrapped, items, replace(recipe, seed=3), checkpoint=path)


def test_kept_first_passes_give_the_same_training(monkeypatch):
    recipe, ends = Recipe(10, 0.01, batch_size=6, evaluations=2), []
    counted, ordinary = [], FirstPasses._compute
    monkeypatch.setattr(FirstPasses, "_compute", lambda *a: (counted.append(1), ordinary(*a)))
    for room in (1.0, 1e-6):
        torch.manual_seed(0)
        model, tok = load_model("tiny-llama")
        wrapped, items = make_arm("back attention", model, 1, 4), many(tok)
        ends.append(
            (
                train(wrapped, items, recipe, keep_first_passes=room),
                weights_of(wrapped),
                len(counted),
            )
        )
    (kept, weights, first), (plain, others, second) = ends
    assert first == second == 1  # computed once with room, never without
    columns = ["step", "loss", "train", "validation"]
    pd.testing.assert_frame_equal(kept[columns], plain[columns], atol=1e-4)
    assert all(torch.allclose(weights[name], others[name], atol=1e-4) for name in weights)


def test_what_first_passes_take_is_known_before():
    model, tok = load_model("tiny-llama")
    wrapped, items = make_arm("back attention", model, 1, 4), many(tok)
    passes = FirstPasses(wrapped, items, group=5)
    passes([0, 7], collate(items, [0, 7]))
    assert 0 < len(passes.kept) <= 10
    for row in range(len(items)):
        passes([row], collate(items, [row]))
    size = sum(x.numel() * 4 for x in passes.kept.values())
    assert FirstPasses.gigabytes(wrapped, items) == pytest.approx(size / 2**30)


def test_every_question_is_seen_once_per_epoch_among_its_like():
    recipe = Recipe(steps=8, learning_rate=1.0, batch_size=6)
    lengths = np.arange(24) % 5
    seen = [_rows_of(step, lengths, recipe) for step in range(4)]
    assert sorted(row for rows in seen for row in rows) == list(range(24))
    assert max(np.ptp(lengths[rows]) for rows in seen) <= 2
    assert seen[0] != _rows_of(4, lengths, recipe)
    assert seen[0] != _rows_of(0, lengths, replace(recipe, seed=1))
    assert len(_rows_of(3, lengths[:4], recipe)) == 4  # fewer questions than a batch


def test_training_says_what_is_wrong():
    model, tok = load_model("tiny-llama")
    items = many(tok)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(model, items, Recipe(1, 0.01))
    model.requires_grad_(True)
    wrapped = make_arm("bias", model, 1, 4)
    with torch.no_grad():
        wrapped.updates["1"].bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(wrapped, items, Recipe(1, 0.01))


# ---------------------------------------------------------------- runs


@pytest.fixture
def tiny_run(monkeypatch):
    frame = one_digit_composite()
    words = frame.assign(prompt="one plus two is", answer=" 3")
    monkeypatch.setitem(DATASETS, "tiny", Dataset("tiny", lambda: words))
    return Run("tiny", "back attention", 0, 0.01, 6, "tiny-llama", 1, 4, 4, 12, 8, 8, "float32")


def test_a_run_is_kept_and_not_made_twice(tiny_run, tmp_path, monkeypatch):
    store = Store(tmp_path, shipped=None)
    runs = [tiny_run, replace(tiny_run, arm="zero-shot", steps=0)]
    sweep(runs, store)
    kept = [store.result(run) for run in runs]
    assert [result["run"]["arm"] for result in kept] == ["back attention", "zero-shot"]
    assert [result["trained"] for result in kept] == [4 * 32 * 4, 0]
    assert set(store.weights(tiny_run)) == {f"updates.1.{n}_proj.weight" for n in "qkvo"}
    monkeypatch.setattr("companion.runs.perform.with_adapter", lambda *a: pytest.fail("made twice"))
    assert train_and_test(tiny_run, store)["right"] == kept[0]["right"]


@pytest.fixture
def mixed_run(tiny_run, monkeypatch):
    """A run that gets some questions right and some wrong, and none before training."""
    frame = one_digit_composite()
    two, one = np.arange(len(frame)) % 2 == 1, np.arange(len(frame)) % 3 > 0
    prompts = [
        f"{'two' if a else 'five'} plus {'one' if b else 'three'} is"
        for a, b in zip(two, one, strict=True)
    ]
    questions = frame.assign(prompt=prompts, answer=np.where(two, " 3", " 6"))
    monkeypatch.setitem(DATASETS, "mixed", Dataset("mixed", lambda: questions))
    monkeypatch.setattr("companion.runs.perform.perplexity", lambda *a: 1.0)
    return replace(
        tiny_run, dataset="mixed", learning_rate=0.05, steps=40, train_items=64, test_items=16
    )


def test_kept_weights_give_the_kept_answers(mixed_run, tmp_path):
    tiny_run, store = mixed_run, Store(tmp_path, shipped=None)
    result = train_and_test(tiny_run, store)
    assert set(result["right"]) == {"0", "1"}
    again = recheck([tiny_run], store, 12).iloc[0]
    assert (again["n"], again["agree"], again["accuracy"]) == (12, 1, again["kept"]) and 0 < again[
        "kept"
    ] < 1
    with with_adapter(tiny_run, "float32") as (model, tok):  # untrained it has none right
        assert not evaluate(model, as_asked.questions(tiny_run, tok, "test"))[0].any()
    with with_adapter(tiny_run, "float32") as (model, tok):
        put_weights(model, store.weights(tiny_run))
        right = evaluate(model, as_asked.questions(tiny_run, tok, "test"))[0]
    assert "".join(map(str, right.astype(int))) == result["right"]
    with (
        pytest.raises(ValueError, match="another arm"),
        with_adapter(replace(tiny_run, dim=2), "float32") as (model, _),
    ):
        put_weights(model, store.weights(tiny_run))
    with with_adapter(tiny_run, "float32"):  # the shared model is free again
        pass


def test_shipped_results_stand_in_for_runs(tiny_run, tmp_path, monkeypatch):
    store = Store(tmp_path / "runs", shipped=None)
    result = train_and_test(tiny_run, store)
    store.ship([tiny_run], with_weights=[tiny_run], folder=tmp_path / "data")
    monkeypatch.setattr("companion.runs.plans.CHECKPOINTS", tmp_path / "data" / "checkpoints")
    monkeypatch.setattr("companion.runs.store.CHECKPOINTS", tmp_path / "data" / "checkpoints")
    fresh = Store(tmp_path / "elsewhere", tmp_path / "data" / "runs.jsonl")
    assert fresh.result(tiny_run)["right"] == result["right"]
    assert set(fresh.weights(tiny_run)) == set(store.weights(tiny_run))
    fresh.ship([tiny_run], folder=tmp_path / "data")  # and stays what it was
    assert len((tmp_path / "data" / "runs.jsonl").read_text().splitlines()) == 1
    with pytest.raises(FileNotFoundError, match="profile full"):
        fresh.weights(replace(tiny_run, seed=5))
    (tmp_path / "data" / "checkpoints" / f"{tiny_run.key}.safetensors").write_bytes(
        b"something else"
    )
    with pytest.raises(OSError, match="is not the file that"):
        fresh.weights(tiny_run)


def test_keys_tell_runs_apart(tiny_run):
    others = [
        replace(tiny_run, **{k: v})
        for k, v in dict(seed=1, arm="bias", learning_rate=0.1, steps=7).items()
    ]
    assert len({run.key for run in [tiny_run, *others]}) == 5
    assert replace(tiny_run).key == tiny_run.key


def test_a_new_setting_at_its_default_leaves_keys_what_they_are(tiny_run):
    @dataclass(frozen=True)
    class Later(Run):
        more: int = 1

    assert Later(**asdict(tiny_run)).key == tiny_run.key != Later(**asdict(tiny_run), more=2).key


def test_compositions_are_tuned_alike(tmp_path):
    """Each arm tries the same decays with the search's rates, and is trained at what does best on ID/ID questions."""
    store = Store(tmp_path, shipped=None)
    while True:
        tried, final = composing_runs(store)
        if final:
            break
        for run in tried:
            if store.result(run) is None:
                pretend(store, run, run.weight_decay - abs(np.log(run.learning_rate / 1e-3)))
    assert {run.arm for run in tried} == set(COMPOSING_ARMS) and len(tried) == 7 * 3 * 3
    assert {(run.weight_decay, run.learning_rate) for run in final} == {(1.0, 1e-3)} and len(
        final
    ) == 7 * 3
    assert {(run.steps, run.test_items, run.recipe.weight_decay) for run in final} == {
        (1600, None, 1.0)
    }


def test_a_plan_without_core_arms_comes_to_an_end():
    store = Store()
    every, none = (main_runs(store, core_arms_on=core) for core in (["1DC"], []))
    assert (
        none[1] and {run.dataset for run in none[1]} == {"two-hop"} and len(none[1]) < len(every[1])
    )


def test_shipped_runs_are_all_that_notebook_03_asks_for(tmp_path):
    """A renamed field or another default would orphan them, and the notebook would train for hours."""
    store, text = Store(tmp_path), NOTEBOOK_03.read_text().replace('\\"', '"')
    every, core = (
        json.loads(re.search(rf"{name}_on = (\[.*?\])", text)[1])
        for name in ("every_arm", "core_arms")
    )
    plans = [
        scratch_runs,
        partial(main_runs, every_arm_on=every, core_arms_on=core),
        partial(adapter_runs, model="gemma3-270m", names=("two-hop",), arms=CORE_ARMS),
    ]
    for plan in plans:
        tried, final = plan(store)
        assert final and all(store.result(run) for run in tried + final)
    files = sorted(CHECKPOINTS.iterdir())
    assert sum(path.stat().st_size for path in files) < 40e6
    for path in files:
        assert store.shipped[path.stem]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def parameter(notebook, name):
    """The value of a notebook's parameter."""
    path = next(NOTEBOOK_03.parent.glob(f"{notebook}_*.ipynb"))
    cell = next(
        c
        for c in nbformat.read(path, as_version=4).cells
        if "parameters" in c.metadata.get("tags", [])
    )
    found = {
        node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body
    }
    return found[name]


def test_shipped_runs_are_all_that_the_sweeps_of_notebook_04_ask_for(tmp_path):
    store, layers = Store(tmp_path), 30
    memories = [tuple(range(first, last + 1)) for first, last in parameter("04", "memories")]
    plans = [
        varied_runs(store, "source_layer", range(layers)),
        varied_runs(store, "memory_layers", [None, *memories], ["back attention"]),
    ]
    digits = {"field": "source_layer", "values": parameter("04", "second_layers")}
    plans.append(varied_runs(store, dataset=parameter("04", "second_dataset"), **digits))
    anew = [("two-hop", layer) for layer in parameter("04", "retuned")]
    anew += [
        (parameter("04", "second_dataset"), layer) for layer in parameter("04", "second_retuned")
    ]
    for name, layer in anew:
        plans.append(adapter_runs(store, names=[name], source_layer=layer, arms=CORE_ARMS))
    for tried, final in plans:
        assert final and all(store.result(run) for run in tried + final)
    assert all("losses" in row for run in plans[0][1] for row in store.result(run)["curve"])


def test_shipped_runs_are_all_that_notebook_06_asks_for(tmp_path):
    store, own = (
        Store(tmp_path),
        {name: parameter("06", name) for name in ("source_layer", "steps")},
    )
    plan = partial(
        adapter_runs, model=parameter("06", "model_name"), names=[parameter("06", "dataset")], **own
    )
    shape = {"widths": parameter("06", "scratch_widths"), "dims": parameter("06", "scratch_dims")}
    plans = [partial(plan, arms=CORE_ARMS, dim=dim) for dim in parameter("06", "dims")]
    plans += [
        partial(plan, arms=["bias"]),
        partial(varied_runs, field="dim", values=parameter("06", "dims"), **own),
        partial(scratch_runs, tried_for=750, seeds=SEEDS, **shape),
    ]
    for tried, final in (plan(store) for plan in plans):
        assert final and all(store.result(run) for run in tried + final)


def test_shipped_runs_are_all_that_notebooks_07_and_08_ask_for(tmp_path):
    store = Store(tmp_path)
    for layers, dim in parameter("07", "several"):
        at = {
            "source_layer": tuple(layers),
            "dim": dim,
            "arms": ["back attention", "residual LoRA"],
        }
        tried, final = adapter_runs(store, names=["two-hop"], **at)
        assert final and all(store.result(run) for run in tried + final)
    plans = [adapter_runs(store, names=OTHER_PROMPTS, arms=CORE_ARMS, batch_size=16)]
    plans.append(composing_runs(store))
    for tried, final in plans:
        assert final and all(store.result(run) for run in tried + final)
    shape = {
        "seeds": [parameter("08", "scratch_seed")],
        "widths": [parameter("08", "scratch_width")],
    }
    learnt = [
        run for run in scratch_runs(store, tried_for=750, **shape)[1] if run.arm == "2 layers"
    ]
    assert [store.weights(run) is not None for run in learnt] == [True]


def pretend(store, run, validation, **more):
    store.keep(
        run, {"run": {}, "validation": validation, "validation_loss": 1.0, "right": "1", **more}, {}
    )


def test_a_run_is_tested_in_the_dtype_that_is_asked_for_and_is_another_run_then(
    tiny_run, tmp_path, monkeypatch
):
    store, ours = (
        Store(tmp_path, shipped=None),
        [replace(tiny_run, model=m) for m in (SCRATCH, "smollm2")],
    )
    keys, seen = [run.key for run in (tiny_run, *ours)], []
    monkeypatch.setenv(runtime.DTYPE, "bfloat16")
    assert (
        tiny_run.key != keys[0] and [run.key for run in ours] == keys[1:]
    )  # whose results are shipped
    monkeypatch.setattr(
        "companion.runs.perform.answer_test",
        lambda run, model, *_: seen.append(model.dtype) or np.array([True]),
    )
    train_and_test(tiny_run, store)
    assert seen == [torch.bfloat16]
    monkeypatch.setenv(runtime.DTYPE, "float32")
    assert tiny_run.key == keys[0] and store.result(tiny_run) is None


def test_the_search_goes_on_while_the_best_is_at_an_end(tiny_run, tmp_path):
    store, scores = Store(tmp_path, shipped=None), {}
    for _ in range(10):
        tried, best = search(tiny_run, store, steps=3)
        if best:
            break
        for run in tried:
            scores[run.learning_rate] = 1 - abs(
                np.log(run.learning_rate / 6e-5)
            )  # best far below what is tried first
            pretend(store, run, scores[run.learning_rate])
    assert sorted(scores) == pytest.approx([6.25e-5, 2.5e-4, 1e-3, 4e-3])
    assert best.learning_rate == pytest.approx(6.25e-5) and len(tried) <= MOST_RATES
    assert best == replace(tiny_run, learning_rate=best.learning_rate)
    assert {(run.steps, run.test_items) for run in tried} == {(3, 0)}


def test_a_diverged_run_is_a_result_and_never_the_best(tiny_run, tmp_path):
    store = Store(tmp_path, shipped=None)
    low, middle, high = search(tiny_run, store, steps=3)[0]
    pretend(store, low, 0.2)
    pretend(store, middle, 0.5)
    store.keep(high, {"run": {}, "diverged": "the loss is nan"}, {})
    assert search(tiny_run, store, steps=3)[1].learning_rate == middle.learning_rate
    with pytest.raises(ValueError, match="None of 1 runs"):
        best_of([high], store)


def test_a_run_that_tries_a_learning_rate_never_sees_the_test(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("companion.runs.perform.answer_test", lambda *a: pytest.fail("tested"))
    result = train_and_test(replace(tiny_run, test_items=0), Store(tmp_path, shipped=None))
    assert (
        "right" not in result and 0 <= result["validation"] <= 1 and result["validation_loss"] > 0
    )


def test_results_on_a_published_dataset_can_be_read_without_it(tiny_run, tmp_path, monkeypatch):
    frame = one_digit_composite().assign(prompt="one plus two is", answer=" 3", group="text 7")
    frame["split"] = ["train", "validation", "test"] * 2187
    monkeypatch.setitem(DATASETS, "SVAMP", replace(DATASETS["SVAMP"], load=lambda: frame))
    run, store = replace(tiny_run, dataset="SVAMP"), Store(tmp_path, shipped=None)
    train_and_test(run, store)
    not_loaded = replace(DATASETS["SVAMP"], load=lambda: pytest.fail("loaded"))
    monkeypatch.setitem(DATASETS, "SVAMP", not_loaded)
    assert test_groups(replace(run), store.result(run)).tolist() == ["text 7"] * 8


def test_a_plan_is_completed(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "tiny", replace(DATASETS["tiny"], tuned_on="tiny"))
    monkeypatch.setattr("companion.runs.plans.MOST_RATES", 3)
    store, sizes = (
        Store(tmp_path, shipped=None),
        dict(source_layer=1, dim=4, batch_size=4, train_items=8),
    )
    sizes |= dict(validation_items=4, test_items=4, dtype="float32", steps=2)

    def plan(store):
        return adapter_runs(store, "tiny-llama", ["tiny"], ["back attention", "bias"], **sizes)

    runs = complete(plan, store)
    assert [run.arm for run in runs[:4]] == ["zero-shot", "few-shot", "back attention", "bias"]
    assert {run.fold for run in runs} == {0, 1, 2} and all(store.result(run) for run in runs)
    assert runs[0].dim != runs[2].dim  # the untrained are the same for every size of a trained arm
    again = recheck([run for run in runs if run.arm == "bias"], store, 3)
    assert (again["n"] == 3).all() and (again["agree"] == 1).all()
    examples = before_and_after(runs[2], store, 2)
    assert (
        list(examples.columns) == ["question", "before", "after", "answer"] and len(examples) == 2
    )
    assert ship([plan], store, tmp_path / "data") == 6 + 12  # 2 arms × 3 rates, 4 arms × 3 seeds
    assert len(list((tmp_path / "data" / "checkpoints").iterdir())) == 3 + 1
    shipped = Store(tmp_path / "empty", tmp_path / "data" / "runs.jsonl")
    assert ship([plan], shipped, tmp_path / "none") == 0 and not (tmp_path / "none").exists()

    monkeypatch.setattr("companion.runs.plans.CHECKPOINTS", tmp_path / "data" / "checkpoints")
    monkeypatch.setattr("companion.runs.store.CHECKPOINTS", tmp_path / "data" / "checkpoints")
    assert ship([plan], store, tmp_path / "later", weights=False) == 18 - 4
    lines = (tmp_path / "later" / "runs.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines}.isdisjoint(
        p.stem for p in CHECKPOINTS.iterdir()
    )
    assert len(lines) == 18 - 4
    assert not (tmp_path / "later" / "checkpoints").exists()


def test_a_setting_is_varied_at_the_rate_that_was_found(tiny_run, tmp_path, monkeypatch):
    store, (tried, final) = (
        Store(tmp_path, shipped=None),
        (["tried"], [tiny_run, replace(tiny_run, arm="few-shot")]),
    )
    monkeypatch.setattr("companion.runs.plans.adapter_runs", lambda *a, **k: (tried, final))
    runs = varied_runs(store, "source_layer", [1, 3], arms=["back attention"])
    assert runs == (tried, [tiny_run, replace(tiny_run, source_layer=3)])


def test_memory_layers_of_a_run_are_read(tiny_run):
    run = replace(tiny_run, memory_layers=(3, 4))
    assert run.key != tiny_run.key
    with with_adapter(run, "float32") as (model, _):
        assert model.memory_layers == (3, 4)
    with (
        pytest.raises(ValueError, match="no memory"),
        with_adapter(replace(run, arm="bias"), "float32"),
    ):
        pass


def test_runs_are_made_on_a_cluster(tiny_run, tmp_path, monkeypatch):
    from distributed import LocalCluster

    run, store = replace(tiny_run, dataset="1DC"), Store(tmp_path, shipped=None)
    with monkeypatch.context() as here:
        here.setattr("companion.runs.plans.perform", lambda *a: pytest.fail("made here"))
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
            here.setenv(runtime.CLUSTER, cluster.scheduler_address)
            sweep([run, replace(run, seed=1)], store)
            assert store.result(run) and store.result(replace(run, seed=1))
        for sizes in (
            {"n_workers": 1, "threads_per_worker": 2},
            {"n_workers": 1, "threads_per_worker": 1},
        ):
            with LocalCluster(**sizes, processes=False, dashboard_address=None) as cluster:
                here.setenv(runtime.CLUSTER, cluster.scheduler_address)
                with pytest.raises(OSError, match="two workers or more"):
                    sweep([replace(run, seed=2)], store)
    kept = store.result(run)["right"]
    assert train_and_test(run, Store(tmp_path / "again", shipped=None))["right"] == kept
    monkeypatch.setenv(runtime.CLUSTER, "nowhere")
    with pytest.raises(OSError, match="No dask scheduler"):
        sweep([replace(tiny_run, seed=2)], store)


def test_worked_examples_come_from_training_only(tiny_run, llama):
    run = replace(tiny_run, dataset="1DC", arm="few-shot")
    plain, shown = (
        as_asked.questions(r, llama[1], "test") for r in (replace(run, arm="zero-shot"), run)
    )
    assert len(shown.prompts[0]) > 4 * len(plain.prompts[0])
    assert shown.prompts[0][-len(plain.prompts[0]) + 1 :] == plain.prompts[0][1:]
    frame = split(load("1DC"), run.fold)
    text = llama[1].decode(shown.prompts[0])
    examples = [f"{part}=" for part in text.split("=")[:-2]]
    trained = set(frame.loc[frame["split"] == "train", "prompt"])
    assert all(example.split(". ")[-1].strip() in trained for example in examples)


def test_operations_are_counted_by_hand(llama):
    """Of a layer of the tiny Llama, attention's scores and sums included."""
    model, _ = load_model("tiny-llama")
    time, width, heads, kv, head, ffn = 7, 32, 4, 2, 8, 48
    linear = width * heads * head * 2 + 2 * width * kv * head + 3 * width * ffn
    layer = 2 * time * linear + 2 * 2 * heads * time * time * head
    total = 4 * layer + 2 * width * model.config.vocab_size
    ids = torch.arange(5, 5 + time)[None]
    counted = forward_flops(model, ids)
    turns = (
        2 * time * head // 2
    )  # older transformers make the angles of rotary embeddings by a matrix product
    assert counted in (total, total + turns)
    total = counted
    wrapped = make_arm("back attention", model, 1, 4)
    states, dim = 4, 4
    update = 2 * time * width * dim * (2 + 2 * states) + 2 * 2 * time * time * states * dim
    assert forward_flops(wrapped, ids) == total + 3 * layer + update


def test_models_from_scratch_of_other_widths(tmp_path):
    store = Store(tmp_path, shipped=None)

    def plan():
        return scratch_runs(store, seeds=(0, 1), widths=(40, 80), dims=(10, 4), tried_for=750)

    tried, final = plan()
    assert {run.steps for run in tried} == {750} and {run.test_items for run in tried} == {0}
    assert (
        len(tried) == 2 * 3 * (3 + 2 * 2) and final == []
    )  # widths, rates, arms: every width and d′ has its own
    for run in tried:
        pretend(store, run, 1 - abs(np.log(run.learning_rate / (1e-3 if run.dim != 4 else 2e-3))))
    for run in plan()[0]:
        if store.result(run) is None:
            pretend(store, run, 0.0)
    final = plan()[1]
    assert len(final) == 2 * 2 * (3 + 2 * 2)  # seeds, widths
    assert {run.learning_rate for run in final if run.dim == 4} == {2e-3}
    assert {run.learning_rate for run in final if run.dim != 4} == {1e-3}
    sizes = {}
    for run in final:
        model, _ = scratch_model(run)
        sizes[run.width, run.arm, run.dim] = sum(p.numel() for p in model.parameters())
    for width, dim in itertools.product((40, 80), (10, 4)):
        own, wide = (sizes[width, arm, dim] - sizes[width, "1 layer", 160] for arm in SIZED)
        assert own == 4 * width * dim and abs(wide - own) <= 3 * width


@pytest.mark.parametrize("arm", SCRATCH_ARMS)
def test_models_from_scratch(arm):
    run = Run("2-digit", arm, 0, 1e-3, 2, SCRATCH, 0, 8, 16, 64, 8, 8, "float32")
    with with_adapter(run, "float32") as (model, tok):
        items = as_asked.questions(run, tok, "train")
        assert {len(answer) for answer in items.answers} == {5} and {
            len(prompt) for prompt in items.prompts
        } == {6}
        text = [tok.decode(ids).replace(" ", "") for ids in (items.prompts[0], items.answers[0])]
        assert int(text[1].rstrip(";")) == eval(re.sub(r"\b0(?=\d)", "", text[0].rstrip("=")))
        assert np.isfinite(train(model, items, run.recipe)["loss"]).all()
        if isinstance(model, TwoPassModel):
            assert model.two_passes and model.memory_layers == (0, 1)


@pytest.mark.parametrize("arm", COMPOSING_ARMS)
def test_models_that_compose(arm):
    run = Run(
        "compositions", arm, 0, 1e-3, 4, SCRATCH, 0, 8, 64, None, None, None, "float32", width=20
    )
    with with_adapter(run, "float32") as (model, tok):
        items = as_asked.questions(run, tok, "train")
        assert {len(prompt) for prompt in items.prompts} == {2, 3} and {
            len(answer) for answer in items.answers
        } == {1}
        assert tok.decode(items.prompts[0] + items.answers[0]) == "".join(
            as_asked.asked(run, "train").iloc[0][:2]
        )
        curve = train(model, items, run.recipe, as_asked.questions(run, tok, "validation"))
        assert set(curve["kinds"].iloc[-1]) == {"ID/ID", "ID/OOD", "OOD/ID", "OOD/OOD"}
        assert np.mean(list(curve["kinds"].iloc[-1].values())) == pytest.approx(
            curve["validation"].iloc[-1]
        )
        layers = (model.base_model if isinstance(model, TwoPassModel) else model).model.layers
        assert len(layers) == (4 if arm in ("4 layers", "2 layers, twice") else 2)
        assert (layers[0] is layers[-2]) == (arm != "4 layers")
        if isinstance(model, TwoPassModel):
            read = {
                "2 layers + back attention": (0, 1, 2),
                "2 layers + same layer": (0,),
                "2 layers + loop": (2,),
            }
            read["2 layers + return"] = (2,)
            assert model.memory_layers == read[arm] and model.two_passes == ("same" not in arm)
            weights = sum(p.numel() for p in model.updates.parameters())
            assert weights == (1 if "return" in arm else 4 * 20 * 8)
    with pytest.raises(ValueError, match="Unknown arm '1 layer'"):
        scratch_model(replace(run, arm="1 layer"))


def test_weights_from_scratch():
    """Widened = with back attention, to one part in a thousand; tied = one layer."""
    count = {}
    for arm in SCRATCH_ARMS:
        model, _ = scratch_model(Run("2-digit", arm, dim=160, model=SCRATCH))
        count[arm] = sum(p.numel() for p in model.parameters())
    assert count["1 layer, wide"] == pytest.approx(count["1 layer + back attention"], rel=1e-3)
    assert (
        count["1 layer, twice"]
        == count["1 layer"]
        < count["1 layer + back attention"]
        < count["2 layers"]
    )
    assert count["1 layer + back attention"] / count["2 layers"] == pytest.approx(0.567, abs=0.01)
