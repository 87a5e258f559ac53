"""Datasets without leakage, the one training loop, the arms, and runs that can be stopped and resumed."""

import ast
import hashlib
import itertools
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backattn import load_model, runtime
from backattn.adapters.arms import make_arm
from backattn.adapters.two_pass import TwoPassModel
from backattn.training.evaluation import (
    evaluate,
)
from backattn.training.loop import train
from companion.paths import NOTEBOOKS
from companion.questions import datasets
from companion.questions.compositions import INVENTED, RELATIONS, compositions
from companion.questions.datasets import (
    DATASETS,
    OTHER_PROMPTS,
    in_context,
    load,
    majority_baseline,
    majority_baseline_by_kind,
    multiarith,
    near_duplicate_groups,
    one_digit_composite,
    svamp,
    two_digit,
    two_hop,
)
from companion.questions.facts import two_hop_facts
from companion.questions.splits import FOLDS, SPLITS, _turn, draw, place_of, split
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

PLACES = [0.5584, 0.3624, 0.4048]  # of "Spain", "3,4", "ant"
OFFLINE = ["2-digit", "1DC", "two-hop", "legs, one kind", "legs, two kinds", *OTHER_PROMPTS]
TWICE = (
    "two-hop",
    "question",
    "code",
)  # ask some questions twice: the capital of a country of a city, of a company


# ---------------------------------------------------------------- datasets


@pytest.mark.parametrize("fold", [None, 0, 1, 2])
@pytest.mark.parametrize("name", OFFLINE)
def test_no_name_is_in_two_splits(name, fold):
    frame = split(load(name), fold)
    assert set(frame["split"]) == set(SPLITS)
    assert not frame["prompt"].duplicated().any() or name in TWICE
    names = frame.assign(name=frame["group"].str.split("|")).explode("name")
    assert (names.groupby("name")["split"].nunique() == 1).all()
    assert frame.loc[frame["split"] == "test", "tested"].all()


@pytest.mark.parametrize("name", OFFLINE)
def test_every_question_is_tested_in_one_fold_or_validates_in_all(name):
    whole = load(name)
    parts = [split(whole, fold) for fold in range(FOLDS)]
    tested = pd.concat([part[part["split"] == "test"] for part in parts])["prompt"]
    held_out = [set(part.loc[part["split"] == "validation", "prompt"]) for part in parts]
    assert held_out[0] == held_out[1] == held_out[2] and not held_out[0] & set(tested)
    if name != "legs, two kinds":  # whose animals may fall into different folds
        alone = whole[whole["tested"] & ~whole["prompt"].isin(held_out[0])]
        assert sorted(tested) == sorted(alone["prompt"])


def test_places_are_what_they_were():
    """A salted hash would shuffle the splits with every start of Python."""
    assert [round(place_of(name), 4) for name in ("Spain", "3,4", "ant")] == PLACES
    with pytest.raises(ValueError, match="folds 0 to 2"):
        split(load("1DC"), 3)


def test_arithmetic_is_right_and_no_first_step_is_seen_before():
    frame = two_digit()
    assert len(frame) == 20_000
    for row in frame.sample(300, random_state=0).itertuples():
        assert int(row.answer) == eval(row.prompt.rstrip("="))
    composite = split(one_digit_composite(), 0)
    assert len(composite) == 6_561
    for row in composite.sample(300, random_state=0).itertuples():
        assert int(row.answer) == eval(row.prompt.rstrip("="))
    digits = (
        composite["prompt"]
        .str.extract(r"\((\d).(\d)\)")
        .apply(lambda row: tuple(sorted(row)), axis=1)
    )
    assert not set(digits[composite["split"] == "test"]) & set(
        digits[composite["split"] == "train"]
    )


def test_other_wordings_ask_the_same_questions():
    plain, question, code = (load(name) for name in ("two-hop", "question", "code"))
    row = plain.index[plain["prompt"] == "Dubliners's author's country is"]
    assert question["prompt"][row].tolist() == [
        "Question: What is the country of the author of Dubliners? Answer:"
    ]
    assert code["prompt"][row].tolist() == ["country(author(Dubliners)) ="]
    for other in (question, code):
        assert other.drop(columns="prompt").equals(plain.drop(columns="prompt"))


