"""Why two-hop questions fail: the conflict of e2 and e3 inside the model (claims C4, C5).

Notation as in `census`, places as in `two_hop`. Tables take the prompts as a frame `asked`, in the
order of the arrays: outcome (prompts answered e3 are right cases, all others wrong ones), pair (of
relations) and e2. Intervals are 95 %, over bridge entities.
"""

import itertools
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
from companion.measures.layers import by_layer, flow_grid, mean_by_layer
from companion.measures.stages import grouped_flow
from companion.measures.two_hop import Reading, contrast, first_token_pairs, place_labels
from companion.questions.prompts import last_token_positions
from companion.report.intervals import bootstrap, mean_summary
from companion.report.verdicts import claim


def cases(asked: pd.DataFrame) -> dict[str, np.ndarray]:
    """Which rows are right and which are wrong cases."""
    right = (asked["outcome"] == "e3").to_numpy()
    return {"right": right, "wrong": ~right}


def right_less_wrong(
    values: np.ndarray, asked: pd.DataFrame, permutations: int = 2000
) -> dict[str, np.ndarray]:
    """`two_hop.contrast` of [n, ...] between right and wrong cases, within pairs of relations."""
    return contrast(values, cases(asked)["right"], asked["pair"], asked["e2"], permutations)


def conflict_table(reading: Reading, asked: pd.DataFrame, permutations: int = 2000) -> pd.DataFrame:
    """Logit e3 − e2 by place and layer for right and wrong cases.

    Returns: layer, mean, low, high, contrast and p (of `right_less_wrong`, for either case alike),
    place, case ("right", "wrong"), n.
    """
    clusters, tables = asked["e2"].to_numpy(), []
    test = right_less_wrong(reading.difference, asked, permutations)
    found = {"contrast": test["difference"].ravel(), "p": test["p"].ravel()}
    for case, rows in cases(asked).items():
        table = mean_by_layer(reading.difference[rows], clusters[rows], reading.places, "place")
        tables.append(table.assign(**found, case=case, n=int(rows.sum())))
    columns = ["layer", "mean", "low", "high", "contrast", "p", "place", "case", "n"]
    return pd.concat(tables, ignore_index=True)[columns]


def readable_table(reading: Reading) -> pd.DataFrame:
    """Share of prompts in which an entity can be read: layer, share, shuffled (of labels), wins,
    place, entity."""
    tables = []
    for entity in ("e2", "e3"):
        found = reading.readable[entity], reading.readable[f"{entity} shuffled"]
        share, shuffled, wins = (x.mean(0) for x in (*found, reading.wins[entity]))  # [places, L+1]
        table = by_layer(reading.places, "place", share=share, shuffled=shuffled, wins=wins)
        tables.append(table.assign(entity=entity))
    columns = ["layer", "share", "shuffled", "wins", "place", "entity"]
    return pd.concat(tables, ignore_index=True)[columns]


def first_readable(reading: Reading, asked: pd.DataFrame, resamples: int = 1000) -> pd.DataFrame:
    """From which state on an entity can be told from another prompt's, by place.

    Returns per place and entity: ever (share of prompts in which it is among the READABLE highest
    in some layer), ever_shuffled (for shuffled labels), told: the first state from which on, up to
    the last but one, its logit beats the shuffled entity's in more than half of the prompts, with
    the whole interval; missing where there is none; wins: the share in which it does in the
    state that enters the last layer; n.
    """
    rows, weights = [], bootstrap(asked["e2"], resamples)
    for place, name in enumerate(reading.places):
        for entity in ("e2", "e3"):
            wins = reading.wins[entity][:, place, :-1]  # [n, L]
            beaten = np.percentile(weights @ wins, 2.5, axis=0) > 0.5
            since = len(beaten) - int(np.logical_and.accumulate(beaten[::-1]).sum())
            row = {"place": name, "entity": entity}
            for column, key in (("ever", entity), ("ever_shuffled", f"{entity} shuffled")):
                row[column] = reading.readable[key][:, place].any(1).mean()
            row["told"] = float(since) if since < len(beaten) else np.nan
            rows.append({**row, "wins": wins[:, -1].mean(), "n": len(wins)})
    return pd.DataFrame(rows)


