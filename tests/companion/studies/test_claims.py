"""The ledger: whole, named by what is there, and every verdict asked again from the tables."""

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from companion import paths
from companion.measures.gains import gain_claim
from companion.measures.stages import WITHOUT_0
from companion.report import tables
from companion.report.verdicts import CLAIMS, CONTROLS, VERDICTS
from companion.studies import (
    attribution_benchmark,
    capacity,
    composition,
    controls,
    layer_ablation,
    stage_discovery,
    what_it_reads,
)
from companion.studies import back_attention_training as training
from companion.studies import other_reasoning_and_cost as reasoning
from companion.studies.claims import IDS, commands, forest, preconditions, whole_ledger
from companion.studies.failure_analysis import census, conflict, patching_grid

TABLES = paths.FIGURES / "tables"


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(TABLES / f"{name}.csv")


@pytest.fixture(scope="module")
def ledger():
    return read("claims")


def test_it_is_what_the_notebooks_say(tmp_path):
    tables.save(whole_ledger([tmp_path, TABLES]), tmp_path, "claims")
    assert (tmp_path / "claims.csv").read_text() == (TABLES / "claims.csv").read_text()


def test_a_new_table_comes_first_and_a_missing_row_is_named(tmp_path):
    new = read("03_claims").assign(verdict="falsified")
    new.to_csv(tmp_path / "03_claims.csv", index=False)
    by = whole_ledger([tmp_path, TABLES]).set_index("id")["verdict"]
    assert by["C7"] == "falsified" and by["C5"] == "verified"
    new[new["id"] != "C7"].to_csv(tmp_path / "03_claims.csv", index=False)
    with pytest.raises(ValueError, match="no row C7"):
        whole_ledger([tmp_path, TABLES])


def test_no_row_and_no_file_that_it_names_is_missing(ledger):
    assert list(dict.fromkeys(ledger["id"])) == list(IDS) and len(ledger) == len(CLAIMS)
    assert set(ledger["verdict"]) <= set(VERDICTS) and set(ledger["control"]) <= set(CONTROLS)
    assert not ledger[["claim", "ours", "comparison", "effect", "says"]].isna().any(axis=None)
    for row in ledger.itertuples():
        files = (paths.FIGURES / f"{row.figure}{suffix}" for suffix in (".png", ".csv"))
        assert any(file.exists() for file in files), row.figure
        for notebook in row.notebook.split(", "):
            assert (paths.NOTEBOOKS / f"{notebook}.ipynb").exists()


def memory_of(name: str) -> pd.DataFrame:
    """A committed table of `memory_table` by key again."""
    keys = ["trained", "off", "same relations", "any relations", "mean", "r1 hidden", "e1 hidden"]
    keys += ["only r1", "third low", "third middle", "third high", "last reads"]
    table = read(name)
    return table.set_index(pd.Index([*keys, "r1 route", "e1 route"][: len(table)], name="key"))


def reading_of(prefix: str, high: tuple[int, int]) -> tuple:
    tests = read(f"{prefix}tests")
    keys = tests["hidden"].replace({"r1, high layers": "r1 high"})
    return read(f"{prefix}high_share"), tests.assign(key=keys), high


