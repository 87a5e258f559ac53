"""Stages: profiles, boundaries, order, knock-outs, the contest of two answers."""

import numpy as np
import pandas as pd
import pytest

from backattn import flow_back, logit_flow
from backattn.models.activations import capture
from backattn.models.tokens import encode
from companion.measures.stages import (
    boundaries,
    core_layers,
    grouped_flow,
    knockout_table,
    order_table,
    other_layers,
    profile_bands,
    stage_profiles,
    stage_table,
)
from companion.questions.facts import facts as the_facts
from companion.questions.prompts import GROUPS, position_groups, single_hop
from companion.report import intervals
from companion.report.verdicts import Claim
from companion.studies.stage_discovery import (
    contest,
    entity_cannot_tell,
    other_relation,
    stages_in_order,
    table_by,
    trend_test,
)


@pytest.fixture(scope="module")
def prompts(llama):
    return single_hop(the_facts(), shots=1, per_relation=3).reset_index(drop=True)


@pytest.fixture(scope="module")
def groups(llama, prompts):
    return position_groups(llama[1], prompts)


def test_grouping_loses_no_flow(llama, prompts, groups):
    flow = logit_flow(*llama, prompts["prompt"], top_k=30)
    back = flow_back(*llama, flow)
    grouped = grouped_flow(back, groups)
    assert grouped["flow"].sum() == pytest.approx(
        back.frame.query("kind != 'embedding'")["flow"].sum(), rel=1e-4
    )
    assert set(grouped["group"]) == set(GROUPS)
    profiles = stage_profiles(grouped)
    assert np.allclose(profiles["C"], profiles["C relation"] + profiles["C last"])
    for profile in profiles.values():
        assert profile.shape == (len(prompts), llama[0].config.num_hidden_layers)
    everything = profiles["A"] + profiles["B"] + profiles["C"] + profiles["D"]
    known = grouped[grouped["group"] != "context"]
    assert everything.sum() == pytest.approx(known["flow"].sum(), rel=1e-4)


ALONE = range(60)  # sixty prompts, each its own cluster


def synthetic(
    centre: float, n: int = 60, layers: int = 30, noise: float = 0.02, seed: int = 0
) -> np.ndarray:
    shape = np.exp(-0.5 * ((np.arange(layers) - centre) / 2) ** 2)
    return shape + noise * np.random.default_rng(seed).standard_normal((n, layers))


def test_planted_stages_are_found_in_order():
    profiles = {
        stage: synthetic(centre, seed=i)
        for i, (stage, centre) in enumerate(zip("ABCD", (5, 12, 18, 25), strict=True))
    }
    table = stage_table(profiles, ALONE).set_index("stage")
    assert table["peak"].tolist() == [5, 12, 18, 25]
    assert (table["begin"] < table["middle"]).all() and (table["middle"] < table["end"]).all()
    assert (
        (table["middle_low"] <= table["middle"]) & (table["middle"] <= table["middle_high"])
    ).all()
    order = order_table(profiles, ALONE)
    assert order["after"].all() and order["step"].all()
    assert trend_test(profiles)["p"] < 1e-6
    assert core_layers(profiles["B"], without=[12]) != core_layers(profiles["B"])
    assert 12 in core_layers(profiles["B"])


def test_a_planted_wrong_order_is_not_called_ordered():
    profiles = {
        stage: synthetic(centre, seed=i)
        for i, (stage, centre) in enumerate(zip("ABCD", (5, 23, 8, 26), strict=True))
    }
    order = order_table(profiles, ALONE)
    assert order["after"].tolist() == [True, False, True]
    assert trend_test(profiles)["share"] < 0.05


def test_no_difference_has_an_interval_around_zero():
    profiles = {stage: synthetic(15, noise=0.3, seed=i) for i, stage in enumerate("ABCD")}
    assert not order_table(profiles, ALONE)["after"].any()


def test_bootstrap_interval_covers():
    generator, hits = np.random.default_rng(1), 0
    for _ in range(60):
        _, low, high = intervals.mean_interval(generator.standard_normal(80), range(80))
        hits += low <= 0 <= high
    assert 50 <= hits <= 60


def test_other_layers_are_other():
    for chosen in other_layers([0, 3, 7], 12, draws=20, seed=0):
        assert len(chosen) == 3 and not set(chosen) & {0, 3, 7}
    assert other_layers([0], 30, 3, 5) == other_layers([0], 30, 3, 5)
    single = other_layers([0, 23], 30, draws=40, seed=0)  # two of 28: many; all different
    assert len({tuple(chosen) for chosen in single}) == 40
    assert len(other_layers([4], 6, draws=19, seed=0)) == 5  # no more than there are


def test_boundaries_lie_where_the_flow_is():
    one = np.zeros(10)
    one[4] = 2.0
    begin, middle, end, peak = boundaries(one)
    assert (begin, middle, end, peak) == pytest.approx((3.6, 4.0, 4.4, 4.0))
    flat = boundaries(np.ones(10))
    assert flat[1] == pytest.approx(4.5)
    assert np.isnan(boundaries(-np.ones(10))).all()
    assert boundaries(np.stack([one, np.ones(10)])).shape == (2, 4)


