"""11: the ledger of all claims, its picture, and the one-page report."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.paths import DATA
from companion.report.figures import BLUE, GREY, ORANGE, WIDTH
from companion.report.verdicts import CLAIMS, VERDICTS, ZONE
from companion.runs.store import Store

IDS = tuple(dict.fromkeys(about.get("id", key) for key, about in CLAIMS.items()))
PAPER, HERE, CONTROL = "the paper", "here", "the strictest control"
SHOWN = ("zero-shot", "few-shot", "residual LoRA", "bias", "same layer", "back attention")
READ = "the lens reads e2 at r1"
RECALLED = "e3 is said with e2's state at r1"
NUMBERS = ("effect", "low", "high", "paper_low", "paper_high", "seen")
NUMBERS += ("control_effect", "control_low", "control_high")
NUMBERS += ("highest_effect", "highest_low", "highest_high")
SHARES = {key for key, about in CLAIMS.items() if about.get("share")}  # judged against half
MET = {"verified": "met", "toy": "met in toys", "inconclusive": "open", "falsified": "not met"}


def whole_ledger(folders: Sequence[Path]) -> pd.DataFrame:
    """The rows that all notebooks wrote (`NN_claims.csv`), in the order of data/claims.yml.

    A table in an earlier folder counts. Raises ValueError when a row of the ledger is missing.
    """
    found = _tables(folders, "[0-9][0-9]*_claims.csv")
    as_text = {"dtype": str, "keep_default_na": False}
    parts = [pd.read_csv(found[name], **as_text) for name in sorted(found)]
    rows = pd.concat(parts, ignore_index=True)
    missing = ", ".join(name for name in IDS if name not in set(rows["id"]))
    if missing:
        raise ValueError(f"The ledger has no row {missing}: run the notebooks that write them.")
    for name in NUMBERS:
        rows[name] = pd.to_numeric(rows[name])
    order = rows["id"].map(IDS.index).argsort(kind="stable")
    return rows.iloc[order].reset_index(drop=True)


def _tables(folders: Sequence[Path], pattern: str) -> dict[str, Path]:
    """File name -> path in the first folder that has it."""
    paths = [path for folder in reversed(folders) for path in folder.glob(pattern)]
    return {path.name: path for path in paths}


def commands(ledger: pd.DataFrame, figures: Path) -> pd.DataFrame:
    """What makes each claim again: id, short, command, timed_minutes (of its last committed run,
    one thread), megabytes (of its committed figures and tables)."""
    took = json.loads((DATA / "MANIFEST.json").read_text(encoding="utf-8"))["runs"]["paper"]
    rows = []
    for row in ledger.itertuples():
        names = row.notebook.split(", ")
        numbers = [name.split("_")[0] for name in names]
        files = [file for n in numbers for file in figures.rglob(f"{n}_*") if file.is_file()]
        seconds = sum(took[name]["seconds"] for name in names)
        about = {"id": row.id, "short": row.short}
        about |= {"command": f"./run_all.sh --only {','.join(numbers)}"}
        about |= {"timed_minutes": round(seconds / 60, 1)}
        rows.append({**about, "megabytes": round(sum(f.stat().st_size for f in files) / 1e6, 1)})
    return pd.DataFrame(rows)


def in_short(ledger: pd.DataFrame) -> str:
    """The claims as README has them, a Markdown table: the paper's number beside ours, and how they
    stand against the strictest control; in points where no unit stands."""
    lines = ["| | claim | paper | here | repeats? | strictest control |", "|---" * 6 + "|"]
    for row in ledger[~_breaks(ledger)].to_dict("records"):
        paper = _shown(row, "paper_low", "paper_high")
        cells = [_link(row), row["short"], paper, _here(row), row["verdict"], _control(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def conditions(ledger: pd.DataFrame) -> str:
    """The conditions that would break the paper's reading, as README has them, a Markdown table."""
    lines = ["| | condition | here | met? |", "|---" * 4 + "|"]
    for row in ledger[_breaks(ledger)].to_dict("records"):
        cells = [_link(row), row["short"], _here(row), f"{MET[row['verdict']]}; {row['control']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _breaks(ledger: pd.DataFrame) -> pd.Series:
    return ledger["id"].str.startswith("B")


def _link(row: dict) -> str:
    return f"[{row['id']}](notebooks/{row['notebook'].split(', ')[0]}.ipynb)"


def _here(row: dict) -> str:
    return _shown(row, "effect", "highest_effect")


def _shown(row: dict, *names: str) -> str:
    """Some numbers of a row, in its unit; those of SHARES as the shares that they are."""
    values = [row[name] for name in names if pd.notna(row[name])]
    if row["id"] in SHARES and values:
        return f"{' to '.join(dict.fromkeys(f'{50 + x:.0f}' for x in values))} %"
    return _numbers(*values, unit=row["unit"])


def _control(row: dict) -> str:
    if pd.isna(row["control_effect"]):
        return "–"
    return f"{row['control']}, {_numbers(row['control_effect'], unit=row['control_unit'])}"


def _numbers(*values: float, unit: str = "points") -> str:
    numbers = dict.fromkeys(f"{x:+.2g}" for x in values if pd.notna(x))
    return " to ".join(numbers) + (f" {unit}" if unit != "points" else "") if numbers else "–"


def report(ledger: pd.DataFrame) -> str:
    """The one-page report: data/report.md with the ledger's numbers, Markdown."""
    noted = json.loads((DATA / "MANIFEST.json").read_text(encoding="utf-8"))["runs"]
    took, trained = noted["paper"].values(), Store().shipped.values()
    on = sorted({run["hardware"] for run in took})  # the system was not always noted
    on = [one for one in on if not any(other.startswith(f"{one}, ") for other in on)]
    claims, breaks = ledger[~_breaks(ledger)], ledger[_breaks(ledger)]
    shown = ["id", "claim", "comparison", "strictest", "says"]
    words = {
        "rows": len(claims),
        "verdicts": _counted(claims["verdict"], VERDICTS),
        "breaks": len(breaks),
        "met": _counted(breaks["verdict"].map(MET), MET.values()),
        "hardware": "; ".join(on),
        "minutes": f"{sum(run['seconds'] for run in took) / 60:.0f}",
        "hours": f"{sum(result.get('seconds', 0) for result in trained) / 3600:.0f}",
        "table": claims[shown].to_markdown(index=False),
        "conditions": breaks[shown].to_markdown(index=False),
    }
    return (DATA / "report.md").read_text(encoding="utf-8").format(**words)


def _counted(words: pd.Series, order: Iterable[str]) -> str:
    counts = words.value_counts()
    return ", ".join(f"{counts[name]} {name}" for name in order if name in counts)


def preconditions(folders: Sequence[Path]) -> pd.DataFrame:
    """What the paper's mechanism needs, in the models where it was measured: model, needs, measured
    (how), share (of questions), holds (more than half). folders: tables of notebooks 02b and 08."""
    names = [f"{name}.csv" for name in ("02b_first_readable", "02b_repaired", "08_premise")]
    readable, repaired, facts = (pd.read_csv(_tables(folders, name)[name]) for name in names)
    drawn = _tables([folder.parent for folder in folders], names[-1])
    layers = pd.read_csv(drawn[names[-1]])
    lens = readable.query("place == 'r1' and entity == 'e2'")["ever"].item()
    low = repaired.set_index("arm").loc["r1", "honest"]
    rows = [
        ("smollm2", "e2 readable at r1", "logit lens, any layer", lens),
        ("smollm2", "e3 recallable low", "failures that r1's high states, put low, repair", low),
        ("smollm2", "both hops known", "questions are selected for it", 1.0),
    ]
    for model, part in layers.groupby("model", sort=False):
        lower = part["layer"] <= part["layer"].max() / 2
        half = {
            name: part[mask].groupby("what")["share"].max()
            for name, mask in (("low", lower), ("high", ~lower))
        }
        read, recalled = half["high"][READ], half["low"][RECALLED]
        known = facts.query("question == 'a fact' and model == @model")["e3"].item()
        rows.append((model, "e2 readable at r1", "logit lens, upper half of the layers", read))
        rows.append((model, "e3 recallable low", "e2's state put at r1, lower half", recalled))
        rows.append((model, "both hops known", "facts right", known))
    table = pd.DataFrame(rows, columns=["model", "needs", "measured", "share"])
    return table.assign(holds=table["share"] > 0.5)


def forest(ledger: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """The ledger as a picture, and its rows: above the claims in points, the zone in grey; below
    the others, each scaled to its own largest number, which stands beside its name. What is no
    comparison of two things is left out: sizes and costs against a formula."""
    rows = ledger[~ledger["unit"].str.startswith(("%", "of "))]
    parts = [rows[rows["unit"] == "points"], rows[rows["unit"] != "points"]]
    size = (WIDTH, 1.6 + 0.27 * len(rows))
    shape = {"layout": "constrained", "height_ratios": [len(part) for part in parts]}
    figure, axes = plt.subplots(2, 1, figsize=size, **shape)
    for ax, part in zip(axes, parts, strict=True):
        for y, row in zip(range(len(part))[::-1], part.to_dict("records"), strict=True):
            elsewhere = row["control_unit"] != row["unit"]
            shown = ("", "highest_", *([] if elsewhere else ["control_"]))
            ends = [row[f"{which}{end}"] for which in shown for end in ("low", "high")]
            scaled = ax is axes[1]
            _row(ax, row, y, max(abs(x) for x in ends if pd.notna(x)) if scaled else 1.0)
            said = MET[row["verdict"]] if row["id"].startswith("B") else row["verdict"]
            ax.annotate(
                said + {"none": ""}.get(row["control"], f"; {row['control']}{'*' * elsewhere}"),
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
            )
        ax.axvline(0, color=GREY, lw=0.8)
        names = [f"{row.short}  {row.id}" for row in part.itertuples()]
        ax.set(yticks=range(len(part))[::-1], yticklabels=names, ylim=(-0.8, len(part) - 0.4))
        ax.tick_params(axis="y", length=0, labelsize=8)
    axes[0].axvspan(-ZONE, ZONE, color="0.88", zorder=0)
    axes[0].set(xlabel="points of accuracy, or of a share above half")
    axes[1].set(
        xlabel="own unit, largest = 1; * control in another unit, not drawn", xlim=(-1.25, 1.25)
    )
    units = [f"{_here(r)}   {r['short']}  {r['id']}" for r in parts[1].to_dict("records")]
    axes[1].set_yticks(range(len(parts[1]))[::-1], units)
    axes[0].legend(
        *_one_of_each(axes[0]), fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3
    )
    shown = ["id", "short", *NUMBERS, "unit", "control_unit", "verdict", "control"]
    return figure, pd.concat(parts)[shown]


def exchanges(folders: Sequence[Path]) -> pd.DataFrame:
    """What another question's memory does to accuracy, by model and questions of notebook 07:
    model, its own, another's. folders: of tables, with figures beside."""
    name, there = "07_exchange.csv", "07_leads.csv"
    shown = pd.read_csv(_tables([folder.parent for folder in folders], name)[name])
    wide = shown.pivot(index="model", columns="memory", values="mean").loc[shown["model"].unique()]
    names = {"own": "its own", "another's": "another's"}
    wide = wide[list(names)].rename(columns=names).rename_axis(columns=None).reset_index()
    lead = pd.read_csv(_tables(folders, there)[there]).query("arm == 'back attention'")
    asked = "smollm2, " + lead["dataset"].str.removesuffix(", again")
    lead = lead[["own", "anothers"]].set_axis(list(names.values()), axis=1).assign(model=asked)
    return pd.concat([wide, lead], ignore_index=True)


def picture(folders: Sequence[Path]) -> tuple[Figure, pd.DataFrame]:
    """The idea drawn, and what back attention and its controls gain, and the rows of the latter.
    folders: with the table 03_arms."""
    arms = pd.read_csv(_tables(folders, "03_arms.csv")["03_arms.csv"])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 2.6), layout="constrained", width_ratios=[3, 2]
    )
    words, source, top = ["Mozart", "'s", "mother", "'s", "spouse", "is"], 2, 6
    for shift, title in ((0, "first pass"), (len(words) + 2, "second pass")):
        for layer in range(top + 1):
            faint = shift and layer <= source
            colour = "0.8" if faint else ORANGE if shift else BLUE
            left.plot(
                [x + shift for x in range(len(words))], [layer] * len(words), "o", c=colour, ms=4
            )
        left.text(shift + 2.5, top + 0.6, title, ha="center", fontsize=8)
    end = 2 * len(words) + 1
    for x in range(len(words)):
        for layer in range(source, top + 1):
            left.plot([x, end], [layer, source], color="0.6", lw=0.3, zorder=0)
    left.plot(end, source, "o", c="black", mfc="none", ms=8)
    places = [*range(len(words)), *range(len(words) + 2, end + 1)]
    left.set_xticks(places, 2 * words, rotation=40, ha="right", fontsize=7)
    left.set(yticks=[0, source, top], yticklabels=["0", "s", "L"], ylabel="layer", ylim=(-0.5, 7.4))
    left.set_title("A low layer reads high ones", fontsize=9)
    table = arms.query("dataset == 'two-hop' and arm in @SHOWN").set_index("arm").loc[list(SHOWN)]
    table = table.reset_index()[["arm", "accuracy", "low", "high", "n", "seeds"]]
    colours = {"back attention": ORANGE, "zero-shot": "0.75", "few-shot": "0.75"}
    looks = [colours.get(arm, GREY) for arm in table["arm"]]
    for y, (row, colour) in enumerate(zip(table.itertuples(), looks, strict=True)):
        right.plot([100 * row.low, 100 * row.high], [y, y], color=colour, lw=2)
        right.plot(100 * row.accuracy, y, "o", color=colour, ms=5)
        right.text(100 * row.high + 1, y, f"{row.accuracy:.0%}", va="center", fontsize=8)
    right.set_yticks(range(len(table)), table["arm"], fontsize=8)
    right.set(xlim=(0, 62), xlabel="two-hop questions right, %")
    right.set_title("Its controls gain as much", fontsize=9)
    return figure, table


