"""05: what trained back attention reads in two-hop questions, and whether it needs that (C10).

probes: of `companion.measures.memory`, whose cells and places these are. Intervals resample bridge
entities; what another training would read is not in them, so that trainings stand beside them.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from backattn.runtime import progress
from companion.measures.memory import PLACES, MemoryProbe, high_layers
from companion.measures.two_hop import read_conflict
from companion.report.intervals import paired, summary
from companion.report.verdicts import Effect, claim, with_interval

NOTICEABLE = 0.05  # nats
UNITS = ["seed", "question", "e2", "pair", "right"]
Cells = list[np.ndarray]  # [M, T] bool per question


def attention(probes: Iterable[MemoryProbe]) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """What queries read: UNITS, query, place, layer, weight (mean of the query place's tokens, sum
    of the place's), chance (if all cells were read alike). And what the last position of each run's
    first question reads, memory layers × tokens."""
    parts, examples = [], []
    for probe in probes:
        maps, _, right = probe.read()
        about = probe.frame[UNITS[:-1]].assign(right=right).to_dict("records")
        axes = {"query": PLACES, "place": PLACES, "layer": probe.memory_layers}
        cells = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
        for row, read, labels in zip(about, maps, probe.labels, strict=True):  # read: [T, M, T]
            inside = np.array([labels == place for place in PLACES], dtype=float)  # [places, T]
            mean = inside / inside.sum(1, keepdims=True).clip(min=1)
            alike = np.broadcast_to(np.tril(np.ones((len(labels),) * 2))[:, None], read.shape)
            alike = alike / alike.sum((1, 2), keepdims=True)
            weight, chance = (
                np.einsum("qt,tms,ps->qpm", mean, each, inside).ravel() for each in (read, alike)
            )
            part = cells.assign(weight=weight, chance=chance, **row)
            parts.append(part[part["chance"] > 0])
        tokens = [probe.tokenizer.decode([t]).strip() for t in probe.items.prompts[0]]
        examples.append(pd.DataFrame(maps[0][-1], list(probe.memory_layers), tokens))
    order = pd.CategoricalDtype(PLACES, ordered=True)
    return pd.concat(parts, ignore_index=True).astype({"query": order, "place": order}), examples


def query_table(read: pd.DataFrame) -> pd.DataFrame:
    """What query places read over all layers: query, place, weight, chance, layer (its mean)."""
    groups = read.groupby(["query", "place", "layer"], observed=True)[["weight", "chance"]]
    means = groups.mean().reset_index("layer")
    means["layer"] = means["layer"] * means["weight"]
    table = means.groupby(["query", "place"], observed=True)[["weight", "chance", "layer"]].sum()
    return table.assign(layer=table["layer"] / table["weight"].clip(lower=1e-12)).reset_index()


def high_share(read: pd.DataFrame, layers: Sequence[int]) -> pd.DataFrame:
    """Weight of the last position on r1's states in some layers: questions (all, right or wrong, by
    training, by pair), share, low, high, chance, over (share less chance), over_low, over_high, n,
    names; without kinds of a single bridge entity."""
    cells = (read["query"] == "last") & (read["place"] == "r1") & read["layer"].isin(layers)
    each = read[cells].groupby(UNITS, sort=False)[["weight", "chance"]].sum().reset_index()
    each["over"] = each["weight"] - each["chance"]
    cases, trainings = each["right"].map({True: "right", False: "wrong"}), each["seed"].astype(str)
    kinds = [
        each.assign(questions=x) for x in ("all", cases, "training " + trainings, each["pair"])
    ]
    frame = pd.concat([part.sort_values("questions", kind="stable") for part in kinds])
    share, over = (summary(frame, value, "questions") for value in ("weight", "over"))
    groups = frame.groupby("questions", sort=False)
    table = share.rename(columns={"mean": "share"}).drop(columns="n")
    table["chance"] = groups["chance"].mean().to_numpy()
    table[["over", "over_low", "over_high", "n"]] = over[["mean", "low", "high", "n"]]
    table["names"] = groups["e2"].nunique().to_numpy()
    return table[table["names"] > 1].reset_index(drop=True)


def most_read(weights: np.ndarray, share: float) -> np.ndarray:
    """The fewest cells that together hold at least `share` of the weight: [M, T] bool."""
    order = np.argsort(-weights, axis=None, kind="stable")
    count = np.searchsorted(np.cumsum(weights.flat[order]), share - 1e-9) + 1
    return np.isin(np.arange(weights.size), order[:count]).reshape(weights.shape)


def random_cells(
    weights: np.ndarray, most: np.ndarray, draw: np.random.Generator, same: str = "count"
) -> np.ndarray:
    """Other cells than `most`, drawn at random: as many, or of as much weight (none where all
    others hold less): [M, T] bool."""
    order, count = draw.permutation(np.flatnonzero(~most)), most.sum()
    if same == "weight":
        count = np.searchsorted(np.cumsum(weights.flat[order]), weights[most].sum()) + 1
        count = count if count <= len(order) else 0
    return np.isin(np.arange(weights.size), order[:count]).reshape(weights.shape)


def hidden_cells(
    probe: MemoryProbe, weights: Cells, share: float, draws: int, draw: np.random.Generator
) -> Iterator[tuple[str, str, Cells, Sequence[str]]]:
    """What `knock_outs` hides: (key, label, cells, from queries at these places). weights: what the
    last position reads."""
    everything, last = probe.block(PLACES), ("last",)

    def others(chosen: Cells, same: str = "count") -> Cells:
        return [random_cells(w, c, draw, same) for w, c in zip(weights, chosen, strict=True)]

    for place in probe.places:
        yield "at", f"everything, at {place}", everything, (place,)
    for place in probe.places:
        rest = [other for other in PLACES if other != place]
        yield "but at", f"everything, but at {place}", everything, rest
    yield "everything", "everything, everywhere", everything, PLACES
    most = [most_read(each, share) for each in weights]
    yield "most", "most read", most, last
    for same in ("count", "weight") * draws:
        label = f"random, same {same} as most read"
        yield f"random {same}", label, others(most, same), last
    high = {place: probe.block([place], high_layers(probe.wrapped.layers)) for place in PLACES}
    for place in probe.places:
        yield f"{place} high", f"{place}, high layers", high[place], last
    for _ in range(draws):
        yield "random r1", "random, same count as r1", others(high["r1"]), last


def knock_outs(
    probes: Iterable[MemoryProbe],
    share: float = 0.25,
    draws: int = 2,
    seed: int = 0,
    silent: bool = False,
    keys: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Hide cells and ask again.

    From the last position: the cells it reads most, which hold `share` of its weight, against
    random others, as many or of as much weight; and one place in the `high_layers`, against as many
    random cells as r1 has there. Besides, everything, from queries at one place, all others, all.
    silent: the weights of other cells stay what they are. keys: only these kinds of cells.

    Returns, per question and kind of cells, means over draws: hidden (label), key, seed, question,
    e2, cells (how many), weight (of what the last position reads; missing for other queries), fall
    (of the answer's log-probability), lost (right before less after).
    """
    draw, rows = np.random.default_rng(seed), []
    for probe in probes:
        read, before, right = probe.read()
        weights = [each[-1] for each in read]
        sets = list(hidden_cells(probe, weights, share, draws, draw))
        sets = [one for one in sets if keys is None or one[0] in keys]
        for key, label, cells, queries in progress(sets, "hiding", unit="set"):
            after, still = probe.ask(cells, queries, silent=silent)
            part = probe.about.assign(key=key, hidden=label, cells=[c.sum() for c in cells])
            held = [w[c].sum() for w, c in zip(weights, cells, strict=True)]
            part["weight"] = held if queries == ("last",) else np.nan
            part = part.assign(fall=before - after, lost=right.astype(float) - still)
            rows.append(part[part["cells"] > 0])
    named = ["hidden", "key", "seed", "question", "e2"]
    return pd.concat(rows).groupby(named, as_index=False, sort=False).mean()


