"""05: what trained back attention reads in two-hop questions, and whether it needs that (C10).

Cells and places as in `companion.measures.memory`. Intervals resample bridge entities; what another
training would read is not in them, so that single trainings stand beside them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from backattn.runtime import progress
from companion.measures.memory import PLACES, MemoryProbe, high_layers, memory_probes
from companion.measures.two_hop import contrast, read_conflict
from companion.report.intervals import mean_interval, mean_summary, paired, summary
from companion.report.verdicts import claim, with_interval
from companion.runs.run import Run
from companion.runs.store import Store

NOTICEABLE = 0.05  # nats


@dataclass
class AttentionSummary:
    """What queries read over all questions of some runs.

    weights: [n, queries, M, places], the mean over a query place's tokens, summed over a read
    place's; chance: the same if every query read all its cells alike; right: [n]; frame: the
    questions; layers: the memory layers; examples: (tokens, what the last position reads [M, T]) of
    each run's first two questions.
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
    """Weights of every query over memory layers and places, see `AttentionSummary`."""
    weights, chance, right, frames, examples, layers = [], [], [], [], [], ()
    for probe in memory_probes(runs, store, count, device):
        (maps, _, outcome), layers = probe.read(), tuple(probe.memory_layers)
        for read, labels in zip(maps, probe.labels, strict=True):  # read: [T, M, T]
            inside = np.array([labels == place for place in PLACES], dtype=float)  # [places, T]
            mean = inside / inside.sum(1, keepdims=True).clip(min=1)
            weights.append(np.einsum("qt,tms,ps->qmp", mean, read, inside))
            alike = np.tril(np.ones((len(labels), len(labels))))
            alike /= alike.sum(1, keepdims=True) * len(layers)  # [T, T]
            flat = np.einsum("qt,ts,ps->qp", mean, alike, inside)
            chance.append(np.repeat(flat[:, None], len(layers), axis=1))
        right.append(outcome)
        frames.append(probe.frame)
        for row in range(min(2, len(maps))):
            tokens = [probe.tokenizer.decode([t]).strip() for t in probe.items.prompts[row]]
            examples.append((tokens, maps[row][-1]))
    frame = pd.concat(frames, ignore_index=True)
    both = np.stack(weights), np.stack(chance)
    return AttentionSummary(*both, np.concatenate(right), frame, layers, examples)


def weight_table(read: AttentionSummary) -> pd.DataFrame:
    """Mean weight of the last position by cell and case: case, layer, place, weight, chance, n."""
    rows, (weights, chance) = [], read.of("last")
    for case, mask in (("right", read.right), ("wrong", ~read.right)):
        for k, place in enumerate(PLACES) if mask.any() else ():
            table = pd.DataFrame({"case": case, "layer": read.layers, "place": place})
            table = table.assign(weight=weights[mask, :, k].mean(0))
            rows.append(table.assign(chance=chance[mask, :, k].mean(0), n=int(mask.sum())))
    return pd.concat(rows, ignore_index=True)


def query_table(read: AttentionSummary) -> pd.DataFrame:
    """What each query place reads at each place, over all layers: query, place, weight, chance,
    layer (the mean memory layer of that weight)."""
    rows = []
    for query in PLACES:
        weights, chance = (x.mean(0) for x in read.of(query))  # [M, places]
        for k, place in enumerate(PLACES):
            total = weights[:, k].sum()
            if chance[:, k].sum() > 0:
                layer = weights[:, k] @ np.array(read.layers) / max(total, 1e-12)
                row = {"query": query, "place": place, "weight": total}
                rows.append({**row, "chance": chance[:, k].sum(), "layer": layer})
    return pd.DataFrame(rows)


def high_share(read: AttentionSummary, layers: Sequence[int]) -> pd.DataFrame:
    """Weight of the last position on r1's states in some layers, over all questions and by kind.

    Returns: questions ("all", "right", "wrong", "training 0" or a pair of relations), share with
    its 95 % interval over bridge entities (low, high), chance, over (share less chance) with
    over_low and over_high, n, names. Kinds with a single bridge entity are left out.
    """
    among, k = np.isin(read.layers, layers), PLACES.index("r1")
    share, chance = (x[:, among, k].sum(1) for x in read.of("last"))
    frame, rows = read.frame.assign(share=share, chance=chance, over=share - chance), []
    kinds = {"all": np.ones(len(frame), dtype=bool), "right": read.right, "wrong": ~read.right}
    kinds |= {f"training {s}": frame["seed"] == s for s in sorted(set(frame["seed"]))}
    kinds |= {pair: frame["pair"] == pair for pair in sorted(set(frame["pair"]))}
    for kind, mask in kinds.items():
        part = frame[mask]
        if part["e2"].nunique() > 1:
            own, over = (mean_summary(part[name], part["e2"]) for name in ("share", "over"))
            row = {"questions": kind, "share": own["mean"], "low": own["low"], "high": own["high"]}
            row |= {"chance": part["chance"].mean(), "over": over["mean"]}
            row |= {"over_low": over["low"], "over_high": over["high"]}
            rows.append({**row, "n": len(part), "names": part["e2"].nunique()})
    return pd.DataFrame(rows)


