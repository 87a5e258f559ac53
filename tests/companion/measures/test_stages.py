"""Stages: profiles, boundaries, order, knock-outs."""

import numpy as np
import pytest

from backattn import flow_back, logit_flow
from backattn.analysis.knockouts import Knockout, KnockoutProbe, group_means
from companion.measures.stages import (
    STAGES,
    against_random,
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
from companion.questions.facts import facts
from companion.questions.prompts import GROUPS, position_groups, single_hop
from companion.studies.stage_discovery import trend_test

ALONE = range(60)  # sixty prompts, each its own cluster


def synthetic(centres, n: int = 60, layers: int = 30, noise: float = 0.02) -> dict[str, np.ndarray]:
    """Profiles of stages A, B, … with their flow around these layers."""
    profiles = {}
    for seed, (stage, centre) in enumerate(zip("ABCD", centres, strict=False)):
        shape = np.exp(-0.5 * ((np.arange(layers) - centre) / 2) ** 2)
        scatter = np.random.default_rng(seed).standard_normal((n, layers))
        profiles[stage] = shape + noise * scatter
    return profiles


def test_grouping_loses_no_flow(llama):
    prompts = single_hop(facts(), shots=1, per_relation=3).reset_index(drop=True)
    back = flow_back(*llama, logit_flow(*llama, prompts["prompt"], top_k=30))
    grouped = grouped_flow(back, position_groups(llama[1], prompts))
    whole = back.frame.query("kind != 'embedding'")["flow"].sum()
    assert grouped["flow"].sum() == pytest.approx(whole, rel=1e-4)
    assert set(grouped["group"]) == set(GROUPS)
    profiles = stage_profiles(grouped)
    assert list(profiles) == list(STAGES)
    assert np.allclose(profiles["C"], profiles["C relation"] + profiles["C last"])
    for profile in profiles.values():
        assert profile.shape == (len(prompts), llama[0].config.num_hidden_layers)
    everything = sum(profiles[stage].sum() for stage in "ABCD")
    known = grouped.query("group != 'context'")["flow"].sum()
    assert everything == pytest.approx(known, rel=1e-4)


def test_planted_stages_are_found_in_order():
    profiles = synthetic((5, 12, 18, 25))
    table = stage_table(profiles, ALONE).set_index("stage")
    assert table["peak"].tolist() == [5, 12, 18, 25]
    for pair in ("begin", "middle"), ("middle", "end"):
        assert (table[pair[0]] < table[pair[1]]).all()
    assert table["middle"].between(table["middle_low"], table["middle_high"]).all()
    order = order_table(profiles, ALONE)
    assert order["after"].all() and order["step"].all()
    assert trend_test(profiles)["p"] < 1e-6
    assert 12 in core_layers(profiles["B"]) and 12 not in core_layers(profiles["B"], without=[12])


def test_a_planted_wrong_order_is_not_called_ordered():
    profiles = synthetic((5, 23, 8, 26))
    assert order_table(profiles, ALONE)["after"].tolist() == [True, False, True]
    assert trend_test(profiles)["share"] < 0.05
    level = synthetic((15, 15, 15, 15), noise=0.3)
    assert not order_table(level, ALONE)["after"].any()


def test_boundaries_lie_where_the_flow_is():
    one = np.zeros(10)
    one[4] = 2.0
    assert boundaries(one) == pytest.approx((3.6, 4.0, 4.4, 4.0))
    assert boundaries(np.ones(10))[1] == pytest.approx(4.5)
    assert np.isnan(boundaries(-np.ones(10))).all()
    assert boundaries(np.stack([one, np.ones(10)])).shape == (2, 4)


def test_bands_are_shares_of_a_stages_flow():
    bands = profile_bands(synthetic((10, 10)), ALONE)
    assert (bands["low"] <= bands["high"]).all()
    assert bands.loc[bands["layer"] == 10, "share"].min() > 0.1


# ---------------------------------------------------------------- knock-outs


def test_a_stage_is_knocked_out_where_its_flow_is():
    assert STAGES["C"].knockouts([np.int64(1)]) == (Knockout("ffn", (1,), ("relation", "last")),)
    attention = Knockout("attention", (1, 2), ("relation", "last"))
    assert STAGES["D"].knockouts([1, 2]) == (attention, Knockout("ffn", (1, 2), ("last",)))


def test_other_layers_are_other():
    for chosen in other_layers([0, 3, 7], 12, draws=20, seed=0):
        assert len(chosen) == 3 and not set(chosen) & {0, 3, 7}
    assert other_layers([0], 30, 3, 5) == other_layers([0], 30, 3, 5)
    pairs = other_layers([0, 23], 30, draws=40, seed=0)  # two of 28: many; all different
    assert len({tuple(chosen) for chosen in pairs}) == 40
    assert len(other_layers([4], 6, draws=19, seed=0)) == 5  # no more than there are


def test_a_stage_is_needed_only_when_it_beats_every_draw():
    drop, random = np.full(40, 1.0), np.random.default_rng(0).normal(0.2, 0.01, (19, 40))
    lucky = random.copy()
    lucky[3] += 1.0
    table = knockout_table({"B": ([3], drop, random), "D": ([4], drop, lucky)}, range(40))
    assert table["needed"].tolist() == [True, False]


def test_a_stage_is_set_against_random_layers(llama):
    prompts = single_hop(facts(), shots=0, per_relation=2)
    texts, groups = prompts["prompt"].tolist(), position_groups(llama[1], prompts)
    means = group_means(*llama, texts, groups)
    probe = KnockoutProbe(*llama, texts, [1] * len(texts), groups, means)
    layers, drop, random = against_random(probe, {"B above 0": [1]}, 1, seed=0)["B above 0"]
    known = probe.log_probs() - probe.log_probs(STAGES["B"].knockouts([1]))
    assert layers == [1] and np.allclose(drop, known.numpy(), atol=1e-5)
    assert random.shape == (1, len(texts))
