"""The stages of single-hop recall: their layers, their order, what knocking them out costs (C1).

Flow is what `flow_back` sends through a node, direct the part of it that goes straight to the
answer, onward the part that later neurons read.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from backattn.analysis.flow_back import FlowBack
from backattn.analysis.knockouts import Knockout, KnockoutProbe
from backattn.runtime import progress
from companion.measures.layers import flow_grid, mean_by_layer
from companion.report.intervals import bootstrap, interval, mean_interval

RELATION, LAST = ("ffn", "relation", "flow"), ("ffn", "last", "onward")
READS = tuple(("attention", group, "flow") for group in ("relation", "last"))
STAGES = {  # (kind of sub-layer, position group, "flow", "direct" or "onward"), added up
    "A": (("ffn", "entity", "flow"),),
    "B": (("attention", "entity", "flow"),),
    "C": (RELATION, LAST),
    "D": (*READS, ("ffn", "last", "direct")),
    "C relation": (RELATION,),
    "C last": (LAST,),
}
STEPS = (("A", "B"), ("B", "C"), ("C", "D"))  # the paper's order
BOUNDARIES = ("begin", "middle", "end", "peak")
# What says where a stage lies. Verdicts leave layer 0 out, as knock-outs do: its FFN acts as a part
# of the embedding.
WITHOUT_0 = "middle, layer 0 left out"
ORDERED_BY = {"middle": {}, WITHOUT_0: {"without": (0,)}, "peak": {"place": "peak"}}


def grouped_flow(back: FlowBack, groups: Sequence) -> pd.DataFrame:
    """`back.frame` over each position group's tokens, without the embedding: prompt, layer, kind,
    group, flow, direct. groups: one array of labels per prompt, one label per token."""
    frame = back.frame[back.frame["kind"] != "embedding"].astype({"kind": str})
    places = zip(frame["prompt"], frame["position"], strict=True)
    frame["group"] = [groups[prompt][position] for prompt, position in places]
    keys = ["prompt", "layer", "kind", "group"]
    return frame.groupby(keys, as_index=False)[["flow", "direct"]].sum()


def stage_profiles(flow: pd.DataFrame) -> dict[str, np.ndarray]:
    """Flow of each of STAGES, from `grouped_flow`: stage -> [prompts, layers]."""
    flow = flow.assign(onward=flow["flow"] - flow["direct"])
    return {stage: sum(flow_grid(flow, *part) for part in parts) for stage, parts in STAGES.items()}


def boundaries(profile: np.ndarray) -> np.ndarray:
    """BOUNDARIES of mean profiles [..., layers] -> [..., 4], in layers; NaN without positive flow.

    Begin, middle and end are where 10, 50 and 90 per cent of the positive flow have passed, a
    layer's flow being spread over l − ½ … l + ½; the peak is a whole layer.
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
    return np.stack([at(0.1), at(0.5), at(0.9), peak], axis=-1)


def stage_table(profiles: dict[str, np.ndarray], clusters: Sequence) -> pd.DataFrame:
    """Each stage's BOUNDARIES with their 95 % intervals in _low and _high: stage, n, begin, …"""
    rows, weights = [], bootstrap(clusters)
    names = [name + end for name in BOUNDARIES for end in ("", "_low", "_high")]
    for stage, profile in profiles.items():
        ends = np.nanpercentile(boundaries(weights @ profile), [2.5, 97.5], axis=0)
        found = np.stack([boundaries(profile.mean(0)), *ends], axis=1).ravel()
        rows.append({"stage": stage, "n": len(profile), **dict(zip(names, found, strict=True))})
    return pd.DataFrame(rows)


def profile_bands(profiles: dict[str, np.ndarray], clusters: Sequence) -> pd.DataFrame:
    """Mean flow as a share of a stage's positive total: stage, layer, share, low, high."""
    stages = np.stack([*profiles.values()], axis=1)  # [prompts, stages, layers]
    totals = np.clip(stages.mean(0), 0, None).sum(-1, keepdims=True)
    shares = stages / np.maximum(totals, 1e-12)
    return mean_by_layer(shares, clusters, [*profiles], "stage").rename(columns={"mean": "share"})


