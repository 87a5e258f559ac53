"""10: is logit flow a good attribution? Circuits of its highest nodes, beside those of others (row
N5)."""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from backattn.analysis.attributions import attribute, from_flow, stability
from backattn.analysis.circuits import SIZES, Circuit, Part
from backattn.analysis.flow_back import flow_back
from backattn.analysis.logit_flow import logit_flow
from backattn.models.hooks import evaluating
from companion.paths import DATA
from companion.questions.contrasts import EVALUATING, SCORING, drawn, pairs_of
from companion.report.intervals import bootstrap, interval
from companion.report.verdicts import Effect, claim

RESULTS = DATA / "10_circuits.safetensors"
MODELS = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M"}
DRAWS = (0, 1, 2)
SCORED = {"exact": 50, "direct": 50}  # of the scoring 100: they are expensive
COUNTS = (10, 30, 100, 300, 1000, 3000, 10_000, 20_000)  # neurons that are kept
REACHES = 0.02  # of exact patching's CMD


@dataclass(frozen=True)
class Entrant:
    """An attribution: how its scores are made, [n, nodes], of the rows of `contrasts.fit`. family:
    "logit flow", "gradient", "ceiling" or "floor"; second: whether it reads the counterfactual
    prompt; units: of which circuits it is asked."""

    name: str
    family: str
    about: str
    scores: Callable[..., np.ndarray]
    second: bool = True
    units: tuple[str, ...] = ("nodes",)


def _direct(method: str = "exact") -> Callable[..., np.ndarray]:
    def scores(circuit: Circuit, tokenizer, frame: pd.DataFrame) -> np.ndarray:
        asked, sizes = (frame["prompt"].tolist(), frame["right_id"].tolist()), {"batch_size": 50}
        if circuit.units == "neurons":
            sizes = {"method": method, "batch_size": 10}
        else:
            sizes |= {"level": "head"}
        flow = logit_flow(circuit.model, tokenizer, *asked, **sizes)
        return from_flow(circuit, flow.frame, "increase")

    return scores


def _back(route: str) -> Callable[..., np.ndarray]:
    def scores(circuit: Circuit, tokenizer, frame: pd.DataFrame) -> np.ndarray:
        asked = frame["prompt"].tolist(), frame["right_id"].tolist()
        level = "neuron" if route == "parts" else "layer"
        flow = logit_flow(circuit.model, tokenizer, *asked, level=level)
        back = flow_back(circuit.model, tokenizer, flow, route, heads=True)
        return from_flow(circuit, back.frame)

    return scores


def _by(method: str, base: str = "counterfactual") -> Callable[..., np.ndarray]:
    def scores(circuit: Circuit, tokenizer, frame: pd.DataFrame) -> np.ndarray:
        pairs, first = pairs_of(tokenizer, frame, circuit.model.device), frame["prompt"].iloc[0]
        return attribute(circuit, pairs, method, base, seed=zlib.crc32(first.encode()))

    return scores


_FLOW, _GRADIENT, _FLOOR = "logit flow", "gradient", "floor"
_ONE, _BOTH = {"second": False}, {"units": ("nodes", "neurons")}
_ALL = (
    Entrant("direct", _FLOW, "equation 3 at the last position", _direct(), **_ONE, **_BOTH),
    Entrant("screen", _FLOW, "its 300 first", _direct("screen"), False, ("neurons",)),
    Entrant("parts", _FLOW, "flow back from the 300 first neurons", _back("parts"), **_ONE),
    Entrant("linear", _FLOW, "flow back from the answer's logit", _back("linear"), **_ONE),
    Entrant(
        "linear, contrast",
        _FLOW,
        "the same from both answers' difference",
        _by("linear", "zero"),
        **_ONE,
        **_BOTH,
    ),
    Entrant("half, mean", _FLOW, "against the mean over prompts", _by("half", "mean"), **_ONE),
    Entrant("linear, pair", _FLOW, "against the counterfactual", _by("linear"), **_BOTH),
    Entrant("half, pair", _FLOW, "RelP: half through the gate", _by("half")),
    Entrant("both ends", _FLOW, "held at both prompts, averaged", _by("both ends"), **_BOTH),
    Entrant("gradient", _GRADIENT, "attribution patching", _by("gradient"), **_BOTH),
    Entrant("integrated", _GRADIENT, "NAP-IG, 5 steps", _by("integrated"), **_BOTH),
    Entrant("midpoint", _GRADIENT, "the gradient half way between both", _by("midpoint"), **_BOTH),
    Entrant("exact", "ceiling", "each node exchanged alone", _by("exact")),
    Entrant("activation", _FLOOR, "size of what is written", _by("activation"), **_ONE, **_BOTH),
    Entrant("random", _FLOOR, "drawn", _by("random"), **_ONE, **_BOTH),
)
ENTRANTS: dict[str, Entrant] = {entrant.name: entrant for entrant in _ALL}


