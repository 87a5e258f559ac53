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
from scipy import stats

from .flow_back import FlowBack
from .intervals import bootstrap, mean_interval
from .lens import read_states
from .patching import Knockout, Trial
from .runtime import progress
from .tasks import ends

STEPS = (("A", "B"), ("B", "C"), ("C", "D"))
SHARE = 0.1  # a stage begins where this share of its positive flow has passed, and ends where it is left


def grouped_flow(back: FlowBack, groups: Sequence) -> pd.DataFrame:
    """`back.frame` summed over the tokens of each position group.

    Returns: prompt, layer, kind, group, flow, direct, without the embedding rows.
    """
    frame = back.frame[back.frame["kind"] != "embedding"]
    label = [groups[prompt][position] for prompt, position in zip(frame["prompt"], frame["position"], strict=True)]
    keys = ["prompt", "layer", "kind", "group"]
    summed = frame.assign(group=label).groupby(keys, observed=True, as_index=False)[["flow", "direct"]].sum()
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
        table = pd.DataFrame({"layer": np.arange(len(mean)), "share": mean, "low": low, "high": high})
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
        low, high = np.nanpercentile(boundaries(weights @ b)[:, 1] - boundaries(weights @ a)[:, 1], [2.5, 97.5])
        row = {"earlier": earlier, "later": later, "gap": gap, "low": low, "high": high, "after": bool(low > 0)}
        rows.append({**row, "step": (earlier, later) in STEPS})
    return pd.DataFrame(rows)


def trend_test(profiles: dict[str, np.ndarray], order: Sequence[str] = tuple("ABCD")) -> dict[str, float]:
    """Page's test that the stages' centres of flow rise in this order within prompts.

    Returns: L, p, and `share`, the part of the prompts whose centres stand in exactly this order (by chance 1/24).
    """
    layers = np.arange(next(iter(profiles.values())).shape[1])
    positive = [np.clip(profiles[stage], 0, None) for stage in order]
    centres = np.stack([(x * layers).sum(1) / np.maximum(x.sum(1), 1e-12) for x in positive], axis=1)  # [n, stages]
    test = stats.page_trend_test(centres)
    return {"L": float(test.statistic), "p": float(test.pvalue), "share": float((np.diff(centres) > 0).all(1).mean())}


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
        "D": (Knockout("attention", layers, ("relation", "last")), Knockout("ffn", layers, ("last",))),
    }[stage]


def other_layers(taken: Sequence[int], layers: int, draws: int, seed: int) -> list[list[int]]:
    """Up to `draws` different random sets, each of as many layers as `taken` and none of them, out of `layers`."""
    generator, rest = np.random.default_rng(seed), [layer for layer in range(layers) if layer not in taken]
    size = min(len(taken), len(rest))
    possible = math.comb(len(rest), size)
    sets: dict[tuple, None] = {}
    while len(sets) < min(draws, possible):
        sets[tuple(sorted(generator.choice(rest, size=size, replace=False).tolist()))] = None
    return [list(chosen) for chosen in sets]