def _row(ax: Axes, row: dict, y: float, scale: float) -> None:
    bar = {"solid_capstyle": "butt"}
    ax.axhline(y, color="0.93", lw=0.6, zorder=0)
    for which in ("", "highest_") if pd.notna(row["highest_effect"]) else ("",):
        low, high, middle = (row[f"{which}{x}"] / scale for x in ("low", "high", "effect"))
        ax.plot([low, high], [y, y], color=BLUE, lw=1.6, **bar)
        ax.plot(middle, y, "o", color=BLUE, ms=5, label=HERE)
    if pd.notna(row["paper_low"]) and row["unit"] == "points":
        ends = [row["paper_low"], row["paper_high"]]
        look = {"color": "black", "mfc": "white", "ms": 5.5, "lw": 0.8, "zorder": 3}
        ax.plot(ends, [y, y], "o-", label=PAPER, **look)
    if pd.notna(row["control_effect"]) and row["control_unit"] == row["unit"]:
        low, high, middle = (row[f"control_{x}"] / scale for x in ("low", "high", "effect"))
        ax.plot([low, high], [y - 0.3] * 2, color=ORANGE, lw=1.2, **bar)
        ax.plot(middle, y - 0.3, "D", color=ORANGE, ms=4, label=CONTROL)


def _one_of_each(ax: Axes) -> tuple[list, list]:
    handles, labels = ax.get_legend_handles_labels()
    drawn = dict(zip(labels, handles, strict=True))
    order = [name for name in (PAPER, HERE, CONTROL) if name in drawn]
    return [drawn[name] for name in order], order
