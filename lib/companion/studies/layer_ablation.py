"""04: where back attention should go."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from companion.measures.settings import at_end
from companion.report.verdicts import claim, points

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


def chosen_near_six(chosen: pd.DataFrame, less_six: pd.DataFrame) -> Check:
    """The layer chosen on validation questions is 5, 6 or 7, and so is every single seed's.
    Against: another is chosen, and ahead of layer 6 on the test with its whole interval.

    chosen: one arm's row of `choose`; less_six: its `setting_differences` from layer 6.
    """
    row = chosen.iloc[0]
    layer = int(row["source_layer"])
    ends = {layer, int(row["lowest"]), int(row["highest"])}
    ahead = less_six.set_index("source_layer").loc[layer, "low"] > 0
    words = f"layer {layer} ({min(ends)} to {max(ends)} by seed)"
    return Check(ends <= PAPERS, layer not in PAPERS and ahead, words)


def unsteady_below_six(instability: pd.DataFrame, measure: str, unit: str) -> Check:
    """One arm's spread or jump is larger at layers 0 to 5 than from 6 on (Mann-Whitney)."""
    low = instability["source_layer"] < 6
    below, above = instability.loc[low, measure], instability.loc[~low, measure]
    higher, lower = (
        stats.mannwhitneyu(below, above, alternative=side).pvalue for side in ("greater", "less")
    )
    words = f"median {measure} {below.median():.2f} {unit} at 0–5, {above.median():.2f} above"
    return Check(higher < LEVEL, lower < LEVEL, f"{words} (p = {higher:.2g})")


def falls_after_six(accuracy: pd.DataFrame) -> Check:
    """One arm's accuracy falls from layer 6 on (Spearman)."""
    after = accuracy[accuracy["source_layer"] >= 6]
    fall = stats.spearmanr(after["source_layer"], after["accuracy"])
    sure = fall.pvalue < LEVEL
    words = f"from layer 6 on Spearman of layer and accuracy {fall.statistic:+.2f}"
    words = f"{words} (p = {fall.pvalue:.2g})"
    return Check(fall.statistic < 0 and sure, fall.statistic > 0 and sure, words)


def ahead_of_same_layer(difference: pd.DataFrame, layer: int) -> Check:
    """At a layer back attention is ahead of the same module on its own layer, with the whole
    interval."""
    rows = difference[difference["other"] == "same layer"].set_index("source_layer")
    row = rows.loc[layer]
    return Check(row["low"] > 0, row["high"] < 0, points(row))


def placement(tables: Mapping[str, pd.DataFrame], arm: str) -> list[Check]:
    """The first four checks of C9 for one arm; tables: `two_hop` of `low_layers_are_best`."""
    chosen, instability, accuracy = (
        of_arm(tables[name], arm) for name in ("chosen", "instability", "accuracy")
    )
    return [
        chosen_near_six(chosen, tables["against six"]),
        unsteady_below_six(instability, "spread", "points"),
        unsteady_below_six(instability, "jump", "nats"),
        falls_after_six(accuracy),
    ]


def of_arm(table: pd.DataFrame, arm: str = "back attention") -> pd.DataFrame:
    """The rows of one arm."""
    return table[table["arm"] == arm]


def low_layers_are_best(
    two_hop: Mapping[str, pd.DataFrame], arithmetic: Mapping[str, pd.DataFrame]
) -> dict:
    """C9. Tables by source layer: chosen (`choose`), against six (`setting_differences` of back
    attention from layer 6), differences (`difference_table` of back attention less the others); of
    two-hop questions also instability (`training_instability`) and accuracy.

    Seven checks. On two-hop questions: the layer chosen; seeds differ more, and losses jump higher,
    at layers 0 to 5; accuracy falls from layer 6 on; these three with p < 0.05 / 3. At the chosen
    layer back attention is ahead of the same module on its own layer: a curve that any trained map
    has would not be back attention's. Which of the first four this control passes too is reported.
    On arithmetic, the paper's task, with fewer layers: the first check and the last.
    """
    choice, digits_choice = (of_arm(part["chosen"]).iloc[0] for part in (two_hop, arithmetic))
    best, digits_best = int(choice["source_layer"]), int(digits_choice["source_layer"])
    checks = placement(two_hop, "back attention")
    control = placement(two_hop, "same layer")
    ahead = ahead_of_same_layer(two_hop["differences"], best)
    digits = chosen_near_six(of_arm(arithmetic["chosen"]), arithmetic["against six"])
    digits_ahead = ahead_of_same_layer(arithmetic["differences"], digits_best)
    n, digits_n = (int(part["differences"]["n"].iloc[0]) for part in (two_hop, arithmetic))
    from_six = points(two_hop["against six"].set_index("source_layer").loc[best])
    passed = [sum(check.passed for check in part) for part in (control, checks)]
    every = [*checks, ahead, digits, digits_ahead]
    words = (
        f"two-hop, n = {n} questions, {int(choice['seeds'])} seeds, rates found at layer 6: "
        f"chosen on validation is {'; '.join(check.words for check in checks)}; there {from_six} "
        f"points against layer 6 and {ahead.words} against the same module on its own layer, which "
        f"passes {passed[0]} of the first four checks too (back attention {passed[1]}); ahead with "
        f"the whole interval of {wins(two_hop['differences'])} layers; on 1DC, n = {digits_n}, "
        f"validation chooses {digits.words}, points: {layer_by_layer(arithmetic)}"
    )
    return claim("C9", words, [c.passed for c in every], [c.against for c in every])


def wins(differences: pd.DataFrame) -> str:
    """At how many layers back attention is ahead of each other arm, and behind."""
    return ", ".join(
        f"{other} at {(part['low'] > 0).sum()} (behind at {(part['high'] < 0).sum()}) of {len(part)}"
        for other, part in differences.groupby("other", sort=False)
    )


def layer_by_layer(tables: Mapping[str, pd.DataFrame]) -> str:
    """Back attention at each layer against itself at layer 6, and against the other arms there."""
    layers = []
    for row in tables["against six"].sort_values("source_layer").to_dict("records"):
        layer, less = row["source_layer"], tables["differences"]
        parts = [f"{points(row)} against layer 6"] if layer != 6 else []
        others = less[less["source_layer"] == layer].to_dict("records")
        parts += [f"{points(other)} against {other['other']}" for other in others]
        layers.append(f"layer {layer} {', '.join(parts)}")
    return "; ".join(layers)
