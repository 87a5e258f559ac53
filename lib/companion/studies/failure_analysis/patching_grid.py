"""02: back-patching over all pairs of layers."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backattn.analysis.back_patching import back_patch, back_patch_one
from backattn.files import atomic_file
from companion.measures.two_hop import donors, first_token_pairs, place_labels
from companion.questions.prompts import last_token_positions
from companion.report.intervals import mean_summary, wilson
from companion.report.verdicts import Claim, _weighed


@dataclass
class Grid:
    """Back-patching over all layer pairs of the analysis set, for every arm ("r1", "r1 donor", "last", "last donor").

    keys: per prompt its text and its donor's (`grid_keys`). said: arm -> [n, targets, sources] next tokens, -1 where
    undefined. log_prob: arm -> [n, targets, sources] of e3, half precision.
    """

    keys: list[str]
    said: dict[str, np.ndarray]
    log_prob: dict[str, np.ndarray]


PATCH_ARMS = ("r1", "r1 donor", "last", "last donor")


def back_patching(
    model, tokenizer, frame: pd.DataFrame, rows: Sequence[int], seed: int = 0
) -> Grid:
    """Run every (source above target) pair for some rows of the analysis set, in all arms.

    The donor arms take the states of another prompt (`donors` of the whole frame, with any relations), at the same
    place in it.
    """
    said, log_prob = {}, {}
    for arm, chosen, given in _patches(tokenizer, frame, rows, seed):
        patched = back_patch(model, tokenizer, *chosen, donors=given)
        said[arm], log_prob[arm] = patched.said.numpy(), patched.log_probs[..., 0].half().numpy()
    keys = grid_keys(frame, seed)
    return Grid([keys[row] for row in rows], said, log_prob)


def _patches(
    tokenizer, frame: pd.DataFrame, rows: Sequence[int], seed: int
) -> Iterator[tuple[str, tuple, list | None]]:
    """Per arm what `back_patch` takes for some rows: (arm, (prompts, positions, tokens), donors)."""
    prompts, ids, other = (
        frame["two_hop"].tolist(),
        first_token_pairs(tokenizer, frame),
        donors(frame, seed, "any"),
    )
    labels = place_labels(tokenizer, frame)
    for arm in PATCH_ARMS:
        places = [end for (end,) in last_token_positions(labels, [arm.split()[0]])]
        given = (
            [(prompts[other[row]], places[other[row]]) for row in rows]
            if arm.endswith("donor")
            else None
        )
        yield (
            arm,
            (
                [prompts[row] for row in rows],
                [places[row] for row in rows],
                [ids[row][:1] for row in rows],
            ),
            given,
        )


def grid_keys(frame: pd.DataFrame, seed: int = 0) -> list[str]:
    """What a row of the grid depends on: the prompt and its donor."""
    prompts = frame["two_hop"].to_numpy()
    return [
        f"{own}\t{other}"
        for own, other in zip(prompts, prompts[donors(frame, seed, "any")], strict=True)
    ]


def repaired(grid: Grid, answers: Sequence[frozenset]) -> dict[str, np.ndarray]:
    """Whether each patch makes the model say e3: arm -> [n, targets, sources]."""
    sets = [np.array(sorted(ids)) for ids in answers]
    return {
        arm: np.stack([np.isin(x, ids) for x, ids in zip(said, sets, strict=True)])
        for arm, said in grid.said.items()
    }


def halves(bridges: Sequence) -> np.ndarray:
    """True for the first half: bridge entities in turn, so that no entity is on both sides."""
    names = sorted(set(bridges))
    return np.array([names.index(bridge) % 2 == 0 for bridge in bridges])


def cross_fitted_choice(
    success: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Choose the (target, source) after which most prompts of one half are right, and try it on the other; both ways.

    success: [n, targets, sources], right with the patch; first: [n] which half. All prompts count, so that a pair that
    mends some wrong cases and breaks more right ones is not chosen.

    Returns (success of each prompt under the pair chosen on the other half [n], the pairs chosen on first and second).
    """
    result, pairs = np.zeros(len(success), dtype=bool), []
    defined = np.triu(np.ones(success.shape[1:], dtype=bool), 1)  # sources above targets
    for chooser in (first, ~first):
        score = np.where(defined, success[chooser].sum(0), -1)
        target, source = (int(i) for i in np.unravel_index(score.argmax(), score.shape))
        pairs.append((target, source))
        result[~chooser] = success[~chooser, target, source]
    return result, pairs


