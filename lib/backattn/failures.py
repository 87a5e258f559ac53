"""Why two-hop questions fail: the conflict of e2 and e3 inside, and what mends it (claims C4 to C6).

Notation as in `census`. A place is the last token of e1's, r1's or r2's words in the two-hop prompt, or the last
position.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .arch import describe
from .datasets import place_of
from .flow_back import flow_back
from .intervals import bootstrap, mean_interval, mean_row, wilson
from .lens import read_states
from .logit_flow import continuation_ids, logit_flow
from .patching import Prompts, back_patch, back_patch_one, blocked_log_probs
from .residual import capture, encode
from .runtime import atomic_file, progress
from .stages import grouped_flow
from .tasks import ends, label_tokens

# ---------------------------------------------------------------- reading the conflict

PLACES = ("e1", "r1", "r2", "last")
READABLE = 10  # an entity can be read where its first token is among this many


def groups(tokenizer, frame: pd.DataFrame) -> list[np.ndarray]:
    """What each token of the two-hop prompt is for: "e1", "r1", "r2", "last" or "context"."""
    return label_tokens(tokenizer, frame["two_hop"], {name: frame[f"{name}_span"] for name in ("e1", "r1", "r2")})


def pair_ids(tokenizer, frame: pd.DataFrame) -> list[tuple[int, int]]:
    """First tokens of (e3, e2) by their proper names."""
    first = {name: continuation_ids(tokenizer, name)[0] for name in {*frame["e3"], *frame["e2"]}}
    return [(first[e3], first[e2]) for e3, e2 in zip(frame["e3"], frame["e2"], strict=True)]


@dataclass
class Reading:
    """What can be read in the states of two-hop prompts, by place and layer (see `read_conflict`).

    places: their names. All else is [n, places, L+1]. difference: logit of e3 less that of e2. readable: entity ->
    whether its first token is among the READABLE highest; "e2 shuffled" and "e3 shuffled" belong to other prompts.
    wins: entity -> whether its logit is above that of the shuffled one (½ where both are the same token, as expected
    without information).
    """

    places: tuple[str, ...]
    difference: np.ndarray
    readable: dict[str, np.ndarray]
    wins: dict[str, np.ndarray]


def read_conflict(model, tokenizer, frame: pd.DataFrame, seed: int = 0, places: Sequence[str] = PLACES) -> Reading:
    """Read e3 and e2 in every layer at the last token of each of some places, and the same for shuffled labels.

    A prompt's shuffled labels are the e2 and e3 of another prompt of the same pair of relations with another e2.
    """
    ids = np.array(pair_ids(tokenizer, frame))
    other = donors(frame, seed)
    tokens = np.concatenate([ids, ids[other]], axis=1)  # e3, e2, e3 shuffled, e2 shuffled
    where = ends(groups(tokenizer, frame), places)
    logits, ranks = read_states(model, tokenizer, frame["two_hop"].tolist(), where, tokens.tolist(), ranks=True)
    names = ("e3", "e2", "e3 shuffled", "e2 shuffled")
    readable = {name: ranks[..., k] < READABLE for k, name in enumerate(names)}
    wins = {}
    for k, name in enumerate(("e3", "e2")):
        same = (tokens[:, k] == tokens[:, k + 2])[:, None, None]  # continents: another prompt's e3 may be the same
        wins[name] = np.where(same, 0.5, logits[..., k] > logits[..., k + 2])
    return Reading(tuple(places), logits[..., 0] - logits[..., 1], readable, wins)


def donors(frame: pd.DataFrame, seed: int = 0, relations: str = "same") -> np.ndarray:
    """Per prompt the row number of another one whose e2 and e3 are none of this one's right answers, nor its e2.

    relations: "same" draws among the prompts with the same relations where there is one, else of the same pair, else
    among all; "any" draws among all. The draw goes by a hash of both prompts' facts, so that a prompt more or less
    leaves the donors of the others what they are.

    Raises ValueError when there is none, or for another value of `relations`.
    """
    if relations not in ("same", "any"):
        raise ValueError(f'Unknown relations {relations!r}; choose "same" or "any".')
    chosen = np.empty(len(frame), dtype=int)
    same = (frame["pair"] + "|" + frame["r1"] + "|" + frame["r2"]).to_numpy()
    pair, e2, e3 = (frame[name].to_numpy() for name in ("pair", "e2", "e3"))
    fact = same + "|" + frame["e1"].to_numpy()
    for row, (second, third) in enumerate(zip(frame["e2_aliases"], frame["e3_aliases"], strict=True)):
        own = [e2[row], e3[row], *second.split("|"), *third.split("|")]
        other = ~np.isin(e2, own) & ~np.isin(e3, own)
        fits = [other & (same == same[row]), other & (pair == pair[row]), other][2 * (relations == "any") :]
        fit = np.flatnonzero(next((fit for fit in fits if fit.any()), other))
        if not len(fit):
            raise ValueError(
                f"No other prompt is about other entities than {e2[row]!r} and {e3[row]!r}: ask more facts."
            )
        chosen[row] = min(fit, key=lambda place: place_of(f"{seed}|{fact[row]}|{fact[place]}"))
    return chosen


def contrast(
    values: np.ndarray,
    right: Sequence[bool],
    strata: Sequence,
    clusters: Sequence,
    permutations: int = 2000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Right against wrong cases within strata (pairs of relations), at every point of [n, ...].

    Prompts of one cluster (bridge entity) and stratum are not independent, so they are averaged and count as one, with
    the share of them that is right.

    difference: right less wrong, from a regression on that share with one intercept per stratum. p: permutation test
    (shares exchanged within strata), corrected for all points at once by the largest |difference / its permutation
    spread|. Raises ValueError when no stratum has both right and wrong cases.
    """
    shape, flat = values.shape[1:], values.reshape(len(values), -1).astype(float)
    keys = pd.DataFrame({"stratum": np.asarray(strata), "cluster": np.asarray(clusters)})
    units = (
        pd.DataFrame(flat)
        .assign(right=np.asarray(right, dtype=float))
        .groupby([keys["stratum"], keys["cluster"]])
        .mean()
    )
    stratum = units.index.codes[0]
    share, flat = units.pop("right").to_numpy(), units.to_numpy()
    own = share - (np.bincount(stratum, weights=share) / np.bincount(stratum))[stratum]
    total = (own**2).sum()
    if total < 1e-12:
        raise ValueError("No pair of relations has both right and wrong cases: ask more facts.")
    draw, null = np.random.default_rng(seed), []
    order = np.argsort(stratum, kind="stable")
    for _ in range(permutations):
        shuffled = np.empty_like(own)
        shuffled[order] = own[order][np.lexsort((draw.random(len(own)), stratum[order]))]
        null.append(shuffled @ flat / total)
    null, difference = np.array(null), own @ flat / total
    spread = np.maximum(null.std(0), 1e-12)
    largest = np.abs(null / spread).max(1)
    p = (1 + (largest[:, None] >= np.abs(difference / spread)).sum(0)) / (permutations + 1)
    return {"difference": difference.reshape(shape), "p": p.reshape(shape)}


