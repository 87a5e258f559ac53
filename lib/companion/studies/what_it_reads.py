"""What trained back attention reads in two-hop questions, and whether it needs that (claim C10).

A cell is a pair (memory layer, position of the prompt) that a query, a position at the source layer, can read. Places
are e1's, r1's and r2's tokens, what stands before e1 (where a tokenizer puts something there), after e1 and after r1
("'s"), and the last token. Intervals resample bridge entities; what another training would read is not in them, so
that single trainings stand beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from backattn.runtime import progress
from companion.measures.memory import PLACES, high_layers, memory_probes
from companion.measures.two_hop import contrast, read_conflict
from companion.report.intervals import mean_interval
from companion.report.verdicts import Claim, _weighed
from companion.runs.run import Run
from companion.runs.store import Store


@dataclass
class AttentionSummary:
    """What queries read over all questions of some runs.

    weights: [n, queries, M, places], the mean over a query place's tokens, summed over a read place's; chance: the same
    if every query read all its cells alike; right: [n]; frame: the questions; layers: the memory layers; examples:
    (tokens, what the last position reads [M, T]) of each run's first two questions.
    """

    weights: np.ndarray
    chance: np.ndarray
    right: np.ndarray
    frame: pd.DataFrame
    layers: tuple[int, ...]
    examples: list[tuple[list[str], np.ndarray]]

    def of(self, query: str) -> tuple[np.ndarray, np.ndarray]:
        """(weights, chance) of the queries at one place: [n, M, places] each."""
        return self.weights[:, PLACES.index(query)], self.chance[:, PLACES.index(query)]


def attention_summary(
    runs: Sequence[Run], store: Store, count: int | None = None, device: str = "cpu"
) -> AttentionSummary:
    """Weights of every query over memory layers and places, see `Maps`."""
    weights, chance, right, frames, examples, layers = [], [], [], [], [], ()
    for reader in memory_probes(runs, store, count, device):
        (of_each, _, said), layers = reader.read(), tuple(reader.memory_layers)
        for own, labels in zip(of_each, reader.labels, strict=True):
            inside = np.array([labels == place for place in PLACES], dtype=float)  # [places, T]
            mean = inside / inside.sum(1, keepdims=True).clip(min=1)
            weights.append(np.einsum("qt,tms,ps->qmp", mean, own, inside))
            alike = np.tril(np.ones((len(labels), len(labels))))
            alike /= alike.sum(1, keepdims=True) * len(layers)  # [T, T]
            flat = np.einsum("qt,ts,ps->qp", mean, alike, inside)
            chance.append(np.repeat(flat[:, None], len(layers), axis=1))
        right.append(said)
        frames.append(reader.frame)
        for row in range(min(2, len(of_each))):
            tokens = [
                reader.tokenizer.decode([token]).strip() for token in reader.items.prompts[row]
            ]
            examples.append((tokens, of_each[row][-1]))
    frame = pd.concat(frames, ignore_index=True)
    return AttentionSummary(
        np.stack(weights), np.stack(chance), np.concatenate(right), frame, layers, examples
    )


def weight_table(read: AttentionSummary) -> pd.DataFrame:
    """Mean weight of the last position by cell and case (right, wrong): case, layer, place, weight, chance, n."""
    rows, (weights, chance) = [], read.of("last")
    for case, mask in (("right", read.right), ("wrong", ~read.right)):
        if not mask.any():
            continue
        for k, place in enumerate(PLACES):
            part = {
                "layer": read.layers,
                "weight": weights[mask, :, k].mean(0),
                "chance": chance[mask, :, k].mean(0),
            }
            rows.append(pd.DataFrame(part).assign(case=case, place=place, n=int(mask.sum())))
    return pd.concat(rows, ignore_index=True)[["case", "layer", "place", "weight", "chance", "n"]]


def query_table(read: AttentionSummary) -> pd.DataFrame:
    """What each query place reads at each place, over all layers: query, place, weight, chance, layer (the mean memory
    layer of that weight)."""
    rows = []
    for query in PLACES:
        weights, chance = (x.mean(0) for x in read.of(query))  # [M, places]
        for k, place in enumerate(PLACES):
            if chance[:, k].sum() > 0:
                layer = weights[:, k] @ np.array(read.layers) / max(weights[:, k].sum(), 1e-12)
                row = {
                    "query": query,
                    "place": place,
                    "weight": weights[:, k].sum(),
                    "chance": chance[:, k].sum(),
                }
                rows.append({**row, "layer": layer})
    return pd.DataFrame(rows)


def high_share(read: AttentionSummary, layers: Sequence[int]) -> pd.DataFrame:
    """Weight of the last position on r1's states in some layers: over all, by case, by training, by pair of relations.

    Returns: questions ("all", "right", "wrong", "training 0" or a pair), share with its 95 % interval over bridge
    entities (low, high), chance, over (share less chance) with over_low and over_high, n, names. Pairs with a single
    bridge entity are left out.
    """
    among, k = np.isin(read.layers, layers), PLACES.index("r1")
    share, chance = (x[:, among, k].sum(1) for x in read.of("last"))
    bridge, pair, rows = read.frame["e2"].to_numpy(), read.frame["pair"].to_numpy(), []
    parts = {"all": np.ones(len(share), dtype=bool), "right": read.right, "wrong": ~read.right}
    parts |= {
        f"training {seed}": read.frame["seed"].to_numpy() == seed
        for seed in sorted(set(read.frame["seed"]))
    }
    parts |= {name: pair == name for name in sorted(set(pair))}
    for name, mask in parts.items():
        if len(set(bridge[mask])) < 2:
            continue
        mean, low, high = mean_interval(np.stack([share, share - chance], 1)[mask], bridge[mask])
        row = {
            "questions": name,
            "share": mean[0],
            "low": low[0],
            "high": high[0],
            "chance": chance[mask].mean(),
        }
        row |= {"over": mean[1], "over_low": low[1], "over_high": high[1]}
        rows.append({**row, "n": int(mask.sum()), "names": len(set(bridge[mask]))})
    return pd.DataFrame(rows)


def case_tests(read: AttentionSummary, layers: Sequence[int]) -> pd.DataFrame:
    """Does the last position read otherwise in right than in wrong cases of a pair of relations? `failures.contrast`.

    Returns per place, for all memory layers and for `layers`: place, layers, right, wrong (mean weights), difference
    (right less wrong within pairs) and p (permutations, corrected for all rows).
    """
    weights, rows = read.of("last")[0], []
    among, occurs = np.isin(read.layers, layers), read.chance.sum((0, 1, 2)) > 0
    names = [(place, k) for k, place in enumerate(PLACES) if occurs[k]]
    values = np.stack(
        [x for _, k in names for x in (weights[:, :, k].sum(1), weights[:, among, k].sum(1))],
        axis=1,
    )
    test = contrast(values, read.right, read.frame["pair"], read.frame["e2"])
    labels = [
        (place, which) for place, _ in names for which in ("all", f"{layers[0]}–{layers[-1]}")
    ]
    for column, (place, which) in enumerate(labels):
        row = {"place": place, "layers": which, "right": values[read.right, column].mean()}
        row |= {
            "wrong": values[~read.right, column].mean(),
            "difference": test["difference"][column],
        }
        rows.append({**row, "p": test["p"][column]})
    return pd.DataFrame(rows)


def most_read(weights: np.ndarray, share: float) -> np.ndarray:
    """The fewest cells that together hold at least `share` of the weight: [M, T] bool."""
    order = np.argsort(-weights, axis=None, kind="stable")
    count = int(np.searchsorted(np.cumsum(weights.flat[order]), share - 1e-9)) + 1
    chosen = np.zeros(weights.shape, dtype=bool)
    chosen.flat[order[:count]] = True
    return chosen


def random_cells(
    weights: np.ndarray, most: np.ndarray, equal: str, draw: np.random.Generator
) -> np.ndarray:
    """Other cells than `most`, drawn at random: as many ("count"), or until they hold as much weight ("weight").

    [M, T] bool; none where all others hold less weight. Raises ValueError for another kind.
    """
    if equal not in ("count", "weight"):
        raise ValueError(f'Unknown kind {equal!r}; choose "count" or "weight".')
    order = draw.permutation(np.flatnonzero(~most))
    count = int(most.sum())
    if equal == "weight":
        sums, target = np.cumsum(weights.flat[order]), weights[most].sum()
        count = int(np.searchsorted(sums, target)) + 1 if len(sums) and sums[-1] >= target else 0
    chosen = np.zeros(weights.shape, dtype=bool)
    chosen.flat[order[:count]] = True
    return chosen


def knock_outs(
    runs: Sequence[Run],
    store: Store,
    share: float = 0.25,
    draws: int = 2,
    count: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> pd.DataFrame:
    """Hide cells and ask again.

    From the last position: the cells it reads most, which hold `share` of its weight, against random other cells, as
    many or with as much weight (left out where all others hold less); and all cells of one place in the `high_layers`,
    against as many random ones as r1 has there. Besides, everything, from the queries at one place, from those at all
    others and from all.

    Returns one row per question, kind of cells and draw: seed, question, e2, hidden (name), cells (how many), weight
    (of the cells, in what the last position reads; missing for other queries), fall (of the answer's log-probability),
    lost (right before less right after).
    """
    draw, rows = np.random.default_rng(seed), []
    for reader in memory_probes(runs, store, count, device):
        read, before, right = reader.read()
        weights, everything = [own[-1] for own in read], reader.block(PLACES)
        plans = [(f"everything, at {place}", everything, (place,)) for place in reader.places]
        for place in reader.places:
            plans.append(
                (f"everything, but at {place}", everything, tuple(p for p in PLACES if p != place))
            )
        plans.append(("everything, everywhere", everything, PLACES))
        most = [most_read(own, share) for own in weights]
        plans.append(("most read", most, ("last",)))
        for equal in ("count", "weight") * draws:
            cells = [random_cells(w, m, equal, draw) for w, m in zip(weights, most, strict=True)]
            plans.append((f"random, same {equal} as most read", cells, ("last",)))
        blocks = {
            place: reader.block([place], high_layers(reader.wrapped.layers))
            for place in reader.places
        }
        plans += [(f"{place}, high layers", cells, ("last",)) for place, cells in blocks.items()]
        for _ in range(draws):
            cells = [
                random_cells(w, m, "count", draw)
                for w, m in zip(weights, blocks["r1"], strict=True)
            ]
            plans.append(("random, same count as r1", cells, ("last",)))
        for name, cells, queries in progress(plans, "hiding", unit="set"):
            after, still = reader.ask(cells, queries)
            about = {
                "seed": reader.frame["seed"],
                "question": range(len(before)),
                "e2": reader.frame["e2"],
            }
            about |= {"cells": [c.sum() for c in cells], "fall": before - after}
            about["weight"] = [w[c].sum() for w, c in zip(weights, cells, strict=True)]
            part = pd.DataFrame(about).assign(
                hidden=name, lost=right.astype(float) - still.astype(float)
            )
            if queries != ("last",):
                part["weight"] = np.nan
            rows.append(part[part["cells"] > 0])
    return pd.concat(rows, ignore_index=True)


def knock_out_table(made: pd.DataFrame) -> pd.DataFrame:
    """`knock_outs` over all questions: hidden, cells, weight, fall (nats) and lost (share of questions), both with
    their 95 % intervals over bridge entities, n."""
    rows = []
    for name in dict.fromkeys(made["hidden"]):
        part = _of_each(made[made["hidden"] == name])
        mean, low, high = mean_interval(part[["fall", "lost"]].to_numpy(), part["e2"])
        row = {
            "hidden": name,
            "cells": part["cells"].mean(),
            "weight": part["weight"].mean(),
            "fall": mean[0],
        }
        row |= {
            "low": low[0],
            "high": high[0],
            "lost": mean[1],
            "lost_low": low[1],
            "lost_high": high[1],
        }
        rows.append({**row, "n": len(part)})
    return pd.DataFrame(rows)


def knock_out_tests(made: pd.DataFrame) -> pd.DataFrame:
    """How much more it costs to hide what is read most, and r1's high layers, than their controls, paired by question.

    Returns: hidden, control, more (nats) with its 95 % interval over bridge entities (low, high), n.
    """
    pairs = [("most read", f"random, same {equal} as most read") for equal in ("count", "weight")]
    rows = []
    for hidden, control in [*pairs, ("r1, high layers", "random, same count as r1")]:
        one, other = (_of_each(made[made["hidden"] == name]) for name in (hidden, control))
        if other.empty:
            continue
        both = one.merge(other, on=["seed", "question", "e2"], suffixes=("", "_other"))
        mean, low, high = mean_interval((both["fall"] - both["fall_other"]).to_numpy(), both["e2"])
        row = {
            "hidden": hidden,
            "control": control,
            "more": float(mean),
            "low": float(low),
            "high": float(high),
        }
        rows.append({**row, "n": len(both)})
    return pd.DataFrame(rows)


def _of_each(part: pd.DataFrame) -> pd.DataFrame:
    """Per question the mean over draws."""
    return part.groupby(["seed", "question", "e2"], as_index=False)[
        ["cells", "weight", "fall", "lost"]
    ].mean()


def weight_against_fall(
    runs: Sequence[Run], store: Store, count: int | None = None, device: str = "cpu"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Does the weight of cells tell how much they matter? Blocks: what the queries at one place read at another.

    Returns (a row per question and block: seed, question, e2, query, place, weight (the mean of the queries'), fall (of
    the answer's log-probability when the block is hidden); and per query with four places or more to read the mean over
    questions of Spearman's rank correlation of weight and fall over these places, to a thousandth and to 0.01 nats,
    since the order of what is near zero is a processor's, with its 95 % interval over bridge entities: query, mean,
    low, high, n, the questions in which both differ between places).
    """
    rows = []
    for reader in memory_probes(runs, store, count, device):
        weights, before, _ = reader.read()
        blocks = [
            (query, place)
            for k, query in enumerate(reader.places)
            for place in reader.places[: k + 1]
        ]
        for query, place in progress(blocks, "blocks", unit="block"):
            asked = [
                own[labels == query].mean(0)
                for own, labels in zip(weights, reader.labels, strict=True)
            ]
            cells = reader.block([place])
            about = {
                "seed": reader.frame["seed"],
                "question": range(len(before)),
                "e2": reader.frame["e2"],
            }
            about["weight"] = [w[c].sum() for w, c in zip(asked, cells, strict=True)]
            about["fall"] = before - reader.ask(cells, (query,))[0]
            rows.append(pd.DataFrame(about).assign(query=query, place=place))
    table, ranks = pd.concat(rows, ignore_index=True), []
    for query, part in table.groupby("query", sort=False):
        if part["place"].nunique() < 4:
            continue
        told = part.assign(weight=part["weight"].round(3), fall=part["fall"].round(2))
        grouped = told.groupby(["seed", "question", "e2"])[["weight", "fall"]]
        each = grouped.filter(lambda own: (own.nunique() > 1).all()).index
        each = (
            told.loc[each]
            .groupby(["seed", "question", "e2"])[["weight", "fall"]]
            .apply(lambda own: stats.spearmanr(own["weight"], own["fall"]).statistic)
        )
        each = each.reset_index(name="rank")
        mean, low, high = mean_interval(each["rank"].to_numpy(), each["e2"])
        ranks.append(
            {
                "query": query,
                "mean": float(mean),
                "low": float(low),
                "high": float(high),
                "n": len(each),
            }
        )
    return table, pd.DataFrame(ranks)


def brought_forward(
    runs: Sequence[Run], store: Store, count: int | None = None, device: str = "cpu"
) -> pd.DataFrame:
    """From which layer on e2 and e3 can be read at the last position, without the adapter and with it.

    Read with the logit lens: an entity can be read where its first token is among the `failures.READABLE` highest. As
    control, the e2 and e3 of another question with the same relations: an adapter may raise all names of a kind.

    Returns one row per question, entity ("e3", "e2", "e3 shuffled", "e2 shuffled") and adapter ("off", "on"): seed,
    question, e2, entity, adapter and readable ([L+1] bool, by state).
    """
    rows = []
    for reader in memory_probes(runs, store, count, device):
        for adapter in ("off", "on"):
            reader.wrapped.enabled = adapter == "on"
            seen = read_conflict(
                reader.wrapped.base_model, reader.tokenizer, reader.frame, places=["last"]
            )
            for entity, readable in seen.readable.items():  # [n, 1, L+1]
                about = {
                    "seed": reader.frame["seed"],
                    "question": range(len(readable)),
                    "e2": reader.frame["e2"],
                }
                part = pd.DataFrame(about).assign(entity=entity, adapter=adapter)
                rows.append(part.assign(readable=list(readable[:, 0])))
    return pd.concat(rows, ignore_index=True)


def forward_lines(made: pd.DataFrame) -> pd.DataFrame:
    """Share of questions in which an entity can be read at the last position: entity, adapter, layer, share, low, high
    (95 %, over bridge entities)."""
    rows = []
    for (entity, adapter), part in made.groupby(["entity", "adapter"], sort=False):
        mean, low, high = mean_interval(np.stack(part["readable"].to_list()), part["e2"])
        table = pd.DataFrame({"layer": range(len(mean)), "share": mean, "low": low, "high": high})
        rows.append(table.assign(entity=entity, adapter=adapter))
    return pd.concat(rows, ignore_index=True)


def forward_table(made: pd.DataFrame) -> pd.DataFrame:
    """How much earlier the adapter makes an entity readable.

    Returns: entity; ever_off, ever_on (share of questions in which it can be read in some state); n; and over the
    questions in which it can be read both ways (both): off, on (mean first state) and earlier (off less on) with its
    95 % interval over bridge entities (low, high; missing for fewer than two entities).
    """
    rows = []
    for entity, part in made.groupby("entity", sort=False):
        wide = part.pivot(
            index=["seed", "question", "e2"], columns="adapter", values="readable"
        ).reset_index()
        off, on = (np.stack(wide[adapter].to_list()) for adapter in ("off", "on"))  # [n, L+1]
        row = {
            "entity": entity,
            "ever_off": off.any(1).mean(),
            "ever_on": on.any(1).mean(),
            "n": len(wide),
        }
        both = off.any(1) & on.any(1)
        row |= {"both": int(both.sum())}
        if wide.loc[both, "e2"].nunique() > 1:
            first = [x[both].argmax(1) for x in (off, on)]
            mean, low, high = mean_interval(first[0] - first[1], wide.loc[both, "e2"])
            row |= {
                "off": first[0].mean(),
                "on": first[1].mean(),
                "earlier": mean,
                "low": low,
                "high": high,
            }
        rows.append(row)
    return pd.DataFrame(rows)


NOTICEABLE = 0.05  # nats


def brings_high_states(
    models: dict[str, tuple[pd.DataFrame, pd.DataFrame, Sequence[int]]],
) -> Claim:
    """C10. models: name -> (`reading.high_share` of r1 at the last position, `reading.knock_out_tests`, the layers).

    Two checks per model: the last position gives r1's high layers more weight than cells read alike would, with its
    whole interval and in every training; and hiding them costs at least NOTICEABLE more than as many random cells.
    """
    passed, against, told = [], [], []
    for name, (share, tests, high) in models.items():
        by = share.set_index("questions")
        whole, trainings = by.loc["all"], by[by.index.str.startswith("training")]
        hidden = tests.set_index(["hidden", "control"]).loc[
            ("r1, high layers", "random, same count as r1")
        ]
        passed += [
            whole["over_low"] > 0 and (trainings["over"] > 0).all(),
            hidden["low"] > NOTICEABLE,
        ]
        against += [
            whole["over_high"] < 0 and (trainings["over"] < 0).all(),
            hidden["high"] < NOTICEABLE,
        ]
        told.append(
            f"{name}: weight of r1's layers {high[0]}–{high[-1]} at the last position {whole['share']:.1%} "
            f"[{whole['low']:.1%}, {whole['high']:.1%}], by chance {whole['chance']:.1%}; hiding them lowers log p(e3) "
            f"by {hidden['more']:+.3f} nats [{hidden['low']:+.3f}, {hidden['high']:+.3f}] more than hiding as many "
            f"random cells; n = {whole['n']:.0f} and {hidden['n']:.0f}, {len(trainings)} trainings"
        )
    return Claim(
        id="C10",
        claim="back attention learns to bring r1's high layers into the last position's source layer",
        paper="layers 27–30 of 32 (attention map)",
        ours=". ".join(told),
        kind="tolerance",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="05_what_it_reads",
        figure="05_map",
    )
