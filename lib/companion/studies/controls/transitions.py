"""07: whom answers name before and after."""

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
from companion.report.intervals import bootstrap, interval, mean_interval
from companion.report.verdicts import Claim, _points, _weighed
from companion.runs.as_asked import asked, questions, test_groups
from companion.runs.perform import load_trained
from companion.runs.run import Run
from companion.runs.store import Store, answers_right
from companion.studies.controls.memory import NO_MORE


def transitions(
    runs: Sequence[Run],
    store: Store,
    device: str = "cpu",
    dataset: str | None = None,
    count: int | None = None,
) -> pd.DataFrame:
    """Whom the model names without and with each run's adapter, by the first token, on the run's test questions.

    runs: of one model and one dataset. dataset: asks the first `count` test questions of another one instead.

    Returns one row per run and question: arm, seed, question, e2, pair (of relations), collides (outcomes begin alike,
    see `census.candidates`), before, after (`census.OUTCOMES`), right (after is e3).
    """
    rows, before = [], {}
    for run in progress(list(runs), "asking again", unit="run"):
        there = replace(run, dataset=dataset, test_items=count) if dataset else run
        frame = asked(there, "test")
        with load_trained(run, store, device) as (model, tokenizer):
            facts = candidates(tokenizer, split(load(there.dataset), run.fold))
            facts = frame[TWO_HOP_KEYS].merge(facts, on=TWO_HOP_KEYS, validate="one_to_one")
            items = questions(there, tokenizer, "test")
            if run.fold not in before:
                with model.disable_adapter():
                    before[run.fold] = _said(model, items)
            said = {"before": before[run.fold], "after": _said(model, items)}
        named = [
            dict(zip(ENTITIES, each, strict=True)) for each in facts[list(ID_COLUMNS)].to_numpy()
        ]
        about = {
            "arm": run.arm,
            "seed": run.seed,
            "question": range(len(facts)),
            **facts[["e2", "pair", "collides"]],
        }
        for name, tokens in said.items():
            about[name] = [
                outcome(int(token), own) for token, own in zip(tokens, named, strict=True)
            ]
        table = pd.DataFrame(about)
        rows.append(table.assign(right=table["after"] == "e3"))
    return pd.concat(rows, ignore_index=True)


def with_stored_arms(made: pd.DataFrame, runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """`transitions` with other arms' runs on the same questions, of which only what was kept is known: right.

    Raises ValueError when a run was tested on other questions.
    """
    before = made.drop_duplicates(["seed", "question"])[
        ["seed", "question", "e2", "pair", "before"]
    ]
    rows = [made]
    for run in runs:
        right = answers_right(store.result(run))
        mine = before[before["seed"] == run.seed]
        if not np.array_equal(mine["e2"], test_groups(run, store.result(run))):
            raise ValueError(f"{run.arm!r}, seed {run.seed}, was not tested on the same questions.")
        rows.append(mine.assign(arm=run.arm, right=right))
    return pd.concat(rows, ignore_index=True)


@torch.no_grad()
def _said(model, items) -> np.ndarray:
    """The most likely next token after each question: [n]."""
    said, order = np.empty(len(items), dtype=int), np.argsort(items.lengths, kind="stable")
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH].tolist()
        batch = collate(items, rows, input_device(model))
        said[rows] = answer_logits(model, batch)[:, -1].argmax(-1).cpu().numpy()
    return said


def transition_table(made: pd.DataFrame) -> pd.DataFrame:
    """How many answers went from whom to whom: arm, before, after, count, share (of all with that before)."""
    table = (
        made.groupby(["arm", "before", "after"], sort=False).size().rename("count").reset_index()
    )
    table["share"] = table["count"] / table.groupby(["arm", "before"])["count"].transform("sum")
    order = {name: place for place, name in enumerate([*dict.fromkeys(made["arm"]), *OUTCOMES])}
    return table.sort_values(
        ["arm", "before", "after"], key=lambda column: column.map(order), ignore_index=True
    )


