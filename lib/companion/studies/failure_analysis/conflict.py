"""Why two-hop questions fail: e2 against e3 inside the model (claims C4, C5).

`asked` holds the prompts in the order of the arrays: outcome (e3 is a right case, all else a wrong
one), pair (of relations) and e2, over which the 95 % intervals are. Places are those of `two_hop`.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from backattn.analysis.knockouts import CachedPrompts, blocked_log_probs
from backattn.models.activations import capture
from backattn.models.decoder import describe
from backattn.models.tokens import encode
from backattn.runtime import progress
from companion.measures.layers import mean_by_layer
from companion.measures.two_hop import Reading, contrast, first_token_pairs, place_labels
from companion.questions.prompts import last_token_positions
from companion.report.intervals import bootstrap, mean_summary
from companion.report.verdicts import Effect, claim


def by_case(values: np.ndarray, asked: pd.DataFrame, places: Sequence[str]) -> pd.DataFrame:
    """Means of [n, places, layers] in right, then wrong cases, as `mean_by_layer`: case, …, n."""
    right, tables = (asked["outcome"] == "e3").to_numpy(), {}
    for case, rows in (("right", right), ("wrong", ~right)):
        table = mean_by_layer(values[rows], asked["e2"][rows], places, "place")
        tables[case] = table.assign(n=rows.sum())
    return pd.concat(tables, names=["case"]).reset_index("case")


def first_readable(reading: Reading, asked: pd.DataFrame) -> pd.DataFrame:
    """From which state on an entity can be told from another prompt's: place, entity, ever (share
    of prompts in which it can be read in some state), ever_shuffled, ahead_from (the state from
    which on the whole interval of `wins` is above a half), wins (in the last layer's input), n."""
    rows, weights = [], bootstrap(asked["e2"], 1000)
    for (k, place), entity in itertools.product(enumerate(reading.places), ("e2", "e3")):
        wins = reading.wins[entity][:, k, :-1]  # [n, L]
        beaten = np.percentile(weights @ wins, 2.5, axis=0) > 0.5
        since = len(beaten) - int(np.logical_and.accumulate(beaten[::-1]).sum())
        row = {"place": place, "entity": entity}
        for column, name in (("ever", entity), ("ever_shuffled", f"{entity} shuffled")):
            row[column] = reading.readable[name][:, k].any(1).mean()
        row["ahead_from"] = float(since) if beaten[-1] else np.nan
        rows.append({**row, "wins": wins[:, -1].mean(), "n": len(wins)})
    return pd.DataFrame(rows)


def causality(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """C5: largest difference, relative to its norm, of the states in one-hop and two-hop prompts:
    layer, r1, last. In the wording "possessive" the former is the latter cut after r1, with " is".
    """
    errors, places = [], last_token_positions(place_labels(tokenizer, frame), ["r1"])
    for text, (_, end), (r1,) in zip(frame["two_hop"], frame["r1_span"], places, strict=True):
        batches = (encode(tokenizer, [x], device=model.device) for x in (text[:end] + " is", text))
        one, two = (capture(model, x, detail=False).hidden[:, 0, [r1, -1]] for x in batches)
        errors.append((one - two).norm(dim=-1) / two.norm(dim=-1))  # [L+1, 2]
    largest = torch.stack(errors).amax(0).cpu().numpy()
    return pd.DataFrame(largest, columns=["r1", "last"]).rename_axis("layer").reset_index()


def flow_tests(e3, e2, asked: pd.DataFrame, permutations: int) -> pd.DataFrame:
    """What C4 says of the direct flow [n, layers] from r1 into e3 and e2 in high layers (the upper
    third): question, mean, low, high, p, n, holds (above zero with p < 0.05 / 3). Two rows are of
    `contrast`, turned round (interval: 1.96 of its spread); one is about wrong cases (bootstrap).
    """
    layers, right, rows = np.arange(e2.shape[1]), (asked["outcome"] == "e3").to_numpy(), []
    late, positive = layers >= -(-2 * len(layers) // 3), np.clip(e2, 0, None)
    centre = positive @ layers / (positive.sum(1) + 1e-12)
    for question, values in (
        ("late flow from r1 into e2, wrong less right cases (logits)", e2[:, late].sum(1)),
        ("mean layer of the flow from r1 into e2, wrong less right cases", centre),
    ):
        test = contrast(values[:, None], right, asked["pair"], asked["e2"], permutations)
        mean, half = -test["difference"][0], 1.96 * test["spread"][0]
        row = {"question": question, "mean": mean, "low": mean - half, "high": mean + half}
        row["p"] = test["p"][0]
        rows.append({**row, "n": len(values)})
    ahead, clusters = (e2 - e3)[~right][:, late].sum(1), asked["e2"][~right]
    draws = bootstrap(clusters, permutations) @ ahead
    p = 2 * min((draws <= 0).mean(), (draws >= 0).mean()) + 1 / permutations
    question = "late flow from r1 in wrong cases, into e2 less into e3 (logits)"
    rows.append({"question": question, **mean_summary(ahead, clusters), "p": p})
    table = pd.DataFrame(rows, columns=["question", "mean", "low", "high", "p", "n"])
    return table.assign(holds=(table["mean"] > 0) & (table["p"] < 0.05 / len(table)))


def hide_windows(model, tokenizer, asked: pd.DataFrame, width: int, seed: int) -> pd.DataFrame:
    """Change of log p(e3) and log p(e2) while r1, or as many random tokens of the worked examples,
    are hidden from the last position in a window of layers: window (its first), hidden ("r1",
    "examples"), entity, case, mean, low, high, n."""
    labels, draw = place_labels(tokenizer, asked), np.random.default_rng(seed)
    right = (asked["outcome"] == "e3").to_numpy()
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
            for (case, mask), k in itertools.product((("right", right), ("wrong", ~right)), (0, 1)):
                row = {"window": first, "hidden": name, "entity": ("e3", "e2")[k], "case": case}
                rows.append({**row, **mean_summary(change[mask, k], asked["e2"][mask])})
    return pd.DataFrame(rows)


def late_influence(tests: pd.DataFrame) -> dict[str, str]:
    """C4. Three checks, the rows of `flow_tests`; the first is the paper's comparison, the last,
    into e2 less into e3 in wrong cases, the strictest control."""
    ours = "; ".join(
        f"{r.question}: {r.mean:+.2f} (p = {r.p:.2g}), n = {r.n}" for r in tests.itertuples()
    )
    checks = dict(zip(("stronger", "later", "feeds e2"), tests["holds"].map(bool), strict=True))
    stronger, _, feeds = (
        Effect(row.question.removesuffix(" (logits)"), row.mean, row.low, row.high, "logits", 0)
        for row in tests.itertuples()
    )
    return claim("C4", ours, checks, stronger, feeds)


def same_states(causality: pd.DataFrame, n: int) -> dict[str, str]:
    """C5. Holds when r1's differences in `causality` are below 1e-4, and last's not small."""
    equal, largest = causality["r1"].max() < 1e-4, causality["last"].max()
    ours = (
        f"largest relative difference at r1 {'below' if equal else 'not below'} 1e-4 in every "
        f"layer, at the last position {largest:.1f}; n = {n}"
    )
    beyond = max(0.0, float(causality["r1"].max()) - 1e-4)  # what is below is rounding
    exact = Effect("difference at r1", beyond, beyond, beyond, "of a state's length", 0, "none")
    return claim("C5", ours, {"equal at r1, not at last": equal and largest > 0.01}, exact)
