"""The ledger is whole, follows from the tables, and is what README shows."""

import re

import pandas as pd
import pytest

from companion import paths
from companion.report import tables
from companion.report.verdicts import VERDICTS
from companion.studies.claims import IDS, whole_ledger
from companion.studies.controls.memory import (
    gain_is_flow,
    high_states_of_r1_matter,
    r1_is_needed,
    several_layers_help,
)
from companion.studies.controls.transitions import bridge_failures_mended, no_knowledge_no_gain
from companion.studies.failure_analysis.census import conflict_not_ignorance, failures_say_bridge
from companion.studies.failure_analysis.conflict import late_influence, same_states
from companion.studies.failure_analysis.patching_grid import back_patching_helps
from companion.studies.other_reasoning_and_cost.arithmetic import arithmetic_has_stages
from companion.studies.other_reasoning_and_cost.costs import costs_as_computed
from companion.studies.other_reasoning_and_cost.prompts import other_prompts_too
from companion.studies.stage_discovery import (
    entity_cannot_tell,
    one_after_the_other,
    stages_in_order,
)
from companion.studies.what_it_reads import brings_high_states

TABLES = paths.FIGURES / "tables"


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(TABLES / f"{name}.csv")


@pytest.fixture(scope="module")
def ledger():
    return read("claims")


def test_no_row_is_missing(ledger):
    assert list(dict.fromkeys(ledger["id"])) == list(IDS) and len(ledger) == len(IDS) + 1
    assert set(ledger["verdict"]) <= set(VERDICTS)
    assert not ledger[["claim", "paper", "ours", "kind", "notebook", "figure"]].isna().any().any()


def test_it_is_what_the_notebooks_say(ledger, tmp_path):
    made = whole_ledger([tmp_path, TABLES])
    assert made["verdict"].tolist() == ledger["verdict"].tolist()
    tables.save(made, tmp_path, "claims")
    assert (tmp_path / "claims.csv").read_text() == (TABLES / "claims.csv").read_text()


def test_an_own_table_comes_first_and_a_missing_row_is_named(tmp_path):
    own = read("03_claims").assign(verdict="contradicted")
    own.to_csv(tmp_path / "03_claims.csv", index=False)
    by = whole_ledger([tmp_path, TABLES]).set_index("id")
    assert (
        set(by.loc["C7", ["verdict"]]) == {"contradicted"}
        and by.loc["C5", "verdict"] == "reproduced"
    )
    own[own["id"] != "C7"].to_csv(tmp_path / "03_claims.csv", index=False)
    with pytest.raises(ValueError, match="no row C7"):
        whole_ledger([tmp_path, TABLES])
    with pytest.raises(FileNotFoundError, match="07_memory"):
        whole_ledger([tmp_path])


def test_files_that_it_names_are_there(ledger):
    for row in ledger[ledger["figure"] != "none"].itertuples():
        assert any(
            (paths.FIGURES / f"{row.figure}{suffix}").exists() for suffix in (".png", ".csv")
        ), row.figure
        for notebook in row.notebook.split(", "):
            assert (paths.NOTEBOOKS / f"{notebook}.ipynb").exists()