def rules() -> list[dict]:
    """Every rule whose inputs are tables, asked again."""
    shares, blocked = read("02_census"), read("01_knockouts")
    order, sums = (x[x["by"] == WITHOUT_0] for x in (read("01_order"), read("09_order")))
    one_hop = shares[shares["examples"] == "one-hop"]
    three_way = read("02_ways").query("`scored by` == 'three-way'").assign(wording="possessive")
    both = {"a": memory_of("07_memory"), "b": memory_of("07_gemma_memory")}
    sources, less, sizes = read("07_sources"), read("07_sources_differences"), read("06_sizes")
    back = sources[(sources["arm"] == "back attention") & (sources["sources"].astype(str) != "6")]
    contest = pd.read_csv(paths.FIGURES / "01_conflict.csv")
    contest = contest[contest["conflict"] == "other relation"]
    stage_b = read("01_stages").set_index("stage").loc["B", "middle"]
    arms = ["same layer", "residual LoRA", "loop LoRA", "LoRA q,v", "bias"]
    sweep = {"chosen": "chosen", "against six": "against_six", "differences": "differences"}
    hops = {**sweep, "instability": "instability", "accuracy": "layers"}
    composed = read("08_composing_differences")
    return [
        stage_discovery.stages_in_order(order, blocked, 9),
        stage_discovery.entity_cannot_tell(contest, stage_b, 9),
        stage_discovery.in_parallel(order, 9),
        census.failures_say_bridge(
            one_hop, read("02_leads"), three_way, read("02_failures_by_type"), 9
        ),
        census.ignorance_not_conflict(shares),
        conflict.late_influence(read("02b_flow_tests")),
        conflict.same_states(
            read("02b_causality").assign(r1=lambda t: 1.0 - t["r1 below 1e-4"]), 9
        ),
        patching_grid.back_patching_helps(read("02b_repaired"), read("02b_against_donor")),
        training.one_layer_matches_two(read("03_scratch"), read("03_scratch_differences")),
        gain_claim("C8", read("03_differences"), arms),
        layer_ablation.low_layers_are_best(
            {key: read(f"04_{name}") for key, name in hops.items()},
            {key: read(f"04_arithmetic_{name}") for key, name in sweep.items()},
        ),
        what_it_reads.brings_high_states(
            {"a": reading_of("05_", (25, 28)), "b": reading_of("05_gemma_", (15, 17))}
        ),
        training.is_small(read("03_sizes")),
        capacity.small_keeps_its_gain(
            sizes.loc[(sizes["share"] - 2e-5).abs().idxmin()], read("06_kept"), read("06_nearest")
        ),
        controls.several_layers_help(
            back,
            less[less["less"] == "layer 6 alone"],
            less[less["less"] == "residual LoRA there"],
        ),
        reasoning.arithmetic_has_stages(
            {"a": (sums, 9), "b": (read("09_scratch_order"), 9)}, read("09_knockouts")
        ),
        reasoning.other_prompts_too(read("09_prompts_differences"), arms[:2]),
        reasoning.costs_as_computed(read("09_costs"), read("09_one_pass")),
        controls.bridge_failures_repaired(read("07_repaired"), read("07_repaired_differences")),
        controls.high_states_of_r1_matter(both),
        controls.gain_is_training(
            both,
            memory_of("07_same_layer_memory"),
            read("07_over_datasets"),
            read("07_closed_set_test"),
        ),
        controls.r1_is_irrelevant(read("02b_against_donor"), both),
        controls.no_knowledge_no_gain(read("07_knowledge")),
        composition.composes(composed[composed["arm"] == "2 layers + back attention"]),
        attribution_benchmark.good_attribution(read("10_benchmark"), read("10_seconds")),
    ]


def test_verdicts_follow_from_the_tables(ledger):
    asked = ["verdict", "control"]
    shown, again = (
        t.groupby("id", sort=False)[asked].agg(list) for t in (ledger, pd.DataFrame(rules()))
    )
    pd.testing.assert_frame_equal(again.loc[shown.index], shown)


def test_the_picture_shows_every_claim_that_has_a_size(ledger):
    figure, drawn = forest(ledger)
    plt.close(figure)
    left_out = ledger[~ledger["id"].isin(drawn["id"])]
    assert set(left_out["id"]) == {"C5", "Q3"} and left_out["control"].eq("none").all()
    assert len(drawn) + len(left_out) + 1 == len(ledger)  # C11 has one row of each


def test_the_report_has_every_row_and_no_gap(ledger):
    page = (paths.FIGURES / "REPORT.md").read_text(encoding="utf-8")
    assert all(row.says in page and row.claim in page for row in ledger.itertuples())
    assert "{" not in page and " nan" not in page and f"| {len(ledger) - 5}: " in page


def test_preconditions_name_how_they_were_measured():
    table = preconditions([TABLES])
    assert (
        table.groupby("model")["needs"].nunique().eq(3).all() and table["share"].between(0, 1).all()
    )
    assert not table.isna().any(axis=None)


def test_each_row_has_a_command_that_makes_it(ledger):
    made = commands(ledger, paths.FIGURES)
    assert len(made) == len(ledger) and (made[["timed_minutes", "megabytes"]] > 0).all(axis=None)
    numbers = made["command"].str.removeprefix("./run_all.sh --only ").str.split(",").explode()
    assert set(numbers) <= {path.stem.split("_")[0] for path in paths.NOTEBOOKS.glob("*.ipynb")}
