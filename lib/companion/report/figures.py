"""The house style, plots for tidy tables, pictures saved with their numbers. A plot takes a frame
whose interval is `low` to `high`, and looks: name -> what has colour and marker (`Look`, `Arm`)."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from backattn.files import atomic_file

PALETTE = sns.color_palette("colorblind").as_hex()
BLUE, ORANGE, GREEN, RED, PURPLE, _, _, SILVER = PALETTE[:8]
GREY = "0.4"
WIDTH = 7.0  # inches, two columns


class Look(NamedTuple):
    colour: str
    marker: str = "o"


Looks = Mapping | None  # name -> Look, or Arm
KINDS = {"embedding": Look(SILVER), "attention": Look(BLUE), "ffn": Look(ORANGE, "s")}
STAGES = {"A": Look(GREEN), "B": Look(BLUE), "C": Look(PURPLE), "D": Look(RED)}
POSITIONS = {"entity": Look(GREEN), "relation": Look(PURPLE, "s"), "last": Look(RED, "^")}
POSITIONS |= {"context": Look(SILVER, "x")}
OUTCOMES = {"e3": Look(GREEN), "e2": Look(RED), "shortcut": Look(PURPLE), "e1": Look(ORANGE)}
OUTCOMES |= {"other": Look("#cccccc")}
CASES = {"right": "-", "wrong": "--"}  # dashes


def style() -> None:
    """The house style: colour-blind-safe, byte-stable files, fonts that every machine has."""
    files = {"figure.dpi": 110, "savefig.dpi": 160, "savefig.bbox": "tight", "pdf.fonttype": 42}
    looks = {"font.family": "DejaVu Sans", "svg.hashsalt": "backattn", "legend.frameon": False}
    looks |= {"axes.spines.top": False, "axes.spines.right": False}
    sns.set_theme(style="ticks", context="paper", palette="colorblind", rc=files | looks)


def save(figure: Figure, folder: Path, name: str, data: pd.DataFrame) -> list[Path]:
    """Write `name`.pdf, .png and .csv (the plotted numbers) into `folder`, without dates and tags,
    so that the same numbers give the same bytes; return the paths."""
    paths = [folder / f"{name}.{suffix}" for suffix in ("pdf", "png", "csv")]
    dates = {"CreationDate": None, "Producer": None, "Creator": None}
    for path, metadata in zip(paths, (dates, {"Software": None}), strict=False):
        with atomic_file(path) as temporary:
            figure.savefig(temporary, metadata=metadata)
    with atomic_file(paths[2]) as temporary:
        data.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return paths


def described(figure: Figure) -> str:
    """A figure in words, for those who do not see it: its title, and of each panel title, axes and
    what the legend names.

    Example:
        >>> figure, ax = plt.subplots()
        >>> _ = ax.set(xlabel="layer", ylabel="share", title="Late")
        >>> described(figure)
        'Late: share by layer.'
    """
    parts = [figure.get_suptitle()]
    for ax in figure.axes:
        legend = ax.get_legend()
        named = ", ".join(text.get_text() for text in legend.get_texts()) if legend else ""
        sides = " by ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        parts.append(": ".join(filter(None, (ax.get_title(), sides, named))))
    return " ".join(f"{' '.join(part.split())}." for part in parts if part)


def axes(ax: Axes | None = None, width: float = WIDTH, height: float = 2.8) -> Axes:
    """`ax`, or the axes of a new figure of this size in inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def looks_of(names: Iterable, looks: Looks) -> dict:
    """A look for every different name: its own in `looks`, else one of the palette in turn."""
    spare = map(Look, itertools.cycle(PALETTE), itertools.cycle("osD^vPX"))
    names = dict.fromkeys(names)
    return {name: looks[name] if looks and name in looks else next(spare) for name in names}


