"""Notebook 01's comparison of the two routes of flow back."""

import pytest
from conftest import PROMPTS

from backattn import flow_back, logit_flow
from companion.studies.stage_discovery import agreement, normaliser_diagnostics


def test_routes_agree_better_than_shuffled_ones(tiny):
    flow = logit_flow(*tiny, PROMPTS, method="exact")
    one, other = (flow_back(*tiny, flow, route=route) for route in ("parts", "linear"))
    agree = agreement(one, other)
    shuffled = other.frame["flow"].sample(frac=1, random_state=0).to_numpy()
    other.frame = other.frame.assign(flow=shuffled)
    assert agree["pearson"].mean() > 0.5 > agreement(one, other)["pearson"].abs().mean()


def test_diagnostics_report_amplification_where_the_normaliser_is_small(tiny):
    flow = logit_flow(*tiny, PROMPTS, method="exact")
    table = normaliser_diagnostics(*tiny, flow, prompts=[0, 2])
    assert set(table["prompt"]) == {0, 2}
    assert table["normaliser"].between(0, 1 + 1e-5).all()
    assert (table["amplification"] >= 1 - 1e-5).all()
    small = table["normaliser"] < table["normaliser"].quantile(0.1)
    typical = table["amplification"].groupby(small).median()
    assert typical[True] > 3 * typical[False]


def test_diagnostics_need_neurons(llama):
    with pytest.raises(ValueError, match="no neurons"):
        normaliser_diagnostics(*llama, logit_flow(*llama, PROMPTS, level="layer"))
