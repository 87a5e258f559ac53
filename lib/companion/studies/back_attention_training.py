"""03: does back attention help, and is it flow or training?"""

from collections.abc import Sequence

import pandas as pd
from torch import nn

from backattn.adapters.back_attention import get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from companion.measures.gains import gain_checks
from companion.report.verdicts import claim, points, with_interval


def sizes(base: nn.Module, dims: Sequence[int], source_layer: int = 6) -> pd.DataFrame:
    """How many weights back attention has at each width, and which share of the base model's: dim,
    weights, share. The base may lie on "meta"."""
    total, rows = sum(p.numel() for p in base.parameters()), []
    for dim in dims:
        wrapped = get_back_attention_model(base, BackAttentionConfig(source_layer, dim))
        weights = wrapped.trainable()[0]
        wrapped.unload()
        rows.append({"dim": dim, "weights": weights, "share": weights / total})
    return pd.DataFrame(rows)


def one_layer_matches_two(
    accuracy: pd.DataFrame, difference: pd.DataFrame, margin: float = 0.01
) -> dict:
    """C7. accuracy, difference: from `results`, arms from scratch; difference is of one layer +
    back attention.

    Two checks, each with its whole interval: it is ahead of one layer, and not behind two layers by
    more than `margin`. Not testable where two layers are not ahead of one.
    """
    arms, less = accuracy.set_index("arm"), difference.set_index("other")
    form = {"value": "accuracy", "form": ".1%"}
    each = ", ".join(f"{arm} {with_interval(row, **form)}" for arm, row in arms.iterrows())
    ahead = ", ".join(f"{other} {points(row)}" for other, row in less.iterrows())
    n, seeds = arms.iloc[0][["n", "seeds"]]
    return claim(
        "C7",
        f"{each}; back attention less the other, points: {ahead}; n = {n}, {seeds} seeds",
        passed=[less.loc["1 layer", "low"] > 0, less.loc["2 layers", "low"] > -margin],
        against=[less.loc["1 layer", "high"] < 0, less.loc["2 layers", "high"] < -margin],
        testable=arms.loc["2 layers", "low"] > arms.loc["1 layer", "high"],
    )


def raises_accuracy(
    difference: pd.DataFrame, controls: Sequence[str], model: str = "smollm2"
) -> dict:
    """C8. difference: `results.difference_table` of back attention against zero-shot and all other
    arms. The checks are those of `gain_checks`."""
    passed, against, words = gain_checks(difference[difference["model"] == model], controls)
    return claim("C8", words, passed, against)


def is_small(sizes: pd.DataFrame) -> dict:
    """C11 as arithmetic. sizes: dim, share (weights of the module over those of Llama 3 8B).

    Two checks: some d′ gives the paper's 0.002 %, to its one digit; and so does the d′ = 160 that
    the paper names.
    """
    shares = {row.dim: f"{100 * row.share:.3f} %" for row in sizes.itertuples()}
    words = "; ".join(f"d′ = {dim}: {share}" for dim, share in shares.items())
    return claim("C11-size", words, ["0.002 %" in shares.values(), shares[160] == "0.002 %"])
