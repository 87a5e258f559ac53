"""Stage discovery: are there four stages in single-hop recall, and do they come in the paper's order? (claims C1, C2)

The paper's stages, made measurable (flow = what `flow_back` sends through a node; direct = the part of it that goes
straight to the answer):

A  entity subject enrichment      flow through FFNs at the entity
B  entity attribute extraction    flow through attention that reads the entity
C  relation subject enrichment    flow through FFNs at the relation, and at the last position the part not direct
D  relation attribute extraction  flow through attention that reads relation or last, and direct flow of FFNs at last
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from backattn.analysis.flow_back import FlowBack
from backattn.analysis.knockouts import Knockout, KnockoutProbe
from backattn.runtime import progress
from companion.report.intervals import bootstrap, mean_interval

STEPS = (("A", "B"), ("B", "C"), ("C", "D"))

SHARE = 0.1  # a stage begins where this share of its positive flow has passed, and ends where it is left


def grouped_flow(back: FlowBack, groups: Sequence) -> pd.DataFrame:
    """`back.frame` summed over the tokens of each position group.

    Returns: prompt, layer, kind, group, flow, direct, without the embedding rows.
    """
    frame = back.frame[back.frame["kind"] != "embedding"]
    label = [
        groups[prompt][position]
        for prompt, position in zip(frame["prompt"], frame["position"], strict=True)
    ]
    keys = ["prompt", "layer", "kind", "group"]
    summed = (
        frame.assign(group=label)
        .groupby(keys, observed=True, as_index=False)[["flow", "direct"]]
        .sum()
    )
    summed["kind"] = summed["kind"].astype(str)
    return summed


def stage_profiles(flow: pd.DataFrame) -> dict[str, np.ndarray]:
    """Flow of every stage by prompt and layer, from `grouped_flow`: stage -> [prompts, layers].

    Besides A to D it holds the two parts of C: "C relation" and "C last".
    """
    prompts, layers = np.sort(flow["prompt"].unique()), int(flow["layer"].max()) + 1

    def table(kind: str, group: str, column: str) -> np.ndarray:
        part = flow[(flow["kind"] == kind) & (flow["group"] == group)]
        wide = part.pivot_table(index="prompt", columns="layer", values=column, aggfunc="sum")
        return wide.reindex(index=prompts, columns=range(layers)).fillna(0.0).to_numpy()

    last = table("ffn", "last", "flow") - table("ffn", "last", "direct")
    relation = table("ffn", "relation", "flow")
    reads = table("attention", "relation", "flow") + table("attention", "last", "flow")
    return {
        "A": table("ffn", "entity", "flow"),
        "B": table("attention", "entity", "flow"),
        "C": relation + last,
        "D": reads + table("ffn", "last", "direct"),
        "C relation": relation,
        "C last": last,
    }


def boundaries(profile: np.ndarray) -> np.ndarray:
    """Begin, middle, end and peak of mean profiles [..., layers] -> [..., 4], in layers.

    Begin, middle and end are where 10, 50 and 90 per cent of the positive flow have passed, a layer's flow being spread
    over l − ½ … l + ½; the peak is a whole layer. NaN where there is no positive flow.
    """
    positive = np.clip(profile, 0, None)
    total = positive.sum(-1, keepdims=True)
    passed = positive.cumsum(-1) / np.where(total > 0, total, np.nan)

    def at(share: float) -> np.ndarray:
        layer = (passed >= share).argmax(-1)[..., None]
        here = np.take_along_axis(passed, layer, -1)
        step = np.take_along_axis(positive, layer, -1) / np.where(total > 0, total, np.nan)
        return (layer + 0.5 - (here - share) / step)[..., 0]

    peak = np.where(total[..., 0] > 0, profile.argmax(-1), np.nan)
    return np.stack([at(SHARE), at(0.5), at(1 - SHARE), peak], axis=-1)


def stage_table(profiles: dict[str, np.ndarray], clusters: Sequence) -> pd.DataFrame:
    """Where each stage begins, has its middle, ends and peaks, with 95 % bootstrap intervals (clusters: see there)."""
    rows, weights = [], bootstrap(clusters)
    for stage, profile in profiles.items():
        point = boundaries(profile.mean(0))
        low, high = np.nanpercentile(boundaries(weights @ profile), [2.5, 97.5], axis=0)
        row = {"stage": stage, "n": len(profile)}
        for index, name in enumerate(("begin", "middle", "end", "peak")):
            row |= {name: point[index], f"{name}_low": low[index], f"{name}_high": high[index]}
        rows.append(row)
    return pd.DataFrame(rows)


def profile_bands(profiles: dict[str, np.ndarray], clusters: Sequence) -> pd.DataFrame:
    """Each stage's mean flow by layer as a share of its positive total, with 95 % intervals.

    Returns: stage, layer, share, low, high.
    """
    rows = []
    for stage, profile in profiles.items():
        total = np.clip(profile.mean(0), 0, None).sum()
        mean, low, high = mean_interval(profile / max(total, 1e-12), clusters)
        table = pd.DataFrame(
            {"layer": np.arange(len(mean)), "share": mean, "low": low, "high": high}
        )
        rows.append(table.assign(stage=stage)[["stage", "layer", "share", "low", "high"]])
    return pd.concat(rows, ignore_index=True)


def order_table(
    profiles: dict[str, np.ndarray], clusters: Sequence, more: Sequence[tuple[str, str]] = ()
) -> pd.DataFrame:
    """How many layers the middle of each stage lies behind the one before it, with 95 % intervals.

    Rows: the paper's steps A→B, B→C, C→D (`step` True), then the pairs in `more`. `after` is True when the whole
    interval is above zero.
    """
    weights, rows = bootstrap(clusters), []
    for earlier, later in (*STEPS, *more):
        a, b = profiles[earlier], profiles[later]
        gap = boundaries(b.mean(0))[1] - boundaries(a.mean(0))[1]
        low, high = np.nanpercentile(
            boundaries(weights @ b)[:, 1] - boundaries(weights @ a)[:, 1], [2.5, 97.5]
        )
        row = {
            "earlier": earlier,
            "later": later,
            "gap": gap,
            "low": low,
            "high": high,
            "after": bool(low > 0),
        }
        rows.append({**row, "step": (earlier, later) in STEPS})
    return pd.DataFrame(rows)


def core_layers(profile: np.ndarray, without: Sequence[int] = ()) -> list[int]:
    """The fewest layers that carry half of a stage's positive mean flow, in order.

    profile: [prompts, layers]; without: layers left out beforehand.
    """
    positive = np.clip(profile.mean(0), 0, None)
    positive[list(without)] = 0
    order = np.argsort(-positive, kind="stable")
    enough = int(np.searchsorted(positive[order].cumsum(), positive.sum() / 2)) + 1
    return sorted(int(layer) for layer in order[:enough])


def stage_knockouts(stage: str, layers: Sequence[int]) -> tuple[Knockout, ...]:
    """The components whose flow defines a stage, in the given layers."""
    layers = tuple(int(layer) for layer in layers)
    return {
        "A": (Knockout("ffn", layers, ("entity",)),),
        "B": (Knockout("attention", layers, ("entity",)),),
        "C": (Knockout("ffn", layers, ("relation", "last")),),
        "D": (
            Knockout("attention", layers, ("relation", "last")),
            Knockout("ffn", layers, ("last",)),
        ),
    }[stage]


def other_layers(taken: Sequence[int], layers: int, draws: int, seed: int) -> list[list[int]]:
    """Up to `draws` different random sets, each of as many layers as `taken` and none of them, out of `layers`."""
    generator, rest = (
        np.random.default_rng(seed),
        [layer for layer in range(layers) if layer not in taken],
    )
    size = min(len(taken), len(rest))
    possible = math.comb(len(rest), size)
    sets: dict[tuple, None] = {}
    while len(sets) < min(draws, possible):
        sets[tuple(sorted(generator.choice(rest, size=size, replace=False).tolist()))] = None
    return [list(chosen) for chosen in sets]


def knockout_table(
    drops: dict[str, tuple[list[int], np.ndarray, np.ndarray]], clusters: Sequence
) -> pd.DataFrame:
    """Drop of the answer's log-probability per stage against random layers.

    drops: stage -> (its layers, drop [prompts], drops of the random sets [draws, prompts]).

    Returns per stage its own mean drop with a 95 % interval over prompts, the mean and range over the random sets, the
    difference with its interval, and `needed`: the difference's whole interval is above zero and the own mean drop
    exceeds every random set's (by chance at most 1 in draws + 1).
    """
    rows = []
    for stage, (layers, own, random) in drops.items():
        row = {
            "stage": stage,
            "layers": " ".join(map(str, layers)),
            "n": len(own),
            "draws": len(random),
        }
        for name, values in (("drop", own), ("difference", own - random.mean(0))):
            mean, low, high = mean_interval(values, clusters)
            row |= {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
        means = random.mean(1)
        row |= {"random": means.mean(), "random_min": means.min(), "random_max": means.max()}
        rows.append(
            {**row, "needed": bool(row["difference_low"] > 0 and row["drop"] > means.max())}
        )
    return pd.DataFrame(rows)


def against_random(
    trial: KnockoutProbe, cores: dict[str, list[int]], draws: int, seed: int
) -> dict[str, tuple]:
    """Drops for each stage's own layers and for `draws` random sets of others; feeds `knockout_table`.

    cores: stage (its first letter says which) -> layers. Layer 0 is never drawn: it acts as part of the embedding.
    """
    total, base, drops = len(trial.arch.blocks), trial.log_probs().numpy(), {}
    with progress(description="knock-outs", total=len(cores) * (draws + 1), unit="run") as bar:
        for stage, layers in cores.items():
            lost = []
            for chosen in [layers, *other_layers([0, *layers], total, draws, seed)]:
                lost.append(base - trial.log_probs(stage_knockouts(stage[0], chosen)).numpy())
                bar.update()
            drops[stage] = (layers, lost[0], np.stack(lost[1:]))
    return drops