def case_tests(read: AttentionSummary, layers: Sequence[int]) -> pd.DataFrame:
    """Does the last position read otherwise in right than in wrong cases of a pair of relations?

    Returns per place, for all memory layers and for `layers`: place, layers, right, wrong (mean
    weights), difference (right less wrong within pairs) and p (`contrast`: permutations, corrected
    for all rows).
    """
    weights, among = read.of("last")[0], np.isin(read.layers, layers)
    occurs, rows, values = read.chance.sum((0, 1, 2)) > 0, [], []
    for k, place in enumerate(PLACES):
        for name, chosen in (("all", among | True), (f"{layers[0]}–{layers[-1]}", among)):
            if occurs[k]:
                rows.append({"place": place, "layers": name})
                values.append(weights[:, chosen, k].sum(1))
    values = np.stack(values, axis=1)  # [n, rows]
    test = contrast(values, read.right, read.frame["pair"], read.frame["e2"])
    means = {
        name: values[mask].mean(0) for name, mask in (("right", read.right), ("wrong", ~read.right))
    }
    return pd.DataFrame(rows).assign(**means, difference=test["difference"], p=test["p"])


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
    """Other cells than `most`, drawn at random: as many ("count"), or as much weight ("weight").

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


@dataclass(frozen=True)
class Hidden:
    """Cells that queries at some places may not read; label: its name in tables."""

    key: str
    label: str
    cells: list[np.ndarray]
    queries: Sequence[str] = ("last",)


def hidden_sets(
    probe: MemoryProbe,
    weights: Sequence[np.ndarray],
    share: float,
    draws: int,
    draw: np.random.Generator,
) -> Iterator[Hidden]:
    """What `knock_outs` hides; weights: what the last position reads, [M, T] per question."""
    everything = probe.block(PLACES)
    for place in probe.places:
        yield Hidden("at", f"everything, at {place}", everything, (place,))
    for place in probe.places:
        others = tuple(other for other in PLACES if other != place)
        yield Hidden("but at", f"everything, but at {place}", everything, others)
    yield Hidden("everything", "everything, everywhere", everything, PLACES)
    most = [most_read(each, share) for each in weights]
    yield Hidden("most", "most read", most)
    for equal in ("count", "weight") * draws:
        cells = [random_cells(w, m, equal, draw) for w, m in zip(weights, most, strict=True)]
        yield Hidden(f"random {equal}", f"random, same {equal} as most read", cells)
    layers = high_layers(probe.wrapped.layers)
    high = {place: probe.block([place], layers) for place in probe.places}
    for place, cells in high.items():
        yield Hidden(f"{place} high", f"{place}, high layers", cells)
    for _ in range(draws):
        cells = [
            random_cells(w, m, "count", draw) for w, m in zip(weights, high["r1"], strict=True)
        ]
        yield Hidden("random r1", "random, same count as r1", cells)


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

    From the last position: the cells it reads most, which hold `share` of its weight, against
    random other cells, as many or with as much weight (left out where all others hold less); and
    all cells of one place in the `high_layers`, against as many random ones as r1 has there.
    Besides, everything, from the queries at one place, from those at all others and from all.

    Returns one row per question, kind of cells and draw: seed, question, e2, key, hidden (label),
    cells (how many), weight (of the cells, in what the last position reads; missing for other
    queries), fall (of the answer's log-probability), lost (right before less right after).
    """
    draw, rows = np.random.default_rng(seed), []
    for probe in memory_probes(runs, store, count, device):
        read, before, right = probe.read()
        weights = [each[-1] for each in read]
        sets = list(hidden_sets(probe, weights, share, draws, draw))
        for hidden in progress(sets, "hiding", unit="set"):
            after, still = probe.ask(hidden.cells, hidden.queries)
            part = probe.about().assign(key=hidden.key, hidden=hidden.label, fall=before - after)
            part["cells"] = [cells.sum() for cells in hidden.cells]
            part["weight"] = [w[c].sum() for w, c in zip(weights, hidden.cells, strict=True)]
            if hidden.queries != ("last",):
                part["weight"] = np.nan
            part["lost"] = right.astype(float) - still.astype(float)
            rows.append(part[part["cells"] > 0])
    return pd.concat(rows, ignore_index=True)


