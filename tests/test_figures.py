"""Plots return their Axes; files are byte-stable and carry their numbers."""

import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from backattn import flow_back, logit_flow
from companion import paths
from companion.report import figures, tables


@pytest.fixture(autouse=True)
def _closed():
    figures.style()
    yield
    plt.close("all")


def test_plots_of_one_prompt_return_axes(llama):
    flow = logit_flow(*llama, "France's capital is", top_k=30)
    back = flow_back(*llama, flow)
    assert isinstance(figures.layer_importance(flow.layers), Axes)
    for kind in ("attention", "ffn"):
        ax = figures.flow_heatmap(back.frame, kind)
        assert isinstance(ax, Axes) and ax.get_title() == kind
        shown = "".join(label.get_text() for label in ax.get_yticklabels())
        assert shown == "France's capital is"


def test_bars_have_the_heights_of_the_numbers(llama):
    flow = logit_flow(*llama, "France's capital is", level="layer")
    ax = figures.layer_importance(flow.layers)
    heights = sorted(patch.get_height() for patch in ax.patches)
    expected = flow.layers[flow.layers["kind"].isin(["attention", "ffn"])]["increase"]
    assert np.allclose(heights, sorted(expected))


def test_saved_twice_gives_the_same_bytes(tmp_path):
    data = pd.DataFrame(
        {"layer": [0, 1, 2], "kind": ["attention", "ffn", "ffn"], "increase": [0.1, 0.25, -0.3]}
    )
    for folder in ("one", "two"):
        written = figures.save(
            figures.layer_importance(data).figure, tmp_path / folder, "bars", data
        )
    assert [p.suffix for p in written] == [".pdf", ".png", ".csv"]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert pd.read_csv(tmp_path / "one/bars.csv").equals(data)


def test_tables_come_in_three_forms_with_the_same_numbers(tmp_path):
    frame = pd.DataFrame({"stage": ["A_1", "B"], "gap": [1.23456, -2.0], "n": [3, 4]})
    for path in tables.save(frame, tmp_path, "t"):
        text = path.read_text()
        assert "1.235" in text and "-2" in text
    assert r"A\_1" in (tmp_path / "t.tex").read_text()
    assert (tmp_path / "t.md").read_text().startswith("| stage")


def test_outcome_bars_keep_order_and_shares():
    rows = [
        {"label": label, "outcome": outcome, "share": share}
        for label, shares in (("first", (0.5, 0.3, 0, 0.1, 0.1)), ("second", (1, 0, 0, 0, 0)))
        for outcome, share in zip(figures.OUTCOME_COLOURS, shares, strict=True)
    ]
    ax = figures.outcome_bars(pd.DataFrame(rows))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "second"]
    assert ax.get_yticks()[0] > ax.get_yticks()[1]  # the first on top
    ends = [patch.get_x() + patch.get_width() for patch in ax.containers[-1]]
    assert np.allclose(ends, 1)


def test_differences_are_marked_where_p_is_small():
    layers = np.tile(np.arange(4), 2)
    table = pd.DataFrame(
        {
            "layer": layers,
            "case": np.repeat(["right", "wrong"], 4),
            "mean": 1.0,
            "low": 0.5,
            "high": 2.0,
        }
    )
    ax = figures.right_and_wrong(table.assign(p=np.tile([0.5, 0.01, 0.5, 0.02], 2)))
    marks = next(line for line in ax.lines if line.get_label() == "p < 0.05")
    assert marks.get_xdata().tolist() == [1, 3]


def test_pairs_are_labelled_with_their_own_layers():
    grid = pd.DataFrame(np.zeros((6, 6)), index=range(6), columns=range(1, 7))
    ax = figures.pair_heatmap(grid, 0.5)
    assert [
        (tick, text.get_text())
        for tick, text in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
    ] == [(4.5, "5")]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "5"]
    bottom, above = ax.get_ylim()
    assert bottom < above  # low targets at the bottom


