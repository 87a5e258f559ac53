"""The stages of single-hop recall: which flow they are, in which layers, in which order, and what
knocking them out costs (claim C1).

Flow is what `flow_back` sends through a node, direct the part of it that goes straight to the
answer, onward the part that later neurons read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from backattn.analysis.flow_back import FlowBack
from backattn.analysis.knockouts import Knockout, KnockoutProbe
from backattn.runtime import progress
from companion.measures.layers import flow_grid, mean_by_layer
from companion.report.intervals import bootstrap, interval, mean_interval


@dataclass(frozen=True)
class Stage:
    """What the paper calls it, and the flow that defines it.

    parts: (kind of sub-layer, position group, "flow", "direct" or "onward"), added up.
    """

    about: str
    parts: tuple[tuple[str, str, str], ...]

    def knockouts(self, layers: Sequence[int]) -> tuple[Knockout, ...]:
        """The components whose flow defines the stage, in these layers."""
        groups: dict[str, tuple[str, ...]] = {}
        for kind, group, _ in self.parts:
            groups[kind] = (*groups.get(kind, ()), group)
        chosen = tuple(int(layer) for layer in layers)
        return tuple(Knockout(kind, chosen, where) for kind, where in groups.items())


RELATION, LAST = ("ffn", "relation", "flow"), ("ffn", "last", "onward")
READS = tuple(("attention", group, "flow") for group in ("relation", "last"))
STAGES = {
    "A": Stage("entity subject enrichment", (("ffn", "entity", "flow"),)),
    "B": Stage("entity attribute extraction", (("attention", "entity", "flow"),)),
    "C": Stage("relation subject enrichment", (RELATION, LAST)),
    "D": Stage("relation attribute extraction", (*READS, ("ffn", "last", "direct"))),
    "C relation": Stage("stage C at the relation's word", (RELATION,)),
    "C last": Stage("stage C at the last position", (LAST,)),
}
STEPS = (("A", "B"), ("B", "C"), ("C", "D"))  # the paper's order

SHARE = 0.1  # of its positive flow has passed where a stage begins, and is left where it ends
BOUNDARIES = ("begin", "middle", "end", "peak")


def grouped_flow(back: FlowBack, groups: Sequence) -> pd.DataFrame:
    """`back.frame` summed over the tokens of each position group, without the embedding.

    groups: one array of labels per prompt, one label per token.
    Returns: prompt, layer, kind, group, flow, direct.
    """
    frame = back.frame[back.frame["kind"] != "embedding"].astype({"kind": str})
    places = zip(frame["prompt"], frame["position"], strict=True)
    frame["group"] = [groups[prompt][position] for prompt, position in places]
    keys = ["prompt", "layer", "kind", "group"]
    return frame.groupby(keys, as_index=False)[["flow", "direct"]].sum()


def stage_profiles(flow: pd.DataFrame) -> dict[str, np.ndarray]:
    """Flow of each of STAGES, from `grouped_flow`: stage -> [prompts, layers]."""
    flow = flow.assign(onward=flow["flow"] - flow["direct"])
    return {
        name: sum(flow_grid(flow, *part) for part in stage.parts) for name, stage in STAGES.items()
    }


def boundaries(profile: np.ndarray) -> np.ndarray:
    """Begin, middle, end and peak of mean profiles [..., layers] -> [..., 4], in layers.

    Begin, middle and end are where 10, 50 and 90 per cent of the positive flow have passed, a
    layer's flow being spread over l − ½ … l + ½; the peak is a whole layer. NaN without positive
    flow.
    """
    positive = np.clip(profile, 0, None)
    total = positive.sum(-1, keepdims=True)
    total = np.where(total > 0, total, np.nan)
    passed = positive.cumsum(-1) / total

    def at(share: float) -> np.ndarray:
        layer = (passed >= share).argmax(-1)[..., None]
        here = np.take_along_axis(passed, layer, -1)
        step = np.take_along_axis(positive, layer, -1) / total
        return (layer + 0.5 - (here - share) / step)[..., 0]

    peak = np.where(np.isnan(total[..., 0]), np.nan, profile.argmax(-1))
    return np.stack([at(SHARE), at(0.5), at(1 - SHARE), peak], axis=-1)


def stage_table(profiles: dict[str, np.ndarray], clusters: Sequence) -> pd.DataFrame:
    """Where each stage begins, has its middle, ends and peaks, with 95 % bootstrap intervals.

    Returns: stage, n, and for each of BOUNDARIES its layer, _low and _high.
    """
    rows, weights = [], bootstrap(clusters)
    for stage, profile in profiles.items():
        ends = np.nanpercentile(boundaries(weights @ profile), [2.5, 97.5], axis=0)
        row = {"stage": stage, "n": len(profile)}
        for name, *found in zip(BOUNDARIES, boundaries(profile.mean(0)), *ends, strict=True):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def profile_bands(profiles: dict[str, np.ndarray], clusters: Sequence) -> pd.DataFrame:
    """Each stage's mean flow by layer as a share of its positive total: stage, layer, share, low,
    high."""
    tables = []
    for stage, profile in profiles.items():
        total = max(np.clip(profile.mean(0), 0, None).sum(), 1e-12)
        tables.append(mean_by_layer((profile / total)[:, None], clusters, [stage], "stage"))
    return pd.concat(tables, ignore_index=True).rename(columns={"mean": "share"})


def order_table(
    profiles: dict[str, np.ndarray], clusters: Sequence, more: Sequence[tuple[str, str]] = ()
) -> pd.DataFrame:
    """How many layers the middle of each stage lies behind that of the one before it.

    Returns: earlier, later, gap, low, high, after (the whole 95 % interval is above zero), step
    (True for the paper's STEPS, which come first, then the pairs in `more`).
    """
    weights, middle, rows = bootstrap(clusters), BOUNDARIES.index("middle"), []
    point = {name: boundaries(x.mean(0))[middle] for name, x in profiles.items()}
    draws = {name: boundaries(weights @ x)[:, middle] for name, x in profiles.items()}
    for a, b in (*STEPS, *more):
        row = {"earlier": a, "later": b, "gap": point[b] - point[a]}
        row |= interval(draws[b] - draws[a])
        rows.append({**row, "after": row["low"] > 0, "step": (a, b) in STEPS})
    return pd.DataFrame(rows)


def core_layers(profile: np.ndarray, without: Sequence[int] = ()) -> list[int]:
    """The fewest layers that carry half of a stage's positive mean flow, in order.

    profile: [prompts, layers]; without: layers left out beforehand.
    """
    positive = np.clip(profile.mean(0), 0, None)
    positive[list(without)] = 0
    order = np.argsort(-positive, kind="stable")
    enough = int(np.searchsorted(positive[order].cumsum(), positive.sum() / 2)) + 1
    return sorted(order[:enough].tolist())


def other_layers(taken: Sequence[int], layers: int, draws: int, seed: int) -> list[list[int]]:
    """Up to `draws` different random sets, each of as many layers as `taken` and none of them, out
    of `layers`."""
    generator = np.random.default_rng(seed)
    rest = [layer for layer in range(layers) if layer not in taken]
    size = min(len(taken), len(rest))
    possible, sets = math.comb(len(rest), size), {}
    while len(sets) < min(draws, possible):
        sets[tuple(sorted(generator.choice(rest, size=size, replace=False).tolist()))] = None
    return [list(chosen) for chosen in sets]


def knockout_table(
    drops: dict[str, tuple[list[int], np.ndarray, np.ndarray]], clusters: Sequence
) -> pd.DataFrame:
    """Drop of the answer's log-probability per stage against random layers, from `against_random`.

    Returns: stage, layers, n, draws, drop (mean, with its 95 % interval in _low and _high),
    difference (drop less the mean over the random sets, the same), random, random_min, random_max
    (mean and range over the sets), needed: the difference's whole interval is above zero and the
    drop exceeds that of every random set (by chance at most 1 in draws + 1).
    """
    rows = []
    for stage, (layers, drop, random) in drops.items():
        row = {"stage": stage, "layers": " ".join(map(str, layers))}
        row |= {"n": len(drop), "draws": len(random)}
        for name, values in (("drop", drop), ("difference", drop - random.mean(0))):
            found = map(float, mean_interval(values, clusters))
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
        means = random.mean(1)
        row |= {"random": means.mean(), "random_min": means.min(), "random_max": means.max()}
        needed = row["difference_low"] > 0 and row["drop"] > means.max()
        rows.append({**row, "needed": bool(needed)})
    return pd.DataFrame(rows)


def against_random(
    probe: KnockoutProbe, cores: dict[str, list[int]], draws: int, seed: int
) -> dict[str, tuple[list[int], np.ndarray, np.ndarray]]:
    """Drops for each stage's layers and for `draws` random sets of others.

    cores: stage (its first letter says which) -> layers. Layer 0 is never drawn: it acts as a part
    of the embedding. Returns: stage -> (its layers, drops [prompts], of the sets [draws, prompts]).
    """
    total, base, drops = len(probe.arch.blocks), probe.log_probs().numpy(), {}
    with progress(description="knock-outs", total=len(cores) * (draws + 1), unit="run") as bar:
        for stage, layers in cores.items():
            lost = []
            for chosen in [layers, *other_layers([0, *layers], total, draws, seed)]:
                lost.append(base - probe.log_probs(STAGES[stage[0]].knockouts(chosen)).numpy())
                bar.update()
            drops[stage] = (layers, lost[0], np.stack(lost[1:]))
    return drops
