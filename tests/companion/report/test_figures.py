"""Plots stand at the numbers of their tables; files are byte-stable and carry their numbers."""

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from backattn import flow_back, logit_flow
from companion.report import figures
from companion.report.figures import Look


@pytest.fixture(autouse=True)
def _closed():
    figures.style()
    yield
    plt.close("all")


def labels(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def test_flow_of_one_prompt_is_drawn_by_token(llama):
    back, kind = flow_back(*llama, logit_flow(*llama, "France's capital is", top_k=30)), "ffn"
    ax = figures.flow_heatmap(back.frame, kind)
    assert ax.get_title() == kind and "".join(labels(ax.yaxis)) == "France's capital is"
    fewer = figures.flow_heatmap(back.frame, kind, first=2)
    assert labels(fewer.yaxis) == labels(ax.yaxis)[2:]


def test_saved_twice_gives_the_same_bytes(tmp_path):
    data = pd.DataFrame({"layer": [0, 1, 2], "mean": [0.1, 0.25, -0.3]})
    for folder in ("one", "two"):
        figure = figures.bands(data, "layer").figure
        written = figures.save(figure, tmp_path / folder, "lines", data)
    assert [p.suffix for p in written] == [".pdf", ".png", ".csv"]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert pd.read_csv(tmp_path / "one/lines.csv").equals(data)


def test_bands_are_drawn_in_order_with_their_looks_and_dashes():
    table = pd.DataFrame({"arm": ["b", "b", "a"], "dim": [4, 1, 1], "mean": [0.4, 0.1, 0.2]})
    looks = {"b": Look("#ff0000", "s")}
    ax = figures.bands(table.assign(low=0.0, high=0.5), "dim", hue="arm", looks=looks)
    first, second = ax.lines  # nothing crosses zero
    assert first.get_xdata().tolist() == [1, 4] and first.get_ydata().tolist() == [0.1, 0.4]
    assert (first.get_color(), first.get_marker(), first.get_label()) == ("#ff0000", "s", "b")
    assert second.get_ydata().tolist() == [0.2] and len(ax.collections) == 2
    assert second.get_color() != first.get_color()
    crossed = figures.bands(table.assign(low=-0.1, high=0.5), "dim", hue="arm")
    assert crossed.lines[-1].get_ydata() == [0, 0]
    rows = [(entity, case, 0, 0.5) for entity in ("e2", "e3") for case in ("right", "wrong")]
    table = pd.DataFrame(rows, columns=["entity", "case", "layer", "mean"])
    ax = figures.bands(table, "layer", hue="entity", dashes=("case", figures.CASES))
    styles = {line.get_label(): line.get_linestyle() for line in ax.lines}
    assert styles == {"e2, right": "-", "e2, wrong": "--", "e3, right": "-", "e3, wrong": "--"}
    assert len({line.get_color() for line in ax.lines}) == 2


def test_intervals_stand_from_the_top():
    table = pd.DataFrame({"name": ["x", "y"], "mean": [0.1, -0.2], "other": ["bias", "few-shot"]})
    table = table.assign(low=table["mean"] - 0.1, high=table["mean"] + 0.1)
    looks = {"bias": Look("#ff0000", "d"), "few-shot": Look("#00ff00", "P")}
    ax = figures.intervals(table, "name", hue="other", looks=looks)
    assert dict(zip(ax.get_yticks(), labels(ax.yaxis), strict=True)) == {1: "x", 0: "y"}
    assert list(ax.lines[0].get_xdata()) == [0.0, 0.2]
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines[1:4:2]]
    assert dots == [(0.1, 1), (-0.2, 0)]
    assert [line.get_marker() for line in ax.lines[1:4:2]] == ["d", "P"]


def test_points_stand_side_by_side_or_along_numbers():
    rows = [(d, arm, i / 10, i) for d in ("one", "two") for i, arm in enumerate("abc", 1)]
    table = pd.DataFrame(rows, columns=["dataset", "arm", "accuracy", "operations"])
    table = table.assign(low=table["accuracy"] - 0.05, high=table["accuracy"] + 0.05)
    ax = figures.points(table, "dataset", "accuracy", "arm")
    assert labels(ax.xaxis) == ["one", "two"]
    drawn = {c.get_label(): c.lines[0] for c in ax.containers}
    heights = {arm: line.get_ydata().tolist() for arm, line in drawn.items()}
    assert heights == {arm: part["accuracy"].tolist() for arm, part in table.groupby("arm")}
    places = [x for line in drawn.values() for x in line.get_xdata()]
    assert len({round(x, 6) for x in places}) == 6  # apart, each at its dataset
    assert max(abs(x - round(x)) for x in places) < 0.5
    table = table[table["dataset"] == "one"]
    ax = figures.points(table, "operations", "accuracy", "arm")
    assert sorted(c.lines[0].get_xdata()[0] for c in ax.containers) == [1, 2, 3]
    figures.levels(table, "accuracy", "arm", dict.fromkeys("abc", Look("#ff0000")), ax)
    assert [text.get_text() for text in ax.texts] == list("abc")
    assert [line.get_ydata()[0] for line in ax.lines[-3:]] == table["accuracy"].tolist()


def test_numbered_cells_are_named_every_fifth_and_may_stand_upwards():
    grid = pd.DataFrame(0.1, index=range(6), columns=range(1, 7))
    ax = figures.heatmap(grid, "gain", top=0.5, upwards=True)
    assert dict(zip(ax.get_xticks(), labels(ax.xaxis), strict=True)) == {4.5: "5"}
    assert labels(ax.yaxis) == ["0", "5"]
    bottom, above = ax.get_ylim()
    assert bottom < above and ax.collections[0].get_clim() == (-0.5, 0.5)
    named = figures.heatmap(grid.rename(columns=str, index=str), "share", diverging=False)
    assert labels(named.xaxis) == list("123456") and named.collections[0].get_clim() == (0, 0.1)


def test_a_figure_is_described_by_what_is_written_in_it():
    data = pd.DataFrame({"layer": [0, 1] * 2, "mean": [0.1, 0.2, 0.3, 0.4], "arm": list("aabb")})
    figure, (left, right) = plt.subplots(1, 2)
    figures.bands(data, "layer", hue="arm", ax=left)
    right.set(title="a panel\nof two lines", xlabel="step")
    figure.suptitle("It rises")
    said = figures.described(figure)
    assert said == "It rises. mean by layer: a, b. a panel of two lines: step."