def test_every_arm_stands_at_its_accuracy():
    rows = [
        {
            "dataset": d,
            "arm": arm,
            "accuracy": i / 10,
            "low": i / 10 - 0.05,
            "high": i / 10 + 0.05,
            "operations": i,
        }
        for d in ("one", "two")
        for i, arm in enumerate(("zero-shot", "bias", "back attention"), 1)
    ]
    table = pd.DataFrame(rows)
    ax = figures.arm_points(table)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["one", "two"]
    heights = {c.get_label(): c.lines[0].get_ydata().tolist() for c in ax.containers}
    assert heights == {arm: part["accuracy"].tolist() for arm, part in table.groupby("arm")}
    places = np.concatenate([c.lines[0].get_xdata() for c in ax.containers]).astype(float)
    assert (
        len(set(places.round(6))) == 6 and abs(places - places.round()).max() < 0.5
    )  # apart, each at its dataset
    ax = figures.arm_points(table[table["dataset"] == "one"], x="operations")
    assert sorted(c.lines[0].get_xdata()[0] for c in ax.containers) == [1, 2, 3]


def test_differences_are_labelled_from_the_top():
    rows = [("a", "bias", 0.1), ("a", "few-shot", -0.2)]
    table = pd.DataFrame(rows, columns=["dataset", "other", "difference"])
    ax = figures.difference_points(
        table.assign(low=table["difference"] - 0.1, high=table["difference"] + 0.1)
    )
    labels = {
        tick: text.get_text()
        for tick, text in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
    }
    assert labels == {1: "a: bias", 0: "a: few-shot"}
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines[1::2]] == [
        (0.1, 1),
        (-0.2, 0),
    ]


def test_learning_curves_are_drawn_over_passes():
    table = pd.DataFrame(
        {"arm": "1 layer", "step": [62, 124], "validation": [0.2, 0.4], "low": 0.1, "high": 0.5}
    )
    line = figures.learning_lines(table, scale=62).lines[0]
    assert line.get_xdata().tolist() == [1, 2] and line.get_ydata().tolist() == [0.2, 0.4]


def test_the_sketch_shows_both_passes():
    ax = figures.idea_sketch(["a", "b"], layers=4, source=1)
    assert [text.get_text() for text in ax.texts].count("a") == 2
    assert {"first pass", "second pass"} <= {text.get_text() for text in ax.texts}


def test_settings_are_drawn_in_order_with_the_chosen_one_marked():
    table = pd.DataFrame(
        {"arm": "bias", "dim": [4, 1], "accuracy": [0.4, 0.1], "low": 0.0, "high": 0.5}
    )
    ax = figures.setting_lines(table, "dim", "accuracy", "arm", chosen={"bias": 4})
    assert ax.lines[0].get_xdata().tolist() == [1, 4] and ax.lines[0].get_ydata().tolist() == [
        0.1,
        0.4,
    ]
    assert (ax.lines[1].get_xdata().tolist(), ax.lines[1].get_ydata().tolist()) == ([4], [0.4])


def test_levels_of_untrained_arms_are_named():
    ax = figures.arm_points(
        pd.DataFrame({"dataset": "a", "arm": ["bias"], "accuracy": 0.5, "low": 0.4, "high": 0.6})
    )
    figures.level_lines(
        pd.DataFrame({"arm": ["zero-shot", "few-shot"], "accuracy": [0.1, 0.2]}), ax
    )
    assert [text.get_text() for text in ax.texts] == ["zero-shot", "few-shot"]
    assert [line.get_ydata()[0] for line in ax.lines[-2:]] == [0.1, 0.2]


def test_cells_are_drawn_with_low_layers_at_the_bottom():
    ax = figures.cell_heatmap(np.array([[0.1, 0.2], [0.3, 0.4]]), [10, 11], ["a", "b"], top=0.4)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["10"]
    bottom, above = ax.get_ylim()
    assert bottom < above
    assert ax.collections[0].get_array().ravel().tolist() == [0.1, 0.2, 0.3, 0.4]


