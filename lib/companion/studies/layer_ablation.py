"""04: where back attention should go."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from companion.measures.settings import at_end
from companion.report.verdicts import claim, points

Tables = Mapping[str, pd.DataFrame]
PAPERS = {5, 6, 7}  # the paper's layer, and its neighbours
LEVEL = 0.05 / 3  # three tests


class Check(NamedTuple):
    """One check of C9: whether it speaks for the claim, whether against it, and in words."""

    passed: bool
    against: bool
    words: str


def training_instability(curves: pd.DataFrame) -> pd.DataFrame:
    """How unsteady training is at each source layer, per arm; curves: from `results.curves`.

    Returns: arm, source_layer, spread, jump, seeds. spread: standard deviation over seeds of the
    accuracy on the validation questions (in points; they are the same for all seeds), each seed
    less its mean over layers. jump: the largest sudden rise of the loss, in nats, mean over seeds.
    A rise is a step's loss less the mean of the three steps before it, all less their medians over
    layers: the batches are the same at all layers, and some are hard.
    """
    tables = []
    for arm, part in curves.groupby("arm", sort=False):
        share = 100 * at_end(part, "source_layer")
        jumps = []
        for _, one_seed in part.groupby("seed"):
            runs = one_seed.groupby("source_layer")["losses"]
            losses = np.stack([np.concatenate(list(run)) for _, run in runs])  # [layers, steps]
            over = losses - np.median(losses, axis=0)
            before = (over[:, :-3] + over[:, 1:-2] + over[:, 2:-1]) / 3
            jumps.append((over[:, 3:] - before).max(1))
        table = {"arm": arm, "source_layer": share.index}
        table |= {"spread": (share - share.mean()).std(axis=1).values}
        table |= {"jump": np.mean(jumps, axis=0), "seeds": share.shape[1]}
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)


def chosen_near_six(tables: Tables) -> Check:
    """The layer chosen on validation questions is 5, 6 or 7, and so is every single seed's.
    Against: another is chosen, and ahead of layer 6 on the test with its whole interval."""
    chosen = tables["chosen"].iloc[0]
    layer = int(chosen["source_layer"])
    ends = {layer, int(chosen["lowest"]), int(chosen["highest"])}
    ahead = tables["against six"].set_index("source_layer").loc[layer, "low"] > 0
    words = f"layer {layer} ({min(ends)} to {max(ends)} by seed)"
    return Check(ends <= PAPERS, layer not in PAPERS and ahead, words)


def unsteady_below_six(tables: Tables, measure: str, unit: str) -> Check:
    """A measure of `training_instability` is larger at layers 0 to 5 than from 6 on
    (Mann-Whitney)."""
    low = tables["instability"]["source_layer"] < 6
    below, above = (tables["instability"].loc[rows, measure] for rows in (low, ~low))
    higher, lower = (
        stats.mannwhitneyu(below, above, alternative=side).pvalue for side in ("greater", "less")
    )
    words = f"median {measure} {below.median():.2f} {unit} at 0–5, {above.median():.2f} above"
    return Check(higher < LEVEL, lower < LEVEL, f"{words} (p = {higher:.2g})")


def falls_after_six(tables: Tables) -> Check:
    """Accuracy falls from layer 6 on (Spearman)."""
    after = tables["accuracy"][tables["accuracy"]["source_layer"] >= 6]
    rank, p = stats.spearmanr(after["source_layer"], after["accuracy"])
    words = f"from layer 6 on Spearman of layer and accuracy {rank:+.2f} (p = {p:.2g})"
    return Check(rank < 0 and p < LEVEL, rank > 0 and p < LEVEL, words)


def ahead_of_same_layer(tables: Tables) -> Check:
    """At the chosen layer back attention is ahead of the same module on its own layer, with the
    whole interval: a curve that any trained map has would not be back attention's."""
    less, layer = tables["differences"], tables["chosen"]["source_layer"].iloc[0]
    row = less[(less["other"] == "same layer") & (less["source_layer"] == layer)].iloc[0]
    return Check(row["low"] > 0, row["high"] < 0, points(row))


def of_arm(tables: Tables, arm: str) -> Tables:
    """The tables, those that have a column arm with the rows of one."""
    return {name: t[t["arm"] == arm] if "arm" in t else t for name, t in tables.items()}


def placement(tables: Tables) -> list[Check]:
    """The first four checks of C9 for one arm."""
    return [
        chosen_near_six(tables),
        unsteady_below_six(tables, "spread", "points"),
        unsteady_below_six(tables, "jump", "nats"),
        falls_after_six(tables),
    ]


def low_layers_are_best(two_hop: Tables, arithmetic: Tables) -> dict:
    """C9. Tables by source layer: chosen (`choose`), against six (`setting_differences` of back
    attention from layer 6), differences (`difference_table` of back attention less the others); of
    two-hop questions also instability (`training_instability`) and accuracy.

    Seven checks: on two-hop questions `placement`, its three tests with p < 0.05 / 3, and
    `ahead_of_same_layer`; on arithmetic, the paper's task, with fewer layers, the first and the
    last. Which of the first four the control "same layer" passes too is reported.
    """
    hops, digits = (of_arm(tables, "back attention") for tables in (two_hop, arithmetic))
    checks, control = placement(hops), placement(of_arm(two_hop, "same layer"))
    ahead, choice = ahead_of_same_layer(hops), chosen_near_six(digits)
    every = [*checks, ahead, choice, ahead_of_same_layer(digits)]
    passed = [sum(check.passed for check in part) for part in (control, checks)]
    n, digits_n = (int(tables["differences"]["n"].iloc[0]) for tables in (hops, digits))
    best, seeds = hops["chosen"][["source_layer", "seeds"]].iloc[0].astype(int)
    wins = ", ".join(
        f"{other} at {sum(less['low'] > 0)} (behind at {sum(less['high'] < 0)}) of {len(less)}"
        for other, less in hops["differences"].groupby("other", sort=False)
    )
    words = (
        f"two-hop, n = {n} questions, {seeds} seeds, rates found at layer 6: chosen on validation "
        f"is {'; '.join(check.words for check in checks)}; there "
        f"{points(hops['against six'].set_index('source_layer').loc[best])} points against layer 6 "
        f"and {ahead.words} against the same module on its own layer, which passes {passed[0]} of "
        f"the first four checks too (back attention {passed[1]}); ahead with the whole interval of "
        f"{wins} layers; on 1DC, n = {digits_n}, validation chooses {choice.words}, points: "
        f"{layer_by_layer(digits)}"
    )
    return claim("C9", words, [c.passed for c in every], [c.against for c in every])


def layer_by_layer(tables: Tables) -> str:
    """Back attention at each layer against itself at layer 6, and against the other arms there."""
    layers = []
    for row in tables["against six"].sort_values("source_layer").to_dict("records"):
        layer, less = row["source_layer"], tables["differences"]
        parts = [f"{points(row)} against layer 6"] if layer != 6 else []
        others = less[less["source_layer"] == layer].to_dict("records")
        parts += [f"{points(other)} against {other['other']}" for other in others]
        layers.append(f"layer {layer} {', '.join(parts)}")
    return "; ".join(layers)