def repaired_shares(made: pd.DataFrame) -> pd.DataFrame:
    """Which share of each kind of failure becomes e3 with each arm: arm, before ("any" for all failures), share, low,
    high (95 %, over bridge entities; NaN for fewer than two), n, names."""
    rows = []
    for arm, part in made.groupby("arm", sort=False):
        for kind in (*OUTCOMES[1:], "any"):
            own = part[(part["before"] != "e3") if kind == "any" else (part["before"] == kind)]
            row = {
                "arm": arm,
                "before": kind,
                "share": float("nan"),
                "low": float("nan"),
                "high": float("nan"),
            }
            if own["e2"].nunique() > 1:
                mean, low, high = mean_interval(own["right"].to_numpy(dtype=float), own["e2"])
                row |= {"share": float(mean), "low": float(low), "high": float(high)}
            rows.append({**row, "n": len(own), "names": own["e2"].nunique()})
    return pd.DataFrame(rows)


def repaired_differences(made: pd.DataFrame) -> pd.DataFrame:
    """Does back attention mend e2 failures above all, and more of them than other arms?

    Two kinds of rows. "than other failures": the share mended of failures that say e2 less that of the others, within
    pairs of relations that have both, the pairs weighted by their failures that say e2. "than <arm>": the share of e2
    failures mended less the other arm's, on the same questions.

    Returns: more, difference, low, high (95 %, over bridge entities), n (e2 failures). Raises ValueError when there is
    no failure of one kind in any pair, or an arm was asked other questions.
    """
    mine = made[made["arm"] == "back attention"].reset_index(drop=True)
    is_e2, is_other = (
        (mine["before"] == "e2").to_numpy(),
        (~mine["before"].isin(["e2", "e3"])).to_numpy(),
    )
    pairs = sorted(set(mine["pair"][is_e2]) & set(mine["pair"][is_other]))
    if not pairs:
        raise ValueError(
            "There are no failures that say e2, or none that do not, in any pair: ask more questions."
        )
    good, weights = (
        mine["right"].to_numpy(dtype=float),
        (np.ones((1, len(mine))), bootstrap(mine["e2"])),
    )

    def within(draws: np.ndarray) -> np.ndarray:
        each, sizes = [], []
        for pair in pairs:
            here = (mine["pair"] == pair).to_numpy()
            each.append(_share(draws, is_e2 & here, good) - _share(draws, is_other & here, good))
            sizes.append(np.where(np.isnan(each[-1]), 0.0, draws @ (is_e2 & here).astype(float)))
        total = np.sum(sizes, axis=0)
        summed = np.nansum(np.multiply(each, sizes), axis=0)
        return np.divide(summed, total, out=np.full(len(draws), np.nan), where=total > 0)

    n = int((is_e2 & mine["pair"].isin(pairs).to_numpy()).sum())
    rows = [_row("than other failures", *map(within, weights), n)]
    for other in [name for name in dict.fromkeys(made["arm"]) if name != "back attention"]:
        keys = ["seed", "question", "e2", "before"]
        theirs = mine[keys].merge(
            made[made["arm"] == other], on=keys, how="left", validate="one_to_one"
        )["right"]
        if theirs.isna().any():
            raise ValueError(f"Back attention and {other!r} were not asked the same questions.")
        less = good - theirs.to_numpy(dtype=float)
        rows.append(
            _row(
                f"than {other}",
                *(_share(draws, is_e2, less) for draws in weights),
                int(is_e2.sum()),
            )
        )
    return pd.DataFrame(rows)


