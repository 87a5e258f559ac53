"""Why two-hop questions fail: the conflict of e2 and e3 inside, and what mends it (claims C4 to C6).

Notation as in `census`. A place is the last token of e1's, r1's or r2's words in the two-hop prompt, or the last
position.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from backattn.analysis.flow_back import flow_back
from backattn.analysis.knockouts import CachedPrompts, blocked_log_probs
from backattn.analysis.logit_flow import logit_flow
from backattn.models.activations import capture
from backattn.models.decoder import describe
from backattn.models.tokens import encode
from backattn.runtime import progress
from companion.measures.stages import grouped_flow
from companion.measures.two_hop import Reading, contrast, first_token_pairs, place_labels
from companion.questions.prompts import last_token_positions
from companion.report.intervals import bootstrap, mean_interval, mean_summary
from companion.report.verdicts import Claim, _weighed


def conflict_table(
    reading: Reading,
    right: Sequence[bool],
    strata: Sequence,
    clusters: Sequence,
    permutations: int = 2000,
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
            part = {
                "layer": range(mean.shape[1]),
                "mean": mean[place],
                "low": low[place],
                "high": high[place],
            }
            part |= {"contrast": test["difference"][place], "p": test["p"][place]}
            rows.append(pd.DataFrame(part).assign(place=name, case=case, n=int(mask.sum())))
    return pd.concat(rows, ignore_index=True)


def readable_table(reading: Reading) -> pd.DataFrame:
    """Share of prompts in which an entity can be read: place, entity, layer, share, shuffled (labels), wins."""
    rows = []
    for entity in ("e2", "e3"):
        own, other = (
            reading.readable[name].mean(0) for name in (entity, f"{entity} shuffled")
        )  # [places, L+1]
        for place, name in enumerate(reading.places):
            wins = reading.wins[entity].mean(0)[place]
            part = {
                "layer": range(own.shape[1]),
                "share": own[place],
                "shuffled": other[place],
                "wins": wins,
            }
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
            own, other = (
                reading.readable[key][:, place] for key in (entity, f"{entity} shuffled")
            )  # [n, L+1]
            wins = reading.wins[entity][:, place, :-1]
            low = np.percentile(weights @ wins, 2.5, axis=0) > 0.5
            run = int(np.argmin(low[::-1])) if not low.all() else len(low)
            row = {
                "place": name,
                "entity": entity,
                "ever": own.any(1).mean(),
                "ever_shuffled": other.any(1).mean(),
            }
            told = float(len(low) - run) if run else np.nan
            rows.append({**row, "told": told, "wins": wins[:, -1].mean(), "n": len(own)})
    return pd.DataFrame(rows)


def causality(model, tokenizer, frame: pd.DataFrame, batch_size: int = 16) -> pd.DataFrame:
    """C5: largest difference, relative to its norm, of the states in one-hop and two-hop prompts, at r1 and at the end.

    For the wording "possessive" only: the one-hop prompt is the two-hop prompt cut after r1, with " is".

    Returns: layer, r1, last.
    """
    one = [
        text[: end[1]] + " is" for text, end in zip(frame["two_hop"], frame["r1_span"], strict=True)
    ]
    worst = []
    for start in range(0, len(frame), batch_size):
        pair = []
        for prompts in (one, frame["two_hop"].tolist()):
            batch = encode(tokenizer, prompts[start : start + batch_size], device=model.device)
            pair.append((batch, capture(model, batch, detail=False).hidden))
        where = torch.tensor(
            [
                end[0]
                for end in last_token_positions(
                    place_labels(tokenizer, frame.iloc[start : start + batch_size]), ["r1"]
                )
            ]
        )
        (one_batch, one_hidden), (two_batch, two_hidden) = pair
        rows = torch.arange(len(where))
        spots = {"r1": (where, where), "last": (one_batch.last.cpu(), two_batch.last.cpu())}
        for name, (a, b) in spots.items():
            left, right = one_hidden[:, rows, a], two_hidden[:, rows, b]  # [L+1, B, D]
            error = (left - right).norm(dim=-1) / right.norm(dim=-1)
            part = {
                "layer": range(len(error)),
                "place": name,
                "difference": error.max(1).values.cpu().numpy(),
            }
            worst.append(pd.DataFrame(part))
    table = pd.concat(worst).pivot_table(
        index="layer", columns="place", values="difference", aggfunc="max"
    )
    return table[["r1", "last"]].reset_index().rename_axis(columns=None)


def flows(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Flow into e3 and into e2 by layer, kind and place, along the linear route (logits).

    Returns: prompt, entity, layer, kind, group, flow, direct.
    """
    labels, parts, ids = (
        place_labels(tokenizer, frame),
        [],
        np.array(first_token_pairs(tokenizer, frame)),
    )
    for k, entity in enumerate(("e3", "e2")):
        first = [
            tokenizer.decode([token]).strip() for token in ids[:, k]
        ]  # what the flow is scored on anyway
        flow = logit_flow(model, tokenizer, frame["two_hop"], first, level="layer", batch_size=8)
        back = flow_back(model, tokenizer, flow, route="linear", batch_size=8)
        back.check()
        assert flow.answer_ids == ids[:, k].tolist()
        parts.append(grouped_flow(back, labels).assign(entity=entity))
    return pd.concat(parts, ignore_index=True)


