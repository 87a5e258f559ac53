"""07: is the gain of trained back attention flow from high layers, or training? (Q1, N2, N3, B3–B5)

An adapter is asked with another memory than it was trained on: what it keeps of its gain in the
answer's log-probability is not from what was taken away. And whom do answers name before and after?
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy import stats

from backattn.adapters.arms import UNTRAINED
from backattn.models.devices import input_device
from backattn.runtime import progress
from backattn.training.batches import collate, first_tokens
from backattn.training.evaluation import answer_logits, by_length
from companion.measures.closed_set import answer_sets, asked_by_hops, in_parts
from companion.measures.memory import BATCH, PLACES, MemoryProbe, high_layers, last_logits
from companion.measures.two_hop import donors
from companion.questions.asking import ENTITIES, ID_COLUMNS, candidates, outcome
from companion.questions.datasets import TWO_HOP_KEYS, load
from companion.questions.splits import split
from companion.report.intervals import bootstrap, holm, interval
from companion.report.verdicts import Effect, claim, named, percent, points
from companion.runs.as_asked import asked, questions
from companion.runs.perform import load_trained, with_adapter
from companion.runs.run import Run
from companion.runs.store import Store

Tables = Mapping[str, pd.DataFrame]
HALF, MOST = 0.5, 0.9  # shares of the gain
TAKEN = {  # keys of `memory_edits`, as a figure names them
    "same relations": "… another's memory",
    "mean": "… the mean memory",
    "r1 hidden": "… r1 hidden",
}
NAMED_BY_N2 = ("than other failures", "than same layer")
NO_MORE = 0.02  # accuracy: what is surely less is nothing that a second pass would be run for


def memory_edits(probe: MemoryProbe) -> Iterator[tuple[str, str, dict]]:
    """Every test of a memory: (key, label, what `MemoryProbe.ask` is given). Thirds are of memory
    layers; edits of layers are left out where only one is read."""
    layers, everything = np.array(probe.memory_layers), probe.block(PLACES)

    def hide(cells: Sequence[np.ndarray], queries: Sequence[str] = PLACES) -> dict:
        return {"hidden": cells, "queries": queries}

    def only(places: Sequence[str], layers: Sequence[int] | None = None) -> dict:
        return hide([~cells for cells in probe.block(places, layers)])

    yield "trained", "as trained", {}
    yield "off", "without the adapter", hide(everything)
    for relations in ("same", "any"):
        label = f"another question's memory, {relations} relations"
        yield f"{relations} relations", label, {"memory": probe.exchanged(relations)}
    yield "mean", "the mean memory", {"memory": probe.averaged()}
    for place in ("r1", "e1"):
        yield f"{place} hidden", f"{place} hidden", hide(probe.block([place]))
    yield "only r1", "only r1", only(["r1"])
    if len(layers) < 3:
        return
    for name, third in zip(("low", "middle", "high"), np.array_split(layers, 3), strict=True):
        label = f"only the {name} third, {third[0]}–{third[-1]}"
        yield f"third {name}", label, only(PLACES, third.tolist())
    yield "last reads", "the last position alone reads", hide(everything, PLACES[:-1])
    for place in ("r1", "e1"):
        route = only([place], high_layers(probe.wrapped.layers))
        pairs = zip(route["hidden"], probe.labels, strict=True)  # earlier queries read nothing
        route["hidden"] = [cells | (at != "last")[:, None, None] for cells, at in pairs]
        yield f"{place} route", f"only {place}'s high layers, at the last position", route


def memory_tests(probes: Iterable[MemoryProbe], facts: pd.DataFrame) -> pd.DataFrame:
    """Ask trained adapters with every edit of their memory: seed, question, e2, r2, seen (its
    answer was one in training), alike (another one asked has its relations and other entities, see
    `donors`), key, test (label), and VALUES of `measures.closed_set`. facts: with all answers to
    each relation."""
    rows = []
    for probe in probes:
        relations = probe.frame[["r1", "r2"]].to_numpy()
        alike = (relations == relations[donors(probe.frame)]).all(1)
        about = probe.about.assign(r2=probe.frame["r2"], seen=probe.frame["seen"], alike=alike)
        of = answer_sets(probe.tokenizer, facts, probe.frame, probe.items)
        probe.read()  # what edits leave as it was need not run again
        for key, label, edit in progress(memory_edits(probe), "another memory", unit="test"):
            values = in_parts(probe.logits(**edit), *of)
            rows.append(about.assign(key=key, test=label).join(values))
    return pd.concat(rows, ignore_index=True)


def memory_table(made: pd.DataFrame) -> pd.DataFrame:
    """`memory_tests` by key: test, log_prob (mean), kept (share of the gain in it), low, high,
    accuracy, n, names, alike (share), p (signed ranks of bridge entities' means against "trained",
    Holm over all tests). Raises ValueError unless the adapter gains something in every sample."""
    groups = made.groupby("key", sort=False)
    table = groups.agg(test=("test", "first"), log_prob=("log_prob", "mean"))
    log_probs = made.pivot(index=["seed", "question", "e2"], columns="key", values="log_prob")
    bridge = log_probs.index.get_level_values("e2")
    kept = log_probs[table.index].sub(log_probs["off"], axis=0)
    draws, gain = bootstrap(bridge) @ kept.to_numpy(), kept["trained"]
    whole = draws[:, [kept.columns.get_loc("trained")]]
    if (whole <= 0).any():
        mean = f"{gain.mean():.3f} nats"
        raise ValueError(f"The adapter gains {mean}, not in every sample: there is no share.")
    table["kept"] = kept.mean() / gain.mean()
    table["low"], table["high"] = np.nanpercentile(draws / whole, [2.5, 97.5], axis=0)
    table = table.assign(accuracy=groups["right"].mean(), n=len(kept), names=bridge.nunique())
    less = log_probs.sub(log_probs["trained"], axis=0).groupby(bridge).mean()
    tests = less[table.index.drop(["trained", "off"])]
    p = pd.DataFrame({"p": {key: stats.wilcoxon(tests[key]).pvalue for key in tests}})
    return table.assign(alike=groups["alike"].mean(), p=holm(p)["corrected"])


def other_ways(
    runs: Sequence[Run], store: Store, facts: pd.DataFrame, count: int, device: str = "cpu"
) -> pd.DataFrame:
    """Each run's first `count` test questions, their answers taken apart: the columns of
    `memory_tests` up to e2, r2, seen, key (the run's arm, and of zero-shot also "hop by hop", the
    second hop asked of its own answer to the first) and VALUES. facts: see `memory_tests`."""
    parts = []
    for run in progress(list(runs), "asking", unit="run"):
        frame = asked(run, "test").head(count).reset_index(drop=True)
        loaded = with_adapter(run, run.tested_in, device)
        if run.arm not in UNTRAINED:
            loaded = load_trained(run, store, device)
        with loaded as (model, tokenizer):
            items = questions(replace(run, test_items=len(frame)), tokenizer, "test")
            made = {run.arm: last_logits(model, items)}
            if run.arm == "zero-shot":
                second = frame.assign(prompt=asked_by_hops(model, tokenizer, frame, facts))
                made["hop by hop"] = last_logits(model, first_tokens(tokenizer, second))
        about = frame[["e2", "r2"]].assign(seed=run.seed, question=frame.index)
        about["seen"] = frame["answer"].isin(asked(run, "train")["answer"])
        of = answer_sets(tokenizer, facts, frame, items)
        parts += [about.assign(key=key).join(in_parts(x, *of)) for key, x in made.items()]
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def transitions(runs: Sequence[Run], store: Store, device: str = "cpu", **other) -> pd.DataFrame:
    """Whom the model names without and with each run's adapter, by the first token, on its test, or
    that of other fields (dataset, test_items): arm, seed, question, e2, pair, collides (see
    `candidates`), before, after (OUTCOMES), right (after is e3)."""
    parts = []
    for run in progress(list(runs), "asking again", unit="run"):
        there = replace(run, **other)
        with load_trained(run, store, device) as (model, tokenizer):
            facts = candidates(tokenizer, split(load(there.dataset), run.fold))
            keys = asked(there, "test")[TWO_HOP_KEYS]
            facts = keys.merge(facts, on=TWO_HOP_KEYS, validate="one_to_one")
            items = questions(there, tokenizer, "test")
            before, after = np.empty((2, len(items)), dtype=int)  # the likeliest tokens
            for rows in by_length(items, BATCH):
                batch = collate(items, rows, input_device(model))
                after[rows] = answer_logits(model, batch)[:, -1].argmax(-1).cpu()
                with model.disable_adapter():
                    before[rows] = answer_logits(model, batch)[:, -1].argmax(-1).cpu()
        ids = facts[list(ID_COLUMNS)].set_axis(ENTITIES, axis=1).to_dict("records")
        table = facts[["e2", "pair", "collides"]].assign(arm=run.arm, seed=run.seed)
        table["question"] = range(len(table))
        for name, tokens in (("before", before), ("after", after)):
            table[name] = [outcome(int(t), own) for t, own in zip(tokens, ids, strict=True)]
        parts.append(table.assign(right=table["after"] == "e3"))
    return pd.concat(parts, ignore_index=True)


def sample_means(frame: pd.DataFrame, value: str, by: list[str]) -> tuple[pd.DataFrame, ...]:
    """Means of a column in groups of rows, and their weights: in the first row of all questions,
    then of each sample of bridge entities, [1 + R, groups]; NaN where none is drawn."""
    draws, groups = bootstrap(frame["e2"]), frame.groupby(by)
    weights = np.vstack([np.ones_like(draws[:1]), draws])
    inside = np.eye(groups.ngroups)[groups.ngroup()]  # [n, groups]
    totals = pd.DataFrame(weights @ inside, columns=groups.size().index)
    values = frame[value].to_numpy(dtype=float)[:, None]
    return weights @ (inside * values) / totals.where(totals > 0), totals


def repaired_differences(made: pd.DataFrame) -> pd.DataFrame:
    """How much larger a share of the failures that say e2 back attention repairs than of others,
    within pairs of relations that have both, weighted by the former, and than other arms of the
    same: more ("than other failures", "than <arm>"), difference, low, high, n (e2 failures).

    Raises ValueError when no pair has both kinds, or an arm was asked other questions.
    """
    index = ["seed", "question", "e2", "pair", "before"]
    wide = made.pivot(index=index, columns="arm", values="right").astype(float).reset_index()
    wide["kind"] = wide["before"].where(wide["before"].isin(["e3", "e2"]), "other")
    kinds = wide[wide["kind"] != "e3"].groupby("pair")["kind"].nunique()
    pairs = kinds.index[kinds == 2]
    if pairs.empty:
        raise ValueError("There is no pair with failures that say e2 and others: ask more.")
    means, totals = sample_means(wide, "back attention", ["kind", "pair"])
    less = means["e2"][pairs] - means["other"][pairs]
    sizes = totals["e2"][pairs].where(less.notna())
    repaired = {"than other failures": (less * sizes).sum(axis=1) / sizes.sum(axis=1)}
    for arm in made.loc[made["arm"] != "back attention", "arm"].unique():
        more = wide["back attention"] - wide[arm]
        if more.isna().any():
            raise ValueError(f"Back attention and {arm!r} were not asked the same questions.")
        repaired[f"than {arm}"] = sample_means(wide.assign(more=more), "more", ["kind"])[0]["e2"]
    e2 = wide.loc[wide["kind"] == "e2", "pair"]
    rows = [
        {"more": name, "difference": draws[0], **interval(draws[1:]), "n": len(e2)}
        for name, draws in repaired.items()
    ]
    rows[0]["n"] = int(e2.isin(pairs).sum())
    return pd.DataFrame(rows)


def knowledge_table(known: pd.DataFrame, unknown: pd.DataFrame, least: int = 10) -> pd.DataFrame:
    """Does an adapter help where the model does not know both hops? `transitions` on questions of
    both kinds that do not collide, over pairs of relations with `least` of each, all pairs alike:
    questions, before, after (shares right), gain, low, high, n, pairs.

    Raises ValueError when no pair has enough.
    """
    both = [known.assign(kind="known"), unknown.assign(kind="unknown")]
    both = pd.concat(both, ignore_index=True).query("not collides")
    counts = both.groupby(["pair", "kind"]).size().unstack(fill_value=0)
    pairs = counts.index[(counts.reindex(columns=["known", "unknown"]) >= least).all(axis=1)]
    if pairs.empty:
        raise ValueError(f"No pair of relations has {least} questions of each kind: ask more.")
    both = both[both["pair"].isin(pairs)].assign(before=both["before"] == "e3", after=both["right"])
    both["gain"] = both["after"].astype(float) - both["before"]
    table = {}
    for value in ("before", "after", "gain"):
        means = sample_means(both, value, ["kind", "pair"])[0].T.groupby("kind").mean().T
        means["known less unknown"] = means["known"] - means["unknown"]
        table[value] = means.iloc[0]
    ends = pd.DataFrame({kind: interval(means.loc[1:, kind]) for kind in means}).T  # of the gain
    table = pd.DataFrame(table).join(ends).rename_axis("questions").reset_index()
    known, unknown = both["kind"].value_counts()[["known", "unknown"]]
    return table.assign(n=[known, unknown, known + unknown], pairs=len(pairs))


def lost(what: str, row: Mapping) -> Effect:
    """What is lost of the gain, from a row of `memory_table`: less than a tenth counts as none."""
    ends = {"lost": 1 - row["kept"], "low": 1 - row["high"], "high": 1 - row["low"]}
    return Effect.of(what, ends, "lost", zone=100 * (1 - MOST))


def _kept(table: pd.DataFrame, keys: Sequence[str]) -> str:
    rows = table.loc[list(keys)].to_dict("records")
    return ", ".join(f"{row['test']} {percent(row, 'kept')}" for row in rows)


def several_layers_help(accuracy: pd.DataFrame, one: pd.DataFrame, lora: pd.DataFrame) -> dict:
    """Q1. Tables by `sources`: accuracy; difference, low, high, n from one source layer of as many
    weights, and from residual LoRA at the same layers. One check per choice of layers: it is ahead
    of one layer with its whole interval. The comparison is the best choice; the strictest control,
    residual LoRA at those layers."""
    one, lora, by = (table.set_index("sources") for table in (one, lora, accuracy))
    each = ", ".join(
        f"{name}: {by.loc[name, 'accuracy']:.0%}, {points(row)} points against one layer, "
        f"{points(lora.loc[name])} against residual LoRA there"
        for name, row in one.iterrows()
    )
    n = int(one["n"].iloc[0])
    ours = f"two-hop, equal weights, rates found for each: {each}; n = {n} questions"
    best = one["difference"].idxmax()
    several = Effect.of(f"layers {best} less one layer", one.loc[best])
    rival = Effect.of("less residual LoRA there", lora.loc[best])
    return claim("Q1", ours, named(one.reset_index(), one["low"] > 0, "sources"), several, rival)


def bridge_failures_repaired(repaired: pd.DataFrame, differences: pd.DataFrame) -> dict:
    """N2. repaired: arm, before, share (of such failures that become e3), low, high, n, names;
    differences: `repaired_differences`. Two checks, with whole intervals: back attention repairs
    more of the failures that say e2 than of others (the comparison), and than the same module on
    its own layer does (the strictest control)."""
    by = repaired[repaired["arm"] == "back attention"].set_index("before")
    rows = differences.set_index("more")
    less = ", ".join(f"{name} {points(row)} points" for name, row in rows.iterrows())
    there = by.dropna(subset=["share"]).iterrows()
    shares = ", ".join(f"{kind} {percent(row)} of {int(row['n'])}" for kind, row in there)
    ours = (
        f"two-hop, share of failures repaired by whom they named: {shares}; of those that say e2, "
        f"more {less}; {int(by.loc['e2', 'names'])} bridge entities among them"
    )
    effects = [Effect.of(f"more {name}", rows.loc[name]) for name in NAMED_BY_N2]
    return claim("N2", ours, {x.what: x.low > 0 for x in effects}, *effects)


def high_states_of_r1_matter(models: Tables) -> dict:
    """N3. models: name -> `memory_table`. Two checks per model, with whole intervals: r1's high
    layers, read by the last position alone, keep more than HALF of the gain, and more than e1's;
    with r1 hidden less than MOST is kept, and less than without e1. The comparison is the first;
    the strictest control, what hiding r1 costs, where it costs least."""
    checks, routes, costs, each = {}, [], [], []
    for name, table in models.items():
        row = table.loc
        carries = row["r1 route"]["low"] > max(HALF, row["e1 route"]["high"])
        needed = row["r1 hidden"]["high"] < min(MOST, row["e1 hidden"]["low"])
        checks |= {f"{name}: carries": carries, f"{name}: needed": needed}
        what = f"{name}: gain that r1's high layers keep alone, above half"
        routes.append(Effect.of(what, row["r1 route"], "kept", HALF))
        costs.append(lost(f"{name}: gain lost with r1 hidden", row["r1 hidden"]))
        keys = ["r1 route", "e1 route", "r1 hidden", "e1 hidden", "only r1"]
        keys += [key for key in table.index if key.startswith("third")]
        each.append(f"{name}: {_kept(table, keys)}; n = {int(table['n'].iloc[0])}")
    ours = f"share of the gain in log p(e3) that is kept: {'. '.join(each)}"
    return claim("N3", ours, checks, routes, min(costs, key=lambda cost: cost.value))


def gain_is_training(
    models: Tables, control: pd.DataFrame, difference: pd.DataFrame, closed: pd.DataFrame
) -> dict:
    """B3, that the gain is training, not flow. models, control (the same module on its own layer):
    `memory_table`; difference: `results.difference_table`, over all datasets on which both arms
    were tried; closed: closed-set accuracy with its own memory less another's.

    With whole intervals: with another question's memory of the same relations, and with the mean,
    more than HALF is kept (the former is the comparison, in each model); back attention is not
    ahead of the control by NO_MORE; another's memory costs nothing in closed-set accuracy (the
    strictest control: the 90 % interval lies within NO_MORE of none, which is equivalence at 5 %).
    """
    keys = ["same relations", "mean"]
    same = difference[difference["dataset"] == "all"].set_index("other").loc["same layer"]
    lost = closed.set_index("value").loc["closed"]
    other = pd.concat([table.loc[keys] for table in models.values()])
    each = "; ".join(
        f"{name}: {_kept(table, keys)}, n = {int(table['n'].iloc[0])}"
        for name, table in {**models, "the same module on its own layer": control}.items()
    )
    ours = (
        f"share of the gain in log p(e3) that is kept: {each}. Over {int(same['names'])} datasets "
        f"{points(same)} points against it; another's memory costs {points(lost, 'mean')} points "
        "among the answers of the right kind"
    )
    equal = abs(lost["low_90"]) < NO_MORE and abs(lost["high_90"]) < NO_MORE
    what = "{}: gain kept with another question's memory, above half"
    kept = [
        Effect.of(what.format(name), table.loc["same relations"], "kept", HALF)
        for name, table in models.items()
    ]
    names = [f"{name}, {key}" for name in models for key in keys]
    checks = dict(zip(names, other["low"] > HALF, strict=True))
    checks |= {"level with the same layer": same["low"] <= 0 and same["high"] < NO_MORE}
    checks |= {"level among answers of the right kind": equal}
    what = "another's memory costs, among answers of the right kind"
    return claim("B3", ours, checks, kept, Effect.of(what, lost, "mean"))


def r1_is_irrelevant(against_donor: pd.DataFrame, models: Tables) -> dict:
    """B4. against_donor: notebook 02b's table; models: name -> `memory_table`. Checks, with whole
    intervals: per model, with r1 hidden more than MOST of the gain is kept (the comparison); r1's
    own high states repair fewer wrong cases than another prompt's (the strictest control)."""
    own = against_donor.set_index(["place", "how"]).loc[("r1", "oracle")]
    hidden = pd.DataFrame({name: table.loc["r1 hidden"] for name, table in models.items()}).T
    kept = ", ".join(f"{name} {percent(row, 'kept')}" for name, row in hidden.iterrows())
    ours = (
        f"wrong cases repaired by r1's own states less by a donor's: {points(own, 'mean')} points "
        f"(oracle over all pairs of layers); with r1 hidden from back attention it keeps {kept} of "
        "its gain in log p(e3)"
    )
    costs = [lost(f"{name}: gain lost with r1 hidden", row) for name, row in hidden.iterrows()]
    checks = {f"{name}: not needed": row["low"] > MOST for name, row in hidden.iterrows()}
    checks |= {"a donor's states do more": own["high"] < 0}
    ends = {"difference": -own["mean"], "low": -own["high"], "high": -own["low"]}
    donor = Effect.of("cases repaired by a donor's states less r1's own", ends)
    costs = [replace(cost, expects="none") for cost in costs]
    return claim("B4", ours, checks, costs, donor)


def no_knowledge_no_gain(table: pd.DataFrame) -> dict:
    """B5. table: `knowledge_table`. Two checks, with whole intervals: where a hop is not known the
    gain is below NO_MORE (the comparison), and it is larger where both are known (the strictest
    control)."""
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
    gain = Effect.of("gain where a hop is not known", without, "gain", expects="none")
    larger = Effect.of("gain where both are known less that", more, "gain")
    checks = {"no gain without": without["high"] < NO_MORE, "more with": more["low"] > 0}
    return claim("B5", ours, checks, gain, larger)