def conflict_table(
    reading: Reading, right: Sequence[bool], strata: Sequence, clusters: Sequence, permutations: int = 2000
) -> pd.DataFrame:
    """Logit e3 − e2 by place and layer for right and wrong cases, with 95 % bands over bridge entities (clusters).

    Returns: place, layer, case ("right", "wrong"), mean, low, high, n, and, for both cases alike, contrast (right less
    wrong within pairs of relations) and p (see `contrast`).
    """
    right, clusters, rows = np.asarray(right, dtype=bool), np.asarray(clusters), []
    test = contrast(reading.difference, right, strata, clusters, permutations)
    for case, mask in (("right", right), ("wrong", ~right)):
        mean, low, high = mean_interval(reading.difference[mask], clusters[mask])
        for place, name in enumerate(reading.places):
            part = {"layer": range(mean.shape[1]), "mean": mean[place], "low": low[place], "high": high[place]}
            part |= {"contrast": test["difference"][place], "p": test["p"][place]}
            rows.append(pd.DataFrame(part).assign(place=name, case=case, n=int(mask.sum())))
    return pd.concat(rows, ignore_index=True)


def readable_table(reading: Reading) -> pd.DataFrame:
    """Share of prompts in which an entity can be read: place, entity, layer, share, shuffled (labels), wins."""
    rows = []
    for entity in ("e2", "e3"):
        own, other = (reading.readable[name].mean(0) for name in (entity, f"{entity} shuffled"))  # [places, L+1]
        for place, name in enumerate(reading.places):
            wins = reading.wins[entity].mean(0)[place]
            part = {"layer": range(own.shape[1]), "share": own[place], "shuffled": other[place], "wins": wins}
            rows.append(pd.DataFrame(part).assign(place=name, entity=entity))
    return pd.concat(rows, ignore_index=True)


