"""A page that moves without a kernel: one HTML file with all it needs, drawn by Bokeh.

Bokeh's drawing code comes in its wheel and goes into the page; plotly's is over three times as
large, and altair's needs a JavaScript engine to be put together. The choices are the browser's own
controls.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from bokeh.embed import components
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    FactorRange,
    HoverTool,
    LinearColorMapper,
    Range1d,
)
from bokeh.palettes import Blues256, RdBu11, interp_palette
from bokeh.plotting import figure
from bokeh.resources import Resources
from jinja2 import Environment

from companion.report import figures

TEMPLATE = Path(__file__).with_suffix(".html")
ENTITIES = {name: figures.OUTCOMES[name].colour for name in ("e1", "e2", "e3")}


def page(
    records: Sequence[Mapping], memories: Mapping[str, str], sets: Mapping[str, str], title: str
) -> str:
    """HTML of questions that a reader chooses, as one self-contained file.

    records: of `studies.demo_memory_switch.memory_switch`; memories: key -> label, in the order of
    the probabilities; sets: a record's set -> label. The page opens on `strongest`. The same
    records give the same text.
    """
    script, parts = components(_plots(), wrap_script=False)
    script, *divs = _same_names(script, *parts.values())
    code = Resources(mode="inline", components=["bokeh"]).js_raw
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        memories=memories,
        sets={key: sets[key] for key in dict.fromkeys(record["set"] for record in records)},
        records=records,
        start=strongest(records),
        entities=ENTITIES,
        code="\n".join(code),
        data=_short([dict(record) for record in records]),
        script=script,
        parts=dict(zip(parts, divs, strict=True)),
    )


def strongest(records: Sequence[Mapping]) -> int:
    """Place of the right answer that another question's memory changes to another word, and whose
    own probability falls most by it; 0 where no right answer is changed."""
    falls = []
    for record in records:
        own, another = np.array(record["probabilities"]).T[:2]  # [words] with each memory
        said = own.argmax()
        counts = record["right"][said] and another.argmax() != said
        falls.append(own[said] - another[said] if counts else 0)
    return int(np.argmax(falls))


def _short(records: list[dict]) -> str:
    """Records as JSON that can stand in a page; the cells of maps as whole hundredths."""
    for record in records:
        maps = {name: record[name] for name in ("flow", "second_flow")}
        record |= {
            name: {k: _hundredths(x) for k, x in both.items()} for name, both in maps.items()
        }
        record["reads"] = _hundredths(record["reads"])
    return json.dumps(records, separators=(",", ":")).replace("</", "<\\/")


def _hundredths(grid: list[list[float]]) -> list[list[int]]:
    return (np.array(grid) * 100).round().astype(int).tolist()


def _same_names(*texts: str) -> list[str]:
    """Bokeh's ids are drawn or counted on; numbers of its own make a page reproducible."""
    ids = r"\b(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|p\d{4,})\b"
    names: dict[str, str] = {}
    return [
        re.sub(ids, lambda found: names.setdefault(found[0], f"part-{len(names)}"), text)
        for text in texts
    ]


def _plots() -> dict:
    """Empty plots by name; the page's script fills their sources, named alike."""
    return {
        "answers": _answers(),
        "flow": _map("flow", "layer", diverging=True),
        "second": _map("second", "layer", diverging=True),
        "running": _running(),
        "reads": _map("reads", "memory layer", diverging=False),
    }


def _plot(name: str, **options):
    """A plot as wide as the page that leaves scrolling to the page."""
    made = figure(
        name=f"{name} plot",
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="",
        **options,
    )
    made.outline_line_color = None
    for axis in made.axis:
        axis.axis_label_text_font_style, axis.axis_label_text_font_size = "normal", "14px"
        axis.major_label_text_font_size = "13px"
    return made


def _answers():
    names = ("word", "probability", "colour", "label")
    source = ColumnDataSource({name: [] for name in names}, name="answers")
    plot = _plot(
        "answers", y_range=FactorRange(name="answers rows"), x_range=Range1d(0, 1.15), height=300
    )
    plot.hbar("word", right="probability", height=0.7, color="colour", source=source)
    plot.text(
        "probability",
        "word",
        text="label",
        source=source,
        x_offset=4,
        text_baseline="middle",
        text_font_size="13px",
    )
    plot.xaxis.axis_label = "probability"
    plot.xgrid.grid_line_color = plot.ygrid.grid_line_color = None
    return plot


def _read_out(name: str, plot) -> None:
    """What is under a finger or the pointer is written below the plot by the page's script."""
    for event in ("tap", "mousemove"):
        plot.js_on_event(event, CustomJS(code=f"readOut('{name}', cb_obj.x, cb_obj.y)"))


def _map(name: str, label: str, diverging: bool):
    """Tokens × layers; a frame is drawn around the cell that is read out."""
    source = ColumnDataSource({key: [] for key in ("layer", "token", "value")}, name=name)
    palette = interp_palette(RdBu11, 101) if diverging else Blues256[::-1]
    mapper = LinearColorMapper(palette=palette, low=-1, high=1, name=f"{name} colours")
    plot = _plot(
        name,
        y_range=FactorRange(name=f"{name} rows"),
        x_range=Range1d(-0.5, 29.5, name=f"{name} columns"),
        height=300,
    )
    cells = plot.rect(
        "layer",
        "token",
        1,
        1,
        source=source,
        line_color=None,
        fill_color={"field": "value", "transform": mapper},
    )
    chosen = ColumnDataSource({key: [] for key in ("layer", "token")}, name=f"{name} chosen")
    frame = {"fill_color": None, "line_color": "#222222", "line_width": 2}
    plot.rect("layer", "token", 1, 1, source=chosen, **frame)
    plot.add_tools(HoverTool(renderers=[cells], tooltips=f"@token, {label} @layer: @value{{0.00}}"))
    _read_out(name, plot)
    plot.xaxis.axis_label, plot.grid.grid_line_color = label, None
    return plot


def _running():
    source = ColumnDataSource({name: [] for name in ("step", *ENTITIES)}, name="running")
    plot = _plot("running", height=280)
    for (name, colour), dash in zip(ENTITIES.items(), ("dotted", "dashed", "solid"), strict=True):
        plot.line(
            "step",
            name,
            source=source,
            color=colour,
            line_width=2,
            line_dash=dash,
            legend_label=name,
        )
    plot.legend.location, plot.legend.orientation = "bottom_left", "horizontal"
    plot.xaxis.axis_label, plot.yaxis.axis_label = "layer", "log-probability so far, nats"
    plot.add_tools(
        HoverTool(
            tooltips=" · ".join(f"{name} @{name}{{0.0}}" for name in ENTITIES),
            mode="vline",
            line_policy="nearest",
        )
    )
    _read_out("running", plot)
    return plot
