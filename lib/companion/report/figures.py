"""What the reader sees: the house style, three plots for tidy tables, and pictures saved beside
their numbers.

`bands` draws lines with a band, `intervals` rows with an interval, `heatmap` a grid. Each takes a
tidy frame whose interval is `low` to `high`, and looks: name -> something with a colour and a
marker (a `Look`, or an `Arm`). What a figure needs besides stands in its notebook's cell.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backattn.files import atomic_file

PALETTE = sns.color_palette("colorblind").as_hex()
GREY = "0.4"
WIDTH = 7.0  # inches, two columns


class Look(NamedTuple):
    """How one thing is drawn wherever it occurs."""

    colour: str
    marker: str = "o"


KINDS = {"embedding": Look(PALETTE[7]), "attention": Look(PALETTE[0]), "ffn": Look(PALETTE[1], "s")}
STAGES = {stage: Look(PALETTE[k]) for stage, k in zip("ABCD", (2, 0, 4, 3), strict=True)}
POSITIONS = {
    "entity": Look(PALETTE[2], "o"),
    "relation": Look(PALETTE[4], "s"),
    "last": Look(PALETTE[3], "^"),
    "context": Look(PALETTE[7], "x"),
}
OUTCOMES = {
    "e3": Look(PALETTE[2]),
    "e2": Look(PALETTE[3]),
    "shortcut": Look(PALETTE[4]),
    "e1": Look(PALETTE[1]),
    "other": Look("#cccccc"),
}
CASES = {"right": "-", "wrong": "--"}  # dashes


def style() -> None:
    """The house style: colour-blind-safe, byte-stable files, fonts that every machine has."""
    sns.set_theme(style="ticks", context="paper", palette="colorblind")
    mpl.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "savefig.bbox": "tight",
            "pdf.fonttype": 42,
            "svg.hashsalt": "backattn",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


def save(figure: Figure, folder: Path, name: str, data: pd.DataFrame) -> list[Path]:
    """Write `name`.pdf, .png and .csv (the plotted numbers) into `folder`; return the paths.

    The files carry no dates and no software tags, so that the same numbers give the same bytes.
    """
    paths = [folder / f"{name}.{suffix}" for suffix in ("pdf", "png", "csv")]
    dates = {"CreationDate": None, "Producer": None, "Creator": None}
    for path, metadata in zip(paths, (dates, {"Software": None}), strict=False):
        with atomic_file(path) as temporary:
            figure.savefig(temporary, metadata=metadata)
    with atomic_file(paths[2]) as temporary:
        data.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return paths


def axes(ax: Axes | None = None, width: float = WIDTH, height: float = 2.8) -> Axes:
    """`ax`, or the axes of a new figure of this size in inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def looks_of(names: list, looks: Mapping | None) -> dict:
    """A look for every name: its own in `looks`, else one of the palette in turn."""
    spare = map(Look, itertools.cycle(PALETTE), itertools.cycle("osD^vPX"))
    return {name: looks[name] if looks and name in looks else next(spare) for name in names}