def order_table(
    profiles: dict,
    clusters: Sequence,
    more: Sequence = (),
    place: str = "middle",
    without: Sequence[int] = (),
) -> pd.DataFrame:
    """How many layers (gap) a stage lies behind another, for the paper's STEPS and the pairs in
    `more`: earlier, later, gap, low, high, after (the interval is above 0), step. place: which of
    BOUNDARIES says where a stage lies; without: layers whose flow is left out."""
    weights, which, rows = bootstrap(clusters), BOUNDARIES.index(place), []
    kept = {name: np.delete(x, list(without), axis=-1) for name, x in profiles.items()}
    point = {name: boundaries(x.mean(0))[which] for name, x in kept.items()}
    draws = {name: boundaries(weights @ x)[:, which] for name, x in kept.items()}
    for a, b in (*STEPS, *more):
        row = {"earlier": a, "later": b, "gap": point[b] - point[a]}
        row |= interval(draws[b] - draws[a])
        rows.append({**row, "after": row["low"] > 0, "step": (a, b) in STEPS})
    return pd.DataFrame(rows)


def order_tables(profiles: dict, clusters: Sequence, more: Sequence = ()) -> pd.DataFrame:
    """`order_table` for each of ORDERED_BY, its name in the column `by`."""
    parts = [
        order_table(profiles, clusters, more, **how).assign(by=name)
        for name, how in ORDERED_BY.items()
    ]
    return pd.concat(parts, ignore_index=True)


def core_layers(profile: np.ndarray, without: Sequence[int] = ()) -> list[int]:
    """The fewest layers but those `without` that carry half of the positive mean flow of a profile
    [prompts, layers], in order."""
    positive = np.clip(profile.mean(0), 0, None)
    positive[list(without)] = 0
    order = np.argsort(-positive, kind="stable")
    enough = int(np.searchsorted(positive[order].cumsum(), positive.sum() / 2)) + 1
    return sorted(order[:enough].tolist())


def other_layers(
    size: int, taken: Sequence[int], layers: int, draws: int, seed: int
) -> list[list[int]]:
    """Up to `draws` different random sets of `size` layers, none of them among `taken`."""
    generator = np.random.default_rng(seed)
    rest = [layer for layer in range(layers) if layer not in taken]
    size = min(size, len(rest))
    possible, sets = math.comb(len(rest), size), {}
    while len(sets) < min(draws, possible):
        sets[tuple(sorted(generator.choice(rest, size=size, replace=False).tolist()))] = None
    return [list(chosen) for chosen in sets]


def against_random(probe: KnockoutProbe, cores: dict, draws: int, seed: int) -> dict[str, tuple]:
    """Drops of log p(answer) without each stage's layers, and without equally many others, drawn
    from those that are in no stage's core (the FFNs of C and of D at the last position are the
    same) and are not layer 0: stage -> (layers, drops [n], of the sets [draws, n]).

    cores: stage (its first letter says which) -> layers.
    """
    total, base, drops = len(probe.arch.blocks), probe.log_probs().numpy(), {}
    taken = {0}.union(*cores.values())
    with progress(description="knock-outs", total=len(cores) * (draws + 1), unit="run") as bar:
        for stage, layers in cores.items():
            lost = []
            for chosen in [layers, *other_layers(len(layers), taken, total, draws, seed)]:
                parts = STAGES[stage[0]]
                knockouts = [Knockout(kind, tuple(chosen), (group,)) for kind, group, _ in parts]
                lost.append(base - probe.log_probs(knockouts).numpy())
                bar.update()
            drops[stage] = (layers, lost[0], np.stack(lost[1:]))
    return drops


def knockout_table(drops: dict[str, tuple], clusters: Sequence) -> pd.DataFrame:
    """`against_random` by stage: layers, n, draws, drop and difference (from the mean over the
    sets), with their 95 % intervals in _low and _high, random, random_min, random_max (over the
    sets), needed: the difference's interval is above zero and the drop exceeds that of every set.
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
