"""Is the gain of trained back attention flow from high layers, or training? (claims N2, N3, B3, B5)

An adapter is asked with another memory than it was trained on: of another question, the mean, or a part of the cells.
What it gains over the model without it, in log-probability of the answer, is the whole; what it keeps of that does not
come from what was taken away. And answers are followed from without to with an adapter, by whom they name.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from . import census, datasets, experiments, failures
from .arch import input_device
from .back_attention import normed
from .experiments import Run, Store
from .intervals import bootstrap, holm, interval, mean_interval
from .reading import BATCH, PLACES, Reader, high_layers, readers
from .runtime import progress
from .training import answer_logits, collate

TRAINED, OFF = "as trained", "without the adapter"
ANOTHER = SAME, MEAN = "another question's memory, same relations", "the mean memory"
R1_HIDDEN = ("r1 hidden", "e1 hidden")  # and its control
ONLY_HIGH = tuple(f"only {place}'s high layers, at the last position" for place in ("r1", "e1"))  # likewise

# ---------------------------------------------------------------- another memory


def lent(memory: Tensor, length: int) -> Tensor:
    """One question's memory [M, S, D] for a question of another length: [M, length, D].

    Positions are counted from the end, where the words that ask stand; where there are too few, the first is repeated.
    """
    return memory[:, (torch.arange(length) - length + memory.shape[1]).clamp(min=0)]


def mean_of_others(memory: Sequence[Tensor]) -> list[Tensor]:
    """Per question the mean of all others' memory at its positions, as `lent`: [M, T, D] each."""
    alike: dict[int, Tensor] = {}
    for length in {own.shape[1] for own in memory}:
        alike[length] = torch.stack([lent(other, length) for other in memory]).sum(0)
    return [(alike[own.shape[1]] - own) / (len(memory) - 1) for own in memory]