def test_verdicts_follow_from_the_tables(ledger):
    """Every rule whose inputs are tables, asked again."""
    census, three_way = (
        read("02_census"),
        pd.DataFrame([{"wording": "possessive", "outcome": "e2"}]),
    )
    census = census[census["examples"] == "one-hop"]
    overall = read("03_differences")
    memory = {name: read(table) for name, table in (("a", "07_memory"), ("b", "07_gemma_memory"))}
    sources, less = read("07_sources"), read("07_sources_differences")
    sources = sources[
        (sources["arm"] == "back attention") & (sources["sources"].astype(str) != "6")
    ]
    conflict = pd.read_csv(paths.FIGURES / "01_conflict.csv")
    stage_b = read("01_stages").set_index("stage").loc["B", "middle"]
    arms = ["same layer", "residual LoRA", "loop LoRA", "LoRA q,v", "bias"]
    made = [
        stages_in_order(read("01_order"), read("01_knockouts"), 9),
        entity_cannot_tell(conflict[conflict["conflict"] == "other relation"], stage_b, 9),
        failures_say_bridge(census, read("02_leads"), three_way.assign(share=0, low=0, high=0), 9),
        late_influence(read("02_flow_tests")),
        same_states(read("02_causality").assign(r1=lambda t: 1.0 - t["r1 below 1e-4"]), 9),
        back_patching_helps(read("02_mending"), read("02_against_donor")),
        brings_high_states(
            {
                "a": (read("05_high_share"), read("05_tests"), (25, 28)),
                "b": (read("05_gemma_high_share"), read("05_gemma_tests"), (15, 17)),
            }
        ),
        several_layers_help(
            sources,
            less[less["less"] == "layer 6 alone"],
            less[less["less"] == "residual LoRA there"],
        ),
        arithmetic_has_stages(
            {"a": (read("08_order"), 9), "b": (read("08_scratch_order"), 9)}, read("08_knockouts")
        ),
        other_prompts_too(read("08_prompts_differences"), arms[:2]),
        costs_as_computed(read("08_costs"), read("08_one_pass")),
        bridge_failures_mended(read("07_mended"), read("07_mended_differences")),
        high_states_of_r1_matter(memory),
        gain_is_flow(memory, read("07_same_layer_memory"), overall),
        no_knowledge_no_gain(read("07_knowledge")),
    ]
    kept = ledger.groupby("id", sort=False)["verdict"].agg(list).to_dict()
    again: dict[str, list[str]] = {}
    for claim in made:
        again.setdefault(claim.id, []).append(claim.verdict)
    assert {name: kept[name] for name in again} == again
    # These are asked from tables above, and in companion/studies.
    assert set(kept) - set(again) == {"B1", "B2", "B4", "C7", "C8", "C9", "C11"}


def test_readme_shows_it(ledger):
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| ([CQNB]\d+) \| (.+?) \| (.+?) \| (.+?) \|$", readme, re.MULTILINE)
    notebooks = [re.findall(r"notebooks/(\w+)\.ipynb", links) or ["none"] for *_, links in shown]
    expected = ledger[["id", "claim", "verdict"]].itertuples(index=False, name=None)
    assert [row[:3] for row in shown] == list(expected)
    assert [", ".join(names) for names in notebooks] == ledger["notebook"].tolist()


@pytest.mark.parametrize(
    "ends, verdict",
    [
        (((1, 2), (1, 2), (1, 2)), "reproduced"),
        (((1, 2), (-2, -1), (-1, 2)), "partly"),
        (((-1, 2), (-2, -1), (-1, 2)), "not at this scale"),
        (((-2, -1), (-2, -1), (-2, -1)), "contradicted"),
    ],
)
def test_b1_follows_its_rule(ends, verdict):
    pairs = [("A", "C relation"), ("B", "C relation"), ("B", "D")]
    rows = [
        {"earlier": a, "later": b, "gap": 0.0, "low": e[0], "high": e[1]}
        for (a, b), e in zip(pairs, ends, strict=True)
    ]
    assert one_after_the_other(pd.DataFrame(rows), 9).verdict == verdict


@pytest.mark.parametrize(
    "right, bridge, other, verdict",
    [
        ((0.1, 0.3), (0.4, 0.6), (0.1, 0.3), "reproduced"),
        ((0.1, 0.3), (0.2, 0.6), (0.1, 0.3), "partly"),
        ((0.4, 0.6), (0.2, 0.6), (0.1, 0.3), "not at this scale"),
        ((0.6, 0.9), (0.0, 0.1), (0.2, 0.3), "contradicted"),
    ],
)
def test_b2_follows_its_rule(right, bridge, other, verdict):
    ends = {"e3": right, "e2": bridge, "other": other}
    rows = [{"outcome": name, "low": low, "high": high} for name, (low, high) in ends.items()]
    table = pd.DataFrame(rows).assign(wording="possessive", examples="one-hop", share=0.3, n=9)
    assert conflict_not_ignorance(table).verdict == verdict


@pytest.mark.parametrize(
    "own, hidden, verdict",
    [
        ((0.1, 0.3), (0.2, 0.8), "reproduced"),
        ((-0.1, 0.3), (0.2, 0.8), "partly"),
        ((-0.1, 0.3), (0.95, 1.0), "not at this scale"),
        ((-0.3, -0.1), (0.95, 1.0), "contradicted"),
    ],
)
def test_b4_follows_its_rule(own, hidden, verdict):
    donor = pd.DataFrame(
        [{"place": "r1", "how": "oracle", "mean": 0.0, "low": own[0], "high": own[1]}]
    )
    table = pd.DataFrame([{"test": "r1 hidden", "kept": 0.5, "low": hidden[0], "high": hidden[1]}])
    assert r1_is_needed(donor, {"one": table}).verdict == verdict