def direct_flow(flow: pd.DataFrame, place: str, entity: str) -> np.ndarray:
    """What the last position's attention takes from one place straight into an entity's logit: [prompts, layers]."""
    part = flow[
        (flow["group"] == place) & (flow["kind"] == "attention") & (flow["entity"] == entity)
    ]
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
            values = direct_flow(flow, place, entity)
            for case, mask in (("right", right), ("wrong", ~right)):
                mean, low, high = mean_interval(values[mask], clusters[mask])
                table = pd.DataFrame(
                    {"layer": range(len(mean)), "mean": mean, "low": low, "high": high}
                )
                rows.append(table.assign(place=place, entity=entity, case=case))
    return pd.concat(rows, ignore_index=True)


def flow_tests(
    flow: pd.DataFrame,
    right: Sequence[bool],
    strata: Sequence,
    clusters: Sequence,
    permutations: int = 2000,
) -> pd.DataFrame:
    """What C4 says of r1's high layers (the upper third), as numbers: question, mean, low, high, p, n, holds.

    The first two rows compare wrong with right cases within pairs of relations (`contrast`, no interval); the third is
    about wrong cases alone (interval and p by bootstrap over clusters). holds: above zero with p < 0.05 / 3.
    """
    right, clusters = np.asarray(right, dtype=bool), np.asarray(clusters)
    e3, e2 = (direct_flow(flow, "r1", entity) for entity in ("e3", "e2"))  # [n, layers]
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
        rows.append(
            {
                "question": question,
                "mean": -test["difference"][0],
                "p": test["p"][0],
                "n": len(right),
            }
        )
    ahead = (e2 - e3)[:, late].sum(1)[~right]
    resampled = bootstrap(clusters[~right], permutations) @ ahead
    p = 2 * min((resampled <= 0).mean(), (resampled >= 0).mean()) + 1 / permutations
    question = "late flow from r1 in wrong cases, into e2 less into e3 (logits)"
    rows.append({"question": question, **mean_summary(ahead, clusters[~right]), "p": p})
    table = pd.DataFrame(rows)[["question", "mean", "low", "high", "p", "n"]]
    return table.assign(holds=(table["mean"] > 0) & (table["p"] < 0.05 / len(table)))


def hide_windows(
    model, tokenizer, frame: pd.DataFrame, right: Sequence[bool], width: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Hide r1 from the last position in windows of layers; as control, as many random tokens of the examples in front.

    Returns: window (its first layer), hidden ("r1", "examples"), entity ("e3", "e2"), case, mean change of the
    entity's log-probability, low, high (95 %, over bridge entities), n.
    """
    labels, ids, draw = (
        place_labels(tokenizer, frame),
        np.array(first_token_pairs(tokenizer, frame)),
        np.random.default_rng(seed),
    )
    prompts, right, bridge = (
        frame["two_hop"].tolist(),
        np.asarray(right, dtype=bool),
        frame["e2"].to_numpy(),
    )
    own = [np.flatnonzero(row == "r1").tolist() for row in labels]
    random = [
        draw.choice(
            np.arange(1, np.flatnonzero(row == "e1")[0]), size=len(places), replace=False
        ).tolist()
        for row, places in zip(labels, own, strict=True)
    ]

    again = CachedPrompts(model, tokenizer, prompts)

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
                    rows.append({**row, **mean_summary(change[mask, k], bridge[mask])})
    return pd.DataFrame(rows)


def late_influence(tests: pd.DataFrame) -> Claim:
    """C4. tests: from `failures.flow_tests`. Three checks, its three rows."""
    told = "; ".join(
        f"{r.question}: {r.mean:+.2f} (p = {r.p:.2g}), n = {r.n}" for r in tests.itertuples()
    )
    against = (tests["mean"] < 0) & (tests["p"] < 0.05 / len(tests))
    return Claim(
        id="C4",
        claim="in false cases the influence of r1's high layers is stronger, arrives late and feeds e2",
        paper="figure (layer ≈ 28 of 32)",
        ours=told,
        kind="tolerance",
        verdict=_weighed(tests["holds"].tolist(), against.tolist()),
        notebook="02_failure_analysis",
        figure="02_flow",
    )


def same_states(causality: pd.DataFrame, n: int) -> Claim:
    """C5. causality: layer, r1, last (relative differences). Holds when r1's are below 1e-4, and last's not small."""
    equal, differs = bool(causality["r1"].max() < 1e-4), bool(causality["last"].max() > 0.01)
    return Claim(
        id="C5",
        claim="r1's states are the same in the one-hop and the two-hop prompt",
        paper="exact (causality)",
        ours=f"largest relative difference at r1 {'below' if equal else 'not below'} 1e-4 in every layer, "
        f"at the last position {causality['last'].max():.1f}; n = {n}",
        kind="exact",
        verdict="reproduced" if equal and differs else "contradicted",
        notebook="02_failure_analysis",
        figure="tables/02_causality",
    )
