"""Notebook 01: small normalisers, two answers in conflict, and the verdicts on C1, C2 and B1."""

import pandas as pd
import pytest
from conftest import PROMPTS

from backattn import logit_flow
from backattn.models.activations import capture
from backattn.models.tokens import encode
from companion.questions.facts import facts
from companion.questions.prompts import position_groups, single_hop
from companion.studies.stage_discovery import (
    contest,
    entity_cannot_tell,
    normaliser_diagnostics,
    one_after_the_other,
    stages_in_order,
)


def test_diagnostics_report_amplification_where_the_normaliser_is_small(tiny):
    flow = logit_flow(*tiny, PROMPTS, method="exact")
    table = normaliser_diagnostics(*tiny, flow, prompts=[0, 2])
    assert set(table["prompt"]) == {0, 2}
    assert table["normaliser"].between(0, 1 + 1e-5).all()
    assert (table["amplification"] >= 1 - 1e-5).all()
    small = table["normaliser"] < table["normaliser"].quantile(0.1)
    typical = table["amplification"].groupby(small).median()
    assert typical[True] > 3 * typical[False]
    with pytest.raises(ValueError, match="no neurons"):
        normaliser_diagnostics(*tiny, logit_flow(*tiny, PROMPTS, level="layer"), [0])


def test_contest_reads_the_models_own_logits_at_the_end(llama):
    prompts = single_hop(facts(), shots=1, per_relation=3).reset_index(drop=True)
    prompts = prompts.assign(answer_id=5, answer_id_other=9)
    table = contest(*llama, prompts, position_groups(llama[1], prompts))
    logits = capture(llama[0], encode(llama[1], prompts["prompt"].tolist())).logits
    final = table[table["layer"] == llama[0].config.num_hidden_layers].set_index("position")
    expected = (logits[:, 5] - logits[:, 9]).mean().item()
    assert final.loc["last", "mean"] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="ask more facts"):
        contest(*llama, prompts.head(0), [])


def test_the_entity_cannot_tell_in_the_bare_form(tiny):
    """The entity stands first, so its states do not depend on the relation: balance makes zero."""
    rows = single_hop(facts(), shots=0, per_relation=6)
    rows = rows.assign(answer_id=range(3, len(rows) + 3))
    others = rows[["subject", "answer_id"]]
    rows = rows.merge(others, on="subject", suffixes=("", "_other"))
    rows = rows.query("answer_id != answer_id_other")
    table = contest(*tiny, rows, position_groups(tiny[1], rows))
    largest = table.assign(mean=table["mean"].abs()).groupby("position")["mean"].max()
    assert largest["entity"] < 1e-4 < largest["last"]


def contest_table(**since) -> pd.DataFrame:
    """31 states in which a position's interval is above zero from a layer on (None: never)."""
    rows = []
    for position, first in since.items():
        for layer in range(31):
            scale = 0.1 if first is None else 10.0
            low = scale if first is not None and layer >= first else -scale
            rows.append((position, layer, low + scale / 2, low, low + scale))
    columns = ["position", "layer", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=columns).assign(clusters=5)


@pytest.mark.parametrize(
    ("entity", "relation", "last", "verdict"),
    [
        (None, 24, 24, "reproduced"),
        (None, 3, 24, "partly"),
        (28, 24, 24, "partly"),
        (None, 24, None, "not testable here"),
        (5, None, 3, "contradicted"),
    ],
)
def test_c2_by_rule(entity, relation, last, verdict):
    row = entity_cannot_tell(contest_table(entity=entity, relation=relation, last=last), 23.0, n=9)
    assert row["verdict"] == verdict
    assert ("last never" if last is None else f"last from state {last}") in row["ours"]


@pytest.mark.parametrize(
    ("after", "needed", "verdict"),
    [
        ([True] * 3, True, "reproduced"),
        ([True, False, True], True, "partly"),
        ([False] * 3, False, "contradicted"),
    ],
)
def test_c1_by_rule(after, needed, verdict):
    order = pd.DataFrame({"earlier": list("ABC"), "later": list("BCD"), "after": after})
    order = order.assign(gap=3, low=1.0, high=5.0, step=True)
    stages = ["A", "A above 0", "B", "C above 0", "D"]
    knockouts = pd.DataFrame({"stage": stages, "needed": [True] + [needed] * 4})
    assert stages_in_order(order, knockouts, n=9)["verdict"] == verdict


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ([(1, 2), (1, 2), (1, 2)], "reproduced"),
        ([(1, 2), (-2, -1), (-1, 2)], "partly"),
        ([(-1, 2), (-2, -1), (-1, 2)], "not at this scale"),
        ([(-2, -1), (-2, -1), (-2, -1)], "contradicted"),
    ],
)
def test_b1_by_rule(ends, verdict):
    order = pd.DataFrame(ends, columns=["low", "high"]).assign(gap=0.0)
    order = order.assign(earlier=["A", "B", "B"], later=["C relation", "C relation", "D"])
    assert one_after_the_other(order, 9)["verdict"] == verdict