def over_draws(made: pd.DataFrame) -> pd.DataFrame:
    """`knock_outs` with the mean over draws: one row per question and kind of cells."""
    keys = ["hidden", "key", "seed", "question", "e2"]
    columns = ["cells", "weight", "fall", "lost"]
    return made.groupby(keys, as_index=False, sort=False)[columns].mean()


def knock_out_table(made: pd.DataFrame) -> pd.DataFrame:
    """`knock_outs` over all questions: hidden, cells, weight, fall (nats) and lost (share of
    questions), both with their 95 % intervals over bridge entities, n."""
    each = over_draws(made)
    means = each.groupby("hidden", sort=False)[["cells", "weight"]].mean().reset_index()
    fall, lost = (summary(each, value, "hidden") for value in ("fall", "lost"))
    table = means.assign(fall=fall["mean"], low=fall["low"], high=fall["high"], lost=lost["mean"])
    return table.assign(lost_low=lost["low"], lost_high=lost["high"], n=fall["n"])


def knock_out_tests(made: pd.DataFrame) -> pd.DataFrame:
    """How much more it costs to hide what is read most, and r1's high layers, than their controls.

    Returns: key, hidden, control (labels), more (nats), paired by question, with its 95 % interval
    over bridge entities (low, high), n.
    """
    each, rows = over_draws(made), []
    label = dict(made[["key", "hidden"]].drop_duplicates().to_numpy())
    tests = (("most", "random count"), ("most", "random weight"), ("r1 high", "random r1"))
    for key, control in tests:
        if control not in label:
            continue
        units = each.loc[each["key"] == control, ["seed", "question"]]
        both = each.merge(units, on=["seed", "question"])  # some have no control of equal weight
        row = {"key": key, "hidden": label[key], "control": label[control]}
        rows.append({**row, **paired(both, key, control, "key", "fall")})
    return pd.DataFrame(rows).rename(columns={"mean": "more"})


def weight_against_fall(
    runs: Sequence[Run], store: Store, count: int | None = None, device: str = "cpu"
) -> pd.DataFrame:
    """Does the weight of cells tell how much they matter? Blocks: what queries read at a place.

    Returns a row per question and block: seed, question, e2, query, place, weight (the mean of the
    queries'), fall (of the answer's log-probability when the block is hidden).
    """
    rows = []
    for probe in memory_probes(runs, store, count, device):
        weights, before, _ = probe.read()
        blocks = [(q, place) for k, q in enumerate(probe.places) for place in probe.places[: k + 1]]
        for query, place in progress(blocks, "blocks", unit="block"):
            cells, part = probe.block([place]), probe.about().assign(query=query, place=place)
            read = [w[at == query].mean(0) for w, at in zip(weights, probe.labels, strict=True)]
            part["weight"] = [w[c].sum() for w, c in zip(read, cells, strict=True)]
            rows.append(part.assign(fall=before - probe.ask(cells, (query,))[0]))
    return pd.concat(rows, ignore_index=True)


