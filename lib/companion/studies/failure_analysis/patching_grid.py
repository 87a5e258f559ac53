"""02: back-patching over all pairs of layers (claim C6).

A pair is (target, source): the state that enters layer `source` is put into layer `target` below.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backattn.analysis.back_patching import back_patch
from backattn.files import atomic_file
from companion.measures.two_hop import donors, first_token_pairs, place_labels
from companion.questions.prompts import last_token_positions
from companion.report.verdicts import Effect, claim, percent

PATCHES = {  # where a state is put, and whether it is another prompt's, from the same place in it
    "r1": ("r1", False),
    "r1 donor": ("r1", True),
    "last": ("last", False),
    "last donor": ("last", True),
}


class Patched(NamedTuple):
    """What a prompt's patches do, [patches, targets, sources]: the next token (-1 where undefined)
    and log p(e3) in half precision."""

    said: np.ndarray
    log_prob: np.ndarray


def grid_keys(frame: pd.DataFrame, seed: int = 0) -> list[str]:
    """What a row of the grid depends on: the prompt and its donor, of any relations."""
    prompts = frame["two_hop"].to_numpy()
    given = prompts[donors(frame, seed, "any")]
    return [f"{prompt}\t{donor}" for prompt, donor in zip(prompts, given, strict=True)]


def back_patching(model, tokenizer, frame: pd.DataFrame, count: int, seed: int = 0) -> dict:
    """Run every pair of the first `count` prompts with all PATCHES: `grid_keys` -> `Patched`."""
    prompts, labels = frame["two_hop"].tolist(), place_labels(tokenizer, frame)
    tokens, other = first_token_pairs(tokenizer, frame)[:count], donors(frame, seed, "any")[:count]
    said, log_prob = [], []
    for place, donated in PATCHES.values():
        ends = [end for (end,) in last_token_positions(labels, [place])]
        given = [(prompts[row], ends[row]) for row in other] if donated else None
        run = back_patch(model, tokenizer, prompts[:count], ends[:count], tokens, given)
        said.append(run.said.numpy().astype(np.int32))
        log_prob.append(run.log_probs[..., 0].half().numpy())
    rows = map(Patched, np.stack(said, axis=1), np.stack(log_prob, axis=1))
    return dict(zip(grid_keys(frame, seed), rows, strict=False))


def attempts(right: dict[str, np.ndarray], asked: pd.DataFrame) -> pd.DataFrame:
    """What each patch does to each prompt; right: patch -> whether e3 is said after each pair.

    Returns: arm (the patch), prompt, e2, right (unpatched), oracle (right with any pair, as
    published), any_pair (share of the pairs), honest (right with the pair after which most prompts
    of the other half are, no bridge entity being in both) and pairs (that of either half).
    """
    tables = {}
    first = np.unique(asked["e2"].astype(str), return_inverse=True)[1] % 2 == 0
    about = {"e2": asked["e2"].to_numpy(), "right": (asked["outcome"] == "e3").to_numpy()}
    for arm, hits in right.items():
        target, source = np.triu_indices(hits.shape[1], 1, hits.shape[2])
        hits = hits[:, target, source]  # [n, pairs]
        best = [int(hits[half].sum(0).argmax()) for half in (first, ~first)]
        table = pd.DataFrame({**about, "oracle": hits.any(1), "any_pair": hits.mean(1)})
        table["honest"] = np.where(first, hits[:, best[1]], hits[:, best[0]])
        tables[arm] = table.assign(pairs=", ".join(f"{target[k]} ← {source[k]}" for k in best))
    return pd.concat(tables, names=["arm", "prompt"]).reset_index()


def save_grid(grid: dict[str, Patched], path: Path, model_name: str) -> None:
    """Write a grid as safetensors, with its prompts and the model's name in the header."""
    tensors = {
        f"{kind} {arm}": np.stack([getattr(patched, kind)[k] for patched in grid.values()])
        for kind in Patched._fields
        for k, arm in enumerate(PATCHES)
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, {"model": model_name, "prompts": json.dumps([*grid])})


def load_grid(path: Path, model_name: str) -> dict[str, Patched]:
    """What `save_grid` wrote, nothing where there is none for this model; ValueError when the file
    cannot be read."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            about, kinds = file.metadata(), Patched._fields
            arrays = [[file.get_tensor(f"{kind} {arm}") for arm in PATCHES] for kind in kinds]
        rows = map(Patched, *(np.stack(x, axis=1) for x in arrays))
        grid = dict(zip(json.loads(about["prompts"]), rows, strict=True))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): take it again from the repository (git checkout)."
        ) from error
    return grid if about["model"] == model_name else {}


def back_patching_helps(repairs: pd.DataFrame, difference: pd.DataFrame) -> dict[str, str]:
    """C6. repairs: by arm the shares of wrong cases repaired (honest, oracle) and net, what is
    gained; difference: those shares less a donor's, by place and how; all with intervals.

    Three checks at r1, each with its whole interval above zero: the honest pair makes more prompts
    right; it, and the oracle, repair more wrong cases than with a donor's states. The published
    comparison is the oracle, the strictest control the donor's states in it.
    """
    by = repairs.set_index("arm")
    less = difference.set_index(["place", "how"]).loc[[("r1", "honest"), ("r1", "oracle")]]

    def share(arm: str, how: str) -> str:
        mean, low, high = by.loc[arm, [how, f"{how}_low", f"{how}_high"]]
        return percent({"share": mean, "low": low, "high": high})

    ours = (
        f"r1 patched: oracle {share('r1', 'oracle')}, donor's states "
        f"{share('r1 donor', 'oracle')}; one pair chosen on the other half "
        f"{share('r1', 'honest')}, donor's {share('r1 donor', 'honest')}; net change of accuracy "
        f"{share('r1', 'net')}; wrong cases: {by.loc['r1', 'wrong']}"
    )
    checks = {"more prompts right": by.loc["r1", "net_low"] > 0}
    checks |= {f"{how}, more than a donor's": row["low"] > 0 for (_, how), row in less.iterrows()}
    mean, low, high = by.loc["r1", ["oracle", "oracle_low", "oracle_high"]]
    ends = {"share": mean, "low": low, "high": high}
    oracle = Effect.of("wrong cases repaired by some pair of layers", ends, "share")
    donor = Effect.of("less a donor's states", less.loc[("r1", "oracle")], "mean")
    return claim("C6", ours, checks, oracle, donor)