def bands(
    table: pd.DataFrame,
    x: str,
    y: str = "mean",
    hue: str | None = None,
    looks: Looks = None,
    dashes: tuple[str, Mapping] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A line per value of `hue` along x, with its band, and the zero line where one crosses it;
    dashes: a second column that tells lines apart, with the line style of each of its values."""
    ax = axes(ax)
    table = table.assign(_hue=table[hue] if hue else "", _style=table[dashes[0]] if dashes else "")
    chosen = looks_of(table["_hue"], looks)
    for (name, case), part in table.groupby(["_hue", "_style"], sort=False, observed=True):
        look, part = chosen[name], part.sort_values(x)
        line = (
            {"marker": "", "ls": dashes[1][case]} if dashes else {"marker": look.marker * bool(hue)}
        )
        line |= {"label": ", ".join(str(word) for word in (name, case) if word != "")}
        ax.plot(part[x], part[y], color=look.colour, lw=1.2, ms=3.5, **line)
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
    value="mean",
    hue=None,
    looks: Looks = None,
    ax: Axes | None = None,
    zone: float = 0.0,
) -> Axes:
    """One value with its interval a row, the first on top, against zero; label names the rows;
    zone: within which differences count as none, in grey."""
    ax, rows = axes(ax, height=0.6 + 0.2 * len(table)), range(len(table))[::-1]
    chosen = looks_of(table[hue], looks) if hue else {}
    for y, row in zip(rows, table.to_dict("records"), strict=True):
        look = chosen[row[hue]] if hue else Look(PALETTE[0])
        ax.plot([row["low"], row["high"]], [y, y], color=look.colour, lw=2, solid_capstyle="butt")
        ax.plot(row[value], y, marker=look.marker, color=look.colour, ms=5)
    ax.axvline(0, color=GREY, lw=0.6)
    ax.axvspan(-zone, zone, color="0.9", zorder=0)
    ax.set(yticks=rows, yticklabels=table[label].tolist(), ylabel="")
    return ax


def points(
    table: pd.DataFrame, x: str, y: str, hue: str, looks: Looks = None, ax: Axes | None = None
) -> Axes:
    """A point with its vertical interval a row; x may be a column of names, set side by side."""
    ax, chosen = axes(ax), looks_of(table[hue], looks)
    names = None if pd.api.types.is_numeric_dtype(table[x]) else list(dict.fromkeys(table[x]))
    for k, (name, look) in enumerate(chosen.items()):
        part = table[table[hue] == name]
        shift = (k - (len(chosen) - 1) / 2) * 0.8 / len(chosen)
        at = part[x] if names is None else part[x].map(names.index) + shift
        error = [(part[y] - part["low"]).clip(lower=0), (part["high"] - part[y]).clip(lower=0)]
        shape = {"fmt": look.marker, "color": look.colour, "ms": 4.5, "lw": 1, "capsize": 2}
        ax.errorbar(at, part[y], yerr=error, label=name, **shape)
    if names is not None:
        ax.set_xticks(range(len(names)), names)
    ax.set(ylabel=y)
    ax.legend(fontsize=8, ncols=2)
    return ax


def levels(table: pd.DataFrame, value: str, label: str, looks: Mapping, ax: Axes) -> Axes:
    """A dotted line across, with its name, at the value of each row."""
    where = {"xycoords": ("axes fraction", "data"), "ha": "center", "va": "top"}
    for name, level in table[[label, value]].to_numpy():
        ax.axhline(level, color=looks[name].colour, lw=0.9, ls=":")
        ax.annotate(name, (0.5, level), fontsize=7, **where)
    return ax


def heatmap(
    grid: pd.DataFrame,
    label: str,
    top: float | None = None,
    diverging: bool = True,
    upwards: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """A grid of numbers, from −top to top around zero, or from 0 to top (diverging=False); label:
    of the colour bar; upwards: the first row at the bottom. Of numbers every fifth is named."""
    ax = axes(ax, height=0.6 + 0.25 * len(grid))
    top = top or np.nanmax(np.abs(grid.to_numpy(dtype=float)))
    scale = {"cmap": "vlag", "vmin": -top, "center": 0, "vmax": top}
    scale = scale if diverging else {"cmap": "mako", "vmin": 0, "vmax": top}
    sns.heatmap(grid, ax=ax, cbar_kws={"label": label}, **scale)
    for labels, set_ticks in ((grid.columns, ax.set_xticks), (grid.index, ax.set_yticks)):
        numbered = pd.api.types.is_numeric_dtype(labels)
        shown = [k for k, name in enumerate(labels) if not numbered or name % 5 == 0]
        set_ticks([k + 0.5 for k in shown], [str(labels[k]) for k in shown])
    ax.tick_params(axis="both", rotation=0)
    if upwards:
        ax.invert_yaxis()
    return ax


def box(ax: Axes, grid: pd.DataFrame, column, rows: Iterable) -> None:
    """A frame around some cells of a `heatmap`: a column, and rows that lie together."""
    where = sorted(grid.index.get_loc(row) for row in rows)
    corner = (grid.columns.get_loc(column), where[0])
    ax.add_patch(Rectangle(corner, 1, len(where), fill=False, ec=ORANGE, lw=1.5, zorder=5))


def flow_heatmap(
    frame: pd.DataFrame, kind: str, first: int = 0, top: float | None = None, ax: Axes | None = None
) -> Axes:
    """Tokens × layers: one prompt's flow through one kind of sub-layer. frame: its rows of
    `FlowBack.frame`; first: the first position shown; top: the colour scale's end."""
    part = frame[(frame["kind"] == kind) & (frame["position"] >= first)]
    grid = part.pivot_table(index="position", columns="layer", values="flow", observed=True)
    tokens = part.drop_duplicates("position").set_index("position")["token"].astype(str)
    grid.index = [repr(tokens[position])[1:-1] for position in grid.index]
    ax = heatmap(grid, "flow, nats", top, ax=ax)
    ax.set(xlabel="layer", ylabel="", title=kind)
    return ax