def rank_correlations(blocks: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of weight and fall over the places that a query reads, per query.

    For queries with four places or more; per question, to a thousandth and to 0.01 nats, since the
    order of what is near zero is a processor's. Returns: query, mean, low, high (95 %, over bridge
    entities), n, the questions in which both differ between places.
    """
    rows, units = [], ["query", "seed", "question", "e2"]
    rounded = blocks.assign(weight=blocks["weight"].round(3), fall=blocks["fall"].round(2))
    for keys, part in rounded.groupby(units, sort=False):
        if len(part) >= 4 and part["weight"].nunique() > 1 and part["fall"].nunique() > 1:
            rank = stats.spearmanr(part["weight"], part["fall"]).statistic
            rows.append({**dict(zip(units, keys, strict=True)), "rank": rank})
    return summary(pd.DataFrame(rows, columns=[*units, "rank"]), "rank", "query")


def brought_forward(
    runs: Sequence[Run], store: Store, count: int | None = None, device: str = "cpu"
) -> pd.DataFrame:
    """From which layer on e2 and e3 can be read at the last position, without the adapter and with.

    Read with the logit lens: an entity can be read where its first token is among the highest. As
    control, the e2 and e3 of another question with the same relations: an adapter may raise all
    names of a kind.

    Returns one row per question, entity ("e3", "e2", "e3 shuffled", "e2 shuffled") and adapter
    ("off", "on"): seed, question, e2, entity, adapter and readable ([L+1] bool, by state).
    """
    rows = []
    for probe in memory_probes(runs, store, count, device):
        for adapter in ("off", "on"):
            probe.wrapped.enabled = adapter == "on"
            reading = read_conflict(probe.wrapped, probe.tokenizer, probe.frame, places=["last"])
            for entity, readable in reading.readable.items():  # [n, 1, L+1]
                part = probe.about().assign(entity=entity, adapter=adapter)
                rows.append(part.assign(readable=list(readable[:, 0])))
    return pd.concat(rows, ignore_index=True)


def forward_lines(made: pd.DataFrame) -> pd.DataFrame:
    """Share of questions in which an entity can be read at the last position: entity, adapter,
    layer, share, low, high (95 %, over bridge entities)."""
    rows = []
    for (entity, adapter), part in made.groupby(["entity", "adapter"], sort=False):
        mean, low, high = mean_interval(np.stack(part["readable"].to_list()), part["e2"])
        table = pd.DataFrame({"layer": range(len(mean)), "share": mean, "low": low, "high": high})
        rows.append(table.assign(entity=entity, adapter=adapter))
    return pd.concat(rows, ignore_index=True)


def forward_table(made: pd.DataFrame) -> pd.DataFrame:
    """How much earlier the adapter makes an entity readable.

    Returns: entity; ever_off, ever_on (share of questions in which it can be read in some state);
    n; and over the questions in which it can be read both ways (both): off, on (mean first state)
    and earlier (off less on) with its 95 % interval over bridge entities (low, high; missing for
    fewer than two entities).
    """
    rows = []
    for entity, part in made.groupby("entity", sort=False):
        units = ["seed", "question", "e2"]
        wide = part.pivot(index=units, columns="adapter", values="readable").reset_index()
        off, on = (np.stack(wide[adapter].to_list()) for adapter in ("off", "on"))  # [n, L+1]
        both = off.any(1) & on.any(1)
        row = {"entity": entity, "ever_off": off.any(1).mean(), "ever_on": on.any(1).mean()}
        row |= {"n": len(wide), "both": int(both.sum())}
        if wide.loc[both, "e2"].nunique() > 1:
            first = [x[both].argmax(1) for x in (off, on)]
            earlier = mean_summary(first[0] - first[1], wide.loc[both, "e2"])
            row |= {"off": first[0].mean(), "on": first[1].mean(), "earlier": earlier["mean"]}
            row |= {"low": earlier["low"], "high": earlier["high"]}
        rows.append(row)
    return pd.DataFrame(rows)


def brings_high_states(
    models: Mapping[str, tuple[pd.DataFrame, pd.DataFrame, Sequence[int]]],
) -> dict:
    """C10. models: name -> (`high_share` of r1 at the last position, `knock_out_tests`, the
    layers).

    Two checks per model: the last position gives r1's high layers more weight than cells read alike
    would, with its whole interval and in every training; and hiding them costs at least NOTICEABLE
    more than as many random cells.
    """
    passed, against, each = [], [], []
    for name, (share, tests, high) in models.items():
        by = share.set_index("questions")
        whole, trainings = by.loc["all"], by[by.index.str.startswith("training")]
        hidden = tests.set_index("key").loc["r1 high"]
        passed += [whole["over_low"] > 0 and (trainings["over"] > 0).all()]
        passed += [hidden["low"] > NOTICEABLE]
        against += [whole["over_high"] < 0 and (trainings["over"] < 0).all()]
        against += [hidden["high"] < NOTICEABLE]
        each.append(
            f"{name}: weight of r1's layers {high[0]}–{high[-1]} at the last position "
            f"{with_interval(whole, 'share', '.1%')}, by chance {whole['chance']:.1%}; hiding them "
            f"lowers log p(e3) by {hidden['more']:+.3f} nats [{hidden['low']:+.3f}, "
            f"{hidden['high']:+.3f}] more than hiding as many random cells; n = {whole['n']:.0f} "
            f"and {hidden['n']:.0f}, {len(trainings)} trainings"
        )
    return claim("C10", ". ".join(each), passed, against)