def test_bootstrap_keeps_clusters_together():
    weights = intervals.bootstrap(["a", "a", "b", "c"], resamples=50)
    assert np.allclose(weights.sum(1), 1) and np.allclose(weights[:, 0], weights[:, 1])
    values = np.array([1.0, -1.0] * 40)  # pairs that cancel: no spread between clusters
    _, low, high = intervals.mean_interval(values, np.arange(80) // 2)
    assert low == pytest.approx(0) and high == pytest.approx(0)


def test_a_stage_is_needed_only_when_it_beats_every_draw():
    own, generator = np.full(40, 1.0), np.random.default_rng(0)
    random = generator.normal(0.2, 0.01, (19, 40))
    lucky = random.copy()
    lucky[3] += 1.0
    table = knockout_table({"B": ([3], own, random), "D": ([4], own, lucky)}, range(40))
    assert table["needed"].tolist() == [True, False]


def test_tables_by_label_hold_all_and_each_label():
    profiles = {stage: synthetic(10, seed=i) for i, stage in enumerate("AB")}
    table = table_by(["x"] * 30 + ["y"] * 25 + ["z"] * 5, profiles, ALONE, least=8)
    assert sorted(table["label"].unique()) == ["all", "x", "y"]
    assert table["middle"].between(9, 11).all()
    bands = profile_bands(profiles, ALONE)
    assert (bands["low"] <= bands["high"]).all() and bands.loc[
        bands["layer"] == 10, "share"
    ].min() > 0.1


# ---------------------------------------------------------------- correct against conflicting


def test_contest_reads_the_models_own_logits_at_the_end(llama, prompts, groups):
    model, tokenizer = llama
    correct, other = [5] * len(prompts), [9] * len(prompts)
    alone = range(len(prompts))
    table = contest(model, tokenizer, prompts["prompt"].tolist(), groups, correct, other, alone)
    logits = capture(model, encode(tokenizer, prompts["prompt"].tolist())).logits
    final = table[
        (table["position"] == "last") & (table["layer"] == model.config.num_hidden_layers)
    ]
    assert final["mean"].item() == pytest.approx(
        (logits[:, 5] - logits[:, 9]).mean().item(), abs=1e-3
    )
    with pytest.raises(ValueError, match="ask more facts"):
        contest(model, tokenizer, [], [], [], [], [])


def test_other_relation_uses_each_pair_both_ways():
    known = pd.DataFrame(
        {
            "subject": ["France", "France", "Spain", "France"],
            "relation": ["capital", "continent", "capital", "language"],
            "answer": ["Paris", "Europe", "Madrid", "Paris"],
            "answer_id": [1, 2, 3, 1],
        }
    )
    rows = other_relation(known)
    pairs = sorted(zip(rows["answer_id"], rows["answer_id_other"], strict=True))
    assert pairs == [
        (1, 2),
        (1, 2),
        (2, 1),
        (2, 1),
    ]  # never against the same token, never another subject


def test_the_entity_cannot_tell_in_the_bare_form(tiny):
    """Causality: the entity stands first, so its states do not depend on the relation, and balance
    makes zero."""
    model, tokenizer = tiny
    facts = single_hop(the_facts(), shots=0, per_relation=6)
    rows = other_relation(facts.assign(answer_id=[3 + i for i in range(len(facts))]))
    labels = position_groups(tokenizer, rows)
    ids = rows["answer_id"].tolist(), rows["answer_id_other"].tolist()
    table = contest(model, tokenizer, rows["prompt"].tolist(), labels, *ids, rows["subject"])
    by = table.groupby("position")["mean"]
    assert (
        by.apply(lambda x: x.abs().max())["entity"]
        < 1e-4
        < by.apply(lambda x: x.abs().max())["last"]
    )


# ---------------------------------------------------------------- verdicts


def contest_table(entity, relation, last):
    """A contest of 31 states in which a position's interval is above zero from the given layer on
    (None: never)."""
    rows = []
    for position, since in (("entity", entity), ("relation", relation), ("last", last)):
        for layer in range(31):
            low = 1.0 if since is not None and layer >= since else -1.0
            scale = 0.1 if since is None else 10.0
            low, high = scale * low, scale * (low + 1)
            rows.append(
                {
                    "position": position,
                    "layer": layer,
                    "mean": (low + high) / 2,
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(rows).assign(clusters=5)


@pytest.mark.parametrize(
    ("since", "verdict"),
    [
        ((None, 24, 24), "reproduced"),
        ((None, 3, 24), "partly"),
        ((28, 24, 24), "partly"),
        ((None, 24, None), "not testable here"),
        ((5, None, 3), "contradicted"),
    ],
)
def test_the_verdict_on_c2_follows_its_rule(since, verdict):
    assert entity_cannot_tell(contest_table(*since), stage_b=23.0, n=9).verdict == verdict


@pytest.mark.parametrize(
    ("after", "needed", "verdict"),
    [
        ([True] * 3, True, "reproduced"),
        ([True, False, True], True, "partly"),
        ([False] * 3, False, "contradicted"),
    ],
)
def test_the_verdict_on_c1_follows_its_rule(after, needed, verdict):
    order = pd.DataFrame(
        {"earlier": list("ABC"), "later": list("BCD"), "gap": 3, "low": 1.0, "high": 5.0}
    )
    order = order.assign(after=after, step=True)
    knockouts = pd.DataFrame(
        {"stage": ["A", "A above 0", "B", "C above 0", "D"], "needed": [True] + [needed] * 4}
    )
    assert stages_in_order(order, knockouts, n=9).verdict == verdict


def test_a_verdict_must_be_a_known_word():
    with pytest.raises(ValueError, match="Unknown verdict"):
        Claim("C1", "", "", "", "", "probably", "", "")
