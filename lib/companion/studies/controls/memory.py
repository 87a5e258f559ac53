"""07: is the gain of trained back attention flow from high layers, or training? (N3, B3, B4, Q1)

An adapter is asked with another memory than it was trained on: of another question, the mean, or a
part of the cells. What it gains over the model without it, in log-probability of the answer, is the
whole; what it keeps of that does not come from what was taken away.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from backattn.adapters.modules import normed
from backattn.runtime import progress
from companion.measures.memory import PLACES, MemoryProbe, high_layers, memory_probes
from companion.measures.two_hop import donors
from companion.report.intervals import bootstrap, holm, interval
from companion.report.verdicts import claim, percent, points
from companion.runs.run import Run
from companion.runs.store import Store

LABELS = {
    "trained": "as trained",
    "off": "without the adapter",
    "same relations": "another question's memory, same relations",
    "any relations": "another question's memory, any relations",
    "mean": "the mean memory",
    "r1 hidden": "r1 hidden",
    "e1 hidden": "e1 hidden",
    "only r1": "only r1",
    "third low": "only the low third, {}–{}",
    "third middle": "only the middle third, {}–{}",
    "third high": "only the high third, {}–{}",
    "last reads": "the last position alone reads",
    "r1 route": "only r1's high layers, at the last position",
    "e1 route": "only e1's high layers, at the last position",
}
HALF, MOST = 0.5, 0.9  # shares of the gain
NO_MORE = 0.02  # accuracy: what is surely less is nothing that a second pass would be run for


def align_to_length(memory: Tensor, length: int) -> Tensor:
    """One question's memory [M, S, D] for a question of another length: [M, length, D].

    Positions are counted from the end, where the words that ask stand; where there are too few, the
    first is repeated.
    """
    return memory[:, (torch.arange(length) - length + memory.shape[1]).clamp(min=0)]


def mean_of_others(memory: Sequence[Tensor]) -> list[Tensor]:
    """Per question the mean of all others' memory at its positions, aligned: [M, T, D] each."""
    sums: dict[int, Tensor] = {}
    for length in {states.shape[1] for states in memory}:
        sums[length] = torch.stack([align_to_length(other, length) for other in memory]).sum(0)
    return [(sums[states.shape[1]] - states) / (len(memory) - 1) for states in memory]


def memory_edits(probe: MemoryProbe) -> Iterator[tuple[str, str, dict]]:
    """Every test of a memory: (its key in LABELS, its label, what `MemoryProbe.ask` is given).

    Thirds are of the memory layers; edits of layers are left out where only one is read.
    """
    states, layers = probe.states(), np.array(probe.memory_layers)

    def exchanged(relations: str) -> list[Tensor]:
        rows = donors(probe.frame, relations=relations)
        return [align_to_length(states[i], x.shape[1]) for i, x in zip(rows, states, strict=True)]

    def hide(cells: Sequence[np.ndarray], queries: Sequence[str] = PLACES) -> dict:
        return {"hidden": cells, "queries": queries}

    def only(cells: Sequence[np.ndarray]) -> dict:
        return hide([~visible for visible in cells])

    def route(place: str) -> dict:
        """Only the last position reads, and only the high layers of one place."""
        hidden = []
        for cells in probe.block([place], high_layers(probe.wrapped.layers)):
            each = np.ones((cells.shape[1], *cells.shape), dtype=bool)  # [T, M, T]
            each[-1] = ~cells
            hidden.append(each)
        return hide(hidden)

    everything = probe.block(PLACES)
    yield "trained", LABELS["trained"], {}
    yield "off", LABELS["off"], hide(everything)
    yield "same relations", LABELS["same relations"], {"memory": exchanged("same")}
    yield "any relations", LABELS["any relations"], {"memory": exchanged("any")}
    # The module normalises what it reads; else a mean would be that of the few huge states.
    read = [normed(x) for x in states] if probe.wrapped.back_attention_config.norm else states
    yield "mean", LABELS["mean"], {"memory": mean_of_others(read)}
    for place in ("r1", "e1"):
        yield f"{place} hidden", LABELS[f"{place} hidden"], hide(probe.block([place]))
    yield "only r1", LABELS["only r1"], only(probe.block(["r1"]))
    if len(layers) > 2:
        for name, third in zip(("low", "middle", "high"), np.array_split(layers, 3), strict=True):
            label = LABELS[f"third {name}"].format(third[0], third[-1])
            yield f"third {name}", label, only(probe.block(PLACES, third.tolist()))
        others = tuple(place for place in PLACES if place != "last")
        yield "last reads", LABELS["last reads"], hide(everything, others)
        for place in ("r1", "e1"):
            yield f"{place} route", LABELS[f"{place} route"], route(place)