def test_a_first_hop_in_context_is_said_once_and_needed():
    facts, frame = two_hop(), in_context()
    known = set(facts[["r1", "e2", "r2", "e3"]].itertuples(index=False, name=None))
    answers = {(e2, r2): e3 for e2, r2, e3 in two_hop_facts()[["e2", "r2", "e3"]].to_numpy()}
    assert len(frame) > 800 and frame["tested"].all() and (frame["group"] == frame["e2"]).all()
    assert frame.groupby(["r1", "e2", "r2"]).size().nunique() == 1
    for row in frame.itertuples():
        *said, asked = re.split(r"(?<=\.) ", row.prompt)
        assert (
            f"{row.e1}'s {row.r1} is {row.e2}." in said
            and asked == f"{row.e1}'s {row.r1}'s {row.r2} is"
        )
        bridges = {s.split(f"'s {row.r1} is ")[1].rstrip(".") for s in said}
        assert len({s.split("'s ")[0] for s in said}) == len(said) == len(bridges) == 3
        assert len({_turn(name) for name in bridges}) == 1
        assert row.e3 not in bridges and (row.r1, row.e2, row.r2, row.e3) in known
        assert all(answers.get((name, row.r2)) != row.e3 for name in bridges - {row.e2})


def test_the_most_frequent_answer_is_guessed(monkeypatch):
    names = [f"g{i}" for i in range(400)]
    answers = ["often" if i % 4 else "seldom" for i in range(400)]
    frame = pd.DataFrame(
        {"prompt": names, "answer": answers, "group": names, "r2": "r", "tested": True}
    )
    monkeypatch.setitem(DATASETS, "made up", lambda: frame)
    assert majority_baseline("made up") == pytest.approx(0.75, abs=0.03)
    assert 0.1 < majority_baseline("in context") < 0.4
    floor = majority_baseline_by_kind()
    assert (
        list(floor.index) == ["ID/ID", "ID/OOD", "OOD/ID", "OOD/OOD"]
        and 0 < floor.min() < floor.max() < 0.15
    )


def test_compositions_hold_out_what_they_say():
    frame = compositions()
    facts = dict(frame.loc[frame["kind"] == "fact", ["prompt", "answer"]].to_numpy())
    assert len(facts) == INVENTED * RELATIONS / 2
    seen = {"ID": set(), "OOD": set()}
    trained, held = set(), set()
    for row in frame[frame["kind"] != "fact"].itertuples():
        e1, r1, r2 = row.prompt.split()
        first, second = f"{e1} {r1}", f"{row.group} {r2}"
        assert facts[first] == f" {row.group}" and facts[second] == row.answer
        for kind, fact in zip(row.kind.split("/"), (first, second), strict=True):
            seen[kind].add(fact)
        if row.kind == "ID/ID":
            (trained if row.split == "train" else held).update(
                [("first", first), ("second", second)]
            )
        assert row.split != "train" or row.kind == "ID/ID"
    assert held <= trained  # each in its place
    assert not seen["ID"] & seen["OOD"] and 0.15 < len(seen["OOD"]) / len(facts) < 0.25
    held_out = frame[frame["split"] != "train"].groupby(["split", "kind"]).size().unstack()
    assert (
        (held_out.loc["validation"] == 70).all()
        and (held_out.loc["test"] == 200).all()
        and len(held_out.columns) == 4
    )
    assert not frame["prompt"].duplicated().any() and split(frame, 1).equals(frame)
    with pytest.raises(ValueError, match="only 224 questions of kind OOD/OOD"):
        compositions(1)


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


def test_tested_two_hop_questions_need_both_hops():
    frame = two_hop()
    assert 0.4 < frame["tested"].mean() < 0.7
    assert (frame["group"] == frame["e2"]).all()


def test_legs_add_up():
    """The stand-in's answers are linear in the counts, with one number of legs for each kind."""
    frame = pd.read_csv(datasets.DATA / "legs.csv")
    one = frame[~frame["animals"].str.contains("|", regex=False)]
    count = one["prompt"].str.extract(r"have (\d+) ")[0].astype(int)
    legs = (one["answer"] / count).groupby(one["animals"]).agg(["min", "max"])
    assert (legs["min"] == legs["max"]).all()
    for row in (
        frame[frame["animals"].str.contains("|", regex=False)]
        .sample(200, random_state=0)
        .itertuples()
    ):
        counts = [int(word) for word in row.prompt.replace(",", " ").split() if word.isdigit()]
        words = row.prompt.partition("have ")[2].partition("?")[0].split(", ")
        kinds = row.animals.split("|")
        order = [next(k for k in kinds if k in word) for word in words]
        assert sum(n * legs.loc[k, "min"] for n, k in zip(counts, order, strict=True)) == row.answer


