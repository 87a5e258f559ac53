"""02: back-patching over all pairs of layers (claim C6).

A pair is (target, source): the state that enters layer `source` is put into layer `target` below.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backattn.analysis.back_patching import back_patch, back_patch_one
from backattn.files import atomic_file
from companion.measures.two_hop import donors, first_token_pairs, place_labels
from companion.questions.prompts import last_token_positions
from companion.report.intervals import mean_summary, wilson
from companion.report.verdicts import claim, percent
from companion.studies.failure_analysis.conflict import cases


class Patch(NamedTuple):
    """Where a state is put, and whether it is another prompt's, from the same place in it."""

    place: str
    donated: bool


PATCHES = {
    "r1": Patch("r1", donated=False),
    "r1 donor": Patch("r1", donated=True),
    "last": Patch("last", donated=False),
    "last donor": Patch("last", donated=True),
}


@dataclass
class Grid:
    """Back-patching over all layer pairs of some prompts, in the order of PATCHES.

    keys: per prompt its text and its donor's (`grid_keys`). said: [patches, n, targets, sources]
    next tokens, -1 where undefined. log_prob: the same of e3, half precision.
    """

    keys: list[str]
    said: np.ndarray
    log_prob: np.ndarray


def back_patching(
    model, tokenizer, frame: pd.DataFrame, rows: Sequence[int], seed: int = 0
) -> Grid:
    """Run every pair for some rows of the analysis set, with all PATCHES.

    A donated state is that of another prompt (`donors` of the whole frame, with any relations).
    """
    patched = [
        back_patch(model, tokenizer, *chosen, donors=given)
        for chosen, given in _patches(tokenizer, frame, rows, seed)
    ]
    keys, said = grid_keys(frame, seed), np.stack([x.said.numpy() for x in patched])
    log_prob = np.stack([x.log_probs[..., 0].half().numpy() for x in patched])
    return Grid([keys[row] for row in rows], said, log_prob)


def _patches(
    tokenizer, frame: pd.DataFrame, rows: Sequence[int], seed: int
) -> Iterator[tuple[tuple, list | None]]:
    """For each of PATCHES what `back_patch` takes: ((prompts, positions, tokens), donors)."""
    prompts, labels = frame["two_hop"].tolist(), place_labels(tokenizer, frame)
    ids, other = first_token_pairs(tokenizer, frame), donors(frame, seed, "any")
    texts, tokens = [prompts[row] for row in rows], [ids[row][:1] for row in rows]
    for patch in PATCHES.values():
        ends = [end for (end,) in last_token_positions(labels, [patch.place])]
        given = [(prompts[other[row]], ends[other[row]]) for row in rows]
        yield (texts, [ends[row] for row in rows], tokens), given if patch.donated else None


def grid_keys(frame: pd.DataFrame, seed: int = 0) -> list[str]:
    """What a row of the grid depends on: the prompt and its donor."""
    prompts = frame["two_hop"].to_numpy()
    given = prompts[donors(frame, seed, "any")]
    return [f"{prompt}\t{donor}" for prompt, donor in zip(prompts, given, strict=True)]


def repaired(grid: Grid, answers: Sequence[frozenset]) -> dict[str, np.ndarray]:
    """Whether the model says e3 after each patch: [n, targets, sources]; answers: e3's ids."""
    right = [
        np.isin(x, list(ids)) for x, ids in zip(grid.said.swapaxes(0, 1), answers, strict=True)
    ]
    return dict(zip(PATCHES, np.stack(right, axis=1), strict=True))


def halves(bridges: Sequence) -> np.ndarray:
    """True for the first half: bridge entities in turn, so that no entity is on both sides."""
    return np.unique(np.asarray(bridges, dtype=str), return_inverse=True)[1] % 2 == 0