def first_readable(reading: Reading, clusters: Sequence, resamples: int = 1000) -> pd.DataFrame:
    """From which state on an entity can be told from another prompt's, by place.

    Returns per place and entity: ever (share of prompts in which it is among the READABLE highest in some layer),
    ever_shuffled (for shuffled labels), told: the first state from which on, up to the last but one, its logit beats
    the shuffled entity's in more than half of the prompts, with the whole 95 % interval over clusters; missing where
    there is none; wins: the share in which it does in the state that enters the last layer; n.
    """
    rows, weights = [], bootstrap(clusters, resamples)
    for place, name in enumerate(reading.places):
        for entity in ("e2", "e3"):
            own, other = (reading.readable[key][:, place] for key in (entity, f"{entity} shuffled"))  # [n, L+1]
            wins = reading.wins[entity][:, place, :-1]
            low = np.percentile(weights @ wins, 2.5, axis=0) > 0.5
            run = int(np.argmin(low[::-1])) if not low.all() else len(low)
            row = {"place": name, "entity": entity, "ever": own.any(1).mean(), "ever_shuffled": other.any(1).mean()}
            told = float(len(low) - run) if run else np.nan
            rows.append({**row, "told": told, "wins": wins[:, -1].mean(), "n": len(own)})
    return pd.DataFrame(rows)


def causality(model, tokenizer, frame: pd.DataFrame, batch_size: int = 16) -> pd.DataFrame:
    """C5: largest difference, relative to its norm, of the states in one-hop and two-hop prompts, at r1 and at the end.

    For the wording "possessive" only: the one-hop prompt is the two-hop prompt cut after r1, with " is".

    Returns: layer, r1, last.
    """
    one = [text[: end[1]] + " is" for text, end in zip(frame["two_hop"], frame["r1_span"], strict=True)]
    worst = []
    for start in range(0, len(frame), batch_size):
        pair = []
        for prompts in (one, frame["two_hop"].tolist()):
            batch = encode(tokenizer, prompts[start : start + batch_size], device=model.device)
            pair.append((batch, capture(model, batch, detail=False).hidden))
        where = torch.tensor(
            [end[0] for end in ends(groups(tokenizer, frame.iloc[start : start + batch_size]), ["r1"])]
        )
        (one_batch, one_hidden), (two_batch, two_hidden) = pair
        rows = torch.arange(len(where))
        spots = {"r1": (where, where), "last": (one_batch.last.cpu(), two_batch.last.cpu())}
        for name, (a, b) in spots.items():
            left, right = one_hidden[:, rows, a], two_hidden[:, rows, b]  # [L+1, B, D]
            error = (left - right).norm(dim=-1) / right.norm(dim=-1)
            part = {"layer": range(len(error)), "place": name, "difference": error.max(1).values.cpu().numpy()}
            worst.append(pd.DataFrame(part))
    table = pd.concat(worst).pivot_table(index="layer", columns="place", values="difference", aggfunc="max")
    return table[["r1", "last"]].reset_index().rename_axis(columns=None)


# ---------------------------------------------------------------- flow


