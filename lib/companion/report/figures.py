"""What the reader sees: plots that return their Axes, and saving with the plotted numbers beside the picture."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from backattn.files import atomic_file
from companion.questions.prompts import GROUPS

PALETTE = sns.color_palette("colorblind")

COLOURS = {"embedding": PALETTE[7], "attention": PALETTE[0], "ffn": PALETTE[1]}

STAGE_COLOURS = dict(zip("ABCD", (PALETTE[2], PALETTE[0], PALETTE[4], PALETTE[3]), strict=True))

POSITION_COLOURS = {
    "entity": PALETTE[2],
    "relation": PALETTE[4],
    "last": PALETTE[3],
    "context": PALETTE[7],
}

MARKERS = {"entity": "o", "relation": "s", "last": "^", "context": "x"}

OUTCOME_COLOURS = dict(
    zip(
        ("e3", "e2", "shortcut", "e1", "other"),
        (PALETTE[2], PALETTE[3], PALETTE[4], PALETTE[1], (0.8, 0.8, 0.8)),
        strict=True,
    )
)

ARM_COLOURS = {
    "zero-shot": (0.75, 0.75, 0.75),
    "few-shot": (0.5, 0.5, 0.5),
    "back attention": PALETTE[3],
    "same layer": PALETTE[1],
    "residual LoRA": PALETTE[0],
    "loop LoRA": PALETTE[4],
    "LoRA q,v": PALETTE[2],
    "bias": PALETTE[5],
    "1 layer": PALETTE[0],
    "1 layer + back attention": PALETTE[3],
    "2 layers": PALETTE[2],
    "1 layer, wide": PALETTE[1],
    "1 layer, twice": PALETTE[4],
    "2 layers + back attention": PALETTE[3],
    "2 layers + same layer": PALETTE[1],
    "2 layers + loop": PALETTE[5],
    "2 layers + return": PALETTE[7],
    "2 layers, twice": PALETTE[4],
    "4 layers": PALETTE[0],
}

ARM_MARKERS = dict(zip(ARM_COLOURS, "xPosD^vdsoPsDos^<Dv", strict=True))

CASE_STYLES = {"right": "-", "wrong": "--"}

WIDTH = 7.0  # inches, two columns


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
    metadata = {
        ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        ".png": {"Software": None},
    }
    for path in paths[:2]:
        with atomic_file(path) as temporary:
            figure.savefig(temporary, metadata=metadata[path.suffix])
    with atomic_file(paths[2]) as temporary:
        data.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return paths


def _axes(ax: Axes | None, width: float = WIDTH, height: float = 2.8) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def _label_layers(ax: Axes, layers: pd.Index) -> None:
    """Every fifth layer on the x axis of a heat map, upright labels on both axes."""
    shown = [index for index, layer in enumerate(layers) if layer % 5 == 0]
    ax.set_xticks([index + 0.5 for index in shown], [str(layers[index]) for index in shown])
    ax.tick_params(axis="both", rotation=0)


def layer_importance(layers: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Bars of the layer importances of one prompt (rows of `LogitFlow.layers`), attention beside FFN."""
    ax = _axes(ax)
    for offset, kind in ((-0.2, "attention"), (0.2, "ffn")):
        part = layers[layers["kind"] == kind]
        ax.bar(part["layer"] + offset, part["increase"], width=0.4, color=COLOURS[kind], label=kind)
    ax.axhline(0, color="0.4", linewidth=0.6)
    ax.set(xlabel="layer", ylabel="increase, nats")
    ax.legend(ncols=2, loc="upper left")
    return ax