def cross_fitted_choice(
    success: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Choose the pair after which most prompts of one half are right, and try it on the other; both
    ways.

    success: [n, targets, sources], right with the patch; first: [n] which half. All prompts count,
    so that a pair that repairs some wrong cases and breaks more right ones is not chosen.

    Returns (success of each prompt under the pair chosen on the other half [n], the pairs chosen on
    first and second).
    """
    result, pairs = np.zeros(len(success), dtype=bool), []
    defined = np.triu(np.ones(success.shape[1:], dtype=bool), 1)  # sources above targets
    for chooser in (first, ~first):
        score = np.where(defined, success[chooser].sum(0), -1)
        target, source = (int(i) for i in np.unravel_index(score.argmax(), score.shape))
        pairs.append((target, source))
        result[~chooser] = success[~chooser, target, source]
    return result, pairs


def repair_table(success: dict[str, np.ndarray], asked: pd.DataFrame) -> pd.DataFrame:
    """How many wrong cases back-patching repairs, and how many right ones it breaks, by patch.

    success: from `repaired`; asked: its prompts, with outcome and e2. Returns: arm (the patch),
    wrong (cases), honest (share of them repaired by the pair chosen on the other half), oracle (by
    any pair, as published), any_pair (the mean over pairs), right (cases), broken (share of them
    that the honest pair breaks), net (change of the share of all prompts that are right, with the
    honest pair), pairs ("target ← source", chosen on the first and on the second half). Intervals
    in _low and
    _high: of net over bridge entities, else Wilson's.
    """
    rows, first, (right, wrong) = [], halves(asked["e2"]), cases(asked).values()
    for arm, table in success.items():
        chosen, pairs = cross_fitted_choice(table, first)
        row = {"arm": arm, "wrong": int(wrong.sum())}
        for name, hit in (("honest", chosen[wrong]), ("oracle", table[wrong].any((1, 2)))):
            low, high = wilson(hit.sum(), len(hit))
            row |= {name: hit.mean(), f"{name}_low": low, f"{name}_high": high}
        target, source = np.triu_indices(table.shape[1], 1, table.shape[2])
        row |= {"any_pair": table[wrong][:, target, source].mean(), "right": int(right.sum())}
        row |= {"broken": 1 - chosen[right].mean() if right.any() else np.nan}
        net = mean_summary(chosen.astype(float) - right, asked["e2"])
        row |= {"net": net["mean"], "net_low": net["low"], "net_high": net["high"]}
        rows.append({**row, "pairs": ", ".join(f"{t} ← {s}" for t, s in pairs)})
    return pd.DataFrame(rows)


def against_donor(success: dict[str, np.ndarray], asked: pd.DataFrame) -> pd.DataFrame:
    """Share of wrong cases repaired with a prompt's states less with a donor's: place, how, mean,
    low, high (over bridge entities), n."""
    rows, first, wrong = [], halves(asked["e2"]), cases(asked)["wrong"]
    ways = {
        "honest": lambda table: cross_fitted_choice(table, first)[0],
        "oracle": lambda table: table.any((1, 2)),
    }
    for place in ("r1", "last"):
        for how, repairs in ways.items():
            same, donor = (repairs(success[arm]) for arm in (place, f"{place} donor"))
            less = same[wrong].astype(float) - donor[wrong]
            rows.append({"place": place, "how": how, **mean_summary(less, asked["e2"][wrong])})
    return pd.DataFrame(rows)


def pair_maps(success: dict[str, np.ndarray], asked: pd.DataFrame) -> pd.DataFrame:
    """Share of wrong cases that each pair repairs: arm, target, source, share."""
    rows = []
    for arm, table in success.items():
        target, source = np.triu_indices(table.shape[1], 1, table.shape[2])
        share = table[cases(asked)["wrong"]].mean(0)[target, source]
        rows.append(pd.DataFrame({"arm": arm, "target": target, "source": source, "share": share}))
    return pd.concat(rows, ignore_index=True)


def staircase_error(
    model, tokenizer, frame: pd.DataFrame, rows: Sequence[int], pairs: int, seed: int = 0
) -> float:
    """Largest difference of log p(e3) between the staircase and plain forward passes one by one.

    Over `pairs` random pairs of layers for each of some rows of the analysis set, with all PATCHES.
    """
    draw, errors = np.random.default_rng(seed), []
    for chosen, given in _patches(tokenizer, frame, rows, seed):
        patched = back_patch(model, tokenizer, *chosen, donors=given)
        every = np.argwhere(patched.said[0].numpy() >= 0)
        for index, (prompt, place, (token,)) in enumerate(zip(*chosen, strict=True)):
            donor = given[index] if given else None
            for pair in draw.choice(len(every), size=min(pairs, len(every)), replace=False):
                target, source = every[pair].tolist()
                plain = back_patch_one(model, tokenizer, prompt, place, source, target, donor)
                quick = patched.log_probs[index, target, source, 0]
                errors.append(abs(plain[token] - quick).item())
    return max(errors)


def save_grid(grid: Grid, path: Path, model_name: str) -> None:
    """Write a grid as safetensors, with its prompts and the model's name in the header."""
    tensors = {f"said {arm}": x for arm, x in zip(PATCHES, grid.said.astype(np.int32), strict=True)}
    tensors |= {f"log_prob {arm}": x for arm, x in zip(PATCHES, grid.log_prob, strict=True)}
    about = {"model": model_name, "prompts": json.dumps(grid.keys)}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=about)


