"""Is the gain of trained back attention flow from high layers, or training? (claims N2, N3, B3, B5)

An adapter is asked with another memory than it was trained on: of another question, the mean, or a part of the cells.
What it gains over the model without it, in log-probability of the answer, is the whole; what it keeps of that does not
come from what was taken away. And answers are followed from without to with an adapter, by whom they name.
"""

from collections.abc import Callable, Sequence

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
from companion.report.verdicts import Claim, _points, _weighed
from companion.runs.run import Run
from companion.runs.store import Store

TRAINED, OFF = "as trained", "without the adapter"

ANOTHER = SAME, MEAN = "another question's memory, same relations", "the mean memory"

R1_HIDDEN = ("r1 hidden", "e1 hidden")  # and its control

ONLY_HIGH = tuple(
    f"only {place}'s high layers, at the last position" for place in ("r1", "e1")
)  # likewise


def align_to_length(memory: Tensor, length: int) -> Tensor:
    """One question's memory [M, S, D] for a question of another length: [M, length, D].

    Positions are counted from the end, where the words that ask stand; where there are too few, the first is repeated.
    """
    return memory[:, (torch.arange(length) - length + memory.shape[1]).clamp(min=0)]


def mean_of_others(memory: Sequence[Tensor]) -> list[Tensor]:
    """Per question the mean of all others' memory at its positions, as `lent`: [M, T, D] each."""
    alike: dict[int, Tensor] = {}
    for length in {own.shape[1] for own in memory}:
        alike[length] = torch.stack([align_to_length(other, length) for other in memory]).sum(0)
    return [(alike[own.shape[1]] - own) / (len(memory) - 1) for own in memory]


