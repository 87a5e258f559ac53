"""Notebook 01: small normalisers, two answers in conflict, and the verdicts on C1, C2 and B1."""

import pandas as pd
import pytest
import torch
from conftest import PROMPTS
from ledger_rows import held

from backattn import logit_flow
from backattn.models.activations import capture
from backattn.models.lens import read_states
from backattn.models.tokens import encode
from companion.questions.facts import facts
from companion.questions.prompts import position_groups, single_hop
from companion.studies import stage_discovery as study


def test_diagnostics_report_amplification_where_the_normaliser_is_small(tiny):
    flow = logit_flow(*tiny, PROMPTS, method="exact")
    table = study.normaliser_diagnostics(*tiny, flow, prompts=[0, 2])
    assert set(table["prompt"]) == {0, 2}
    assert table["normaliser"].between(0, 1 + 1e-5).all()
    assert (table["amplification"] >= 1 - 1e-5).all()
    small = table["normaliser"] < table["normaliser"].quantile(0.1)
    typical = table["amplification"].groupby(small).median()
    assert typical[True] > 3 * typical[False]
    with pytest.raises(ValueError, match="no neurons"):
        study.normaliser_diagnostics(*tiny, logit_flow(*tiny, PROMPTS, level="layer"), [0])


def test_contest_reads_the_models_own_logits_at_the_end(llama):
    prompts = single_hop(facts(), shots=1, per_relation=3).reset_index(drop=True)
    prompts = prompts.assign(answer_id=5, answer_id_other=9)
    table = study.contest(*llama, prompts, position_groups(llama[1], prompts))
    logits = capture(llama[0], encode(llama[1], prompts["prompt"].tolist())).logits
    final = table[table["layer"] == llama[0].config.num_hidden_layers].set_index("position")
    expected = (logits[:, 5] - logits[:, 9]).mean().item()
    assert final.loc["last", "mean"] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="ask more facts"):
        study.contest(*llama, prompts.head(0), [])


def test_contest_reads_a_prompt_once_for_all_its_pairs(llama, monkeypatch):
    prompts = single_hop(facts(), shots=1, per_relation=2).reset_index(drop=True)
    pairs = pd.DataFrame({"answer_id": [5, 7, 5], "answer_id_other": [9, 8, 6]})
    asked = prompts.merge(pairs, how="cross").sample(frac=1, random_state=0).iloc[1:]
    table = study.contest(*llama, asked, position_groups(llama[1], asked))
    logits = capture(llama[0], encode(llama[1], asked["prompt"].tolist())).logits
    less = [x[a] - x[b] for x, a, b in zip(logits, *map(asked.get, pairs), strict=True)]
    final = table[table["layer"] == llama[0].config.num_hidden_layers].set_index("position")
    assert final.loc["last", "mean"] == pytest.approx(torch.stack(less).mean().item(), abs=1e-4)
    read = []
    monkeypatch.setattr(study, "read_states", lambda *x: read.extend(x[2]) or read_states(*x))
    again = study.contest(*llama, asked, position_groups(llama[1], asked))
    assert again.equals(table) and sorted(read) == sorted(set(asked["prompt"])) != []


@pytest.mark.parametrize(
    ("entity", "relation", "last", "verdict"),
    [
        (31, 24, 24, "all"),
        (31, 3, 24, "some"),
        (28, 24, 24, "some"),
        (31, 24, 31, "none"),  # not testable
        (5, 31, 3, "none"),
    ],
)
def test_c2_by_rule(entity, relation, last, verdict):
    """31 states, a position's interval being above zero from one on (31: never)."""
    tables = []
    for position, first in (("entity", entity), ("relation", relation), ("last", last)):
        scale = 0.1 if first == 31 else 10.0
        table = pd.DataFrame({"position": position, "layer": range(31), "low": -scale})
        table.loc[first:, "low"] = scale
        tables.append(table.assign(mean=table["low"] + scale / 2, high=table["low"] + scale))
    row = study.entity_cannot_tell(pd.concat(tables).assign(clusters=5), 23.0, n=9)
    assert held(row) == verdict
    assert ("last never" if last == 31 else f"last from state {last}") in row["ours"]


@pytest.mark.parametrize(
    ("after", "needed", "verdict"),
    [([1, 1, 1], 1, "all"), ([1, 0, 1], 1, "some"), ([0, 0, 0], 0, "none")],
)
def test_c1_by_rule(after, needed, verdict):
    order = pd.DataFrame({"earlier": list("ABC"), "later": list("BCD"), "after": after})
    order = order.assign(gap=3, low=1.0, high=5.0, step=True)
    stages = ["A", "A above 0", "B", "C above 0", "D"]
    knockouts = pd.DataFrame({"stage": stages, "needed": [True] + [bool(needed)] * 4})
    knockouts = knockouts.assign(difference=0.3, difference_low=0.2, difference_high=0.4)
    row = study.stages_in_order(order, knockouts, n=9)
    assert held(row) == verdict and row["verdict"] == "verified" and row["control"] == "ahead"
    order.loc[1, ["gap", "low", "high"]] = -2, -3, -1  # one step back is enough
    row = study.stages_in_order(order, knockouts, n=9)
    assert row["verdict"] == "falsified" and "B→C: -2.0 [-3.0, -1.0] layers" in row["comparison"]


ABOVE, AROUND, BELOW = (1, 2), (-1, 2), (-2, -1)
B1 = [([BELOW] * 3, "verified", "ahead"), ([BELOW, AROUND, ABOVE], "verified", "behind")]
B1 += [([AROUND, BELOW, BELOW], "inconclusive", "ahead"), ([ABOVE] * 3, "falsified", "behind")]


@pytest.mark.parametrize(("ends", "verdict", "control"), B1)
def test_b1_by_rule(ends, verdict, control):
    """The condition is met where the relation's layers come before the entity's."""
    order = pd.DataFrame(ends, columns=["low", "high"]).assign(gap=0.0)
    order = order.assign(earlier=["A", "B", "B"], later=["C relation", "C relation", "D"])
    row = study.in_parallel(order, 9)
    assert (row["verdict"], row["control"]) == (verdict, control)
    assert row["checks"].startswith(f"{ends.count(BELOW)} of 3")