def load_grid(path: Path, model_name: str) -> Grid | None:
    """A grid written by `save_grid`, or None when there is none for this model.

    Raises ValueError when the file cannot be read.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
            said, log_prob = (
                np.stack([file.get_tensor(f"{kind} {arm}") for arm in PATCHES])
                for kind in ("said", "log_prob")
            )
        grid = Grid(json.loads(about["prompts"]), said, log_prob)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): take it again from the repository (git checkout)."
        ) from error
    return grid if about["model"] == model_name else None


def merge_grids(
    fresh: Grid, shipped: Grid | None, keys: Sequence[str]
) -> tuple[Grid, dict[str, float]]:
    """The fresh results, and the shipped ones for those of `keys` that were not run again.

    Returns (grid over the keys that either has, in their order; comparison on the prompts that both
    have: prompts, said (share of equal next tokens) and log_prob (largest difference)).
    """
    place = {key: (grid, k) for grid in (shipped, fresh) if grid for k, key in enumerate(grid.keys)}
    chosen = [place[key] for key in keys if key in place]
    said, log_prob = (
        np.stack([getattr(grid, name)[:, k] for grid, k in chosen], axis=1)
        for name in ("said", "log_prob")
    )
    merged = Grid([key for key in keys if key in place], said, log_prob)
    both = [key for key in fresh.keys if shipped and key in shipped.keys]
    if not both:
        return merged, {"prompts": 0, "said": float("nan"), "log_prob": float("nan")}
    new, old = ((grid, [grid.keys.index(key) for key in both]) for grid in (fresh, shipped))
    defined = fresh.said[0, 0] >= 0

    def pairs(name: str) -> list[np.ndarray]:
        return [getattr(grid, name)[:, rows][..., defined] for grid, rows in (new, old)]

    says, logs = pairs("said"), pairs("log_prob")
    apart = np.abs(logs[0].astype(float) - logs[1]).max()
    equal = (says[0] == says[1]).mean()
    return merged, {"prompts": len(both), "said": float(equal), "log_prob": float(apart)}


def back_patching_helps(repairs: pd.DataFrame, difference: pd.DataFrame) -> dict[str, str]:
    """C6. repairs, difference: from `repair_table` and `against_donor`; r1's states are patched.

    Three checks, each with its whole interval above zero: with one pair of layers chosen on the
    other half, more prompts are right than without a patch; that pair repairs more wrong cases than
    one with a donor's states; and more cases are repaired by any pair (the oracle) than with a
    donor's states.
    """
    by, less = repairs.set_index("arm"), difference[difference["place"] == "r1"].set_index("how")
    less, net = less.loc[["honest", "oracle"]], by.loc["r1"]

    def share(arm: str, how: str) -> str:
        mean, low, high = by.loc[arm, [how, f"{how}_low", f"{how}_high"]]
        return percent({"share": mean, "low": low, "high": high})

    ours = (
        f"r1 patched: oracle {share('r1', 'oracle')}, donor's states "
        f"{share('r1 donor', 'oracle')}; one pair chosen on the other half "
        f"{share('r1', 'honest')}, donor's {share('r1 donor', 'honest')}; net change of accuracy "
        f"{share('r1', 'net')}; wrong cases: {net['wrong']}"
    )
    passed = [net["net_low"] > 0, *(less["low"] > 0)]
    return claim("C6", ours, passed, [net["net_high"] < 0, *(less["high"] < 0)])