def flows(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Flow into e3 and into e2 by layer, kind and place, along the linear route (logits).

    Returns: prompt, entity, layer, kind, group, flow, direct.
    """
    labels, parts, ids = groups(tokenizer, frame), [], np.array(pair_ids(tokenizer, frame))
    for k, entity in enumerate(("e3", "e2")):
        first = [tokenizer.decode([token]).strip() for token in ids[:, k]]  # what the flow is scored on anyway
        flow = logit_flow(model, tokenizer, frame["two_hop"], first, level="layer", batch_size=8)
        back = flow_back(model, tokenizer, flow, route="linear", batch_size=8)
        back.check()
        assert flow.answer_ids == ids[:, k].tolist()
        parts.append(grouped_flow(back, labels).assign(entity=entity))
    return pd.concat(parts, ignore_index=True)


def straight(flow: pd.DataFrame, place: str, entity: str) -> np.ndarray:
    """What the last position's attention takes from one place straight into an entity's logit: [prompts, layers]."""
    part = flow[(flow["group"] == place) & (flow["kind"] == "attention") & (flow["entity"] == entity)]
    wide = part.pivot_table(index="prompt", columns="layer", values="direct", aggfunc="sum")
    prompts, layers = int(flow["prompt"].max()) + 1, int(flow["layer"].max()) + 1
    return wide.reindex(index=range(prompts), columns=range(layers)).fillna(0.0).to_numpy()


def flow_bands(flow: pd.DataFrame, right: Sequence[bool], clusters: Sequence) -> pd.DataFrame:
    """`straight` from r1 and from e1 by layer, right and wrong cases, with 95 % bands over clusters.

    Returns: place, entity, case, layer, mean, low, high.
    """
    right, clusters, rows = np.asarray(right, dtype=bool), np.asarray(clusters), []
    for place in ("e1", "r1"):
        for entity in ("e3", "e2"):
            values = straight(flow, place, entity)
            for case, mask in (("right", right), ("wrong", ~right)):
                mean, low, high = mean_interval(values[mask], clusters[mask])
                table = pd.DataFrame({"layer": range(len(mean)), "mean": mean, "low": low, "high": high})
                rows.append(table.assign(place=place, entity=entity, case=case))
    return pd.concat(rows, ignore_index=True)


def flow_tests(
    flow: pd.DataFrame, right: Sequence[bool], strata: Sequence, clusters: Sequence, permutations: int = 2000
) -> pd.DataFrame:
    """What C4 says of r1's high layers (the upper third), as numbers: question, mean, low, high, p, n, holds.

    The first two rows compare wrong with right cases within pairs of relations (`contrast`, no interval); the third is
    about wrong cases alone (interval and p by bootstrap over clusters). holds: above zero with p < 0.05 / 3.
    """
    right, clusters = np.asarray(right, dtype=bool), np.asarray(clusters)
    e3, e2 = (straight(flow, "r1", entity) for entity in ("e3", "e2"))  # [n, layers]
    layers = np.arange(e2.shape[1])
    late, positive = layers >= -(-2 * len(layers) // 3), np.clip(e2, 0, None)
    rows = []
    for question, values in (
        ("late flow from r1 into e2, wrong less right cases (logits)", e2[:, late].sum(1)),
        (
            "mean layer of the flow from r1 into e2, wrong less right cases",
            positive @ layers / (positive.sum(1) + 1e-12),
        ),
    ):
        test = contrast(values[:, None], right, strata, clusters, permutations)
        rows.append({"question": question, "mean": -test["difference"][0], "p": test["p"][0], "n": len(right)})
    ahead = (e2 - e3)[:, late].sum(1)[~right]
    resampled = bootstrap(clusters[~right], permutations) @ ahead
    p = 2 * min((resampled <= 0).mean(), (resampled >= 0).mean()) + 1 / permutations
    question = "late flow from r1 in wrong cases, into e2 less into e3 (logits)"
    rows.append({"question": question, **mean_row(ahead, clusters[~right]), "p": p})
    table = pd.DataFrame(rows)[["question", "mean", "low", "high", "p", "n"]]
    return table.assign(holds=(table["mean"] > 0) & (table["p"] < 0.05 / len(table)))


# ---------------------------------------------------------------- interventions


def hide_windows(
    model, tokenizer, frame: pd.DataFrame, right: Sequence[bool], width: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Hide r1 from the last position in windows of layers; as control, as many random tokens of the examples in front.

    Returns: window (its first layer), hidden ("r1", "examples"), entity ("e3", "e2"), case, mean change of the
    entity's log-probability, low, high (95 %, over bridge entities), n.
    """
    labels, ids, draw = groups(tokenizer, frame), np.array(pair_ids(tokenizer, frame)), np.random.default_rng(seed)
    prompts, right, bridge = frame["two_hop"].tolist(), np.asarray(right, dtype=bool), frame["e2"].to_numpy()
    own = [np.flatnonzero(row == "r1").tolist() for row in labels]
    random = [
        draw.choice(np.arange(1, np.flatnonzero(row == "e1")[0]), size=len(places), replace=False).tolist()
        for row, places in zip(labels, own, strict=True)
    ]

    again = Prompts(model, tokenizer, prompts)

    def log_probs(sources: Sequence, layers: Sequence[int]) -> np.ndarray:
        logs = blocked_log_probs(again, sources, layers)
        return logs.gather(1, torch.tensor(ids)).numpy()  # [n, (e3, e2)]

    layers = len(describe(model).blocks)
    base, rows = log_probs([[] for _ in prompts], []), []
    for first in progress(range(0, layers, width), "hiding r1", unit="window"):
        for hidden, sources in (("r1", own), ("examples", random)):
            change = log_probs(sources, range(first, min(first + width, layers))) - base
            for case, mask in (("right", right), ("wrong", ~right)):
                for k, entity in enumerate(("e3", "e2")):
                    row = {"window": first, "hidden": hidden, "entity": entity, "case": case}
                    rows.append({**row, **mean_row(change[mask, k], bridge[mask])})
    return pd.DataFrame(rows)


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


def back_patching(model, tokenizer, frame: pd.DataFrame, rows: Sequence[int], seed: int = 0) -> Grid:
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
    prompts, ids, other = frame["two_hop"].tolist(), pair_ids(tokenizer, frame), donors(frame, seed, "any")
    labels = groups(tokenizer, frame)
    for arm in PATCH_ARMS:
        places = [end for (end,) in ends(labels, [arm.split()[0]])]
        given = [(prompts[other[row]], places[other[row]]) for row in rows] if arm.endswith("donor") else None
        yield (
            arm,
            ([prompts[row] for row in rows], [places[row] for row in rows], [ids[row][:1] for row in rows]),
            given,
        )


def grid_keys(frame: pd.DataFrame, seed: int = 0) -> list[str]:
    """What a row of the grid depends on: the prompt and its donor."""
    prompts = frame["two_hop"].to_numpy()
    return [f"{own}\t{other}" for own, other in zip(prompts, prompts[donors(frame, seed, "any")], strict=True)]


def mended(grid: Grid, answers: Sequence[frozenset]) -> dict[str, np.ndarray]:
    """Whether each patch makes the model say e3: arm -> [n, targets, sources]."""
    sets = [np.array(sorted(ids)) for ids in answers]
    return {
        arm: np.stack([np.isin(x, ids) for x, ids in zip(said, sets, strict=True)]) for arm, said in grid.said.items()
    }


def halves(bridges: Sequence) -> np.ndarray:
    """True for the first half: bridge entities in turn, so that no entity is on both sides."""
    names = sorted(set(bridges))
    return np.array([names.index(bridge) % 2 == 0 for bridge in bridges])


def honest_choice(success: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
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


def mending_table(success: dict[str, np.ndarray], right: np.ndarray, bridges: Sequence) -> pd.DataFrame:
    """How many wrong cases back-patching mends, and how many right ones it breaks, by arm.

    honest: share of wrong cases mended by the pair chosen on the other half. oracle: by any pair (as published).
    any_pair: the mean over pairs. broken: share of right cases that the honest pair breaks. net: change of the share of
    all prompts that are right, with the honest pair (interval over bridge entities; the others are Wilson's). pairs are
    "target ← source", chosen on the first and on the second half.
    """
    rows, first, wrong = [], halves(bridges), ~right
    for arm, table in success.items():
        chosen, pairs = honest_choice(table, first)
        row = {"arm": arm, "wrong": int(wrong.sum())}
        for name, hit in (("honest", chosen), ("oracle", table.any((1, 2)))):
            low, high = wilson(hit[wrong].sum(), wrong.sum())
            row |= {name: hit[wrong].mean(), f"{name}_low": low, f"{name}_high": high}
        defined = np.triu_indices(table.shape[1], 1, table.shape[2])
        row |= {"any_pair": table[wrong][:, defined[0], defined[1]].mean(), "right": int(right.sum())}
        row |= {"broken": 1 - chosen[right].mean() if right.any() else np.nan}
        net = mean_row(chosen.astype(float) - right, bridges)
        row |= {"net": net["mean"], "net_low": net["low"], "net_high": net["high"]}
        rows.append({**row, "pairs": ", ".join(f"{t} ← {s}" for t, s in pairs)})
    return pd.DataFrame(rows)


def against_donor(success: dict[str, np.ndarray], right: np.ndarray, bridges: Sequence) -> pd.DataFrame:
    """Share of wrong cases mended, own states less a donor's: place, how, mean, low, high (over bridge entities), n."""
    rows, first, wrong, bridges = [], halves(bridges), ~right, np.asarray(bridges)
    for place in ("r1", "last"):
        own, donor = success[place], success[f"{place} donor"]
        pairs = (honest_choice(x, first)[0] for x in (own, donor))
        for how, (a, b) in (("honest", pairs), ("oracle", (own.any((1, 2)), donor.any((1, 2))))):
            rows.append({"place": place, "how": how, **mean_row(a[wrong].astype(float) - b[wrong], bridges[wrong])})
    return pd.DataFrame(rows)


def pair_maps(success: dict[str, np.ndarray], right: np.ndarray) -> pd.DataFrame:
    """Share of wrong cases that each pair mends: arm, target, source, share."""
    rows = []
    for arm, table in success.items():
        target, source = np.triu_indices(table.shape[1], 1, table.shape[2])
        share = table[~right].mean(0)[target, source]
        rows.append(pd.DataFrame({"arm": arm, "target": target, "source": source, "share": share}))
    return pd.concat(rows, ignore_index=True)


def staircase_error(model, tokenizer, frame: pd.DataFrame, rows: Sequence[int], pairs: int, seed: int = 0) -> float:
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
                errors.append(abs(plain[token].item() - patched.log_probs[index, target, source, 0].item()))
    return max(errors)


def save_grid(grid: Grid, path: Path, model_name: str) -> None:
    """Write a grid as safetensors, with its prompts and the model's name in the header."""
    tensors = {f"said {arm}": x.astype(np.int32) for arm, x in grid.said.items()}
    tensors |= {f"log_prob {arm}": x for arm, x in grid.log_prob.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"model": model_name, "prompts": json.dumps(grid.keys)})


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
        said, log_prob = ({arm: tensors[f"{kind} {arm}"] for arm in PATCH_ARMS} for kind in ("said", "log_prob"))
        grid = Grid(json.loads(about["prompts"]), said, log_prob)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): take it again from the repository (git checkout)."
        ) from error
    return grid if about["model"] == model_name else None