def knowledge_table(known: pd.DataFrame, unknown: pd.DataFrame, least: int = 10) -> pd.DataFrame:
    """Does an adapter help where the model does not know both hops?

    known, unknown: `transitions` of the same runs on questions of both kinds; those that collide are left out. Only
    pairs of relations with `least` questions of each kind count, all alike, so that both kinds ask for the same.

    Returns: questions ("known", "unknown", "known less unknown"), before, after (shares right; their differences), gain
    (after less before), low, high (95 %, over bridge entities), n, pairs. Raises ValueError when no pair has enough.
    """
    both = pd.concat(
        [known.assign(kind="known"), unknown.assign(kind="unknown")], ignore_index=True
    )
    both = both[~both["collides"]]
    counts = both.groupby(["pair", "kind"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=["known", "unknown"], fill_value=0)
    pairs = counts.index[(counts >= least).all(axis=1)]
    if pairs.empty:
        raise ValueError(
            f"No pair of relations has {least} known and {least} unknown questions: ask more."
        )
    both = both[both["pair"].isin(pairs)].reset_index(drop=True)
    parts = {
        "before": (both["before"] == "e3").to_numpy(dtype=float),
        "after": both["right"].to_numpy(dtype=float),
    }
    parts["gain"] = parts["after"] - parts["before"]
    draws, ones = bootstrap(both["e2"]), np.ones((1, len(both)))

    def mean(weights: np.ndarray, kind: str, values: np.ndarray) -> np.ndarray:
        each = [
            _share(weights, ((both["kind"] == kind) & (both["pair"] == pair)).to_numpy(), values)
            for pair in pairs
        ]
        return np.nanmean(each, axis=0)

    rows = []
    for kind in ("known", "unknown"):
        means = {name: float(mean(ones, kind, values)[0]) for name, values in parts.items()}
        rows.append({"questions": kind, **means, **interval(mean(draws, kind, parts["gain"]))})
        rows[-1] |= {"n": int((both["kind"] == kind).sum()), "pairs": len(pairs)}
    less = {name: rows[0][name] - rows[1][name] for name in parts}
    ends = interval(mean(draws, "known", parts["gain"]) - mean(draws, "unknown", parts["gain"]))
    rows.append(
        {"questions": "known less unknown", **less, **ends, "n": len(both), "pairs": len(pairs)}
    )
    return pd.DataFrame(rows)


def _share(weights: np.ndarray, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weighted means [R] of values [n] where mask [n] holds, for weights [R, n]; NaN where nothing is drawn."""
    total = weights @ mask.astype(float)
    return np.divide(
        weights @ (values * mask), total, out=np.full(len(weights), np.nan), where=total > 0
    )


def _row(name: str, value: np.ndarray, draws: np.ndarray, n: int) -> dict:
    return {"more": name, "difference": float(value[0]), **interval(draws), "n": n}


def bridge_failures_mended(mended: pd.DataFrame, differences: pd.DataFrame) -> Claim:
    """N2. mended, differences: from `controls.mended_shares` and `controls.mended_differences`.

    Two checks, each with its whole interval: back attention mends a larger share of the failures that say e2 than of
    the others, and a larger share of them than the same module on its own layer.
    """
    by = mended[mended["arm"] == "back attention"].set_index("before")
    rows = differences.set_index("more").loc[["than other failures", "than same layer"]]
    less = ", ".join(
        f"{name} {_points(row)} points" for name, row in differences.set_index("more").iterrows()
    )
    shares = ", ".join(
        f"{kind} {row['share']:.0%} [{row['low']:.0%}, {row['high']:.0%}] of {int(row['n'])}"
        for kind, row in by.dropna(subset=["share"]).iterrows()
    )
    return Claim(
        id="N2",
        claim="what back attention mends are the failures that say the bridge entity",
        paper="next check",
        ours=f"two-hop, share of failures mended by whom they named: {shares}; of those that say e2, more {less}; "
        f"{int(by.loc['e2', 'names'])} bridge entities among them",
        kind="tolerance",
        verdict=_weighed(list(rows["low"] > 0), list(rows["high"] < 0)),
        notebook="07_controls",
        figure="07_transitions",
    )


def no_knowledge_no_gain(table: pd.DataFrame) -> Claim:
    """B5. table: `controls.knowledge_table`.

    Two checks, each with the whole interval: the gain is larger where both hops are known than where they are not, and
    where they are not it is below NO_MORE.
    """
    by = table.set_index("questions")
    more, without = by.loc["known less unknown"], by.loc["unknown"]
    told = "; ".join(
        f"{name}: {row['before']:.0%} → {row['after']:.0%}, {100 * row['gain']:+.1f} [{100 * row['low']:+.1f}, "
        f"{100 * row['high']:+.1f}] points, n = {int(row['n'])}"
        for name, row in by.loc[["known", "unknown"]].iterrows()
    )
    return Claim(
        id="B5",
        claim="no base knowledge, no gain",
        paper="break condition",
        ours=f"two-hop, SmolLM2, by whether it knows both hops, {int(more['pairs'])} pairs of relations, all alike: "
        f"{told}; known less unknown {100 * more['gain']:+.1f} [{100 * more['low']:+.1f}, {100 * more['high']:+.1f}]",
        kind="tolerance",
        verdict=_weighed(
            [bool(more["low"] > 0), bool(without["high"] < NO_MORE)],
            [bool(more["high"] < 0), bool(without["low"] > NO_MORE)],
        ),
        notebook="07_controls",
        figure="tables/07_knowledge",
    )