def repair_table(
    success: dict[str, np.ndarray], right: np.ndarray, bridges: Sequence
) -> pd.DataFrame:
    """How many wrong cases back-patching mends, and how many right ones it breaks, by arm.

    honest: share of wrong cases mended by the pair chosen on the other half. oracle: by any pair (as published).
    any_pair: the mean over pairs. broken: share of right cases that the honest pair breaks. net: change of the share of
    all prompts that are right, with the honest pair (interval over bridge entities; the others are Wilson's). pairs are
    "target ← source", chosen on the first and on the second half.
    """
    rows, first, wrong = [], halves(bridges), ~right
    for arm, table in success.items():
        chosen, pairs = cross_fitted_choice(table, first)
        row = {"arm": arm, "wrong": int(wrong.sum())}
        for name, hit in (("honest", chosen), ("oracle", table.any((1, 2)))):
            low, high = wilson(hit[wrong].sum(), wrong.sum())
            row |= {name: hit[wrong].mean(), f"{name}_low": low, f"{name}_high": high}
        defined = np.triu_indices(table.shape[1], 1, table.shape[2])
        row |= {
            "any_pair": table[wrong][:, defined[0], defined[1]].mean(),
            "right": int(right.sum()),
        }
        row |= {"broken": 1 - chosen[right].mean() if right.any() else np.nan}
        net = mean_summary(chosen.astype(float) - right, bridges)
        row |= {"net": net["mean"], "net_low": net["low"], "net_high": net["high"]}
        rows.append({**row, "pairs": ", ".join(f"{t} ← {s}" for t, s in pairs)})
    return pd.DataFrame(rows)


def against_donor(
    success: dict[str, np.ndarray], right: np.ndarray, bridges: Sequence
) -> pd.DataFrame:
    """Share of wrong cases mended, own states less a donor's: place, how, mean, low, high (over bridge entities), n."""
    rows, first, wrong, bridges = [], halves(bridges), ~right, np.asarray(bridges)
    for place in ("r1", "last"):
        own, donor = success[place], success[f"{place} donor"]
        pairs = (cross_fitted_choice(x, first)[0] for x in (own, donor))
        for how, (a, b) in (("honest", pairs), ("oracle", (own.any((1, 2)), donor.any((1, 2))))):
            rows.append(
                {
                    "place": place,
                    "how": how,
                    **mean_summary(a[wrong].astype(float) - b[wrong], bridges[wrong]),
                }
            )
    return pd.DataFrame(rows)


def pair_maps(success: dict[str, np.ndarray], right: np.ndarray) -> pd.DataFrame:
    """Share of wrong cases that each pair mends: arm, target, source, share."""
    rows = []
    for arm, table in success.items():
        target, source = np.triu_indices(table.shape[1], 1, table.shape[2])
        share = table[~right].mean(0)[target, source]
        rows.append(pd.DataFrame({"arm": arm, "target": target, "source": source, "share": share}))
    return pd.concat(rows, ignore_index=True)


def staircase_error(
    model, tokenizer, frame: pd.DataFrame, rows: Sequence[int], pairs: int, seed: int = 0
) -> float:
    """Largest difference of log p(e3) between the staircase and plain forward passes one by one.

    Over `pairs` random pairs of layers for each of some rows of the analysis set, in every arm (see `back_patching`).
    """
    draw, errors = np.random.default_rng(seed), []
    for _, chosen, given in _patches(tokenizer, frame, rows, seed):
        patched = back_patch(model, tokenizer, *chosen, donors=given)
        targets, sources = np.triu_indices(patched.said.shape[1], 1, patched.said.shape[2])
        for index, (prompt, place, (token,)) in enumerate(zip(*chosen, strict=True)):
            for pair in draw.choice(len(targets), size=min(pairs, len(targets)), replace=False):
                target, source = int(targets[pair]), int(sources[pair])
                donor = given[index] if given else None
                plain = back_patch_one(model, tokenizer, prompt, place, source, target, donor)
                errors.append(
                    abs(plain[token].item() - patched.log_probs[index, target, source, 0].item())
                )
    return max(errors)