def knockout_table(drops: dict[str, tuple[list[int], np.ndarray, np.ndarray]], clusters: Sequence) -> pd.DataFrame:
    """Drop of the answer's log-probability per stage against random layers.

    drops: stage -> (its layers, drop [prompts], drops of the random sets [draws, prompts]).

    Returns per stage its own mean drop with a 95 % interval over prompts, the mean and range over the random sets, the
    difference with its interval, and `needed`: the difference's whole interval is above zero and the own mean drop
    exceeds every random set's (by chance at most 1 in draws + 1).
    """
    rows = []
    for stage, (layers, own, random) in drops.items():
        row = {"stage": stage, "layers": " ".join(map(str, layers)), "n": len(own), "draws": len(random)}
        for name, values in (("drop", own), ("difference", own - random.mean(0))):
            mean, low, high = mean_interval(values, clusters)
            row |= {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
        means = random.mean(1)
        row |= {"random": means.mean(), "random_min": means.min(), "random_max": means.max()}
        rows.append({**row, "needed": bool(row["difference_low"] > 0 and row["drop"] > means.max())})
    return pd.DataFrame(rows)


def contest(
    model,
    tokenizer,
    prompts: Sequence[str],
    groups: Sequence,
    correct: Sequence[int],
    conflicting: Sequence[int],
    clusters: Sequence,
    positions: Sequence[str] = ("entity", "relation", "last"),
    batch_size: int = 16,
) -> pd.DataFrame:
    """Logit of the correct less that of the conflicting answer, read at the last token of each position group.

    The lens recomputes the norm's scale in every state. Layer l is the state that enters layer l; the highest is the
    state that leaves the model.

    clusters: see `intervals.bootstrap`.

    Returns: position, layer, mean, low, high (95 % intervals), clusters (their number).

    Raises ValueError when there are no prompts, or a position group is missing from one.
    """
    if not len(prompts):
        raise ValueError("There is no prompt with a conflicting answer: ask more facts.")
    pairs = np.stack([correct, conflicting], axis=1)  # [n, 2]
    logits, _ = read_states(model, tokenizer, prompts, ends(groups, positions), pairs, batch_size=batch_size)
    mean, low, high = mean_interval(logits[..., 0] - logits[..., 1], clusters)  # [positions, L+1]
    parts = [
        pd.DataFrame({"position": name, "layer": range(mean.shape[1]), "mean": mean[i], "low": low[i], "high": high[i]})
        for i, name in enumerate(positions)
    ]
    return pd.concat(parts, ignore_index=True).assign(clusters=len(set(clusters)))


def other_relation(known: pd.DataFrame) -> pd.DataFrame:
    """Rows of `known` with the subject's answer to another relation: relation_other, answer_other, answer_id_other.

    Every pair of answers occurs both ways round, once as correct and once as conflicting, so that no relation's
    answers are favoured.
    """
    joined = known.merge(known[["subject", "relation", "answer", "answer_id"]], on="subject", suffixes=("", "_other"))
    different = (joined["relation"] != joined["relation_other"]) & (joined["answer_id"] != joined["answer_id_other"])
    return joined[different].reset_index(drop=True)


def other_entity(known: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`known` with answer_id_other: another entity's answer to the same relation, with another first token."""
    generator, parts = np.random.default_rng(seed), []
    for _, part in known.groupby("relation", sort=True):
        ids = part["answer_id"].to_numpy()
        if len(np.unique(ids)) < 2:
            continue
        picks = [generator.choice(ids[ids != own]) for own in ids]
        parts.append(part.assign(answer_id_other=picks))
    if not parts:
        raise ValueError("Every relation has a single answer here, so nothing conflicts: ask more facts.")
    return pd.concat(parts).reset_index(drop=True)


def normaliser_bins(sample: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """Neurons in groups of equal size by their normaliser; sample: normaliser, amplification, a row per neuron.

    Returns per group the medians of both, and low and high, the 10th and 90th percentiles of the amplification.
    """
    groups = sample.groupby(pd.qcut(sample["normaliser"], bins, labels=False))
    low, high = (groups["amplification"].quantile(q) for q in (0.1, 0.9))
    middle = groups[["normaliser", "amplification"]].median()
    return middle.assign(low=low, high=high, neurons=groups.size()).reset_index(drop=True)


def route_summary(agree: pd.DataFrame, sample: pd.DataFrame) -> pd.DataFrame:
    """Agreement of the two routes and behaviour near small normalisers, as one table: quantity, mean, low, high.

    low and high are the 2.5 and 97.5 percentiles over prompts (agreement) or neurons (normaliser, amplification).
    """
    columns = {
        "Pearson correlation of the routes, per prompt": agree["pearson"],
        "Spearman correlation of the routes, per prompt": agree["spearman"],
        "normaliser |w·x| / Σ|w·x_k|, per neuron": sample["normaliser"],
        "amplification Σ|share|, per neuron": sample["amplification"],
    }
    rows = [
        {"quantity": name, "mean": x.mean(), "low": x.quantile(0.025), "high": x.quantile(0.975), "extreme": x.max()}
        for name, x in columns.items()
    ]
    return pd.DataFrame(rows)


def table_by(labels: Sequence, profiles: dict[str, np.ndarray], clusters: Sequence, least: int = 8) -> pd.DataFrame:
    """`stage_table` for all prompts ("all") and for each label that at least `least` carry, with a column label."""
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    parts = [stage_table(profiles, clusters).assign(label="all")]
    for label in np.unique(labels):
        mine = labels == label
        if mine.sum() >= least:
            part = stage_table({stage: profile[mine] for stage, profile in profiles.items()}, clusters[mine])
            parts.append(part.assign(label=label))
    return pd.concat(parts, ignore_index=True)


def against_random(trial: Trial, cores: dict[str, list[int]], draws: int, seed: int) -> dict[str, tuple]:
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
