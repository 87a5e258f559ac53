"""04: where back attention should go."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from companion.measures.settings import _at_end
from companion.report.verdicts import Claim, _points, _weighed
from companion.runs.results import _finished
from companion.runs.run import Run
from companion.runs.store import Store


def training_instability(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """How unsteady training is at each source layer, per arm.

    Returns: arm, source_layer, spread, jump, seeds. spread: standard deviation over seeds of the accuracy on the
    validation questions (in points; they are the same for all seeds), each seed less its mean over layers. jump: the
    largest sudden rise of the loss, in nats, mean over seeds. A rise is a step's loss less the mean of the three steps
    before it, all less their medians over layers: the batches are the same at all layers, and some are hard. Raises
    ValueError when a run is not finished.
    """
    tables = []
    for arm in dict.fromkeys(run.arm for run in runs):
        mine = [run for run in runs if run.arm == arm]
        wide = 100 * _at_end(mine, store, "source_layer")
        jumps = []
        for seed in wide.columns:
            own = sorted(
                (run for run in mine if run.seed == seed), key=lambda run: run.source_layer
            )
            curves = [_finished(run, store)["curve"] for run in own]
            losses = np.stack(
                [np.concatenate([row["losses"] for row in curve]) for curve in curves]
            )  # [layers, steps]
            over = losses - np.median(losses, axis=0)
            before = (over[:, :-3] + over[:, 1:-2] + over[:, 2:-1]) / 3
            jumps.append((over[:, 3:] - before).max(1))
        table = pd.DataFrame(
            {
                "arm": arm,
                "source_layer": wide.index,
                "spread": (wide - wide.mean()).std(axis=1).values,
            }
        )
        tables.append(table.assign(jump=np.mean(jumps, axis=0), seeds=wide.shape[1]))
    return pd.concat(tables, ignore_index=True)


def low_layers_are_best(
    chosen: pd.DataFrame,
    against_six: pd.DataFrame,
    unrest: pd.DataFrame,
    accuracy: pd.DataFrame,
    difference: pd.DataFrame,
    arithmetic: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame],
) -> Claim:
    """C9. chosen: `comparison.choose`; against_six: `comparison.setting_differences` of back attention from layer 6;
    unrest: `comparison.unrest`; accuracy: arm, source_layer, accuracy; difference: back attention less the others, from
    `comparison.difference_table`, by source_layer; arithmetic: chosen, against_six and difference on 1DC.

    Seven checks, five on two-hop questions. The layer chosen on validation questions is 5, 6 or 7, and so is every
    single seed's (against: another is chosen, and ahead of layer 6 on the test with its whole interval). Seeds differ
    more, and losses jump higher, at layers 0 to 5 than from 6 on (Mann-Whitney); accuracy falls from layer 6 on
    (Spearman); these three with p < 0.05 / 3. At the chosen layer back attention is ahead of the same module on its own
    layer, with the whole interval: a curve that any trained map has would not be back attention's. Which of the first
    four the control passes too is told. On arithmetic, the paper's task, with fewer layers: the first check and the
    last.
    """
    best, seeds = (
        int(chosen.set_index("arm").loc["back attention", name])
        for name in ("source_layer", "seeds")
    )
    ahead = against_six.set_index("source_layer").loc[best]
    passed, against, told = _placement("back attention", chosen, unrest, accuracy)
    against[0] = against[0] and bool(ahead["low"] > 0)
    control = _placement("same layer", chosen, unrest, accuracy)[0]
    same = difference[
        (difference["other"] == "same layer") & (difference["source_layer"] == best)
    ].iloc[0]
    second, six, less = arithmetic
    choice = second.set_index("arm").loc["back attention"]
    layer, ends = (
        int(choice["source_layer"]),
        {int(choice[name]) for name in ("source_layer", "lowest", "highest")},
    )
    moved = six.set_index("source_layer").loc[layer]
    own = less[less["other"] == "same layer"].set_index("source_layer").loc[layer]
    passed += [same["low"] > 0, ends <= {5, 6, 7}, own["low"] > 0]
    against += [same["high"] < 0, layer not in (5, 6, 7) and moved["low"] > 0, own["high"] < 0]
    tried = []
    for row in six.sort_values("source_layer").to_dict("records"):
        at = less[less["source_layer"] == row["source_layer"]].to_dict("records")
        parts = [f"{_points(row)} against layer 6"] if row["source_layer"] != 6 else []
        parts += [f"{_points(one)} against {one['other']}" for one in at]
        tried.append(f"layer {row['source_layer']} {', '.join(parts)}")
    digits = (
        f"on 1DC, n = {int(own['n'])}, validation chooses layer {layer} ({min(ends)} to {max(ends)} by seed), points: "
        f"{'; '.join(tried)}"
    )
    wins = ", ".join(
        f"{other} at {(part['low'] > 0).sum()} (behind at {(part['high'] < 0).sum()}) of {len(part)}"
        for other, part in difference.groupby("other", sort=False)
    )
    return Claim(
        id="C9",
        claim="layer 6 is the best source layer; 0–5 are unstable, and it falls after",
        paper="sweep on Llama-7B, arithmetic: 93.2 at layer 6, 67.1 without",
        ours=(
            f"two-hop, n = {int(same['n'])} questions, {seeds} seeds, rates found at layer 6: {told}; there "
            f"{_points(ahead)} points against layer 6 and {_points(same)} against the same module on its own layer, "
            f"which passes {sum(control)} of the first four checks too (back attention {sum(passed[:4])}); ahead with "
            f"the whole interval of {wins} layers; {digits}"
        ),
        kind="band over seeds",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="04_layer_ablation",
        figure="04_layers",
    )


def _placement(
    arm: str, chosen: pd.DataFrame, unrest: pd.DataFrame, accuracy: pd.DataFrame
) -> tuple[list[bool], list[bool], str]:
    """The first four checks of C9 for one arm: (passed, against, in words)."""
    mine = [table[table["arm"] == arm] for table in (chosen, unrest, accuracy)]
    choice, level = mine[0].iloc[0], 0.05 / 3
    range_of = {int(choice[name]) for name in ("source_layer", "lowest", "highest")}
    passed, against = [range_of <= {5, 6, 7}], [int(choice["source_layer"]) not in (5, 6, 7)]
    told = [
        f"chosen on validation is layer {int(choice['source_layer'])} ({min(range_of)} to {max(range_of)} by seed)"
    ]
    low = mine[1]["source_layer"] < 6
    for name, unit in (("spread", "points"), ("jump", "nats")):
        below, above = mine[1].loc[low, name], mine[1].loc[~low, name]
        higher, lower = (
            stats.mannwhitneyu(below, above, alternative=side).pvalue
            for side in ("greater", "less")
        )
        passed.append(bool(higher < level))
        against.append(bool(lower < level))
        told.append(
            f"median {name} {below.median():.2f} {unit} at 0–5, {above.median():.2f} above (p = {higher:.2g})"
        )
    after = mine[2][mine[2]["source_layer"] >= 6]
    fall = stats.spearmanr(after["source_layer"], after["accuracy"])
    passed.append(bool(fall.statistic < 0 and fall.pvalue < level))
    against.append(bool(fall.statistic > 0 and fall.pvalue < level))
    told.append(
        f"from layer 6 on Spearman of layer and accuracy {fall.statistic:+.2f} (p = {fall.pvalue:.2g})"
    )
    return passed, against, "; ".join(told)