def test_rows_stand_from_the_top():
    table = pd.DataFrame(
        {"name": ["x", "y"], "mean": [1.0, 2.0], "low": [0.5, 1.5], "high": [1.5, 2.5]}
    )
    ax = figures.interval_rows(table, "name", "mean", "low", "high")
    assert dict(
        zip(ax.get_yticks(), [t.get_text() for t in ax.get_yticklabels()], strict=True)
    ) == {1: "x", 0: "y"}
    assert ax.lines[0].get_xdata().tolist() == [1.0, 2.0]


def test_the_adapter_has_whole_lines():
    rows = [(entity, adapter, 0, 0.5) for entity in ("e2", "e3") for adapter in ("off", "on")]
    table = pd.DataFrame(rows, columns=["entity", "adapter", "layer", "share"]).assign(
        low=0.4, high=0.6
    )
    styles = {line.get_label(): line.get_linestyle() for line in figures.adapter_lines(table).lines}
    assert styles == {"e2, off": "--", "e2, on": "-", "e3, off": "--", "e3, on": "-"}
    shuffled = figures.adapter_lines(table.replace({"entity": {"e2": "e2 shuffled"}})).lines
    assert len({str(line.get_color()) for line in shuffled}) == 2


def test_blocks_stand_at_weight_and_fall():
    table = pd.DataFrame(
        {"query": ["r1", "last"], "place": "e1", "weight": [0.1, 0.9], "fall": [0.0, 1.0]}
    )
    lines = figures.block_points(table).lines
    assert [(line.get_label(), line.get_xdata()[0], line.get_ydata()[0]) for line in lines[:2]] == [
        ("from r1", 0.1, 0.0),
        ("from last", 0.9, 1.0),
    ]


def test_transitions_are_drawn_with_their_counts():
    share = pd.DataFrame([[0.25, 0.75], [0.0, 1.0]], index=["e3", "other"], columns=["e3", "other"])
    ax = figures.transition_map(share, share.map("{:.0%}".format))
    assert [text.get_text() for text in ax.texts] == ["25%", "75%", "0%", "100%"]
    assert (ax.get_ylabel(), [label.get_text() for label in ax.get_yticklabels()]) == (
        "without",
        ["e3", "other"],
    )


def test_costs_are_drawn_by_way_and_length():
    rows = [
        (way, layer, n, 1 + layer, 2.0) for way in ("a", "b") for layer in (1, 6) for n in (16, 64)
    ]
    table = pd.DataFrame(rows, columns=["way", "source_layer", "context", "times", "bound"])
    ax = figures.cost_lines(table, "times")
    assert len(ax.lines) == 5 and {len(line.get_xdata()) for line in ax.lines} == {2}
    assert [line.get_label() for line in ax.lines][:2] == ["a, 16 tokens", "a, 64 tokens"]


def test_verdicts_are_drawn_in_their_columns():
    rows = [("C1", "short", "reproduced"), ("C2", "long " * 30, "contradicted")]
    verdicts = ("reproduced", "partly", "not at this scale", "contradicted", "not testable here")
    ax = figures.verdict_grid(pd.DataFrame(rows, columns=["id", "claim", "verdict"]), verdicts)
    dots = [
        (line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "o"
    ]
    assert dots == [(0, 1), (3, 0)] and ax.get_yticklabels()[1].get_text().endswith(" …")


TABLES = sorted((paths.FIGURES / "tables").glob("*.tex"))


def test_committed_tables_hold_nothing_that_latex_lacks():
    assert len(TABLES) > 100
    for path in TABLES:
        strange = {c for c in path.read_text("utf-8") if ord(c) > 255} - set("–—…←“”‘’")
        assert not strange, f"{path.name}: add {strange} to tables.SYMBOLS"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_committed_tables_compile(tmp_path):
    head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs,textcomp}\begin{document}\tiny"
    lines = [head, *(rf"\input{{{path}}}\par" for path in TABLES), r"\end{document}"]
    (tmp_path / "all.tex").write_text("\n".join(lines))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