def causality(model, tokenizer, frame: pd.DataFrame, batch_size: int = 16) -> pd.DataFrame:
    """C5: largest difference, relative to its norm, of the states in one-hop and two-hop prompts,
    at r1 and at the end.

    For the wording "possessive" only: the one-hop prompt is the two-hop prompt cut after r1, with
    " is". Returns: layer, r1, last.
    """
    cuts = zip(frame["two_hop"], frame["r1_span"], strict=True)
    one_hop = frame.assign(one_hop=[text[: span[1]] + " is" for text, span in cuts])
    errors = []
    for start in range(0, len(frame), batch_size):
        part, states = one_hop.iloc[start : start + batch_size], []
        r1 = torch.tensor(last_token_positions(place_labels(tokenizer, part), ["r1"]))[:, 0]
        for column in ("one_hop", "two_hop"):
            batch = encode(tokenizer, part[column].tolist(), device=model.device)
            spots = torch.stack([r1, batch.last.cpu()])  # [2, B]
            hidden = capture(model, batch, detail=False).hidden  # [L+1, B, T, D]
            states.append(hidden[:, torch.arange(len(part)), spots])  # [L+1, 2, B, D]
        error = (states[0] - states[1]).norm(dim=-1) / states[1].norm(dim=-1)
        errors.append(error.amax(-1).cpu().numpy())
    r1, last = np.max(errors, axis=0).T
    return pd.DataFrame({"layer": range(len(r1)), "r1": r1, "last": last})