def knock_out_table(made: pd.DataFrame) -> pd.DataFrame:
    """`knock_outs` over all questions, fall (nats) and lost (share of them) with intervals."""
    table = made.groupby("hidden", sort=False)[["cells", "weight"]].mean().reset_index()
    fall, lost = (summary(made, value, "hidden") for value in ("fall", "lost"))
    table[["fall", "low", "high"]] = fall[["mean", "low", "high"]]
    table[["lost", "lost_low", "lost_high", "n"]] = lost[["mean", "low", "high", "n"]]
    return table


def knock_out_tests(made: pd.DataFrame) -> pd.DataFrame:
    """How much more it costs to hide what is read most, and r1's high layers, than their controls:
    key, hidden, control (labels), more (nats, paired by question), low, high, n."""
    rows, label = [], made.drop_duplicates("key").set_index("key")["hidden"]
    controls = {"random count": "most", "random weight": "most", "random r1": "r1 high"}
    for control, key in controls.items():
        units = made.loc[made["key"] == control, ["seed", "question"]]
        both = made.merge(units, on=["seed", "question"])  # some have no control of equal weight
        if len(both):
            row = {"key": key, "hidden": label[key], "control": label[control]}
            rows.append({**row, **paired(both, key, control, "key", "fall")})
    return pd.DataFrame(rows).rename(columns={"mean": "more"})