def save_grid(grid: Grid, path: Path, model_name: str) -> None:
    """Write a grid as safetensors, with its prompts and the model's name in the header."""
    tensors = {f"said {arm}": x.astype(np.int32) for arm, x in grid.said.items()}
    tensors |= {f"log_prob {arm}": x for arm, x in grid.log_prob.items()}
    with atomic_file(path) as temporary:
        save_file(
            tensors, temporary, metadata={"model": model_name, "prompts": json.dumps(grid.keys)}
        )


def load_grid(path: Path, model_name: str) -> Grid | None:
    """A grid written by `save_grid`, or None when there is none for this model.

    Raises ValueError when the file cannot be read.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        said, log_prob = (
            {arm: tensors[f"{kind} {arm}"] for arm in PATCH_ARMS} for kind in ("said", "log_prob")
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

    Returns (grid over the keys that either has, in their order; comparison on the prompts that both have: prompts, said
    (share of equal next tokens) and log_prob (largest difference)).
    """
    grids = [fresh, *([shipped] if shipped else [])]
    place = {
        key: (g, grid.keys.index(key))
        for g, grid in reversed(list(enumerate(grids)))
        for key in grid.keys
    }
    chosen = [place[key] for key in keys if key in place]

    def pick(name: str, arm: str) -> np.ndarray:
        return np.stack([getattr(grids[g], name)[arm][row] for g, row in chosen])

    said, log_prob = ({arm: pick(name, arm) for arm in PATCH_ARMS} for name in ("said", "log_prob"))
    merged = Grid([key for key in keys if key in place], said, log_prob)
    both = [key for key in fresh.keys if shipped and key in shipped.keys]
    compared: dict[str, float] = {
        "prompts": len(both),
        "said": float("nan"),
        "log_prob": float("nan"),
    }
    if both:
        mine, theirs = ([grid.keys.index(key) for key in both] for grid in (fresh, shipped))
        defined = fresh.said["r1"][0] >= 0
        compared["said"] = float(
            np.mean(
                [(fresh.said[a][mine] == shipped.said[a][theirs])[:, defined] for a in PATCH_ARMS]
            )
        )
        compared["log_prob"] = max(
            float(
                np.abs(fresh.log_prob[a][mine].astype(float) - shipped.log_prob[a][theirs])[
                    :, defined
                ].max()
            )
            for a in PATCH_ARMS
        )
    return merged, compared


def back_patching_helps(mending: pd.DataFrame, difference: pd.DataFrame) -> Claim:
    """C6. mending, difference: from `failures.mending_table` and `failures.against_donor`; r1's states are patched.

    Three checks, each with its whole interval above zero: with one pair of layers chosen on the other half, more
    prompts are right than without a patch; that pair mends more wrong cases than one with a donor's states; and more
    cases are mended by any pair (the oracle) than with a donor's states.
    """
    by = mending.set_index("arm")
    own, rows = by.loc["r1"], difference[difference["place"] == "r1"].set_index("how")

    def told(arm: str, how: str) -> str:
        row = by.loc[arm]
        return f"{row[how]:.0%} [{row[how + '_low']:.0%}, {row[how + '_high']:.0%}]"

    passed = [own["net_low"] > 0, *(rows.loc[how, "low"] > 0 for how in ("honest", "oracle"))]
    against = [own["net_high"] < 0, *(rows.loc[how, "high"] < 0 for how in ("honest", "oracle"))]
    return Claim(
        id="C6",
        claim="restoring r1's high-layer state into a lower layer helps",
        paper="32–66 % of wrong cases by model, as an oracle over all layer pairs (Biran et al. 2024)",
        ours=f"r1 patched: oracle {told('r1', 'oracle')}, donor's states {told('r1 donor', 'oracle')}; one pair chosen "
        f"on the other half {told('r1', 'honest')}, donor's {told('r1 donor', 'honest')}; net change of accuracy "
        f"{told('r1', 'net')}; wrong cases: {own['wrong']}",
        kind="exact",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="02_failure_analysis",
        figure="02_back_patching",
    )