def flows(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Flow into e3 and into e2 by layer, kind and place, along the linear route (logits).

    Returns: prompt, layer, kind, group (the place), flow, direct, entity.
    """
    labels, prompts, parts = place_labels(tokenizer, frame), frame["two_hop"].tolist(), []
    for k, entity in enumerate(("e3", "e2")):
        ids = [pair[k] for pair in first_token_pairs(tokenizer, frame)]
        flow = logit_flow(model, tokenizer, prompts, ids, level="layer", batch_size=8)
        back = flow_back(model, tokenizer, flow, route="linear", batch_size=8)
        back.check()
        parts.append(grouped_flow(back, labels).assign(entity=entity))
    return pd.concat(parts, ignore_index=True)


def direct_flow(flow: pd.DataFrame, place: str, entity: str) -> np.ndarray:
    """What the last position's attention takes from one place straight into an entity's logit:
    [prompts, layers]."""
    return flow_grid(flow[flow["entity"] == entity], "attention", place, "direct")


def flow_bands(flow: pd.DataFrame, asked: pd.DataFrame) -> pd.DataFrame:
    """`direct_flow` from e1 and from r1, of right and wrong cases: layer, mean, low, high, place,
    entity, case."""
    clusters, tables = asked["e2"].to_numpy(), []
    for place, entity in itertools.product(("e1", "r1"), ("e3", "e2")):
        values = direct_flow(flow, place, entity)[:, None]
        for case, rows in cases(asked).items():
            table = mean_by_layer(values[rows], clusters[rows], [place], "place")
            tables.append(table.assign(entity=entity, case=case))
    columns = ["layer", "mean", "low", "high", "place", "entity", "case"]
    return pd.concat(tables, ignore_index=True)[columns]


def flow_tests(flow: pd.DataFrame, asked: pd.DataFrame, permutations: int = 2000) -> pd.DataFrame:
    """What C4 says of r1's high layers (the upper third): question, mean, low, high, p, n, holds.

    The first two rows are of `right_less_wrong`, the other way round (no interval); the third is
    about wrong cases alone (interval and p by bootstrap).
    holds: above zero with p < 0.05 / 3.
    """
    e3, e2 = (direct_flow(flow, "r1", entity) for entity in ("e3", "e2"))  # [n, layers]
    layers, wrong = np.arange(e2.shape[1]), cases(asked)["wrong"]
    late, positive = layers >= -(-2 * len(layers) // 3), np.clip(e2, 0, None)
    centre = positive @ layers / (positive.sum(1) + 1e-12)
    compared = {
        "late flow from r1 into e2, wrong less right cases (logits)": e2[:, late].sum(1),
        "mean layer of the flow from r1 into e2, wrong less right cases": centre,
    }
    rows = []
    for question, values in compared.items():
        test = right_less_wrong(values[:, None], asked, permutations)
        row = {"question": question, "mean": -test["difference"][0], "low": np.nan, "high": np.nan}
        rows.append({**row, "p": test["p"][0], "n": len(values)})
    ahead, clusters = (e2 - e3)[wrong][:, late].sum(1), asked["e2"][wrong]
    draws = bootstrap(clusters, permutations) @ ahead
    p = 2 * min((draws <= 0).mean(), (draws >= 0).mean()) + 1 / permutations
    question = "late flow from r1 in wrong cases, into e2 less into e3 (logits)"
    rows.append({"question": question, **mean_summary(ahead, clusters), "p": p})
    table = pd.DataFrame(rows)
    return table.assign(holds=(table["mean"] > 0) & (table["p"] < 0.05 / len(table)))


def hide_windows(
    model, tokenizer, asked: pd.DataFrame, width: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Hide r1 from the last position in windows of layers; as control, as many random tokens of the
    worked examples in front.

    Returns: window (its first layer), hidden ("r1", "examples"), entity ("e3", "e2"), case, mean
    (change of the entity's log-probability), low, high, n.
    """
    labels, draw = place_labels(tokenizer, asked), np.random.default_rng(seed)
    ids = torch.tensor(first_token_pairs(tokenizer, asked))
    hidden = {"r1": [np.flatnonzero(row == "r1") for row in labels], "examples": []}
    for row, tokens in zip(labels, hidden["r1"], strict=True):
        examples = np.arange(1, np.flatnonzero(row == "e1")[0])
        hidden["examples"].append(draw.choice(examples, size=len(tokens), replace=False))
    prompts = CachedPrompts(model, tokenizer, asked["two_hop"].tolist())

    def log_probs(sources: Sequence, layers: Sequence[int]) -> np.ndarray:
        return blocked_log_probs(prompts, sources, layers).gather(1, ids).numpy()  # [n, (e3, e2)]

    base, layers, rows = log_probs([[]] * len(asked), []), len(describe(model).blocks), []
    for first in progress(range(0, layers, width), "hiding r1", unit="window"):
        for name, sources in hidden.items():
            change = log_probs(sources, range(first, min(first + width, layers))) - base
            for (case, mask), k in itertools.product(cases(asked).items(), (0, 1)):
                row = {"window": first, "hidden": name, "entity": ("e3", "e2")[k], "case": case}
                rows.append({**row, **mean_summary(change[mask, k], asked["e2"][mask])})
    return pd.DataFrame(rows)


def late_influence(tests: pd.DataFrame) -> dict[str, str]:
    """C4. tests: from `flow_tests`. Three checks, its three rows."""
    ours = "; ".join(
        f"{r.question}: {r.mean:+.2f} (p = {r.p:.2g}), n = {r.n}" for r in tests.itertuples()
    )
    against = (tests["mean"] < 0) & (tests["p"] < 0.05 / len(tests))
    return claim("C4", ours, tests["holds"], against)


def same_states(causality: pd.DataFrame, n: int) -> dict[str, str]:
    """C5. causality: layer, r1, last (relative differences). Holds when r1's are below 1e-4, and
    last's not small."""
    equal, largest = causality["r1"].max() < 1e-4, causality["last"].max()
    ours = (
        f"largest relative difference at r1 {'below' if equal else 'not below'} 1e-4 in every "
        f"layer, at the last position {largest:.1f}; n = {n}"
    )
    return claim("C5", ours, passed=[equal and largest > 0.01])
