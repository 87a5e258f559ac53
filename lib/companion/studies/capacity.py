"""06: how small back attention can be."""

import pandas as pd

from companion.report.intervals import interval
from companion.report.verdicts import Effect, claim, named, percent, points, strictest
from companion.runs.results import resampled, same_questions


def kept_share(narrow: pd.DataFrame, best: pd.DataFrame, base: pd.DataFrame) -> dict[str, float]:
    """Which share of what `best` gains over `base` is kept by `narrow`, from the `results.answers`
    of three arms: kept, low, high (95 %, samples of names), n.

    Raises ValueError when the tests differ, or `best` is not ahead of `base` in every sample.
    """
    arms = [narrow, best, base]
    same_questions(arms, "The three arms")
    small, whole, floor = (part["right"].mean() for part in arms)
    one, two, zero = map(resampled, arms)
    if (two <= zero).any():
        raise ValueError(
            f"A gain from {floor:.3f} to {whole:.3f} is too small: its share has no interval."
        )
    kept = {"kept": (small - floor) / (whole - floor), **interval((one - zero) / (two - zero))}
    return {**kept, "n": narrow["question"].nunique()}


def small_keeps_its_gain(share: pd.Series, kept: pd.DataFrame, gain: pd.DataFrame) -> dict:
    """C11 as a question of use. share: dim and share of the width nearest to the paper's share of
    the weights; of that width, kept: `kept_share` by arm; gain: `results.difference_table`.

    Four checks, each with the whole interval: back attention keeps more than half (our choice) of
    the best width's gain; and it is ahead of each arm of as few weights or fewer. The paper's
    comparison is the gain over zero-shot; the strictest control, the other arm that does best.
    """
    less, kept = gain.set_index("other"), kept.set_index("arm")
    small, rivals = kept.loc["back attention"], less.loc[["same layer", "residual LoRA", "bias"]]
    ahead = ", ".join(
        f"{other} {points(row)} (keeps {kept.loc[other, 'kept']:.0%}, "
        f"{'more than half' if kept.loc[other, 'low'] > 0.5 else 'not surely half'})"
        for other, row in rivals.iterrows()
    )
    return claim(
        "C11-use",
        f"two-hop, d′ = {int(share['dim'])} ({100 * share['share']:.4f} % of the weights): "
        f"{points(less.loc['zero-shot'])} points over zero-shot, {percent(small, 'kept')} of what "
        f"the width chosen gains; less arms of no more weights: {ahead}; n = {int(small['n'])} "
        f"questions, rates found at that width",
        {
            "keeps half of the gain": small["low"] > 0.5,
            **named(rivals.reset_index(), rivals["low"] > 0),
        },
        Effect.of("less zero-shot", less.loc["zero-shot"]),
        strictest(rivals.reset_index()),
    )