def bands(
    table: pd.DataFrame,
    x: str,
    y: str = "mean",
    hue: str | None = None,
    looks: Mapping | None = None,
    dashes: tuple[str, Mapping] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A line per value of `hue` along x, with its band from `low` to `high`, and the zero line
    where one of them crosses it.

    dashes: a second column that tells lines apart, with the line style of each of its values.
    """
    ax = axes(ax)
    table = table.assign(_hue=table[hue] if hue else "", _style=table[dashes[0]] if dashes else "")
    chosen = looks_of(list(table["_hue"].unique()), looks)
    for (name, case), part in table.groupby(["_hue", "_style"], sort=False, observed=True):
        look, part = chosen[name], part.sort_values(x)
        line = dashes[1][case] if dashes else "-"
        label = ", ".join(str(word) for word in (name, case) if word != "")
        marker = look.marker if hue and not dashes else ""
        ax.plot(
            part[x], part[y], line, color=look.colour, marker=marker, ms=3.5, lw=1.2, label=label
        )
        if {"low", "high"} <= {*part}:
            ax.fill_between(part[x], part["low"], part["high"], color=look.colour, alpha=0.2, lw=0)
    ends = table[[name for name in (y, "low", "high") if name in table]]
    if ends.min(axis=None) < 0 < ends.max(axis=None):
        ax.axhline(0, color=GREY, lw=0.6)
    ax.set(xlabel=x.replace("_", " "), ylabel=y)
    if hue:
        ax.legend(fontsize=8)
    return ax


def intervals(
    table: pd.DataFrame,
    label: str,
    value: str = "mean",
    hue: str | None = None,
    looks: Mapping | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One value with its interval a row, the first on top, against zero; label: the column that
    names the rows."""
    ax = axes(ax, height=0.6 + 0.2 * len(table))
    chosen = looks_of(list(table[hue].unique()), looks) if hue else {}
    for y, row in zip(range(len(table))[::-1], table.to_dict("records"), strict=True):
        look = chosen[row[hue]] if hue else Look(PALETTE[0])
        ax.plot([row["low"], row["high"]], [y, y], color=look.colour, lw=2, solid_capstyle="butt")
        ax.plot(row[value], y, marker=look.marker, color=look.colour, ms=5)
    ax.axvline(0, color=GREY, lw=0.6)
    ax.set(yticks=range(len(table))[::-1], yticklabels=table[label].tolist(), ylabel="")
    return ax


def points(
    table: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    looks: Mapping | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A point with its vertical interval from `low` to `high` a row; x may be a column of names,
    set side by side."""
    ax = axes(ax)
    names = None if pd.api.types.is_numeric_dtype(table[x]) else list(dict.fromkeys(table[x]))
    hues = list(dict.fromkeys(table[hue]))
    for k, (name, look) in enumerate(looks_of(hues, looks).items()):
        part = table[table[hue] == name]
        shift = (k - (len(hues) - 1) / 2) * 0.8 / len(hues)
        at = part[x] if names is None else part[x].map(names.index) + shift
        error = [(part[y] - part["low"]).clip(lower=0), (part["high"] - part[y]).clip(lower=0)]
        shape = {"fmt": look.marker, "color": look.colour, "ms": 4.5, "lw": 1, "capsize": 2}
        ax.errorbar(at, part[y], yerr=error, label=name, **shape)
    if names is not None:
        ax.set_xticks(range(len(names)), names)
    ax.set(ylabel=y)
    ax.legend(fontsize=8, ncols=2)
    return ax


def levels(
    table: pd.DataFrame,
    value: str,
    label: str,
    looks: Mapping | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A dotted line across, with its name, at the value of each row."""
    ax = axes(ax)
    for row in table.to_dict("records"):
        name, level = row[label], row[value]
        ax.axhline(level, color=looks[name].colour if looks else GREY, lw=0.9, ls=":")
        where = {"xycoords": ("axes fraction", "data"), "ha": "center", "va": "top"}
        ax.annotate(name, (0.5, level), fontsize=7, **where)
    return ax


def heatmap(
    grid: pd.DataFrame,
    label: str,
    top: float | None = None,
    diverging: bool = True,
    upwards: bool = False,
    ax: Axes | None = None,
    **options,
) -> Axes:
    """A grid of numbers, from −top to top around zero, or from 0 to top (diverging=False).

    label: of the colour bar. upwards: the first row at the bottom. Of numbered rows and columns
    every fifth is named.
    """
    ax = axes(ax, height=0.6 + 0.25 * len(grid))
    top = top or np.nanmax(np.abs(grid.to_numpy(dtype=float)))
    scale = (
        {"cmap": "vlag", "vmin": -top, "center": 0} if diverging else {"cmap": "mako", "vmin": 0}
    )
    sns.heatmap(grid, ax=ax, vmax=top, cbar_kws={"label": label}, **{**scale, **options})
    for labels, set_ticks in ((grid.columns, ax.set_xticks), (grid.index, ax.set_yticks)):
        numbered = pd.api.types.is_numeric_dtype(labels)
        shown = [k for k, name in enumerate(labels) if not numbered or name % 5 == 0]
        set_ticks([k + 0.5 for k in shown], [str(labels[k]) for k in shown])
    ax.tick_params(axis="both", rotation=0)
    if upwards:
        ax.invert_yaxis()
    return ax


def flow_heatmap(
    frame: pd.DataFrame, kind: str, first: int = 0, top: float | None = None, ax: Axes | None = None
) -> Axes:
    """Tokens × layers: one prompt's flow through one kind of sub-layer.

    frame: rows of `FlowBack.frame` of one prompt; first: the first position shown; top: the colour
    scale's end.
    """
    part = frame[(frame["kind"] == kind) & (frame["position"] >= first)]
    grid = part.pivot_table(index="position", columns="layer", values="flow", observed=True)
    tokens = part.drop_duplicates("position").set_index("position")["token"].astype(str)
    grid.index = pd.Index([repr(tokens[position])[1:-1] for position in grid.index])
    ax = heatmap(grid, "flow, nats", top, ax=ax)
    ax.set(xlabel="layer", ylabel="", title=kind)
    return ax