def flow_heatmap(
    frame: pd.DataFrame, kind: str, ax: Axes | None = None, first: int = 0, top: float | None = None
) -> Axes:
    """Tokens × layers picture of one prompt's flow through one kind of sub-layer.

    frame: rows of `FlowBack.frame` of one prompt; first: the first position shown; top: the colour scale's end.
    """
    part = frame[(frame["kind"] == kind) & (frame["position"] >= first)]
    grid = part.pivot_table(index="position", columns="layer", values="flow", observed=True)
    tokens = part.drop_duplicates("position").set_index("position")["token"].astype(str)
    ax = _axes(ax, height=0.6 + 0.25 * len(grid))
    top = top or np.abs(grid.to_numpy()).max()
    labels = [repr(tokens[p])[1:-1] for p in grid.index]
    sns.heatmap(
        grid,
        ax=ax,
        cmap="vlag",
        center=0,
        vmin=-top,
        vmax=top,
        yticklabels=labels,
        cbar_kws={"label": "flow, nats"},
    )
    ax.set(xlabel="layer", ylabel="", title=kind)
    _label_layers(ax, grid.columns)
    return ax


def grouped_heatmap(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """Position group × layer picture; table: group, layer, mean."""
    grid = table.pivot(index="group", columns="layer", values="mean")
    grid = grid.reindex([group for group in GROUPS if group in grid.index])
    ax = _axes(ax, height=1.6)
    top = np.abs(
        grid.drop(index="context", errors="ignore").to_numpy()
    ).max()  # the context may go beyond
    sns.heatmap(
        grid, ax=ax, cmap="vlag", center=0, vmin=-top, vmax=top, cbar_kws={"label": "flow, nats"}
    )
    ax.set(xlabel="layer", ylabel="", title=title)
    _label_layers(ax, grid.columns)
    return ax


def stage_bands(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of each stage's flow by layer with its interval; table: stage, layer, share, low, high."""
    ax = _axes(ax)
    for stage, part in table.groupby("stage"):
        colour = STAGE_COLOURS[stage]
        ax.plot(part["layer"], part["share"], color=colour, label=stage, marker=".", linewidth=1.2)
        ax.fill_between(
            part["layer"], part["low"], part["high"], color=colour, alpha=0.25, linewidth=0
        )
    ax.axhline(0, color="0.4", linewidth=0.6)
    ax.set(xlabel="layer", ylabel="share of the stage's flow")
    ax.legend(title="stage", ncols=4)
    return ax


def stage_spans(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Begin, middle and end of each stage with intervals; table: as `stages.stage_table`, first row on top."""
    ax = _axes(ax, height=0.5 + 0.36 * len(table))
    for y, row in enumerate(table[::-1].to_dict("records")):
        colour = STAGE_COLOURS[row["stage"][0]]
        ax.plot(
            [row["begin"], row["end"]],
            [y, y],
            color=colour,
            linewidth=7,
            alpha=0.35,
            solid_capstyle="butt",
        )
        for name, marker in (("begin", "|"), ("middle", "D"), ("end", "|")):
            ax.plot([row[f"{name}_low"], row[f"{name}_high"]], [y, y], color=colour, linewidth=2)
            ax.plot(row[name], y, marker=marker, color=colour, markersize=6)
        ax.plot(row["peak"], y, marker="*", color="black", markersize=7)
    ax.set(
        xlabel="layer",
        yticks=range(len(table)),
        yticklabels=table["stage"][::-1],
        ylim=(-0.6, len(table) - 0.4),
    )
    return ax


def knockout_bars(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Drop of the answer's log-probability, stage against random layers.

    table: stage, drop, drop_low, drop_high, random, random_min, random_max.
    """
    ax = _axes(ax)
    x = np.arange(len(table))
    error = [table["drop"] - table["drop_low"], table["drop_high"] - table["drop"]]
    colours = [STAGE_COLOURS[stage[0]] for stage in table["stage"]]
    ax.bar(
        x - 0.2,
        table["drop"],
        0.38,
        yerr=error,
        color=colours,
        label="the stage's own layers",
        capsize=2,
    )
    error = [table["random"] - table["random_min"], table["random_max"] - table["random"]]
    ax.bar(
        x + 0.2,
        table["random"],
        0.38,
        yerr=error,
        color="0.75",
        label="equally many other layers",
        capsize=2,
    )
    ax.axhline(0, color="0.4", linewidth=0.6)
    ax.set(xticks=x, xticklabels=table["stage"], ylabel="drop of log p(answer), nats")
    ax.legend()
    return ax


def contest_lines(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """Logit of correct − conflicting answer by layer, a line per position; table: position, layer, mean, low, high."""
    ax = _axes(ax)
    for position, part in table.groupby("position", sort=False):
        colour = POSITION_COLOURS[position]
        ax.plot(
            part["layer"],
            part["mean"],
            color=colour,
            marker=MARKERS[position],
            markersize=3,
            label=position,
        )
        ax.fill_between(
            part["layer"], part["low"], part["high"], color=colour, alpha=0.25, linewidth=0
        )
    ax.axhline(0, color="0.4", linewidth=0.6)
    ax.set(xlabel="state entering layer", ylabel="logit, correct − conflicting", title=title)
    ax.legend(title="read at")
    return ax


def agreement_scatter(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean flow per (layer, kind, group) by one route against the other; table: kind, parts, linear."""
    ax = _axes(ax, width=3.4, height=3.0)
    for kind, part in table.groupby("kind", sort=True):
        ax.scatter(part["parts"], part["linear"], s=12, color=COLOURS[kind], label=kind, alpha=0.8)
    ax.set(xlabel="route “parts”, nats", ylabel="route “linear”, logits")
    ax.set_xscale("symlog", linthresh=0.1)
    ax.set_yscale("symlog", linthresh=0.1)
    ax.legend()
    return ax


def normaliser_plot(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How far shares are amplified where the normaliser is small; table: as `stages.normaliser_bins`."""
    ax = _axes(ax, width=3.4, height=3.0)
    ax.plot(table["normaliser"], table["amplification"], color=PALETTE[0], marker="o", markersize=4)
    ax.fill_between(
        table["normaliser"], table["low"], table["high"], color=PALETTE[0], alpha=0.25, linewidth=0
    )
    ax.set(xlim=(0, 1.02), yscale="log", xlabel="normaliser |w·x| / Σ|w·x_k|", ylabel="Σ |share|")
    return ax


def outcome_bars(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """One stacked bar per row label; table: label, outcome, share, n. Labels keep their order, the first on top."""
    labels = list(dict.fromkeys(table["label"]))
    ax = _axes(ax, height=0.7 + 0.32 * len(labels))
    left = np.zeros(len(labels))
    for outcome, colour in OUTCOME_COLOURS.items():
        part = (
            table[table["outcome"] == outcome]
            .set_index("label")["share"]
            .reindex(labels)
            .fillna(0)
            .to_numpy()
        )
        ax.barh(
            np.arange(len(labels))[::-1], part, left=left, color=colour, label=outcome, height=0.75
        )
        for y, (start, size) in enumerate(zip(left, part, strict=True)):
            if size >= 0.05:
                ax.text(
                    start + size / 2,
                    len(labels) - 1 - y,
                    f"{size:.0%}",
                    ha="center",
                    va="center",
                    fontsize=7,
                )
        left = left + part
    ax.set(
        yticks=np.arange(len(labels))[::-1],
        yticklabels=labels,
        xlim=(0, 1),
        xlabel="share of prompts",
    )
    ax.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


def right_and_wrong(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """Logit e3 − e2 by layer, right and wrong cases, dots where they differ; table: layer, case, mean, low, high, p."""
    ax = _axes(ax)
    for case, colour in (("right", PALETTE[2]), ("wrong", PALETTE[3])):
        part = table[table["case"] == case]
        ax.plot(
            part["layer"], part["mean"], CASE_STYLES[case], color=colour, label=case, linewidth=1.4
        )
        ax.fill_between(
            part["layer"], part["low"], part["high"], color=colour, alpha=0.2, linewidth=0
        )
    differ = table[(table["case"] == "right") & (table["p"] < 0.05)]["layer"]
    ax.plot(
        differ,
        np.full(len(differ), 0.03),
        "k.",
        markersize=4,
        label="p < 0.05",
        transform=ax.get_xaxis_transform(),
    )
    ax.axhline(0, color="0.4", linewidth=0.6)
    ax.set(xlabel="state entering layer", title=title)
    return ax


def readable_lines(table: pd.DataFrame, upper: Axes, lower: Axes, title: str = "") -> None:
    """How often e2 and e3 are among the highest tokens (above), and beat another prompt's entity (below).

    table: entity, layer, share, shuffled, wins, of one place.
    """
    for entity, part in table.groupby("entity"):
        colour = OUTCOME_COLOURS[entity]
        upper.plot(part["layer"], part["share"], color=colour, label=entity)
        upper.plot(part["layer"], part["shuffled"], ":", color=colour, label=f"{entity} shuffled")
        lower.plot(part["layer"], part["wins"], color=colour, label=entity)
    lower.axhline(0.5, color="0.4", linewidth=0.6)
    upper.set(title=title, ylim=(-0.02, 1.02))
    lower.set(xlabel="state entering layer", ylim=(-0.02, 1.02))


def flow_lines(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """Flow by layer into e3 and e2, right and wrong cases; table: entity, case, layer, mean, low, high."""
    ax = _axes(ax)
    for (entity, case), part in table.groupby(["entity", "case"]):
        colour = OUTCOME_COLOURS[entity]
        ax.plot(
            part["layer"],
            part["mean"],
            CASE_STYLES[case],
            color=colour,
            label=f"into {entity}, {case}",
            linewidth=1.2,
        )
        ax.fill_between(
            part["layer"], part["low"], part["high"], color=colour, alpha=0.15, linewidth=0
        )
    ax.axhline(0, color="0.4", linewidth=0.6)
    ax.set(xlabel="layer", title=title)
    return ax


def window_bars(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """Change of a log-probability by window of hidden layers; table: window, hidden, mean, low, high."""
    ax = _axes(ax)
    windows = sorted(table["window"].unique())
    for offset, (hidden, colour) in zip(
        (-0.2, 0.2), (("r1", PALETTE[4]), ("examples", "0.75")), strict=True
    ):
        part = table[table["hidden"] == hidden].sort_values("window")
        error = [part["mean"] - part["low"], part["high"] - part["mean"]]
        ax.bar(
            np.arange(len(windows)) + offset,
            part["mean"],
            0.38,
            yerr=error,
            color=colour,
            label=hidden,
            capsize=2,
        )
    ax.axhline(0, color="0.4", linewidth=0.6)
    ax.set(
        xticks=range(len(windows)),
        xticklabels=[f"{w}–" for w in windows],
        xlabel="hidden in layers",
        title=title,
    )
    return ax


def pair_heatmap(grid: pd.DataFrame, top: float, ax: Axes | None = None, title: str = "") -> Axes:
    """Share of wrong cases mended by (target, source) pair; grid: targets × sources, NaN where undefined."""
    ax = _axes(ax, width=3.4, height=3.0)
    sns.heatmap(
        grid, ax=ax, cmap="mako", vmin=0, vmax=top, cbar_kws={"label": "wrong cases mended"}
    )
    for labels, set_ticks in ((grid.columns, ax.set_xticks), (grid.index, ax.set_yticks)):
        shown = [place for place, layer in enumerate(labels) if layer % 5 == 0]
        set_ticks([place + 0.5 for place in shown], [str(labels[place]) for place in shown])
    ax.tick_params(axis="both", rotation=0)
    ax.invert_yaxis()
    ax.set(xlabel="state taken from entering layer", ylabel="put into layer", title=title)
    return ax


def idea_sketch(tokens: list[str], layers: int, source: int, ax: Axes | None = None) -> Axes:
    """The two passes of back attention: what the last position reads at the source layer, and what runs again."""
    ax = _axes(ax, height=2.9)
    count = len(tokens)
    for shift, title in ((0, "first pass"), (count + 1.5, "second pass")):
        for position in range(count):
            for layer in range(layers + 1):
                again = shift and layer > source
                colour = PALETTE[3] if again else PALETTE[0] if not shift else "0.85"
                ax.plot(shift + position, layer, "o", markersize=5, color=colour)
            ax.text(
                shift + position,
                -0.7,
                tokens[position],
                ha="right",
                va="top",
                rotation=35,
                fontsize=8,
            )
        ax.text(shift + (count - 1) / 2, layers + 0.6, title, ha="center", fontsize=9)
    target = (count + 1.5 + count - 1, source)
    for position in range(count):
        for layer in range(source, layers + 1):
            ax.plot(
                [position, target[0]],
                [layer, target[1]],
                color="0.6",
                linewidth=0.3,
                alpha=0.6,
                zorder=0,
            )
    ax.plot(*target, "o", markersize=10, markerfacecolor="none", markeredgecolor="black")
    ax.set(
        ylim=(-0.5, layers + 1.2),
        ylabel="layer",
        yticks=[0, source, layers],
        yticklabels=["0", "s", "L"],
    )
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    return ax


def learning_lines(table: pd.DataFrame, ax: Axes | None = None, scale: float = 1.0) -> Axes:
    """Validation accuracy by training step, a line per arm, its band from the worst to the best seed.

    table: arm, step, validation, low, high; scale: steps per unit of the x axis.
    """
    ax = _axes(ax)
    for arm, part in table.groupby("arm", sort=False):
        x, colour = part["step"] / scale, ARM_COLOURS[arm]
        ax.plot(
            x,
            part["validation"],
            color=colour,
            marker=ARM_MARKERS[arm],
            markersize=4,
            linewidth=1.2,
            label=arm,
        )
        ax.fill_between(x, part["low"], part["high"], color=colour, alpha=0.2, linewidth=0)
    ax.set(ylabel="accuracy, validation", ylim=(-0.02, 1.02))
    ax.legend(fontsize=8)
    return ax


def arm_points(table: pd.DataFrame, ax: Axes | None = None, x: str | None = None) -> Axes:
    """Accuracy of every arm with its interval; table: dataset, arm, accuracy, low, high.

    x: a column for the x axis (weights, operations); None puts the datasets side by side.
    """
    ax = _axes(ax)
    names = list(dict.fromkeys(table["dataset"]))
    arms = [arm for arm in ARM_COLOURS if arm in set(table["arm"])]
    for place, arm in enumerate(arms):
        part = table[table["arm"] == arm]
        if x is None:
            at = part["dataset"].map(names.index) + (place - (len(arms) - 1) / 2) * 0.8 / len(arms)
        else:
            at = part[x]
        error = [
            (part["accuracy"] - part["low"]).clip(lower=0),
            (part["high"] - part["accuracy"]).clip(lower=0),
        ]
        ax.errorbar(
            at, part["accuracy"], yerr=error, fmt=ARM_MARKERS[arm], color=ARM_COLOURS[arm], label=arm, capsize=2,
            markersize=4.5, linewidth=1,
        )  # fmt: skip
    if x is None:
        ax.set_xticks(range(len(names)), names)
    ax.set(ylabel="accuracy, test")
    ax.legend(fontsize=8, ncols=2)
    return ax


def difference_points(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Differences with their intervals, a row per dataset and other arm, the first on top.

    table: dataset, other, difference, low, high.
    """
    ax = _axes(ax, height=0.6 + 0.2 * len(table))
    y = np.arange(len(table))[::-1]
    for at, row in zip(y, table.to_dict("records"), strict=True):
        colour = ARM_COLOURS[row["other"]]
        ax.plot(
            [row["low"], row["high"]], [at, at], color=colour, linewidth=2, solid_capstyle="butt"
        )
        ax.plot(row["difference"], at, marker=ARM_MARKERS[row["other"]], color=colour, markersize=5)
    ax.axvline(0, color="0.4", linewidth=0.6)
    ax.set(
        yticks=y, yticklabels=[f"{r['dataset']}: {r['other']}" for r in table.to_dict("records")]
    )
    ax.set_xlabel("accuracy of back attention less the other arm's")
    return ax


def setting_lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    ax: Axes | None = None,
    chosen: dict[str, int] | None = None,
) -> Axes:
    """A line per arm along one setting (source layer, d′), with the band of its interval.

    table: x, y, low, high and `by` (arm, or the other arm of a difference); chosen: arm -> the setting to mark.
    """
    ax = _axes(ax)
    for arm, part in table.groupby(by, sort=False):
        part, colour = part.sort_values(x), ARM_COLOURS[arm]
        ax.plot(
            part[x],
            part[y],
            color=colour,
            marker=ARM_MARKERS[arm],
            markersize=3.5,
            linewidth=1.2,
            label=arm,
        )
        ax.fill_between(part[x], part["low"], part["high"], color=colour, alpha=0.15, linewidth=0)
        if chosen:
            at = part[part[x] == chosen[arm]]
            ax.plot(at[x], at[y], "o", markersize=9, markerfacecolor="none", markeredgecolor=colour)
    ax.set(xlabel=x.replace("_", " "), ylabel=y)
    ax.legend(fontsize=8)
    return ax


def level_lines(table: pd.DataFrame, ax: Axes) -> None:
    """A dotted line with its name at the accuracy of each untrained arm; table: arm, accuracy."""
    for arm, level in table[["arm", "accuracy"]].to_numpy():
        ax.axhline(level, color=ARM_COLOURS[arm], linewidth=0.9, linestyle=":")
        ax.annotate(
            arm, (0.5, level), xycoords=("axes fraction", "data"), fontsize=7, ha="center", va="top"
        )


def cell_heatmap(
    weights: np.ndarray,
    layers: Sequence[int],
    columns: Sequence[str],
    top: float,
    ax: Axes | None = None,
) -> Axes:
    """Weights over memory layers and positions (or places) [M, columns], low layers at the bottom."""
    ax = _axes(ax, width=3.4, height=3.0)
    sns.heatmap(
        weights, ax=ax, cmap="mako", vmin=0, vmax=top, cbar_kws={"extend": "max", "label": "weight"}
    )
    shown = [place for place, layer in enumerate(layers) if layer % 5 == 0]
    ax.set_yticks(
        [place + 0.5 for place in shown], [str(layers[place]) for place in shown], rotation=0
    )
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=40, ha="right")
    ax.invert_yaxis()
    ax.set(ylabel="memory layer")
    return ax


def cost_lines(table: pd.DataFrame, value: str, ax: Axes | None = None, title: str = "") -> Axes:
    """A ratio to the plain model by source layer, a colour per way and a line per length of the prompt, and the bound.

    table: way, source_layer, context, bound and `value`.
    """
    ax = _axes(ax)
    for k, (way, part) in enumerate(table.groupby("way", sort=False)):
        for dashes, (context, own) in zip(
            itertools.cycle(("-", "--", ":", "-.")), part.groupby("context"), strict=False
        ):
            label = f"{way}, {context} tokens"
            ax.plot(
                own["source_layer"],
                own[value],
                dashes,
                color=PALETTE[3 - 3 * k],
                marker="o",
                markersize=3,
                label=label,
            )
    bound = table.groupby("source_layer")["bound"].max()
    ax.plot(bound.index, bound, color="0.4", linewidth=0.8, label="1 + (L − s) / L")
    ax.set(xlabel="source layer", ylabel="over the plain model", title=title)
    return ax


def verdict_grid(table: pd.DataFrame, verdicts: Sequence[str], ax: Axes | None = None) -> Axes:
    """A row per claim, the first on top, with a dot in the column of its verdict; table: id, claim, verdict."""
    ax = _axes(ax, height=0.8 + 0.22 * len(table))
    colours = dict(zip(verdicts, (PALETTE[2], PALETTE[8], "0.6", PALETTE[3], "0.85"), strict=True))
    for y, row in zip(range(len(table) - 1, -1, -1), table.itertuples(), strict=True):
        ax.axhline(y, color="0.92", linewidth=0.6, zorder=0)
        ax.plot(verdicts.index(row.verdict), y, "o", color=colours[row.verdict], markersize=8)
    names = [
        f"{row.id}  {row.claim if len(row.claim) < 74 else row.claim[:72] + ' …'}"
        for row in table.itertuples()
    ]
    ax.set(
        yticks=range(len(table) - 1, -1, -1), yticklabels=names, xlim=(-0.5, len(verdicts) - 0.5)
    )
    ax.set_xticks(range(len(verdicts)), verdicts, rotation=35, ha="left")
    ax.xaxis.tick_top()
    ax.tick_params(axis="both", length=0, labelsize=7.5)
    ax.spines[["left", "bottom"]].set_visible(False)
    return ax


def transition_map(share: pd.DataFrame, labels: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Whom answers name before (rows) and after (columns), shaded by the share of the row; labels: what cells say."""
    ax = _axes(ax, width=4.2, height=3.0)
    sns.heatmap(
        share,
        ax=ax,
        annot=labels,
        fmt="",
        cmap="Blues",
        vmin=0,
        vmax=1,
        cbar=False,
        annot_kws={"fontsize": 8},
    )
    ax.tick_params(axis="both", length=0, rotation=0)
    ax.set(xlabel="with back attention", ylabel="without")
    return ax


def interval_rows(
    table: pd.DataFrame, label: str, value: str, low: str, high: str, ax: Axes | None = None
) -> Axes:
    """One value with its interval per row, the first on top, against zero."""
    ax = _axes(ax, height=0.6 + 0.2 * len(table))
    y = np.arange(len(table))[::-1]
    ax.hlines(y, table[low], table[high], color=PALETTE[0], linewidth=2)
    ax.plot(table[value], y, "o", color=PALETTE[0], markersize=4)
    ax.axvline(0, color="0.4", linewidth=0.6)
    ax.set(yticks=y, yticklabels=table[label].tolist())
    return ax


def adapter_lines(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """How often an entity and another question's can be read by layer, without the adapter (dashed) and with it.

    table: entity ("e2" or "e2 shuffled", say), adapter, layer, share, low, high.
    """
    ax = _axes(ax)
    for (entity, adapter), part in table.groupby(["entity", "adapter"], sort=False):
        own, _, shuffled = entity.partition(" ")
        colour, dashes = (
            "0.5" if shuffled else OUTCOME_COLOURS[own],
            "-" if adapter == "on" else "--",
        )
        ax.plot(
            part["layer"],
            part["share"],
            dashes,
            color=colour,
            linewidth=1.2,
            label=f"{entity}, {adapter}",
        )
        ax.fill_between(
            part["layer"], part["low"], part["high"], color=colour, alpha=0.12, linewidth=0
        )
    ax.set(xlabel="state entering layer", title=title, ylim=(-0.02, 1.02))
    ax.legend(fontsize=8)
    return ax


def block_points(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """What each block of cells weighs and what hiding it costs; table: query, place, weight, fall (means)."""
    ax = _axes(ax, width=3.8, height=3.0)
    for k, (query, part) in enumerate(table.groupby("query", sort=False)):
        ax.plot(
            part["weight"],
            part["fall"],
            "os^vDP"[k % 6],
            color=PALETTE[k],
            markersize=5,
            label=f"from {query}",
        )
    ax.axhline(0, color="0.4", linewidth=0.6)
    ax.set(xlabel="share of what the query reads", ylabel="fall of log p(e3) when hidden, nats")
    ax.legend(fontsize=7)
    return ax