def merge_grids(fresh: Grid, shipped: Grid | None, keys: Sequence[str]) -> tuple[Grid, dict[str, float]]:
    """The fresh results, and the shipped ones for those of `keys` that were not run again.

    Returns (grid over the keys that either has, in their order; comparison on the prompts that both have: prompts, said
    (share of equal next tokens) and log_prob (largest difference)).
    """
    grids = [fresh, *([shipped] if shipped else [])]
    place = {key: (g, grid.keys.index(key)) for g, grid in reversed(list(enumerate(grids))) for key in grid.keys}
    chosen = [place[key] for key in keys if key in place]

    def pick(name: str, arm: str) -> np.ndarray:
        return np.stack([getattr(grids[g], name)[arm][row] for g, row in chosen])

    said, log_prob = ({arm: pick(name, arm) for arm in PATCH_ARMS} for name in ("said", "log_prob"))
    merged = Grid([key for key in keys if key in place], said, log_prob)
    both = [key for key in fresh.keys if shipped and key in shipped.keys]
    compared: dict[str, float] = {"prompts": len(both), "said": float("nan"), "log_prob": float("nan")}
    if both:
        mine, theirs = ([grid.keys.index(key) for key in both] for grid in (fresh, shipped))
        defined = fresh.said["r1"][0] >= 0
        compared["said"] = float(
            np.mean([(fresh.said[a][mine] == shipped.said[a][theirs])[:, defined] for a in PATCH_ARMS])
        )
        compared["log_prob"] = max(
            float(np.abs(fresh.log_prob[a][mine].astype(float) - shipped.log_prob[a][theirs])[:, defined].max())
            for a in PATCH_ARMS
        )
    return merged, compared