def _edits(reader: Reader) -> dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]]:
    """Every test of a reader by name: a function that asks."""
    memory, layers = reader.states(), np.array(reader.memory_layers)
    low, middle, high = (part.tolist() for part in np.array_split(layers, 3))

    def of(relations: str) -> list[Tensor]:
        rows = failures.donors(reader.frame, relations=relations)
        return [lent(memory[row], own.shape[1]) for row, own in zip(rows, memory, strict=True)]

    def mean() -> list[Tensor]:
        # The module normalises what it reads; else a mean would be that of the few states with huge entries.
        return mean_of_others([normed(own) for own in memory] if reader.wrapped.back_attention_config.norm else memory)

    def all_but(cells: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return reader.ask([~own for own in cells], PLACES)

    def route(place: str) -> tuple[np.ndarray, np.ndarray]:
        """Only the last position reads, and only the high layers of one place."""
        hidden = []
        for labels, cells in zip(reader.labels, reader.block([place], high_layers(reader.wrapped.layers)), strict=True):
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
            tests[f"only the {name} third, {part[0]}–{part[-1]}"] = lambda cells=cells: all_but(cells)
        others = tuple(place for place in PLACES if place != "last")
        tests["the last position alone reads"] = lambda: reader.ask(reader.block(PLACES), others)
        tests |= {name: lambda p=p: route(p) for p, name in zip(("r1", "e1"), ONLY_HIGH, strict=True)}
    return tests


def memory_tests(runs: Sequence[Run], store: Store, count: int | None = None, device: str = "cpu") -> pd.DataFrame:
    """Ask trained adapters their first `count` test questions with every edit of their memory.

    Of another question: what the first pass made of a question about other entities, with the same relations (where one
    of those asked has them, else any, see `failures.donors`) or any; positions as in `lent`. The mean is that of all
    other questions asked, of states as the module reads them. Thirds are of the memory layers; the edits of layers are
    left out where only one is read.

    Returns one row per question and test: seed, question, e2, alike (another one asked has its relations and other
    entities), test, log_prob (of the answer's first token), right.
    """
    rows = []
    for reader in readers(runs, store, count, device):
        other = reader.frame.iloc[failures.donors(reader.frame)]
        relations = [frame[["r1", "r2"]].to_numpy() for frame in (reader.frame, other)]
        alike = (relations[0] == relations[1]).all(1)
        for name, ask in progress(_edits(reader).items(), "another memory", unit="test"):
            log_probs, right = ask()
            about = {"seed": reader.frame["seed"], "question": range(len(right)), "e2": reader.frame["e2"]}
            about |= {"alike": alike}
            rows.append(pd.DataFrame({**about, "test": name, "log_prob": log_probs, "right": right.astype(float)}))
    return pd.concat(rows, ignore_index=True)


def memory_table(made: pd.DataFrame) -> pd.DataFrame:
    """`memory_tests` over all questions.

    Returns: test, log_prob (mean), kept (share of the adapter's gain in log-probability), low, high (95 %, over bridge
    entities), p (signed ranks of bridge entities' means, against the adapter as trained, Holm over all tests; NaN for
    the two ends), accuracy, n, names (bridge entities), alike (share of questions with a donor of the same relations).

    Raises ValueError unless the adapter gains something in every sample: shares of nothing have no meaning.
    """
    wide, right = (
        made.pivot(index=["seed", "question", "e2"], columns="test", values=v) for v in ("log_prob", "right")
    )
    bridge = wide.index.get_level_values("e2")
    draws = bootstrap(bridge)
    gain = (wide[TRAINED] - wide[OFF]).to_numpy()
    if (draws @ gain <= 0).any():
        raise ValueError(f"The adapter gains {gain.mean():.3f} nats, not in every sample: there is no share. Ask more.")
    rows = []
    for test in dict.fromkeys(made["test"]):
        own = (wide[test] - wide[OFF]).to_numpy()
        row = {"test": test, "log_prob": wide[test].mean(), "kept": own.mean() / gain.mean()}
        row |= interval((draws @ own) / (draws @ gain))
        if test not in (TRAINED, OFF):
            row["p"] = stats.wilcoxon((wide[test] - wide[TRAINED]).groupby(bridge).mean()).pvalue
        rows.append({**row, "accuracy": right[test].mean(), "n": len(wide), "names": bridge.nunique()})
        rows[-1]["alike"] = made.loc[made["test"] == test, "alike"].mean()
    table = pd.DataFrame(rows)
    return table.assign(p=holm(table.dropna(subset=["p"]))["corrected"])


# ---------------------------------------------------------------- whom answers name


def transitions(
    runs: Sequence[Run], store: Store, device: str = "cpu", dataset: str | None = None, count: int | None = None
) -> pd.DataFrame:
    """Whom the model names without and with each run's adapter, by the first token, on the run's test questions.

    runs: of one model and one dataset. dataset: asks the first `count` test questions of another one instead.

    Returns one row per run and question: arm, seed, question, e2, pair (of relations), collides (outcomes begin alike,
    see `census.candidates`), before, after (`census.OUTCOMES`), right (after is e3).
    """
    rows, before = [], {}
    for run in progress(list(runs), "asking again", unit="run"):
        there = replace(run, dataset=dataset, test_items=count) if dataset else run
        frame = experiments.asked(there, "test")
        with experiments.trained(run, store, device) as (model, tokenizer):
            facts = census.candidates(tokenizer, datasets.split(datasets.load(there.dataset), run.fold))
            facts = frame[datasets.TWO_HOP_KEYS].merge(facts, on=datasets.TWO_HOP_KEYS, validate="one_to_one")
            items = experiments.questions(there, tokenizer, "test")
            if run.fold not in before:
                with model.disable_adapter():
                    before[run.fold] = _said(model, items)
            said = {"before": before[run.fold], "after": _said(model, items)}
        named = [dict(zip(census.ENTITIES, each, strict=True)) for each in facts[list(census.ID_COLUMNS)].to_numpy()]
        about = {"arm": run.arm, "seed": run.seed, "question": range(len(facts)), **facts[["e2", "pair", "collides"]]}
        for name, tokens in said.items():
            about[name] = [census.outcome(int(token), own) for token, own in zip(tokens, named, strict=True)]
        table = pd.DataFrame(about)
        rows.append(table.assign(right=table["after"] == "e3"))
    return pd.concat(rows, ignore_index=True)


def with_kept(made: pd.DataFrame, runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """`transitions` with other arms' runs on the same questions, of which only what was kept is known: right.

    Raises ValueError when a run was tested on other questions.
    """
    before = made.drop_duplicates(["seed", "question"])[["seed", "question", "e2", "pair", "before"]]
    rows = [made]
    for run in runs:
        right = experiments.right_of(store.result(run))
        mine = before[before["seed"] == run.seed]
        if not np.array_equal(mine["e2"], experiments.test_groups(run, store.result(run))):
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
    table = made.groupby(["arm", "before", "after"], sort=False).size().rename("count").reset_index()
    table["share"] = table["count"] / table.groupby(["arm", "before"])["count"].transform("sum")
    order = {name: place for place, name in enumerate([*dict.fromkeys(made["arm"]), *census.OUTCOMES])}
    return table.sort_values(["arm", "before", "after"], key=lambda column: column.map(order), ignore_index=True)


def mended_shares(made: pd.DataFrame) -> pd.DataFrame:
    """Which share of each kind of failure becomes e3 with each arm: arm, before ("any" for all failures), share, low,
    high (95 %, over bridge entities; NaN for fewer than two), n, names."""
    rows = []
    for arm, part in made.groupby("arm", sort=False):
        for kind in (*census.OUTCOMES[1:], "any"):
            own = part[(part["before"] != "e3") if kind == "any" else (part["before"] == kind)]
            row = {"arm": arm, "before": kind, "share": float("nan"), "low": float("nan"), "high": float("nan")}
            if own["e2"].nunique() > 1:
                mean, low, high = mean_interval(own["right"].to_numpy(dtype=float), own["e2"])
                row |= {"share": float(mean), "low": float(low), "high": float(high)}
            rows.append({**row, "n": len(own), "names": own["e2"].nunique()})
    return pd.DataFrame(rows)


def mended_differences(made: pd.DataFrame) -> pd.DataFrame:
    """Does back attention mend e2 failures above all, and more of them than other arms?

    Two kinds of rows. "than other failures": the share mended of failures that say e2 less that of the others, within
    pairs of relations that have both, the pairs weighted by their failures that say e2. "than <arm>": the share of e2
    failures mended less the other arm's, on the same questions.

    Returns: more, difference, low, high (95 %, over bridge entities), n (e2 failures). Raises ValueError when there is
    no failure of one kind in any pair, or an arm was asked other questions.
    """
    mine = made[made["arm"] == "back attention"].reset_index(drop=True)
    is_e2, is_other = (mine["before"] == "e2").to_numpy(), (~mine["before"].isin(["e2", "e3"])).to_numpy()
    pairs = sorted(set(mine["pair"][is_e2]) & set(mine["pair"][is_other]))
    if not pairs:
        raise ValueError("There are no failures that say e2, or none that do not, in any pair: ask more questions.")
    good, weights = mine["right"].to_numpy(dtype=float), (np.ones((1, len(mine))), bootstrap(mine["e2"]))

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
        theirs = mine[keys].merge(made[made["arm"] == other], on=keys, how="left", validate="one_to_one")["right"]
        if theirs.isna().any():
            raise ValueError(f"Back attention and {other!r} were not asked the same questions.")
        less = good - theirs.to_numpy(dtype=float)
        rows.append(_row(f"than {other}", *(_share(draws, is_e2, less) for draws in weights), int(is_e2.sum())))
    return pd.DataFrame(rows)


def knowledge_table(known: pd.DataFrame, unknown: pd.DataFrame, least: int = 10) -> pd.DataFrame:
    """Does an adapter help where the model does not know both hops?

    known, unknown: `transitions` of the same runs on questions of both kinds; those that collide are left out. Only
    pairs of relations with `least` questions of each kind count, all alike, so that both kinds ask for the same.

    Returns: questions ("known", "unknown", "known less unknown"), before, after (shares right; their differences), gain
    (after less before), low, high (95 %, over bridge entities), n, pairs. Raises ValueError when no pair has enough.
    """
    both = pd.concat([known.assign(kind="known"), unknown.assign(kind="unknown")], ignore_index=True)
    both = both[~both["collides"]]
    counts = both.groupby(["pair", "kind"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=["known", "unknown"], fill_value=0)
    pairs = counts.index[(counts >= least).all(axis=1)]
    if pairs.empty:
        raise ValueError(f"No pair of relations has {least} known and {least} unknown questions: ask more.")
    both = both[both["pair"].isin(pairs)].reset_index(drop=True)
    parts = {"before": (both["before"] == "e3").to_numpy(dtype=float), "after": both["right"].to_numpy(dtype=float)}
    parts["gain"] = parts["after"] - parts["before"]
    draws, ones = bootstrap(both["e2"]), np.ones((1, len(both)))

    def mean(weights: np.ndarray, kind: str, values: np.ndarray) -> np.ndarray:
        each = [_share(weights, ((both["kind"] == kind) & (both["pair"] == pair)).to_numpy(), values) for pair in pairs]
        return np.nanmean(each, axis=0)

    rows = []
    for kind in ("known", "unknown"):
        means = {name: float(mean(ones, kind, values)[0]) for name, values in parts.items()}
        rows.append({"questions": kind, **means, **interval(mean(draws, kind, parts["gain"]))})
        rows[-1] |= {"n": int((both["kind"] == kind).sum()), "pairs": len(pairs)}
    less = {name: rows[0][name] - rows[1][name] for name in parts}
    ends = interval(mean(draws, "known", parts["gain"]) - mean(draws, "unknown", parts["gain"]))
    rows.append({"questions": "known less unknown", **less, **ends, "n": len(both), "pairs": len(pairs)})
    return pd.DataFrame(rows)


def _share(weights: np.ndarray, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weighted means [R] of values [n] where mask [n] holds, for weights [R, n]; NaN where nothing is drawn."""
    total = weights @ mask.astype(float)
    return np.divide(weights @ (values * mask), total, out=np.full(len(weights), np.nan), where=total > 0)


def _row(name: str, value: np.ndarray, draws: np.ndarray, n: int) -> dict:
    return {"more": name, "difference": float(value[0]), **interval(draws), "n": n}