@dataclass
class Draw:
    """The pairs of one draw, those that evaluate made ready once for all entrants."""

    score: pd.DataFrame
    evaluate: list[Part]
    groups: np.ndarray  # of what evaluates, as numbers

    @classmethod
    def of(cls, circuit: Circuit, tokenizer, fit: pd.DataFrame, seed: int) -> "Draw":
        parts = drawn(fit, seed)
        pairs = pairs_of(tokenizer, parts["evaluate"], circuit.model.device)
        with evaluating(circuit.model):
            ready = list(circuit.parts(pairs, "counterfactual", 50))
        return cls(parts["score"], ready, pd.factorize(parts["evaluate"]["group"])[0])


def judged(circuit: Circuit, tokenizer, draw: Draw, entrant: Entrant) -> dict:
    """One entrant on one draw.

    Returns scores (mean, [nodes]), stable (Jaccard overlaps of the first ten), and of the evaluated
    prompts their groups [n] and m: none and everything [n]; "by value" and "by size", with nodes
    kept in these orders, [SIZES, n]. Of neurons instead of these "kept" and "removed", in the order
    by value, [COUNTS, n], and no scores.
    """
    neurons, score = circuit.units == "neurons", draw.score
    each = entrant.scores(circuit, tokenizer, score.head(SCORED.get(entrant.name, len(score))))
    mean = each.mean(0)
    sizes = [100 * count / len(mean) for count in COUNTS] if neurons else SIZES
    ways = {"by value": (mean, False), "by size": (np.abs(mean), False)}
    if neurons:
        ways = {"kept": (mean, False), "removed": (mean, True)}
    m = {
        name: circuit.curve(draw.evaluate, order, sizes=sizes, remove=remove).attrs
        for name, (order, remove) in ways.items()
    }
    ends = next(iter(m.values()))
    return {
        "scores": mean[:0] if neurons else mean.astype(np.float32),
        "stable": stability(each, first=10).astype(np.float32),
        "none": np.array(ends["none"], dtype=np.float32),
        "everything": np.array(ends["all"], dtype=np.float32),
        "groups": draw.groups.astype(np.int16),
        **{name: np.array(attrs["m"], dtype=np.float32) for name, attrs in m.items()},
    }


def read_results(path: Path = RESULTS) -> dict[tuple, dict]:
    """(units, model, task, draw, entrant) -> what `judged` gave, as shipped (made by
    data/build_circuits.py)."""
    found: dict[tuple, dict] = {}
    for key, x in load_file(path).items():
        *about, draw, entrant, name = key.split("/")
        found.setdefault((*about, int(draw), entrant), {})[name] = x.astype(np.float32)
    return found