def memory_tests(
    runs: Sequence[Run], store: Store, count: int | None = None, device: str = "cpu"
) -> pd.DataFrame:
    """Ask trained adapters their first `count` test questions with every edit of their memory.

    Of another question: what the first pass made of a question about other entities, with the same
    relations (where one of those asked has them, else any, see `donors`) or any. The mean is that
    of all other questions asked, of states as the module reads them.

    Returns one row per question and test: seed, question, e2, alike (another one asked has its
    relations and other entities), key, test (label), log_prob (of the answer's first token), right.
    """
    rows = []
    for probe in memory_probes(runs, store, count, device):
        other = probe.frame.iloc[donors(probe.frame)]
        relations = [frame[["r1", "r2"]].to_numpy() for frame in (probe.frame, other)]
        about = probe.about().assign(alike=(relations[0] == relations[1]).all(1))
        for key, label, edit in progress(memory_edits(probe), "another memory", unit="test"):
            log_probs, right = probe.ask(**edit)
            about = about.assign(key=key, test=label, log_prob=log_probs)
            rows.append(about.assign(right=right.astype(float)))
    return pd.concat(rows, ignore_index=True)


def memory_table(made: pd.DataFrame) -> pd.DataFrame:
    """`memory_tests` over all questions, by key: test, log_prob (mean), kept (share of the
    adapter's gain in log-probability), low, high (95 %, over bridge entities), accuracy, n, names
    (bridge entities), alike (share of questions with a donor of the same relations), p (signed
    ranks of bridge entities' means, against the adapter as trained, Holm over all tests; NaN for
    both ends).

    Raises ValueError unless the adapter gains something in every sample: shares of nothing have no
    meaning.
    """
    units = ["seed", "question", "e2"]
    wide = made.pivot(index=units, columns="key", values="log_prob")
    right = made.pivot(index=units, columns="key", values="right")
    bridge = wide.index.get_level_values("e2")
    draws, gain = bootstrap(bridge), (wide["trained"] - wide["off"]).to_numpy()
    if (draws @ gain <= 0).any():
        mean = f"{gain.mean():.3f} nats"
        raise ValueError(f"The adapter gains {mean}, not in every sample: there is no share.")
    rows = {}
    for (key, label), part in made.groupby(["key", "test"], sort=False):
        kept = (wide[key] - wide["off"]).to_numpy()
        row = {"test": label, "log_prob": wide[key].mean(), "kept": kept.mean() / gain.mean()}
        row |= interval((draws @ kept) / (draws @ gain))
        row |= {"accuracy": right[key].mean(), "n": len(wide), "names": bridge.nunique()}
        row["alike"] = part["alike"].mean()
        if key not in ("trained", "off"):
            row["p"] = stats.wilcoxon((wide[key] - wide["trained"]).groupby(bridge).mean()).pvalue
        rows[key] = row
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("key")
    return table.assign(p=holm(table.dropna(subset=["p"]))["corrected"])


def several_layers_help(
    accuracy: pd.DataFrame, against_one: pd.DataFrame, against_lora: pd.DataFrame
) -> dict:
    """Q1. Of back attention with several source layers: sources (as text), accuracy, low, high; and
    difference, low, high, n, from one source layer of as many weights (against_one), from residual
    LoRA at the same layers (against_lora).

    One check per choice of layers: it is ahead of one layer with its whole interval.
    """
    lora, by = against_lora.set_index("sources"), accuracy.set_index("sources")
    each = ", ".join(
        f"{row['sources']}: {by.loc[row['sources'], 'accuracy']:.0%}, {points(row)} points against "
        f"one layer, {points(lora.loc[row['sources']])} against residual LoRA there"
        for _, row in against_one.iterrows()
    )
    n = int(against_one["n"].iloc[0])
    ours = f"two-hop, equal weights, rates found for each: {each}; n = {n} questions"
    return claim("Q1", ours, against_one["low"] > 0, against_one["high"] < 0)


