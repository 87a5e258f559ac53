"""03: does back attention help, and is it flow or training?"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import nn

from backattn.adapters.back_attention import get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from companion.report.verdicts import Claim, _gains, _points, _verdict, _weighed


def sizes(base: nn.Module, dims: Sequence[int], source_layer: int = 6) -> list[dict]:
    """How many weights back attention has at each width, and which share of the base model's (may lie on "meta").

    Returns per width: dim, weights, share.
    """
    total, rows = sum(p.numel() for p in base.parameters()), []
    for dim in dims:
        wrapped = get_back_attention_model(base, BackAttentionConfig(source_layer, dim))
        weights = wrapped.trainable()[0]
        wrapped.unload()
        rows.append({"dim": dim, "weights": weights, "share": weights / total})
    return rows


def names_needed(differences: pd.DataFrame, points: float) -> pd.DataFrame:
    """How many held-out names would bring the interval of each difference to ± `points` hundredths.

    differences: from `difference_table`; of its rows over all datasets the number of runs is given instead. An interval
    narrows with the square root of the number of names (or runs). Returns: dataset, other, half_width, has, needed.
    """
    half = (differences["high"] - differences["low"]) / 2
    has = differences["names"].where(differences["dataset"] != "all", differences["n"])
    needed = np.ceil(has * (100 * half / points) ** 2).astype(int)
    return differences[["dataset", "other"]].assign(half_width=half, has=has, needed=needed)


def one_layer_matches_two(
    accuracy: pd.DataFrame, difference: pd.DataFrame, margin: float = 0.01
) -> Claim:
    """C7. accuracy, difference: from `comparison`, arms from scratch; difference is of one layer + back attention.

    Two checks, each with its whole interval: it is ahead of one layer, and not behind two layers by more than `margin`.
    Not testable where two layers are not ahead of one.
    """
    by, less = accuracy.set_index("arm"), difference.set_index("other")
    gap = by.loc["2 layers", "low"] > by.loc["1 layer", "high"]
    passed = [less.loc["1 layer", "low"] > 0, less.loc["2 layers", "low"] > -margin]
    against = [less.loc["1 layer", "high"] < 0, less.loc["2 layers", "high"] < -margin]
    told = ", ".join(
        f"{arm} {row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"
        for arm, row in by.iterrows()
    )
    ahead = ", ".join(f"{other} {_points(row)}" for other, row in less.iterrows())
    first = by.iloc[0]
    return Claim(
        id="C7",
        claim="one layer with back attention reaches two layers on 2-digit arithmetic",
        paper="93.8 % vs 92.5 %, with 56.7 % of the parameters (width 440, d′ = 160)",
        ours=f"{told}; back attention less the other, points: {ahead}; n = {first['n']}, {first['seeds']} seeds",
        kind="band over seeds",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against)))
        if gap
        else "not testable here",
        notebook="03_back_attention_training",
        figure="03_scratch",
    )


def raises_accuracy(difference: pd.DataFrame, controls: list[str], model: str = "smollm2") -> Claim:
    """C8. difference: from `comparison.difference_table`, of back attention against zero-shot and all other arms.

    The checks are those of `_gains`.
    """
    passed, against, told = _gains(difference[difference["model"] == model], controls)
    return Claim(
        id="C8",
        claim="back attention on a frozen LLM raises accuracy on five reasoning datasets",
        paper="Llama3.1-8B, mean 46.9 → 77.0 at source layer 6, against zero-shot",
        ours=told,
        kind="band over seeds",
        verdict=_weighed(passed, against),
        notebook="03_back_attention_training",
        figure="03_arms",
    )


def adapter_size(sizes: pd.DataFrame) -> Claim:
    """C11 as arithmetic. sizes: dim, share (weights of the module over those of Llama 3 8B).

    Two checks: some d′ gives the paper's 0.002 %, to its one digit; and so does the d′ = 160 that the paper names.
    """
    by = sizes.set_index("dim")["share"]
    told = {dim: f"{100 * share:.3f} %" for dim, share in by.items()}
    return Claim(
        id="C11",
        claim="back attention is small",
        paper="0.002 % of Llama3-8B",
        ours="; ".join(f"d′ = {dim}: {text}" for dim, text in told.items()),
        kind="exact",
        verdict=_verdict(["0.002 %" in told.values(), told[160] == "0.002 %"]),
        notebook="03_back_attention_training",
        figure="tables/03_sizes",
    )
