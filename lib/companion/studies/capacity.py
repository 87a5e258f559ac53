"""06: how small back attention can be."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from companion.measures.settings import _over_values
from companion.report.intervals import interval
from companion.report.verdicts import Claim, _points, _weighed
from companion.runs.results import _same_questions, pooled_answers, resampled
from companion.runs.run import Run
from companion.runs.store import Store


def kept_share(
    narrow: Sequence[Run], best: Sequence[Run], base: Sequence[Run], store: Store
) -> dict[str, float]:
    """Which share of what `best` gains over `base` is kept by `narrow`, three arms' runs on the same questions.

    Returns: kept, low, high (95 %, samples of names), n. Raises ValueError when the tests differ, or when `best` is not
    ahead of `base` in every sample.
    """
    three = [pooled_answers(runs, store) for runs in (narrow, best, base)]
    _same_questions(three, "The three arms")
    own, whole, floor = (one.right.mean() for one in three)
    one, two, zero = (resampled(answered) for answered in three)
    if (two <= zero).any():
        raise ValueError(
            f"A gain from {floor:.3f} to {whole:.3f} is too small: its share has no interval."
        )
    kept = (own - floor) / (whole - floor)
    return {"kept": kept, **interval((one - zero) / (two - zero)), "n": len(three[0].groups)}


def doubling_table(runs: Sequence[Run], store: Store, field: str) -> pd.DataFrame:
    """What one doubling of a field of `Run` does to accuracy, per arm: the least-squares slope over log2 of its values.

    Returns: arm, slope, low, high (95 %, samples of names), worst, best (single seeds' slopes), n (questions), seeds,
    settings (values). Raises ValueError when the tests differ.
    """
    rows, values = [], list(dict.fromkeys(getattr(run, field) for run in runs))
    away = np.log2(values) - np.log2(values).mean()
    weights = away / (away**2).sum()
    for arm in dict.fromkeys(run.arm for run in runs):
        mine = [run for run in runs if run.arm == arm]
        whole, seeds = (
            _over_values(mine, store, field, values, weights),
            sorted({run.seed for run in mine}),
        )
        own = {seed: [run for run in mine if run.seed == seed] for seed in seeds}
        single = [
            _over_values(part, store, field, values, weights).right.mean() for part in own.values()
        ]
        row = {"arm": arm, "slope": whole.right.mean(), **interval(resampled(whole))}
        row |= {"worst": min(single), "best": max(single), "n": len(whole.groups)}
        rows.append({**row, "seeds": len(seeds), "settings": len(values)})
    return pd.DataFrame(rows)


def small_keeps_its_gain(share: pd.Series, kept: pd.DataFrame, gain: pd.DataFrame) -> Claim:
    """C11 as a question of use. share: dim and share of the width nearest to the paper's share of the weights; kept:
    arm and `comparison.kept_share` of that width's arms, against the best width of back attention and zero-shot; gain:
    `comparison.difference_table` of back attention with that width.

    Four checks, each with the whole interval: more than half (our choice) of the best width's gain is kept; and it is
    ahead of each arm that costs as few weights or fewer: the same module on its own layer, residual LoRA, a bias. What
    these keep of the gain is told.
    """
    by, part = gain.set_index("other"), kept.set_index("arm")
    rivals, own = (
        [by.loc[other] for other in ("same layer", "residual LoRA", "bias")],
        part.loc["back attention"],
    )
    passed = [own["low"] > 0.5, *(row["low"] > 0 for row in rivals)]
    against = [own["high"] < 0.5, *(row["high"] < 0 for row in rivals)]
    less = ", ".join(
        f"{row.name} {_points(row)} (keeps {part.loc[row.name, 'kept']:.0%}, "
        f"{'more than half' if part.loc[row.name, 'low'] > 0.5 else 'not surely half'})"
        for row in rivals
    )
    return Claim(
        id="C11",
        claim="so small a back attention keeps most of the gain, and the gain is its own",
        paper="0.002 % of Llama3-8B; on Llama3.1-8B the mean of five datasets rises by 30 points",
        ours=(
            f"two-hop, d′ = {int(share['dim'])} ({100 * share['share']:.4f} % of the weights): "
            f"{_points(by.loc['zero-shot'])} points over zero-shot, {own['kept']:.0%} [{own['low']:.0%}, "
            f"{own['high']:.0%}] of what the width chosen gains; less arms of no more weights: {less}; "
            f"n = {int(own['n'])} questions, rates found at that width"
        ),
        kind="band over seeds",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="06_capacity",
        figure="06_dims",
    )
