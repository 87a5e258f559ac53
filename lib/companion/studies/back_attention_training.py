"""03: does back attention help, and is it flow or training? (C8: `companion.measures.gains`.)"""

import pandas as pd

from companion.report.verdicts import Effect, claim, points, with_interval


def one_layer_matches_two(accuracy: pd.DataFrame, difference: pd.DataFrame) -> dict:
    """C7, from tables of arms from scratch; difference: of one layer + back attention.

    Two checks, each with its whole interval: it is ahead of one layer, and not behind two layers by
    more than a point (the paper's comparison). The strictest control is one layer run twice. Not
    testable where two layers are not ahead of one.
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
        {
            "ahead of one layer": less.loc["1 layer", "low"] > 0,
            "reaches two layers": less.loc["2 layers", "low"] > -0.01,
        },
        Effect.of("less two layers", less.loc["2 layers"], zone=1, expects="no less"),
        Effect.of("less one layer run twice", less.loc["1 layer, twice"]),
        testable=arms.loc["2 layers", "low"] > arms.loc["1 layer", "high"],
    )


def is_small(sizes: pd.DataFrame) -> dict:
    """C11 as arithmetic. sizes: dim, share (weights of the module over those of Llama 3 8B).

    One check: some d′ gives the paper's 0.002 %, to its one digit; which one it took is not known.
    """
    shares = {row.dim: f"{100 * row.share:.3f} %" for row in sizes.itertuples()}
    words = "; ".join(f"d′ = {dim}: {share}" for dim, share in shares.items())
    nearest = sizes.loc[(sizes["share"] - 2e-5).abs().idxmin()]
    off = 100 * (nearest["share"] / 2e-5 - 1)
    what = f"share of the weights at d′ = {nearest['dim']:.0f}, against 0.002 %"
    exact = Effect(what, off, off, off, "% off the paper's", 25, "none")
    return claim("C11-size", words, {"some d′ gives 0.002 %": "0.002 %" in shares.values()}, exact)