def _edits(reader: MemoryProbe) -> dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]]:
    """Every test of a reader by name: a function that asks."""
    memory, layers = reader.states(), np.array(reader.memory_layers)
    low, middle, high = (part.tolist() for part in np.array_split(layers, 3))

    def of(relations: str) -> list[Tensor]:
        rows = donors(reader.frame, relations=relations)
        return [
            align_to_length(memory[row], own.shape[1])
            for row, own in zip(rows, memory, strict=True)
        ]

    def mean() -> list[Tensor]:
        # The module normalises what it reads; else a mean would be that of the few states with huge entries.
        return mean_of_others(
            [normed(own) for own in memory] if reader.wrapped.back_attention_config.norm else memory
        )

    def all_but(cells: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return reader.ask([~own for own in cells], PLACES)

    def route(place: str) -> tuple[np.ndarray, np.ndarray]:
        """Only the last position reads, and only the high layers of one place."""
        hidden = []
        for labels, cells in zip(
            reader.labels, reader.block([place], high_layers(reader.wrapped.layers)), strict=True
        ):
            own = np.ones((len(labels), *cells.shape), dtype=bool)  # [T, M, T]
            own[-1] = ~cells
            hidden.append(own)
        return reader.ask(hidden, PLACES)

    tests = {
        TRAINED: reader.ask,
        OFF: lambda: reader.ask(reader.block(PLACES), PLACES),
        SAME: lambda: reader.ask(memory=of("same")),
        "another question's memory, any relations": lambda: reader.ask(memory=of("any")),
        MEAN: lambda: reader.ask(memory=mean()),
        **{f"{p} hidden": lambda p=p: reader.ask(reader.block([p]), PLACES) for p in ("r1", "e1")},
        "only r1": lambda: all_but(reader.block(["r1"])),
    }
    if len(layers) > 2:
        for name, part in (("low", low), ("middle", middle), ("high", high)):
            cells = reader.block(PLACES, part)
            tests[f"only the {name} third, {part[0]}–{part[-1]}"] = lambda cells=cells: all_but(
                cells
            )
        others = tuple(place for place in PLACES if place != "last")
        tests["the last position alone reads"] = lambda: reader.ask(reader.block(PLACES), others)
        tests |= {
            name: lambda p=p: route(p) for p, name in zip(("r1", "e1"), ONLY_HIGH, strict=True)
        }
    return tests


def memory_tests(
    runs: Sequence[Run], store: Store, count: int | None = None, device: str = "cpu"
) -> pd.DataFrame:
    """Ask trained adapters their first `count` test questions with every edit of their memory.

    Of another question: what the first pass made of a question about other entities, with the same relations (where one
    of those asked has them, else any, see `failures.donors`) or any; positions as in `lent`. The mean is that of all
    other questions asked, of states as the module reads them. Thirds are of the memory layers; the edits of layers are
    left out where only one is read.

    Returns one row per question and test: seed, question, e2, alike (another one asked has its relations and other
    entities), test, log_prob (of the answer's first token), right.
    """
    rows = []
    for reader in memory_probes(runs, store, count, device):
        other = reader.frame.iloc[donors(reader.frame)]
        relations = [frame[["r1", "r2"]].to_numpy() for frame in (reader.frame, other)]
        alike = (relations[0] == relations[1]).all(1)
        for name, ask in progress(_edits(reader).items(), "another memory", unit="test"):
            log_probs, right = ask()
            about = {
                "seed": reader.frame["seed"],
                "question": range(len(right)),
                "e2": reader.frame["e2"],
            }
            about |= {"alike": alike}
            rows.append(
                pd.DataFrame(
                    {**about, "test": name, "log_prob": log_probs, "right": right.astype(float)}
                )
            )
    return pd.concat(rows, ignore_index=True)


def memory_table(made: pd.DataFrame) -> pd.DataFrame:
    """`memory_tests` over all questions.

    Returns: test, log_prob (mean), kept (share of the adapter's gain in log-probability), low, high (95 %, over bridge
    entities), p (signed ranks of bridge entities' means, against the adapter as trained, Holm over all tests; NaN for
    the two ends), accuracy, n, names (bridge entities), alike (share of questions with a donor of the same relations).

    Raises ValueError unless the adapter gains something in every sample: shares of nothing have no meaning.
    """
    wide, right = (
        made.pivot(index=["seed", "question", "e2"], columns="test", values=v)
        for v in ("log_prob", "right")
    )
    bridge = wide.index.get_level_values("e2")
    draws = bootstrap(bridge)
    gain = (wide[TRAINED] - wide[OFF]).to_numpy()
    if (draws @ gain <= 0).any():
        raise ValueError(
            f"The adapter gains {gain.mean():.3f} nats, not in every sample: there is no share. Ask more."
        )
    rows = []
    for test in dict.fromkeys(made["test"]):
        own = (wide[test] - wide[OFF]).to_numpy()
        row = {"test": test, "log_prob": wide[test].mean(), "kept": own.mean() / gain.mean()}
        row |= interval((draws @ own) / (draws @ gain))
        if test not in (TRAINED, OFF):
            row["p"] = stats.wilcoxon((wide[test] - wide[TRAINED]).groupby(bridge).mean()).pvalue
        rows.append(
            {**row, "accuracy": right[test].mean(), "n": len(wide), "names": bridge.nunique()}
        )
        rows[-1]["alike"] = made.loc[made["test"] == test, "alike"].mean()
    table = pd.DataFrame(rows)
    return table.assign(p=holm(table.dropna(subset=["p"]))["corrected"])


def several_layers_help(
    accuracy: pd.DataFrame, against_one: pd.DataFrame, against_lora: pd.DataFrame
) -> Claim:
    """Q1. accuracy, against_one, against_lora: of back attention with several source layers: sources (as text),
    accuracy, low, high; and difference, low, high, n, from one source layer of as many weights (against_one), from
    residual LoRA at the same layers (against_lora).

    One check per choice of layers: it is ahead of one layer with its whole interval.
    """
    lora, by = against_lora.set_index("sources"), accuracy.set_index("sources")
    told = ", ".join(
        f"{row['sources']}: {by.loc[row['sources'], 'accuracy']:.0%}, {_points(row)} points against one layer, "
        f"{_points(lora.loc[row['sources']])} against residual LoRA there"
        for _, row in against_one.iterrows()
    )
    return Claim(
        id="Q1",
        claim="several source layers do better than one",
        paper="open question",
        ours=f"two-hop, equal weights, rates found for each: {told}; n = {int(against_one['n'].iloc[0])} questions",
        kind="band over seeds",
        verdict=_weighed(list(against_one["low"] > 0), list(against_one["high"] < 0)),
        notebook="07_controls",
        figure="07_sources",
    )


HALF, MOST = 0.5, 0.9  # shares of the gain


def high_states_of_r1_matter(models: dict[str, pd.DataFrame]) -> Claim:
    """N3. models: name -> `controls.memory_table`.

    Two checks per model, each with whole intervals: r1's high layers, read by the last position alone, keep more than
    half of the gain, and more than e1's do (against: less than half); and with r1 hidden less than nine tenths are
    kept, and less than with e1 hidden (against: more than nine tenths).
    """
    passed, against, told = [], [], []
    for name, table in models.items():
        by = table.set_index("test")
        route, control, hidden, other = (by.loc[test] for test in (*ONLY_HIGH, *R1_HIDDEN))
        passed += [
            route["low"] > max(HALF, control["high"]),
            hidden["high"] < min(MOST, other["low"]),
        ]
        against += [route["high"] < HALF, hidden["low"] > MOST]
        parts = [*ONLY_HIGH, *R1_HIDDEN, "only r1", *(test for test in by.index if "third" in test)]
        told.append(
            f"{name}: {', '.join(f'{test} {_kept(by.loc[test])}' for test in parts)}; n = {int(route['n'])}"
        )
    return Claim(
        id="N3",
        claim="the gain runs from r1's high layers to the last position",
        paper="next check",
        ours=f"share of the gain in log p(e3) that is kept: {'. '.join(told)}",
        kind="tolerance",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="07_controls",
        figure="07_memory",
    )


def _kept(row) -> str:
    return f"{row['kept']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"


NO_MORE = 0.02  # accuracy: what is surely less is nothing that a second pass would be run for


def gain_is_flow(
    models: dict[str, pd.DataFrame], control: pd.DataFrame, difference: pd.DataFrame
) -> Claim:
    """B3, put as its opposite: the gain is cross-layer flow, not training. models: name -> `controls.memory_table`, of
    back attention; control: the same of the same module on its own layer; difference: back attention less that module
    over all datasets, `comparison.difference_table`.

    Two checks per model and one more, each with the whole interval: with another question's memory of the same
    relations, and with the mean memory, less than half of the gain is kept (against: more); and back attention is ahead
    of the same module on its own layer (against: by less than NO_MORE). How much the control keeps is told.
    """

    def rows(table: pd.DataFrame) -> list[pd.Series]:
        return [
            table.set_index("test").loc[test] for test in ANOTHER
        ]  # of the same relations, and the mean

    def words(name: str, table: pd.DataFrame) -> str:
        return f"{name}: {', '.join(f'{row.name} {_kept(row)}' for row in rows(table))}, n = {int(table['n'].iloc[0])}"

    same = difference[
        (difference["other"] == "same layer") & (difference["dataset"] == "all")
    ].iloc[0]
    passed = [row["high"] < HALF for table in models.values() for row in rows(table)] + [
        same["low"] > 0
    ]
    against = [row["low"] > HALF for table in models.values() for row in rows(table)]
    against += [same["low"] <= 0 and same["high"] < NO_MORE]
    told = "; ".join(words(name, table) for name, table in models.items())
    return Claim(
        id="B3",
        claim="the gain is cross-layer flow, not parameter count or training signal",
        paper="break condition",
        ours=f"share of the gain in log p(e3) that is kept: {told}; "
        f"{words('the same module on its own layer', control)}. Over all datasets {_points(same)} points against it",
        kind="tolerance",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="07_controls",
        figure="07_memory",
    )


def r1_is_needed(against_donor: pd.DataFrame, models: dict[str, pd.DataFrame]) -> Claim:
    """B4. against_donor: `failures.against_donor`; models: name -> `controls.memory_table`.

    One check of back-patching and one per model, each with its whole interval: r1's own high states mend more wrong
    cases than another prompt's do, by any pair of layers; and with r1 hidden from back attention less than MOST of its
    gain is kept (against: more).
    """
    own = (
        against_donor.set_index(["place", "how"])
        .loc[("r1", "oracle")]
        .rename({"mean": "difference"})
    )
    hidden = {name: table.set_index("test").loc["r1 hidden"] for name, table in models.items()}
    kept = ", ".join(f"{name} {_kept(row)}" for name, row in hidden.items())
    return Claim(
        id="B4",
        claim="what r1's states say is needed",
        paper="break condition",
        ours=f"wrong cases mended by r1's own states less by a donor's: {_points(own)} points (oracle over all pairs "
        f"of layers); with r1 hidden from back attention it keeps {kept} of its gain in log p(e3)",
        kind="tolerance",
        verdict=_weighed(
            [bool(own["low"] > 0), *(bool(row["high"] < MOST) for row in hidden.values())],
            [bool(own["high"] < 0), *(bool(row["low"] > MOST) for row in hidden.values())],
        ),
        notebook="02_failure_analysis, 07_controls",
        figure="02_back_patching",
    )