def weight_against_fall(probes: Iterable[MemoryProbe]) -> pd.DataFrame:
    """A row per question and block, what queries read at a place: seed, question, e2, query, place,
    weight (mean of the queries'), fall (of the answer's log-probability when it is hidden)."""
    rows = []
    for probe in probes:
        weights, before, _ = probe.read()
        blocks = [(q, place) for k, q in enumerate(probe.places) for place in probe.places[: k + 1]]
        for query, place in progress(blocks, "blocks", unit="block"):
            cells, part = probe.block([place]), probe.about.assign(query=query, place=place)
            read = [w[at == query].mean(0) for w, at in zip(weights, probe.labels, strict=True)]
            part["weight"] = [w[c].sum() for w, c in zip(read, cells, strict=True)]
            rows.append(part.assign(fall=before - probe.ask(cells, (query,))[0]))
    return pd.concat(rows, ignore_index=True)


def by_depth(probes: Iterable[MemoryProbe], bands: int = 5) -> pd.DataFrame:
    """What the last position reads, by place and band of depth: seed, question, e2, place, depth
    (the band's middle, per cent of the layers), weight, fall (of the answer's log-probability when
    the band is silenced there: its weight is not given to the others)."""
    rows = []
    for probe in probes:
        weights, before, _ = probe.read()
        depth = 100 * np.array(probe.memory_layers) / probe.wrapped.layers
        ends = np.linspace(depth.min(), 100, bands + 1)
        band = np.clip(np.searchsorted(ends, depth, side="right") - 1, 0, bands - 1)
        blocks = list(itertools.product(probe.places, range(bands)))
        for place, k in progress(blocks, "silencing", unit="block"):
            layers = np.array(probe.memory_layers)[band == k]
            cells, part = probe.block([place], layers), probe.about.assign(place=place)
            part["depth"] = ends[k : k + 2].mean()
            part["weight"] = [w[-1][c].sum() for w, c in zip(weights, cells, strict=True)]
            rows.append(part.assign(fall=before - probe.ask(cells, silent=True)[0]))
    return pd.concat(rows, ignore_index=True)


def brought_forward(probes: Iterable[MemoryProbe]) -> pd.DataFrame:
    """Where the logit lens reads e3 and e2 at the last position, and ("shuffled", since an adapter
    may raise all names of a kind) those of another question with the same relations: seed,
    question, e2, entity, adapter ("off", "on"), layer (that the state enters), readable."""
    rows = []
    for probe in probes:
        model, ask = probe.wrapped, (probe.tokenizer, probe.frame)
        for adapter in ("off", "on"):
            probe.wrapped.enabled = adapter == "on"
            for entity, readable in read_conflict(model, *ask, places=["last"]).readable.items():
                about = probe.about.assign(entity=entity, adapter=adapter)
                grid = pd.DataFrame(readable[:, 0], index=pd.MultiIndex.from_frame(about))
                rows.append(grid.rename_axis(columns="layer").stack().rename("readable"))
    return pd.concat(rows).reset_index()


def brings_high_states(models: Mapping[str, tuple]) -> dict:
    """C10. models: name -> (`high_share`, `knock_out_tests`, the layers). Two checks per model: the
    last position gives r1's high layers more weight than chance, with the whole interval and in
    every training; hiding them costs at least NOTICEABLE more than as many random cells. The first
    is the paper's comparison; the second, where it is least, the strictest control."""
    checks, weights, costs, each = {}, [], [], []
    for name, (share, tests, high) in models.items():
        by = share.set_index("questions")
        whole, trainings = by.loc["all"], by[by.index.str.startswith("training")]
        hidden = tests.set_index("key").loc["r1 high"]
        more = whole["over_low"] > 0 and (trainings["over"] > 0).all()
        checks |= {f"{name}: read": more, f"{name}: needed": hidden["low"] > NOTICEABLE}
        over = whole[["over", "over_low", "over_high"]].set_axis(["over", "low", "high"])
        weights.append(Effect.of(f"{name}: weight of r1's high layers, above chance", over, "over"))
        what = f"{name}: hiding them less hiding random cells"
        costs.append(Effect(what, *hidden[["more", "low", "high"]], "nats", NOTICEABLE))
        each.append(
            f"{name}: weight of r1's layers {high[0]}–{high[-1]} at the last position "
            f"{with_interval(whole, 'share', '.1%')}, by chance {whole['chance']:.1%}; hiding them "
            f"lowers log p(e3) by {hidden['more']:+.3f} nats [{hidden['low']:+.3f}, "
            f"{hidden['high']:+.3f}] more than hiding as many random cells; n = {whole['n']:.0f} "
            f"and {hidden['n']:.0f}, {len(trainings)} trainings"
        )
    least = min(costs, key=lambda cost: cost.value)
    return claim("C10", ". ".join(each), checks, weights, least)
