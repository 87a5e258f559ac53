"""04: where back attention should go."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from companion.measures.settings import at_end
from companion.report.verdicts import Effect, claim, points, strictest

Tables = Mapping[str, pd.DataFrame]
PAPERS = {5, 6, 7}  # the paper's layer, and its neighbours
LEVEL = 0.05 / 3  # three tests


class Check(NamedTuple):
    """One check of C9: its name, whether it speaks for the claim, and in words."""

    name: str
    passed: bool
    words: str


def training_instability(curves: pd.DataFrame) -> pd.DataFrame:
    """How unsteady training is: arm, source_layer, spread, jump, seeds; from `results.curves`.

    spread: standard deviation over seeds of the accuracy on the validation questions (in points;
    they are the same for all seeds), each seed less its mean over layers. jump: the largest rise of
    a step's loss over the mean of the three steps before it, in nats, mean over seeds, all less
    their medians over layers: the batches are the same at all layers, and some are hard.
    """
    tables = []
    for arm, part in curves.groupby("arm", sort=False):
        share = 100 * at_end(part, "source_layer")  # [layers, seeds]
        runs = part.groupby(["seed", "source_layer"])["losses"]
        losses = np.stack([np.concatenate(list(run)) for _, run in runs])
        losses = losses.reshape(*share.T.shape, -1)  # [seeds, layers, steps]
        over = losses - np.median(losses, axis=1, keepdims=True)
        before = (over[..., :-3] + over[..., 1:-2] + over[..., 2:-1]) / 3
        jump = (over[..., 3:] - before).max(-1).mean(0)
        table = {"arm": arm, "spread": (share - share.mean()).std(axis=1), "jump": jump}
        tables.append(pd.DataFrame({**table, "seeds": share.shape[1]}).reset_index())
    return pd.concat(tables, ignore_index=True)[["arm", "source_layer", "spread", "jump", "seeds"]]


def _choice(tables: Tables, arm: str = "back attention") -> tuple[Check, Check]:
    """First and fifth check: the layer chosen on validation questions is 5, 6 or 7, and so is every
    single seed's; and there back attention is ahead of the same module on its own layer, with the
    whole interval."""
    chosen = tables["chosen"].set_index("arm").loc[arm]
    layer, *others = chosen[["source_layer", "lowest", "highest"]].astype(int)
    words = f"layer {layer} ({min(layer, *others)} to {max(layer, *others)} by seed)"
    near = Check("layer 5 to 7 is chosen", {layer, *others} <= PAPERS, words)
    row = tables["differences"].set_index(["other", "source_layer"]).loc["same layer", layer]
    return near, Check("ahead of the same layer", row["low"] > 0, points(row))


def _placement(tables: Tables, arm: str) -> list[Check]:
    """The first four checks: `_choice`; spread and jump of `training_instability` are larger at
    layers 0 to 5 than above (Mann-Whitney); accuracy falls from layer 6 on (Spearman)."""
    checks = [_choice(tables, arm)[0]]
    unsteady = tables["instability"].groupby("arm").get_group(arm)
    accuracy = tables["accuracy"].groupby("arm").get_group(arm)
    low = unsteady["source_layer"] < 6
    for measure, unit in (("spread", "points"), ("jump", "nats")):
        below, above = unsteady.loc[low, measure], unsteady.loc[~low, measure]
        higher = stats.mannwhitneyu(below, above, alternative="greater").pvalue
        words = f"median {measure} {below.median():.2f} {unit} at 0–5, {above.median():.2f} above"
        name = f"larger {measure} at 0–5"
        checks.append(Check(name, higher < LEVEL, f"{words} (p = {higher:.2g})"))
    after = accuracy[accuracy["source_layer"] >= 6]
    rank, p = stats.spearmanr(after["source_layer"], after["accuracy"])
    words = f"from layer 6 on Spearman of layer and accuracy {rank:+.2f} (p = {p:.2g})"
    return [*checks, Check("falls after 6", rank < 0 and p < LEVEL, words)]


def low_layers_are_best(two_hop: Tables, arithmetic: Tables) -> dict:
    """C9. Tables by source layer: chosen (`choose`), against six (`setting_differences` of back
    attention from layer 6), differences (`difference_table` of back attention less the others); of
    two-hop questions also instability (`training_instability`) and accuracy.

    Seven checks: on two-hop questions `_placement`, its three tests with p < 0.05 / 3, and a lead
    over the same module on its own layer (without one the curve would be any trained map's); on
    arithmetic, the paper's task, with fewer layers, the first and the last (`_choice`). Which of
    the first four the control "same layer" passes too is reported. The paper's comparison is layer
    6 on arithmetic less the best other layer; the strictest control, the other arm that does
    best there.
    """
    checks, control = (_placement(two_hop, arm) for arm in ("back attention", "same layer"))
    (_, ahead), (choice, digits_ahead) = _choice(two_hop), _choice(arithmetic)
    every = [*checks, ahead, choice, digits_ahead]
    passed = [sum(check.passed for check in part) for part in (control, checks)]
    n, digits_n = (int(tables["differences"]["n"].iloc[0]) for tables in (two_hop, arithmetic))
    chosen = two_hop["chosen"].set_index("arm").loc["back attention"]
    six = two_hop["against six"].set_index("source_layer").loc[chosen["source_layer"]]
    wins = ", ".join(
        f"{other} at {sum(less['low'] > 0)} (behind at {sum(less['high'] < 0)}) of {len(less)}"
        for other, less in two_hop["differences"].groupby("other", sort=False)
    )
    digits = arithmetic["against six"].query("source_layer != 6").assign(other="layer 6")
    digits, layers = pd.concat([digits, arithmetic["differences"]]), []
    for layer, less in digits.groupby("source_layer"):
        each = (f"{points(row)} against {row['other']}" for _, row in less.iterrows())
        layers.append(f"layer {layer} {', '.join(each)}")
    words = (
        f"two-hop, n = {n} questions, {int(chosen['seeds'])} seeds, rates found at layer 6: chosen "
        f"on validation is {'; '.join(check.words for check in checks)}; there {points(six)} "
        f"points against layer 6 and {ahead.words} against the same module on its own layer, which "
        f"passes {passed[0]} of the first four checks too (back attention {passed[1]}); ahead with "
        f"the whole interval of {wins} layers; on 1DC, n = {digits_n}, validation chooses "
        f"{choice.words}, points: {'; '.join(layers)}"
    )
    tasks = ["two-hop"] * 5 + ["1DC"] * 2
    named = {f"{task}: {c.name}": c.passed for task, c in zip(tasks, every, strict=True)}
    best = arithmetic["against six"].query("source_layer != 6")
    best = best.loc[best["difference"].idxmax()]
    row = {"difference": -best["difference"], "low": -best["high"], "high": -best["low"]}
    six = Effect.of(f"layer 6 less layer {best['source_layer']:.0f}, 1DC", row)
    there = arithmetic["differences"].query("source_layer == 6")
    return claim("C9", words, named, six, strictest(there, "less {} at layer 6, 1DC"))
