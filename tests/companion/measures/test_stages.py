"""Stages: profiles, boundaries, order, knock-outs."""

import numpy as np
import pytest

from backattn import flow_back, logit_flow
from backattn.analysis.knockouts import Knockout, KnockoutProbe, group_means
from companion.measures import stages
from companion.questions.facts import facts
from companion.questions.prompts import GROUPS, position_groups, single_hop

ALONE = range(60)  # sixty prompts, each its own cluster


def synthetic(centres, noise: float = 0.02) -> dict[str, np.ndarray]:
    """Profiles of sixty prompts and 30 layers, the stages' flow being around these layers."""
    shapes = [np.exp(-0.5 * ((np.arange(30) - centre) / 2) ** 2) for centre in centres]
    scatter = [np.random.default_rng(seed).standard_normal((60, 30)) for seed in range(4)]
    return dict(zip("ABCD", np.array(shapes)[:, None] + noise * np.array(scatter), strict=True))


def test_grouping_loses_no_flow(llama):
    prompts = single_hop(facts(), shots=1, per_relation=3).reset_index(drop=True)
    back = flow_back(*llama, logit_flow(*llama, prompts["prompt"], top_k=30))
    grouped = stages.grouped_flow(back, position_groups(llama[1], prompts))
    whole = back.frame.query("kind != 'embedding'")["flow"].sum()
    assert grouped["flow"].sum() == pytest.approx(whole, rel=1e-4)
    assert set(grouped["group"]) == set(GROUPS)
    profiles = stages.stage_profiles(grouped)
    assert list(profiles) == list(stages.STAGES)
    assert np.allclose(profiles["C"], profiles["C relation"] + profiles["C last"])
    shape = len(prompts), llama[0].config.num_hidden_layers
    assert {profile.shape for profile in profiles.values()} == {shape}
    everything = sum(profiles[stage].sum() for stage in "ABCD")
    known = grouped.query("group != 'context'")["flow"].sum()
    assert everything == pytest.approx(known, rel=1e-4)


def test_planted_stages_are_found_in_order():
    profiles = synthetic((5, 12, 18, 25))
    table = stages.stage_table(profiles, ALONE).set_index("stage")
    assert table["peak"].tolist() == [5, 12, 18, 25]
    assert (table["begin"] < table["middle"]).all() and (table["middle"] < table["end"]).all()
    assert table["middle"].between(table["middle_low"], table["middle_high"]).all()
    order = stages.order_table(profiles, ALONE)
    assert order["after"].all() and order["step"].all()
    cores = (stages.core_layers(profiles["B"], without) for without in ([], [12]))
    assert [12 in core for core in cores] == [True, False]
    bands = stages.profile_bands(profiles, ALONE)
    assert (bands["low"] <= bands["high"]).all()
    assert bands.groupby("stage")["share"].max().between(0.1, 0.3).all()


def test_a_planted_wrong_order_is_not_called_ordered():
    wrong, level = synthetic((5, 23, 8, 26)), synthetic((15, 15, 15, 15), noise=0.3)
    assert stages.order_table(wrong, ALONE)["after"].tolist() == [True, False, True]
    assert not stages.order_table(level, ALONE)["after"].any()


def test_layer_0_can_be_left_out_of_the_order():
    """C lies before B by its middle, since half of it is in layer 0, and after B without that."""
    profiles = synthetic((5, 12, 18, 25))
    profiles["C"][:, 0] += 1.1 * profiles["C"].sum(-1)
    table = stages.order_tables(profiles, ALONE).set_index("by")
    after = {name: part["after"].tolist() for name, part in table.groupby(level=0)}
    assert after["middle"] == [True, False, True] and after[stages.WITHOUT_0] == [True] * 3
    gap = table.loc[stages.WITHOUT_0, "gap"].to_numpy()
    assert np.allclose(gap, [7, 6, 7], atol=0.5) and table.loc["peak", "gap"].iloc[1] == -12


def test_boundaries_lie_where_the_flow_is():
    one = np.zeros(10)
    one[4] = 2.0
    assert stages.boundaries(one) == pytest.approx((3.6, 4.0, 4.4, 4.0))
    assert stages.boundaries(np.ones(10))[1] == pytest.approx(4.5)
    assert np.isnan(stages.boundaries(-np.ones(10))).all()
    assert stages.boundaries(np.stack([one, np.ones(10)])).shape == (2, 4)


def test_other_layers_are_other():
    for chosen in stages.other_layers(2, [0, 3, 7], 12, draws=20, seed=0):
        assert len(chosen) == 2 and not set(chosen) & {0, 3, 7}
    pairs = stages.other_layers(2, [0, 23], 30, draws=40, seed=0)  # two of 28: many; all different
    assert len({tuple(chosen) for chosen in pairs}) == 40
    assert pairs == stages.other_layers(2, [0, 23], 30, draws=40, seed=0)
    assert len(stages.other_layers(1, [4], 6, draws=19, seed=0)) == 5  # no more than there are


def test_a_stage_is_needed_only_when_it_beats_every_draw():
    drop, random = np.full(40, 1.0), np.random.default_rng(0).normal(0.2, 0.01, (19, 40))
    lucky = random.copy()
    lucky[3] += 1.0
    table = stages.knockout_table({"B": ([3], drop, random), "D": ([4], drop, lucky)}, range(40))
    assert table["needed"].tolist() == [True, False]


def test_a_stage_is_set_against_random_layers(llama):
    """And knocked out where its flow is."""
    prompts = single_hop(facts(), shots=0, per_relation=2)
    texts, groups = prompts["prompt"].tolist(), position_groups(llama[1], prompts)
    means = group_means(*llama, texts, groups)
    probe = KnockoutProbe(*llama, texts, [1] * len(texts), groups, means)
    cores = {"D above 0": [1], "A": [2]}  # of four layers only the last is in neither, nor layer 0
    layers, drop, random = stages.against_random(probe, cores, 1, seed=0)["D above 0"]
    assert layers == [1]
    for layer, lost in ((1, drop), (3, random[0])):
        parts = ("attention", ("relation", "last")), ("ffn", ("last",))
        knockouts = [Knockout(kind, (layer,), where) for kind, where in parts]
        known = probe.log_probs() - probe.log_probs(knockouts)
        assert np.allclose(lost, known.numpy(), atol=1e-5)