def measures(result: dict, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """CPR, of the order by value, and CMD, of that by absolute value, of means over the evaluated
    prompts with some weights [..., n] (None: all alike): [...] each."""
    share = np.array([0.0, *SIZES]) / 100
    by_value, by_size = (_faithful(result, order, weights) for order in ("by value", "by size"))
    before = np.zeros((*by_value.shape[:-1], 1))  # nothing kept
    value, size = (np.concatenate([before, f], axis=-1) for f in (by_value, by_size))
    return {"CPR": np.trapezoid(value, share), "CMD": np.trapezoid(np.abs(1 - size), share)}


def _faithful(result: dict, order: str, weights: np.ndarray | None = None) -> np.ndarray:
    """f at each size: [..., sizes]."""
    count = len(result["none"])
    weights = np.full(count, 1 / count) if weights is None else weights
    none, everything = (weights @ result[name] for name in ("none", "everything"))
    kept = weights @ result[order].T
    return (kept - none[..., None]) / (everything - none)[..., None]


def table(results: dict[tuple, dict], samples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """A row per model, task and entrant: CPR and CMD (means over draws) with 95 % intervals (draws,
    and within each the groups of the evaluated prompts, are drawn again), stable, draws, groups
    (of a draw), and Pearson's r of its scores with exact patching's."""
    choose, rows = np.random.default_rng(seed), []
    keys = [key for key in results if key[0] == "nodes"]
    frame = pd.DataFrame(keys, columns=["units", "model", "task", "draw", "entrant"])
    for (model, task, entrant), part in frame.groupby(["model", "task", "entrant"], sort=False):
        mine = [results[key] for key in part.itertuples(index=False, name=None)]
        exact = [results.get(("nodes", model, task, d, "exact")) for d in part["draw"]]
        means = pd.DataFrame([measures(one) for one in mine]).astype(float).mean()
        again = [
            measures(one, bootstrap(one["groups"].astype(int).tolist(), samples, seed + draw))
            for draw, one in zip(part["draw"], mine, strict=True)
        ]
        which = choose.integers(len(mine), size=(samples, len(mine)))
        pairs = [(x["scores"], y["scores"]) for x, y in zip(mine, exact, strict=True) if y]
        row = {"model": model, "task": task, "entrant": entrant}
        for name in ("CPR", "CMD"):
            each = np.stack([one[name] for one in again])  # [draws, samples]
            ends = interval(np.take_along_axis(each, which.T, axis=0).mean(0))
            row |= {name: means[name], f"{name}_low": ends["low"], f"{name}_high": ends["high"]}
        row["pearson"] = np.mean([np.corrcoef(x, y)[0, 1] for x, y in pairs]) if pairs else np.nan
        row["stable"] = np.mean([x["stable"].mean() for x in mine])
        groups = int(np.mean([len(np.unique(x["groups"])) for x in mine]))
        rows.append({**row, "draws": len(mine), "groups": groups})
    return pd.DataFrame(rows)


def curves(results: dict[tuple, dict]) -> pd.DataFrame:
    """f by the share of nodes that are kept, in the order by absolute value: model, task, entrant,
    size, mean over draws, low and high (lowest and highest draw)."""
    rows = [
        {"model": model, "task": task, "entrant": entrant, "size": size, "f": value}
        for (units, model, task, _, entrant), x in results.items()
        if units == "nodes"
        for size, value in zip(SIZES, _faithful(x, "by size"), strict=True)
    ]
    by = ["model", "task", "entrant", "size"]
    found = pd.DataFrame(rows).groupby(by, sort=False)["f"].agg(["mean", "min", "max"])
    return found.reset_index().rename(columns={"min": "low", "max": "high"})


def neuron_curves(results: dict[tuple, dict]) -> pd.DataFrame:
    """f by the number of FFN neurons that are kept, or removed, in the order by value: task,
    entrant, neurons, way, f."""
    return pd.DataFrame(
        [
            {"task": task, "entrant": entrant, "neurons": count, "way": way, "f": value}
            for (units, _, task, _, entrant), x in results.items()
            if units == "neurons"
            for way in ("kept", "removed")
            for count, value in zip(COUNTS, _faithful(x, way), strict=True)
        ]
    )


def neurons_needed(lines: pd.DataFrame, share: float = 0.8) -> pd.DataFrame:
    """By task and entrant: how many neurons restore `share` of the difference (between two counts
    by their logarithms; NaN: more than the largest count), f of the first 300, and what is left
    without them."""
    rows = []
    for (task, entrant), part in lines.groupby(["task", "entrant"], sort=False):
        kept, removed = (
            part[part["way"] == way].set_index("neurons")["f"] for way in ("kept", "removed")
        )
        reached = kept.cummax()
        needed = np.nan
        if reached.iloc[-1] >= share:
            steps = reached + np.arange(len(reached)) * 1e-9  # np.interp wants them to rise
            needed = round(float(np.exp(np.interp(share, steps, np.log(kept.index)))))
        about = {"task": task, "entrant": entrant, "needed": needed}
        rows.append({**about, "first_300": kept[300], "without_300": removed[300]})
    return pd.DataFrame(rows)


def timings(circuit: Circuit, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Seconds a prompt of every entrant for nodes but exact patching, on some rows of
    `contrasts.fit`, after one for warming up: entrant, timed_seconds."""
    rows = []
    for name, entrant in ENTRANTS.items():
        if "nodes" in entrant.units and name != "exact":
            entrant.scores(circuit, tokenizer, frame.head(2))
            began = time.perf_counter()
            entrant.scores(circuit, tokenizer, frame)
            rows.append((name, (time.perf_counter() - began) / len(frame)))
    return pd.DataFrame(rows, columns=["entrant", "timed_seconds"])


def good_attribution(found: pd.DataFrame, timed: pd.DataFrame) -> dict[str, str]:
    """N5. found: `table`, of which SmolLM2's rows count; timed: `timings`.

    Two checks: some route of logit flow comes within REACHES of exact patching's CMD, or below, on
    four tasks of five, at no more than NAP-IG's seconds; some route is of use, below random on
    every task, interval against interval. The comparison is the paper's own step with a random
    order, on the task where it leads by least; the strictest control, exact patching on the task
    where the best route is furthest behind. Both as the difference of CMDs, from interval's end to
    interval's end.
    """
    mine = found[found["model"] == "smollm2"]
    by = mine.pivot(index="task", columns="entrant", values="CMD")
    seconds = timed.set_index("entrant")["timed_seconds"]
    routes = [name for name in by if ENTRANTS[name].family == "logit flow"]
    reached = {name: int((by[name] <= by["exact"] + REACHES).sum()) for name in routes}
    best = max(routes, key=lambda name: (reached[name], -by[name].mean()))
    ends = mine.pivot(index="task", columns="entrant", values=["CMD_low", "CMD_high"])
    of_use = {x: (ends["CMD_high", x] < ends["CMD_low", "random"]).all() for x in routes}
    named = dict.fromkeys(["direct", "parts", best, "integrated", "exact", "random"])
    words = ", ".join(f"{name} {by[name].mean():.2f}" for name in named)
    ours = (
        f"CMD, mean over {len(by)} tasks: {words}; {best} reaches exact patching on "
        f"{reached[best]}, parts, the paper's own step, on {reached['parts']}; "
        f"{'parts is' if of_use['parts'] else 'parts is not'} below random on every task; draws: "
        f"{int(mine['draws'].min())}, {SCORING} prompts score, {EVALUATING} evaluate"
    )
    checks = {
        "reaches exact patching": reached[best] >= 4 and seconds[best] <= seconds["integrated"],
        "of use": any(of_use.values()),
    }

    def less(high: str, low: str) -> Effect:
        task = (by[high] - by[low]).idxmin()
        ends_of = ends.loc[task]
        low_end = ends_of["CMD_low", high] - ends_of["CMD_high", low]
        high_end = ends_of["CMD_high", high] - ends_of["CMD_low", low]
        mean, what = by.loc[task, high] - by.loc[task, low], f"{high} less {low}, {task}"
        return Effect(what, mean, low_end, high_end, "CMD", REACHES)

    return claim("N5", ours, checks, less("random", "parts"), less("exact", best))
