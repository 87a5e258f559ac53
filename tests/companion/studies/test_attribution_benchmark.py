"""Notebook 10: entrants on a tiny model, measures by hand, and the rule of N5."""

import numpy as np
import pandas as pd
import pytest
from ledger_rows import held
from safetensors.numpy import save_file

from backattn import load_model
from backattn.analysis.circuits import SIZES, Circuit
from backattn.models.tokens import encode
from companion.questions import contrasts
from companion.studies import attribution_benchmark as study
from companion.studies.attribution_benchmark import ENTRANTS, Draw, judged


@pytest.fixture
def few(monkeypatch):
    for name, value in (("SCORING", 6), ("EVALUATING", 8)):
        monkeypatch.setattr(contrasts, name, value)
    monkeypatch.setattr(study, "COUNTS", (10, 100, 192))
    model, tokenizer = load_model("tiny-llama")
    frame = contrasts.agreement().sample(300, random_state=0)
    lengths = [encode(tokenizer, frame[name].tolist()).lengths for name in ("prompt", "other")]
    return (
        model,
        tokenizer,
        frame[(lengths[0] == lengths[1]).numpy()].assign(right_id=5, wrong_id=9),
    )


@pytest.mark.parametrize("units", ["nodes", "neurons"])
def test_every_entrant_is_judged(few, units):
    model, tokenizer, usable = few
    circuit = Circuit(model, units)
    draw = Draw.of(circuit, tokenizer, usable, 0)
    ends = []
    for entrant in ENTRANTS.values():
        if units not in entrant.units:
            continue
        found = judged(circuit, tokenizer, draw, entrant)
        sizes = len(SIZES) if units == "nodes" else 3
        names = ("by value", "by size") if units == "nodes" else ("kept", "removed")
        for name in names:
            assert found[name].shape == (sizes, 8) and np.isfinite(found[name]).all()
        whole = found["everything"]
        np.testing.assert_allclose(found[names[0]][-1], whole, atol=1e-4)  # all are kept
        if units == "neurons":
            np.testing.assert_allclose(found["removed"][-1], found["none"], atol=1e-4)
        ends.append(whole)
    assert all(np.allclose(one, ends[0], atol=1e-5) for one in ends) and len(ends) > 7


def made(everything: float, by_size: float) -> dict:
    m = np.full((len(SIZES), 40), by_size, dtype=np.float32)
    m[-1] = everything
    ends = {"none": np.zeros(40, np.float32), "everything": np.full(40, everything, np.float32)}
    rest = {"scores": np.arange(5.0), "stable": np.ones(3), "groups": np.arange(40) // 4}
    return {**ends, **rest, "by value": m, "by size": m}


def test_measures_are_areas(few):
    nothing, half = study.measures(made(2.0, 0.0)), study.measures(made(2.0, 1.0))
    assert nothing == {"CPR": pytest.approx(0.25), "CMD": pytest.approx(0.75)}
    assert half["CMD"] == pytest.approx(0.5 * 0.75 + 0.5 * 0.0005, abs=1e-3)


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {f"nodes/smollm2/two-hop/1/direct/{k}": v for k, v in made(1.0, 0.5).items()}
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)
    found = study.read_results(path)
    assert list(found) == [("nodes", "smollm2", "two-hop", 1, "direct")]
    table = study.table(found | {("nodes", "smollm2", "two-hop", 1, "exact"): made(1.0, 1.0)}, 20)
    assert table.set_index("entrant").loc["exact", "CMD"] < 0.01
    assert (table["CMD_low"] <= table["CMD"] + 1e-6).all() and (table["draws"] == 1).all()


def test_questions_of_one_group_are_drawn_together():
    draw = np.random.default_rng(0)
    found, by_group = made(2.0, 0.0), draw.normal(size=10).repeat(4).astype(np.float32)
    for order in ("by value", "by size"):
        found[order][:-1] += by_group
    alone = {**found, "groups": np.arange(40)}
    keys = [("nodes", "smollm2", "x", draw, "exact") for draw in (0, 1)]
    wide, narrow = (study.table({key: one for key in keys}, 400).iloc[0] for one in (found, alone))
    assert wide["CMD_high"] - wide["CMD_low"] > 1.3 * (narrow["CMD_high"] - narrow["CMD_low"])
    assert wide["groups"] == 10 and narrow["groups"] == 40 and wide["draws"] == 2


def benchmark(linear: float, parts: float, seconds: float = 1.0) -> tuple[pd.DataFrame, ...]:
    values = {"exact": 0.1, "integrated": 0.12, "random": 0.7, "linear, pair": linear}
    values |= {"parts": parts, "direct": parts}
    rows = [
        {"model": "smollm2", "task": task, "entrant": name, "CMD": value}
        for task in "abcde"
        for name, value in values.items()
    ]
    table = pd.DataFrame(rows).assign(draws=3)
    timed = pd.DataFrame({"entrant": list(values), "timed_seconds": seconds})
    timed.loc[timed["entrant"] == "integrated", "timed_seconds"] = 2.0
    return table.assign(CMD_low=table["CMD"] - 0.05, CMD_high=table["CMD"] + 0.05), timed


@pytest.mark.parametrize(
    "table, verdict",
    [
        (benchmark(0.11, 0.3), "all"),
        (benchmark(0.11, 0.9), "all"),
        (benchmark(0.3, 0.3), "some"),
        (benchmark(0.3, 0.9), "some"),  # of use by another route
        (benchmark(0.11, 0.68, seconds=3.0), "some"),  # dearer than NAP-IG
        (benchmark(0.68, 0.68), "none"),
        (benchmark(0.9, 0.9), "none"),
    ],
)
def test_n5_follows_its_rule(table, verdict):
    row = study.good_attribution(*table)
    assert row["id"] == "N5" and held(row) == verdict


def test_neurons_needed_lie_between_two_counts():
    counts = (10, 30, 100, 300, 1000)
    kept = dict(zip(counts, (0.0, 0.1, 0.5, 0.9, 1.0), strict=True))
    lines = pd.DataFrame(
        {"task": "x", "entrant": "y", "neurons": n, "way": way, "f": f if way == "kept" else 1 - f}
        for n, f in kept.items()
        for way in ("kept", "removed")
    )
    row = study.neurons_needed(lines).iloc[0]
    assert 100 < row["needed"] < 300 and row["first_300"] == 0.9
    assert row["without_300"] == pytest.approx(0.1)
    none = study.neurons_needed(lines.assign(f=0.0)).iloc[0]
    assert np.isnan(none["needed"])


def test_every_entrant_but_the_dear_one_is_timed(few):
    model, tokenizer, usable = few
    timed = study.timings(Circuit(model), tokenizer, usable.head(4))
    wanted = {e.name for e in ENTRANTS.values() if "nodes" in e.units} - {"exact"}
    assert set(timed["entrant"]) == wanted and (timed["timed_seconds"] > 0).all()