def high_states_of_r1_matter(models: Mapping[str, pd.DataFrame]) -> dict:
    """N3. models: name -> `memory_table`.

    Two checks per model, each with whole intervals: r1's high layers, read by the last position
    alone, keep more than half of the gain, and more than e1's do (against: less than half); and
    with r1 hidden less than nine tenths are kept, and less than with e1 hidden (against: more than
    nine tenths).
    """
    passed, against, each = [], [], []
    for name, table in models.items():
        row = table.loc
        passed += [row["r1 route"]["low"] > max(HALF, row["e1 route"]["high"])]
        passed += [row["r1 hidden"]["high"] < min(MOST, row["e1 hidden"]["low"])]
        against += [row["r1 route"]["high"] < HALF, row["r1 hidden"]["low"] > MOST]
        keys = ["r1 route", "e1 route", "r1 hidden", "e1 hidden", "only r1"]
        keys += [key for key in table.index if key.startswith("third")]
        kept = ", ".join(f"{row[key]['test']} {percent(row[key], 'kept')}" for key in keys)
        each.append(f"{name}: {kept}; n = {int(table['n'].iloc[0])}")
    ours = f"share of the gain in log p(e3) that is kept: {'. '.join(each)}"
    return claim("N3", ours, passed, against)


def gain_is_flow(
    models: Mapping[str, pd.DataFrame], control: pd.DataFrame, difference: pd.DataFrame
) -> dict:
    """B3, put as its opposite: the gain is cross-layer flow, not training. models: name ->
    `memory_table`, of back attention; control: of the same module on its own layer; difference:
    back attention less that module over all datasets, `results.difference_table`.

    Two checks per model and one more, each with the whole interval: with another question's memory
    of the same relations, and with the mean memory, less than half of the gain is kept (against:
    more); and back attention is ahead of the same module on its own layer (against: by less than
    NO_MORE). How much the control keeps is reported.
    """

    def words(name: str, table: pd.DataFrame) -> str:
        rows = [table.loc[key] for key in ("same relations", "mean")]
        kept = ", ".join(f"{row['test']} {percent(row, 'kept')}" for row in rows)
        return f"{name}: {kept}, n = {int(table['n'].iloc[0])}"

    over_all = difference[difference["dataset"] == "all"].set_index("other")
    same = over_all.loc["same layer"]
    other = pd.concat([table.loc[["same relations", "mean"]] for table in models.values()])
    passed = [*(other["high"] < HALF), same["low"] > 0]
    against = [*(other["low"] > HALF), same["low"] <= 0 and same["high"] < NO_MORE]
    ours = (
        f"share of the gain in log p(e3) that is kept: "
        f"{'; '.join(words(name, table) for name, table in models.items())}; "
        f"{words('the same module on its own layer', control)}. Over all datasets {points(same)} "
        "points against it"
    )
    return claim("B3", ours, passed, against)


def r1_is_needed(against_donor: pd.DataFrame, models: Mapping[str, pd.DataFrame]) -> dict:
    """B4. against_donor: notebook 02's table of that name; models: name -> `memory_table`.

    One check of back-patching and one per model, each with its whole interval: r1's own high states
    mend more wrong cases than another prompt's do, by any pair of layers; and with r1 hidden from
    back attention less than MOST of its gain is kept (against: more).
    """
    own = against_donor.set_index(["place", "how"]).loc[("r1", "oracle")]
    hidden = {name: table.loc["r1 hidden"] for name, table in models.items()}
    kept = ", ".join(f"{name} {percent(row, 'kept')}" for name, row in hidden.items())
    ours = (
        f"wrong cases mended by r1's own states less by a donor's: {points(own, 'mean')} points "
        f"(oracle over all pairs of layers); with r1 hidden from back attention it keeps {kept} of "
        "its gain in log p(e3)"
    )
    passed = [own["low"] > 0, *(row["high"] < MOST for row in hidden.values())]
    against = [own["high"] < 0, *(row["low"] > MOST for row in hidden.values())]
    return claim("B4", ours, passed, against)
