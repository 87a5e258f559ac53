"""07: whom answers name without and with an adapter (claims N2, B5)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from backattn.models.devices import input_device
from backattn.runtime import progress
from backattn.training.batches import collate
from backattn.training.evaluation import answer_logits
from companion.measures.memory import BATCH
from companion.questions.asking import ENTITIES, ID_COLUMNS, OUTCOMES, candidates, outcome
from companion.questions.datasets import TWO_HOP_KEYS, load
from companion.questions.splits import split
from companion.report.intervals import bootstrap, interval, mean_summary
from companion.report.verdicts import claim, percent, points
from companion.runs.as_asked import asked, questions
from companion.runs.perform import load_trained
from companion.runs.run import Run
from companion.runs.store import Store
from companion.studies.controls.memory import NO_MORE


def transitions(
    runs: Sequence[Run],
    store: Store,
    device: str = "cpu",
    dataset: str | None = None,
    count: int | None = None,
) -> pd.DataFrame:
    """Whom the model names without and with each run's adapter, by the first token, on its test.

    runs: of one model and one dataset. dataset: asks the first `count` test questions of another
    one instead.

    Returns one row per run and question: arm, seed, question, e2, pair (of relations), collides
    (outcomes begin alike, see `candidates`), before, after (OUTCOMES), right (after is e3).
    """
    rows, before = [], {}
    for run in progress(list(runs), "asking again", unit="run"):
        there = replace(run, dataset=dataset, test_items=count) if dataset else run
        with load_trained(run, store, device) as (model, tokenizer):
            facts = candidates(tokenizer, split(load(there.dataset), run.fold))
            facts = asked(there, "test")[TWO_HOP_KEYS].merge(
                facts, on=TWO_HOP_KEYS, validate="one_to_one"
            )
            items = questions(there, tokenizer, "test")
            if run.fold not in before:
                with model.disable_adapter():
                    before[run.fold] = _next_tokens(model, items)
            after = _next_tokens(model, items)
        table = facts[["e2", "pair", "collides"]].assign(arm=run.arm, seed=run.seed)
        table["question"] = range(len(table))
        ids = [dict(zip(ENTITIES, row, strict=True)) for row in facts[list(ID_COLUMNS)].to_numpy()]
        for name, tokens in (("before", before[run.fold]), ("after", after)):
            table[name] = [outcome(int(t), own) for t, own in zip(tokens, ids, strict=True)]
        rows.append(table.assign(right=table["after"] == "e3"))
    return pd.concat(rows, ignore_index=True)


@torch.no_grad()
def _next_tokens(model, items) -> np.ndarray:
    """The most likely next token after each question: [n]."""
    tokens, order = np.empty(len(items), dtype=int), np.argsort(items.lengths, kind="stable")
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH].tolist()
        batch = collate(items, rows, input_device(model))
        tokens[rows] = answer_logits(model, batch)[:, -1].argmax(-1).cpu().numpy()
    return tokens


def with_stored_arms(made: pd.DataFrame, answered: pd.DataFrame) -> pd.DataFrame:
    """`transitions` with other arms on the same questions, of which only `right` is known.

    answered: `results.answers` of their runs. Raises ValueError where they were asked others.
    """
    before = made.drop_duplicates(["seed", "question"])
    before = before[["seed", "question", "e2", "pair", "before"]]
    place = answered.groupby(["arm", "seed"], sort=False).cumcount()
    other = answered[["arm", "seed", "group", "right"]].assign(question=place)
    other = other.merge(before, on=["seed", "question"], how="left")
    if not (other["group"] == other["e2"]).all():
        raise ValueError("These arms were not tested on the same questions.")
    other["right"] = other["right"] == 1
    return pd.concat([made, other.drop(columns="group")], ignore_index=True)


def transition_table(made: pd.DataFrame) -> pd.DataFrame:
    """How many answers went from whom to whom: arm, before, after, count, share (of all with that
    before)."""
    keys = ["arm", "before", "after"]
    table = made.groupby(keys, sort=False).size().rename("count").reset_index()
    table["share"] = table["count"] / table.groupby(keys[:2])["count"].transform("sum")
    order = {name: place for place, name in enumerate([*dict.fromkeys(made["arm"]), *OUTCOMES])}
    return table.sort_values(keys, key=lambda column: column.map(order), ignore_index=True)


def repaired_shares(made: pd.DataFrame) -> pd.DataFrame:
    """Which share of each kind of failure becomes e3 with each arm: arm, before ("any" for all
    failures), share, low, high (95 %, over bridge entities; NaN for fewer than two), n, names."""
    rows = []
    for arm, part in made.groupby("arm", sort=False):
        for kind in (*OUTCOMES[1:], "any"):
            failures = part[part["before"] != "e3" if kind == "any" else part["before"] == kind]
            right, names = failures["right"].to_numpy(dtype=float), failures["e2"].nunique()
            row = {"arm": arm, "before": kind, **mean_summary(right, failures["e2"])}
            row["mean"] = row["mean"] if names > 1 else np.nan
            rows.append({**row, "names": names})
    return pd.DataFrame(rows).rename(columns={"mean": "share"})


def repaired_differences(made: pd.DataFrame) -> pd.DataFrame:
    """Does back attention mend e2 failures above all, and more of them than other arms?

    Two kinds of rows. "than other failures": the share mended of failures that say e2 less that of
    the others, within pairs of relations that have both, the pairs weighted by their failures that
    say e2. "than <arm>": the share of e2 failures mended less the other arm's, on the same
    questions.

    Returns: more, difference, low, high (95 %, over bridge entities), n (e2 failures). Raises
    ValueError when there is no failure of one kind in any pair, or an arm was asked other
    questions.
    """
    back = made[made["arm"] == "back attention"].reset_index(drop=True)
    is_e2, is_other = back["before"] == "e2", ~back["before"].isin(["e2", "e3"])
    pairs = sorted(set(back["pair"][is_e2]) & set(back["pair"][is_other]))
    if not pairs:
        raise ValueError(
            "There are no failures that say e2, or none that do not, in any pair: ask more."
        )
    right = back["right"].to_numpy(dtype=float)

    def within(weights: np.ndarray) -> np.ndarray:
        each, sizes = [], []
        for pair in pairs:
            e2, other = (mask & (back["pair"] == pair) for mask in (is_e2, is_other))
            each.append(masked_mean(weights, e2, right) - masked_mean(weights, other, right))
            sizes.append(np.where(np.isnan(each[-1]), 0.0, weights @ e2.to_numpy(dtype=float)))
        total, summed = np.sum(sizes, axis=0), np.nansum(np.multiply(each, sizes), axis=0)
        return np.divide(summed, total, out=np.full(len(weights), np.nan), where=total > 0)

    difference = float(within(np.ones((1, len(back))))[0])
    ends = interval(within(bootstrap(back["e2"])))
    row = {"more": "than other failures", "difference": difference, **ends}
    rows = [{**row, "n": int((is_e2 & back["pair"].isin(pairs)).sum())}]
    for other in dict.fromkeys(made["arm"]):
        if other != "back attention":
            row = _less_e2(made, back, other)
            rows.append({"more": f"than {other}", **row, "n": int(is_e2.sum())})
    return pd.DataFrame(rows)


def _less_e2(made: pd.DataFrame, back: pd.DataFrame, other: str) -> dict[str, float]:
    """Share of e2 failures mended by back attention less by another arm: difference, low, high."""
    keys = ["seed", "question", "e2", "before"]
    theirs = back[keys].merge(
        made[made["arm"] == other], on=keys, how="left", validate="one_to_one"
    )["right"]
    if theirs.isna().any():
        raise ValueError(f"Back attention and {other!r} were not asked the same questions.")
    less = back["right"].to_numpy(dtype=float) - theirs.to_numpy(dtype=float)
    is_e2 = back["before"] == "e2"
    mean = float(masked_mean(np.ones((1, len(back))), is_e2, less)[0])
    return {"difference": mean, **interval(masked_mean(bootstrap(back["e2"]), is_e2, less))}


def masked_mean(weights: np.ndarray, mask: pd.Series, values: np.ndarray) -> np.ndarray:
    """Weighted means [R] of values [n] where mask [n] holds, for weights [R, n]; or NaN."""
    mask = mask.to_numpy(dtype=float)
    total = weights @ mask
    empty = np.full(len(weights), np.nan)
    return np.divide(weights @ (values * mask), total, out=empty, where=total > 0)


def knowledge_table(known: pd.DataFrame, unknown: pd.DataFrame, least: int = 10) -> pd.DataFrame:
    """Does an adapter help where the model does not know both hops?

    known, unknown: `transitions` of the same runs on questions of both kinds; those that collide
    are left out. Only pairs of relations with `least` questions of each kind count, all alike, so
    that both kinds ask for the same.

    Returns: questions ("known", "unknown", "known less unknown"), before, after (shares right;
    their differences), gain (after less before), low, high (95 %, over bridge entities), n, pairs.
    Raises ValueError when no pair has enough.
    """
    both = pd.concat([known.assign(kind="known"), unknown.assign(kind="unknown")])
    both = both[~both["collides"]]
    counts = both.groupby(["pair", "kind"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=["known", "unknown"], fill_value=0)
    pairs = counts.index[(counts >= least).all(axis=1)]
    if pairs.empty:
        raise ValueError(f"No pair of relations has {least} questions of each kind: ask more.")
    both = both[both["pair"].isin(pairs)].reset_index(drop=True)
    values = {"before": both["before"] == "e3", "after": both["right"]}
    values = {name: column.to_numpy(dtype=float) for name, column in values.items()}
    values["gain"] = values["after"] - values["before"]
    samples, whole = bootstrap(both["e2"]), np.ones((1, len(both)))

    def mean(weights: np.ndarray, kind: str, name: str) -> np.ndarray:
        masks = [(both["kind"] == kind) & (both["pair"] == pair) for pair in pairs]
        return np.nanmean([masked_mean(weights, mask, values[name]) for mask in masks], axis=0)

    rows, draws = [], {}
    for kind in ("known", "unknown"):
        draws[kind] = mean(samples, kind, "gain")
        row = {name: float(mean(whole, kind, name)[0]) for name in values}
        row |= {**interval(draws[kind]), "n": int((both["kind"] == kind).sum())}
        rows.append({"questions": kind, **row, "pairs": len(pairs)})
    less = {name: rows[0][name] - rows[1][name] for name in values}
    less |= {**interval(draws["known"] - draws["unknown"]), "n": len(both), "pairs": len(pairs)}
    return pd.DataFrame([*rows, {"questions": "known less unknown", **less}])


def bridge_failures_mended(mended: pd.DataFrame, differences: pd.DataFrame) -> dict:
    """N2. mended, differences: from `repaired_shares` and `repaired_differences`.

    Two checks, each with its whole interval: back attention mends a larger share of the failures
    that say e2 than of the others, and a larger share of them than the same module on its own
    layer.
    """
    by = mended[mended["arm"] == "back attention"].set_index("before")
    rows = differences.set_index("more")
    less = ", ".join(f"{name} {points(row)} points" for name, row in rows.iterrows())
    shares = ", ".join(
        f"{kind} {percent(row)} of {int(row['n'])}"
        for kind, row in by.dropna(subset=["share"]).iterrows()
    )
    ours = (
        f"two-hop, share of failures mended by whom they named: {shares}; of those that say e2, "
        f"more {less}; {int(by.loc['e2', 'names'])} bridge entities among them"
    )
    checked = rows.loc[["than other failures", "than same layer"]]
    return claim("N2", ours, checked["low"] > 0, checked["high"] < 0)


def no_knowledge_no_gain(table: pd.DataFrame) -> dict:
    """B5. table: `knowledge_table`.

    Two checks, each with the whole interval: the gain is larger where both hops are known than
    where they are not, and where they are not it is below NO_MORE.
    """
    by = table.set_index("questions")
    more, without = by.loc["known less unknown"], by.loc["unknown"]
    each = "; ".join(
        f"{name}: {row['before']:.0%} → {row['after']:.0%}, {points(row, 'gain')} points, "
        f"n = {int(row['n'])}"
        for name, row in by.loc[["known", "unknown"]].iterrows()
    )
    ours = (
        f"two-hop, SmolLM2, by whether it knows both hops, {int(more['pairs'])} pairs of "
        f"relations, all alike: {each}; known less unknown {points(more, 'gain')}"
    )
    passed = [more["low"] > 0, without["high"] < NO_MORE]
    return claim("B5", ours, passed, [more["high"] < 0, without["low"] > NO_MORE])
