"""10: is logit flow a good attribution? Circuits of its highest nodes, beside those of others (row
N5)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from backattn.analysis.attributions import attribute, from_flow, stability
from backattn.analysis.circuits import SIZES, Circuit, areas
from backattn.analysis.flow_back import flow_back
from backattn.analysis.logit_flow import logit_flow
from companion.paths import DATA
from companion.questions.contrasts import drawn, pairs_of

RESULTS = DATA / "10_circuits.safetensors"
MODELS = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M"}
DRAWS = (0, 1, 2)
SCORED = {"exact": 50}  # prompts of the scoring 100 that are enough for what is dear
REACHES = 0.02  # of exact patching's CMD


@dataclass(frozen=True)
class Entrant:
    """An attribution: how its scores are made, [n, nodes], of the rows of `contrasts.fit`. family:
    "logit flow", "gradient", "ceiling" or "floor"; second: whether it reads the counterfactual
    prompt."""

    name: str
    family: str
    about: str
    scores: Callable[..., np.ndarray]
    second: bool = True


def _direct(circuit: Circuit, tokenizer, frame: pd.DataFrame) -> np.ndarray:
    asked = frame["prompt"].tolist(), frame["right_id"].tolist()
    flow = logit_flow(circuit.model, tokenizer, *asked, level="head", batch_size=50)
    return from_flow(circuit, flow.frame, "increase")


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
        pairs = pairs_of(tokenizer, frame, circuit.model.device)
        return attribute(circuit, pairs, method, base)

    return scores


_FLOW, _GRADIENT, _FLOOR = "logit flow", "gradient", "floor"
_ALL = (
    Entrant("direct", _FLOW, "equation 3, heads and FFNs at the last position", _direct, False),
    Entrant("parts", _FLOW, "flow back from the 300 first neurons", _back("parts"), False),
    Entrant("linear", _FLOW, "flow back from the answer's logit", _back("linear"), False),
    Entrant(
        "linear, contrast",
        _FLOW,
        "the same from both answers' difference",
        _by("linear", "zero"),
        False,
    ),
    Entrant("half, contrast", _FLOW, "with half through the gate", _by("half", "zero"), False),
    Entrant("half, mean", _FLOW, "against the mean over prompts", _by("half", "mean"), False),
    Entrant("linear, pair", _FLOW, "against the counterfactual prompt", _by("linear")),
    Entrant("half, pair", _FLOW, "RelP: half through the gate", _by("half")),
    Entrant("both ends", _FLOW, "held at both prompts, averaged", _by("both ends")),
    Entrant("gradient", _GRADIENT, "attribution patching", _by("gradient")),
    Entrant("integrated", _GRADIENT, "NAP-IG, 5 steps", _by("integrated")),
    Entrant("exact", "ceiling", "each node exchanged alone", _by("exact")),
    Entrant("activation", _FLOOR, "size of what is written", _by("activation"), False),
    Entrant("random", _FLOOR, "drawn", _by("random"), False),
)
ENTRANTS: dict[str, Entrant] = {entrant.name: entrant for entrant in _ALL}


def judged(circuit: Circuit, tokenizer, fit: pd.DataFrame, draw: int, entrant: Entrant) -> dict:
    """One entrant on one draw: scores (mean, [nodes]), stable (Jaccard overlaps of the first ten),
    m by value and m by size (of the evaluated prompts with nodes kept in these orders, [SIZES, n]),
    none and everything [n], seconds a prompt."""
    parts = drawn(fit, draw)
    score, evaluate = (parts[name] for name in ("score", "evaluate"))
    score, began = score.head(SCORED.get(entrant.name, len(score))), time.perf_counter()
    each = entrant.scores(circuit, tokenizer, score)
    seconds, mean = (time.perf_counter() - began) / len(score), each.mean(0)
    pairs = pairs_of(tokenizer, evaluate, circuit.model.device)
    curves = [circuit.curve(pairs, order).attrs for order in (mean, np.abs(mean))]
    return {
        "scores": mean.astype(np.float32),
        "stable": stability(each, first=10).astype(np.float32),
        "by value": curves[0]["m"],
        "by size": curves[1]["m"],
        "none": curves[0]["none"],
        "everything": curves[0]["all"],
        "seconds": np.array([seconds], dtype=np.float32),
    }


def read_results(path: Path = RESULTS) -> dict[tuple, dict]:
    """(model, task, draw, entrant) -> what `judged` gave, as shipped (made by
    data/build_circuits.py)."""
    found: dict[tuple, dict] = {}
    for key, x in load_file(path).items():
        model, task, draw, entrant, name = key.split("/")
        found.setdefault((model, task, int(draw), entrant), {})[name] = x.astype(np.float32)
    return found


def measures(result: dict, rows: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """CPR, of the order by value, and CMD, of that by absolute value, over some evaluated
    prompts."""
    none, everything = (result[name][rows].mean() for name in ("none", "everything"))
    found = {}
    for place, (name, order) in enumerate((("CPR", "by value"), ("CMD", "by size"))):
        f = (result[order][:, rows].mean(1) - none) / (everything - none)
        found[name] = areas(pd.DataFrame({"size": SIZES, "faithfulness": f}))[place]
    return found


def table(results: dict[tuple, dict], samples: int = 200, seed: int = 0) -> pd.DataFrame:
    """A row per model, task and entrant: CPR and CMD (means over draws) with 95 % intervals (draws,
    then prompts of each, are drawn again), stable, seconds, draws, and Pearson's r of its scores
    with exact patching's."""
    draw, rows = np.random.default_rng(seed), []
    frame = pd.DataFrame(list(results), columns=["model", "task", "draw", "entrant"])
    for (model, task, entrant), part in frame.groupby(["model", "task", "entrant"], sort=False):
        mine = [results[key] for key in part.itertuples(index=False, name=None)]
        exact = [results.get((model, task, d, "exact")) for d in part["draw"]]
        means = pd.DataFrame([measures(one) for one in mine]).mean()
        again = []
        for _ in range(samples):
            chosen = [mine[k] for k in draw.integers(len(mine), size=len(mine))]
            size = len(chosen[0]["none"])
            again.append(
                pd.DataFrame([measures(x, draw.integers(size, size=size)) for x in chosen]).mean()
            )
        ends = pd.DataFrame(again).quantile([0.025, 0.975])
        pairs = [(x["scores"], y["scores"]) for x, y in zip(mine, exact, strict=True) if y]
        row = {"model": model, "task": task, "entrant": entrant}
        for name in ("CPR", "CMD"):
            row |= {name: means[name], f"{name}_low": ends[name].iloc[0]}
            row |= {f"{name}_high": ends[name].iloc[1]}
        row["pearson"] = np.mean([np.corrcoef(x, y)[0, 1] for x, y in pairs]) if pairs else np.nan
        row["stable"] = np.mean([x["stable"].mean() for x in mine])
        row |= {"seconds": np.mean([x["seconds"][0] for x in mine]), "draws": len(mine)}
        rows.append(row)
    return pd.DataFrame(rows)
