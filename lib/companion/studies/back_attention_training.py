"""03: does back attention help, and is it flow or training? (C8: `companion.measures.gains`.)"""

import pandas as pd

from companion.report.verdicts import claim, points, with_interval


def one_layer_matches_two(accuracy: pd.DataFrame, difference: pd.DataFrame) -> dict:
    """C7, from tables of arms from scratch; difference: of one layer + back attention.

    Two checks, each with its whole interval: it is ahead of one layer, and not behind two layers by
    more than a point. Not testable where two layers are not ahead of one.
    """
    arms, less = accuracy.set_index("arm"), difference.set_index("other")
    each = ", ".join(
        f"{arm} {with_interval(row, 'accuracy', '.1%')}" for arm, row in arms.iterrows()
    )
    ahead = ", ".join(f"{other} {points(row)}" for other, row in less.iterrows())
    n, seeds = arms.iloc[0][["n", "seeds"]]
    return claim(
        "C7",
        f"{each}; back attention less the other, points: {ahead}; n = {n}, {seeds} seeds",
        passed=[less.loc["1 layer", "low"] > 0, less.loc["2 layers", "low"] > -0.01],
        against=[less.loc["1 layer", "high"] < 0, less.loc["2 layers", "high"] < -0.01],
        testable=arms.loc["2 layers", "low"] > arms.loc["1 layer", "high"],
    )


def is_small(sizes: pd.DataFrame) -> dict:
    """C11 as arithmetic. sizes: dim, share (weights of the module over those of Llama 3 8B).

    Two checks: some d′ gives the paper's 0.002 %, to its one digit; and so does the d′ = 160 that
    the paper names.
    """
    shares = {row.dim: f"{100 * row.share:.3f} %" for row in sizes.itertuples()}
    words = "; ".join(f"d′ = {dim}: {share}" for dim, share in shares.items())
    return claim("C11-size", words, ["0.002 %" in shares.values(), shares[160] == "0.002 %"])