@given(st.text(min_size=1))
def test_places_lie_in_the_unit_interval(name):
    assert 0 <= place_of(name) < 1


def test_texts_that_say_nearly_the_same_are_twins():
    texts = [
        "Ann has N pens and then buys N more at a shop",
        "Bob has N pens and then buys N more at a shop",
        "How tall is a tree of N years",
    ]
    groups = near_duplicate_groups([text.lower().split() for text in texts])
    assert groups[0] == groups[1] != groups[2]


def test_draw_is_seeded_and_says_when_there_is_nothing():
    frame = split(one_digit_composite(), 0)
    assert draw(frame, "test", 20).equals(draw(frame, "test", 20))
    assert len(draw(frame, "test")) == (frame["split"] == "test").sum()
    with pytest.raises(ValueError, match="no questions in split 'dev'"):
        draw(frame, "dev", 3)
    with pytest.raises(ValueError, match="Unknown dataset"):
        load("gsm")
    with pytest.raises(ValueError, match="1 or 2 kinds"):
        datasets.legs(3)


def test_published_files_are_read_and_checked(tmp_path, monkeypatch):
    items = [{"Body": "Tom has 3 pens .", "Question": "How many?", "Answer": 3.0}] * 2
    (tmp_path / "svamp").mkdir()
    path = tmp_path / "svamp" / "SVAMP.json"
    path.write_text(json.dumps(items))
    with pytest.raises(ValueError, match="another sha256"):
        svamp(tmp_path)
    place, url, _ = datasets.PUBLISHED["svamp"]
    digest = datasets.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.PUBLISHED, "svamp", (place, url, digest))
    frame = svamp(tmp_path)
    assert frame["prompt"][0] == "Tom has 3 pens. How many? Answer:" and frame["answer"][0] == " 3"
    with pytest.raises(FileNotFoundError, match="unset BACKATTN_DATASETS"):
        multiarith(tmp_path)
    monkeypatch.delenv("BACKATTN_DATASETS", raising=False)
    monkeypatch.setattr("companion.questions.datasets.CACHE", tmp_path / "cache")
    monkeypatch.setitem(datasets.PUBLISHED, "svamp", (place, "http://127.0.0.1:9/none", digest))
    with pytest.raises(OSError, match="Put the file into"):
        svamp()


# ---------------------------------------------------------------- runs


@pytest.fixture
def tiny_run(monkeypatch):
    frame = one_digit_composite()
    words = frame.assign(prompt="one plus two is", answer=" 3")
    monkeypatch.setitem(DATASETS, "tiny", lambda: words)
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
    monkeypatch.setitem(DATASETS, "mixed", lambda: questions)
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
    monkeypatch.setitem(DATASETS, "SVAMP", lambda: frame)
    run, store = replace(tiny_run, dataset="SVAMP"), Store(tmp_path, shipped=None)
    for user in ("questions.datasets", "runs.as_asked"):
        monkeypatch.setattr(
            f"companion.{user}.split",
            lambda frame, fold: frame.assign(split=["train", "validation", "test"] * 2187),
        )
    train_and_test(run, store)
    monkeypatch.setitem(DATASETS, "SVAMP", lambda: pytest.fail("loaded"))
    assert test_groups(replace(run), store.result(run)).tolist() == ["text 7"] * 8


def test_a_plan_is_completed(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("companion.runs.plans.TUNED_ON", {"tiny": "tiny"})
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


PUBLISHED = Path(os.environ.get("BACKATTN_DATASETS", "nowhere"))


@pytest.mark.skipif(
    not (PUBLISHED / "svamp").exists(), reason="set BACKATTN_DATASETS to a folder with the datasets"
)
def test_published_datasets_as_they_are():
    for name, count in (("SVAMP", 1000), ("MultiArith", 600)):
        frame = split(load(name), 0)
        assert len(frame) == count and set(frame["split"]) == set(SPLITS)
        assert (frame.groupby("group")["split"].nunique() == 1).all()
        assert frame["answer"].str.fullmatch(r" -?\d+(\.\d+)?").all()
        assert frame["prompt"].str.endswith("? Answer:").mean() > 0.9
