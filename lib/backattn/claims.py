"""Verdicts on the paper's claims: each a rule over result tables, so that none can be written by hand."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from .controls import ANOTHER, ONLY_HIGH, R1_HIDDEN

VERDICTS = ("reproduced", "partly", "not at this scale", "contradicted", "not testable here")


@dataclass(frozen=True)
class Claim:
    """One row of the ledger. `ours` says what was measured, with n and interval; `kind` how exact it is."""

    id: str
    claim: str
    paper: str
    ours: str
    kind: str
    verdict: str
    notebook: str
    figure: str

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise ValueError(f"Unknown verdict {self.verdict!r}; choose one of {', '.join(VERDICTS)}.")


def ledger(claims: list[Claim]) -> pd.DataFrame:
    """The claims as a table."""
    return pd.DataFrame([asdict(claim) for claim in claims])


IDS = tuple(
    f"{letter}{k}" for letter, count in (("C", 11), ("Q", 3), ("N", 3), ("B", 5)) for k in range(1, count + 1)
)  # every row that a whole ledger has; C11 has two, of its size and of its use


def whole_ledger(folders: Sequence[Path]) -> pd.DataFrame:
    """The ledgers of all notebooks, with the break conditions that are read off their tables, in the order of IDS.

    folders: where tables are looked for, the first that has one counts. Raises FileNotFoundError when a table is
    nowhere, ValueError when a row of IDS is missing.
    """

    def table(name: str) -> pd.DataFrame:
        found = [folder / f"{name}.csv" for folder in folders if (folder / f"{name}.csv").exists()]
        if not found:
            raise FileNotFoundError(f"{name}.csv is in none of {', '.join(map(str, folders))}: run its notebook first.")
        return pd.read_csv(found[0])

    memory = {"smollm2": table("07_memory"), "gemma3-270m": table("07_gemma_memory")}
    read_off = [
        one_after_the_other(table("01_order"), n=int(table("01_stages")["n"].iloc[0])),
        conflict_not_ignorance(table("02_census")),
        r1_is_needed(table("02_against_donor"), memory),
    ]
    names = sorted({path.stem for folder in folders for path in folder.glob("[0-9][0-9]_claims.csv")})
    rows = pd.concat([*map(table, names), ledger(read_off)], ignore_index=True)
    missing = [name for name in IDS if name not in set(rows["id"])]
    if missing:
        raise ValueError(f"The ledger has no row {', '.join(missing)}: run the notebooks that write them.")
    return rows.sort_values("id", key=lambda ids: ids.map(IDS.index), kind="stable", ignore_index=True)


def _verdict(passed: list[bool]) -> str:
    return "reproduced" if all(passed) else "partly" if any(passed) else "contradicted"


def stages_in_order(order: pd.DataFrame, knockouts: pd.DataFrame, n: int) -> Claim:
    """C1. order, knockouts: from `stages.order_table` and `stages.knockout_table`.

    Seven checks: each of A→B, B→C, C→D has its whole interval above zero; and each stage's own layers are `needed`.
    Layer 0, whose FFN acts as a part of the embedding, is left out of A and C for the second kind.
    """
    steps = order[order["step"]]
    own = knockouts[knockouts["stage"].isin(["A above 0", "B", "C above 0", "D"])]
    gaps = ", ".join(f"{r.earlier}→{r.later} {r.gap:+.1f} [{r.low:.1f}, {r.high:.1f}]" for r in steps.itertuples())
    needed = ", ".join(own.loc[own["needed"], "stage"]) or "none"
    return Claim(
        id="C1",
        claim="single-hop recall runs through four stages A, B, C, D in this order",
        paper="A–B layers ≈7–20, C–D ≈20–31 of Llama2-7B",
        ours=f"layers between stages: {gaps}; own layers needed more than every random set: {needed}; n = {n}",
        kind="tolerance",
        verdict=_verdict([*steps["after"], *own["needed"]]),
        notebook="01_stage_discovery",
        figure="01_stages",
    )


def entity_cannot_tell(contest: pd.DataFrame, stage_b: float, n: int) -> Claim:
    """C2. contest: position, layer, mean, low, high, clusters; stage_b: the middle of stage B, in layers.

    A position tells the answers apart from state l on when the interval is above zero in every state from l to the
    end. Three checks: the entity's interval stays, in every state, below a tenth of what the last position reaches
    in the end; relation and last tell them apart; they begin to in states that leave stage B's layer or a later
    one. Not testable where the last position does not tell them apart.
    """
    since, by_position = {}, {name: part.sort_values("layer") for name, part in contest.groupby("position")}
    for position, part in by_position.items():
        above = (part["low"] > 0).to_numpy()
        run = int(np.argmin(above[::-1])) if not above.all() else len(above)  # states at the end that are above zero
        since[position] = int(part["layer"].to_numpy()[len(above) - run]) if run else None
    entity, reached = by_position["entity"], by_position["last"]["mean"].iloc[-1]
    small = bool((entity["high"] < reached / 10).all() and (entity["low"] > -reached / 10).all())
    readers = [since["relation"], since["last"]]
    can = None not in readers
    verdict = _verdict([small, can, can and min(readers) > stage_b])
    order = ("entity", "relation", "last")
    told = ", ".join(f"{p} {'never' if since[p] is None else f'from state {since[p]}'}" for p in order)
    final = {p: by_position[p].iloc[-1] for p in order}
    sizes = ", ".join(f"{p} {r['mean']:+.1f} [{r['low']:.1f}, {r['high']:.1f}]" for p, r in final.items())
    return Claim(
        id="C2",
        claim="the entity position cannot tell the correct from the conflicting answer; relation and last can, after B",
        paper="figure",
        ours=f"tells them apart: {told}; in the final state: {sizes}; middle of stage B: layer {stage_b:.1f}; "
        f"n = {n} prompts about {contest['clusters'].iloc[0]} subjects",
        kind="tolerance",
        verdict=verdict if since["last"] is not None else "not testable here",
        notebook="01_stage_discovery",
        figure="01_conflict",
    )


def _weighed(passed: list[bool], against: list[bool]) -> str:
    """Like `_verdict`, but where nothing passed it takes evidence against the claim to contradict it."""
    return _verdict(passed) if any(passed) or all(against) else "not at this scale"


def failures_say_bridge(census: pd.DataFrame, leads: pd.DataFrame, three_way: pd.DataFrame, n: int) -> Claim:
    """C3. census, three_way: wording, outcome, share, low, high over all kept prompts; leads: `census.bridge_lead` over
    the prompts not answered e3. The worked examples are one-hop facts, the answers open vocabulary.

    Four checks: in each of three wordings, more failures say e2 than echo e1, the other entity of the prompt; and in
    the paper's wording ("possessive") more than half of all failures say e2. Each with its whole interval.
    """
    by = leads.set_index("wording")
    passed = [*(by["lead_low"] > 0), by.loc["possessive", "share_low"] > 0.5]
    against = [*(by["lead_high"] < 0), by.loc["possessive", "share_high"] < 0.5]

    def percent(table: pd.DataFrame, wording: str, outcome: str) -> str:
        row = table.set_index(["wording", "outcome"]).loc[(wording, outcome)]
        return f"{outcome} {row['share']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"

    open_shares = ", ".join(percent(census, "possessive", outcome) for outcome in ("e3", "e2", "e1", "other"))
    others = "; ".join(f"{w}: {percent(census, w, 'e2')}" for w in by.index if w != "possessive")
    ahead = ", ".join(f"{w} {r['lead']:+.0%} [{r['lead_low']:.0%}, {r['lead_high']:.0%}]" for w, r in by.iterrows())
    return Claim(
        id="C3",
        claim="two-hop failures answer the bridge entity e2",
        paper="of 568 cases 52.3 % e3, 42.4 % e2, 5.3 % the answer of e1's r2",
        ours=f"open vocabulary, e1's r1's r2: {open_shares}; {others}; "
        f"3-way: {percent(three_way, 'possessive', 'e2')}; e2 less e1 among failures: {ahead}; n = {n}",
        kind="tolerance",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="02_failure_analysis",
        figure="02_census",
    )


def late_influence(tests: pd.DataFrame) -> Claim:
    """C4. tests: from `failures.flow_tests`. Three checks, its three rows."""
    told = "; ".join(f"{r.question}: {r.mean:+.2f} (p = {r.p:.2g}), n = {r.n}" for r in tests.itertuples())
    against = (tests["mean"] < 0) & (tests["p"] < 0.05 / len(tests))
    return Claim(
        id="C4",
        claim="in false cases the influence of r1's high layers is stronger, arrives late and feeds e2",
        paper="figure (layer ≈ 28 of 32)",
        ours=told,
        kind="tolerance",
        verdict=_weighed(tests["holds"].tolist(), against.tolist()),
        notebook="02_failure_analysis",
        figure="02_flow",
    )


def same_states(causality: pd.DataFrame, n: int) -> Claim:
    """C5. causality: layer, r1, last (relative differences). Holds when r1's are below 1e-4, and last's not small."""
    equal, differs = bool(causality["r1"].max() < 1e-4), bool(causality["last"].max() > 0.01)
    return Claim(
        id="C5",
        claim="r1's states are the same in the one-hop and the two-hop prompt",
        paper="exact (causality)",
        ours=f"largest relative difference at r1 {'below' if equal else 'not below'} 1e-4 in every layer, "
        f"at the last position {causality['last'].max():.1f}; n = {n}",
        kind="exact",
        verdict="reproduced" if equal and differs else "contradicted",
        notebook="02_failure_analysis",
        figure="tables/02_causality",
    )


def back_patching_helps(mending: pd.DataFrame, difference: pd.DataFrame) -> Claim:
    """C6. mending, difference: from `failures.mending_table` and `failures.against_donor`; r1's states are patched.

    Three checks, each with its whole interval above zero: with one pair of layers chosen on the other half, more
    prompts are right than without a patch; that pair mends more wrong cases than one with a donor's states; and more
    cases are mended by any pair (the oracle) than with a donor's states.
    """
    by = mending.set_index("arm")
    own, rows = by.loc["r1"], difference[difference["place"] == "r1"].set_index("how")

    def told(arm: str, how: str) -> str:
        row = by.loc[arm]
        return f"{row[how]:.0%} [{row[how + '_low']:.0%}, {row[how + '_high']:.0%}]"

    passed = [own["net_low"] > 0, *(rows.loc[how, "low"] > 0 for how in ("honest", "oracle"))]
    against = [own["net_high"] < 0, *(rows.loc[how, "high"] < 0 for how in ("honest", "oracle"))]
    return Claim(
        id="C6",
        claim="restoring r1's high-layer state into a lower layer helps",
        paper="32–66 % of wrong cases by model, as an oracle over all layer pairs (Biran et al. 2024)",
        ours=f"r1 patched: oracle {told('r1', 'oracle')}, donor's states {told('r1 donor', 'oracle')}; one pair chosen "
        f"on the other half {told('r1', 'honest')}, donor's {told('r1 donor', 'honest')}; net change of accuracy "
        f"{told('r1', 'net')}; wrong cases: {own['wrong']}",
        kind="exact",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="02_failure_analysis",
        figure="02_back_patching",
    )


def _points(row) -> str:
    """A difference of accuracies with its interval, in points."""
    return f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def one_layer_matches_two(accuracy: pd.DataFrame, difference: pd.DataFrame, margin: float = 0.01) -> Claim:
    """C7. accuracy, difference: from `comparison`, arms from scratch; difference is of one layer + back attention.

    Two checks, each with its whole interval: it is ahead of one layer, and not behind two layers by more than `margin`.
    Not testable where two layers are not ahead of one.
    """
    by, less = accuracy.set_index("arm"), difference.set_index("other")
    gap = by.loc["2 layers", "low"] > by.loc["1 layer", "high"]
    passed = [less.loc["1 layer", "low"] > 0, less.loc["2 layers", "low"] > -margin]
    against = [less.loc["1 layer", "high"] < 0, less.loc["2 layers", "high"] < -margin]
    told = ", ".join(f"{arm} {row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}]" for arm, row in by.iterrows())
    ahead = ", ".join(f"{other} {_points(row)}" for other, row in less.iterrows())
    first = by.iloc[0]
    return Claim(
        id="C7",
        claim="one layer with back attention reaches two layers on 2-digit arithmetic",
        paper="93.8 % vs 92.5 %, with 56.7 % of the parameters (width 440, d′ = 160)",
        ours=f"{told}; back attention less the other, points: {ahead}; n = {first['n']}, {first['seeds']} seeds",
        kind="band over seeds",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))) if gap else "not testable here",
        notebook="03_back_attention_training",
        figure="03_scratch",
    )


def raises_accuracy(difference: pd.DataFrame, controls: list[str], model: str = "smollm2") -> Claim:
    """C8. difference: from `comparison.difference_table`, of back attention against zero-shot and all other arms.

    The checks are those of `_gains`.
    """
    passed, against, told = _gains(difference[difference["model"] == model], controls)
    return Claim(
        id="C8",
        claim="back attention on a frozen LLM raises accuracy on five reasoning datasets",
        paper="Llama3.1-8B, mean 46.9 → 77.0 at source layer 6, against zero-shot",
        ours=told,
        kind="band over seeds",
        verdict=_weighed(passed, against),
        notebook="03_back_attention_training",
        figure="03_arms",
    )


def other_prompts_too(difference: pd.DataFrame, controls: list[str]) -> Claim:
    """N1. difference: of back attention on questions asked in other ways, by dataset (`comparison.difference_table`)
    and over all of them (`comparison.pooled_table`); the checks are those of `_gains`."""
    passed, against, told = _gains(difference, controls)
    counts = difference[difference["dataset"] != "all"].groupby("dataset", sort=False)["n"].first()
    return Claim(
        id="N1",
        claim="back attention helps on three more datasets with other prompts",
        paper="next check",
        ours=f"{told}; n = {', '.join(f'{n:.0f} ({name})' for name, n in counts.items())}, of the same second hops",
        kind="band over seeds",
        verdict=_weighed(passed, against),
        notebook="08_beyond_facts_and_cost",
        figure="08_prompts",
    )


def _gains(table: pd.DataFrame, controls: list[str]) -> tuple[list[bool], list[bool], str]:
    """What `comparison.difference_table` of back attention says for it, against it, and in words.

    One check per dataset: ahead of zero-shot, the paper's comparison. One for few-shot and one per control, over all
    datasets: ahead of worked examples, and of an arm trained on the same questions. Each with its whole interval. A
    control that was not tried on all datasets is told and not checked.

    Raises ValueError when the table has no row for one of them.
    """
    missing = sorted({"zero-shot", "few-shot", *controls} - set(table["other"]))
    if missing:
        raise ValueError(f"There is no comparison with {missing[0]!r}.")
    untrained = table[(table["other"] == "zero-shot") & (table["dataset"] != "all")]
    over = "all" if "all" in set(table["dataset"]) else untrained["dataset"].iloc[0]
    trained = table[(table["dataset"] == over) & table["other"].isin(["few-shot", *controls])]
    partial = table[table["other"].isin(set(controls) - set(trained["other"]))].groupby("other").tail(1)
    passed = [*(untrained["low"] > 0), *(trained["low"] > 0)]
    against = [*(untrained["high"] < 0), *(trained["high"] < 0)]
    gains = ", ".join(f"{row['dataset']} {_points(row)}" for _, row in untrained.iterrows())
    ahead = ", ".join(f"{row['other']} {_points(row)}" for _, row in trained.iterrows())
    told = "".join(f"; on {row['dataset']} less {row['other']} {_points(row)}" for _, row in partial.iterrows())
    words = f"less zero-shot, points: {gains}; over all datasets less {ahead}{told}"
    return list(map(bool, passed)), list(map(bool, against)), words


def small(sizes: pd.DataFrame) -> Claim:
    """C11 as arithmetic. sizes: dim, share (weights of the module over those of Llama 3 8B).

    Two checks: some d′ gives the paper's 0.002 %, to its one digit; and so does the d′ = 160 that the paper names.
    """
    by = sizes.set_index("dim")["share"]
    told = {dim: f"{100 * share:.3f} %" for dim, share in by.items()}
    return Claim(
        id="C11",
        claim="back attention is small",
        paper="0.002 % of Llama3-8B",
        ours="; ".join(f"d′ = {dim}: {text}" for dim, text in told.items()),
        kind="exact",
        verdict=_verdict(["0.002 %" in told.values(), told[160] == "0.002 %"]),
        notebook="03_back_attention_training",
        figure="tables/03_sizes",
    )


NOTICEABLE = 0.05  # nats


def brings_high_states(models: dict[str, tuple[pd.DataFrame, pd.DataFrame, Sequence[int]]]) -> Claim:
    """C10. models: name -> (`reading.high_share` of r1 at the last position, `reading.knock_out_tests`, the layers).

    Two checks per model: the last position gives r1's high layers more weight than cells read alike would, with its
    whole interval and in every training; and hiding them costs at least NOTICEABLE more than as many random cells.
    """
    passed, against, told = [], [], []
    for name, (share, tests, high) in models.items():
        by = share.set_index("questions")
        whole, trainings = by.loc["all"], by[by.index.str.startswith("training")]
        hidden = tests.set_index(["hidden", "control"]).loc[("r1, high layers", "random, same count as r1")]
        passed += [whole["over_low"] > 0 and (trainings["over"] > 0).all(), hidden["low"] > NOTICEABLE]
        against += [whole["over_high"] < 0 and (trainings["over"] < 0).all(), hidden["high"] < NOTICEABLE]
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


def low_layers_are_best(
    chosen: pd.DataFrame,
    against_six: pd.DataFrame,
    unrest: pd.DataFrame,
    accuracy: pd.DataFrame,
    difference: pd.DataFrame,
    arithmetic: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame],
) -> Claim:
    """C9. chosen: `comparison.choose`; against_six: `comparison.setting_differences` of back attention from layer 6;
    unrest: `comparison.unrest`; accuracy: arm, source_layer, accuracy; difference: back attention less the others, from
    `comparison.difference_table`, by source_layer; arithmetic: chosen, against_six and difference on 1DC.

    Seven checks, five on two-hop questions. The layer chosen on validation questions is 5, 6 or 7, and so is every
    single seed's (against: another is chosen, and ahead of layer 6 on the test with its whole interval). Seeds differ
    more, and losses jump higher, at layers 0 to 5 than from 6 on (Mann-Whitney); accuracy falls from layer 6 on
    (Spearman); these three with p < 0.05 / 3. At the chosen layer back attention is ahead of the same module on its own
    layer, with the whole interval: a curve that any trained map has would not be back attention's. Which of the first
    four the control passes too is told. On arithmetic, the paper's task, with fewer layers: the first check and the
    last.
    """
    best, seeds = (int(chosen.set_index("arm").loc["back attention", name]) for name in ("source_layer", "seeds"))
    ahead = against_six.set_index("source_layer").loc[best]
    passed, against, told = _placement("back attention", chosen, unrest, accuracy)
    against[0] = against[0] and bool(ahead["low"] > 0)
    control = _placement("same layer", chosen, unrest, accuracy)[0]
    same = difference[(difference["other"] == "same layer") & (difference["source_layer"] == best)].iloc[0]
    second, six, less = arithmetic
    choice = second.set_index("arm").loc["back attention"]
    layer, ends = int(choice["source_layer"]), {int(choice[name]) for name in ("source_layer", "lowest", "highest")}
    moved = six.set_index("source_layer").loc[layer]
    own = less[less["other"] == "same layer"].set_index("source_layer").loc[layer]
    passed += [same["low"] > 0, ends <= {5, 6, 7}, own["low"] > 0]
    against += [same["high"] < 0, layer not in (5, 6, 7) and moved["low"] > 0, own["high"] < 0]
    tried = []
    for row in six.sort_values("source_layer").to_dict("records"):
        at = less[less["source_layer"] == row["source_layer"]].to_dict("records")
        parts = [f"{_points(row)} against layer 6"] if row["source_layer"] != 6 else []
        parts += [f"{_points(one)} against {one['other']}" for one in at]
        tried.append(f"layer {row['source_layer']} {', '.join(parts)}")
    digits = (
        f"on 1DC, n = {int(own['n'])}, validation chooses layer {layer} ({min(ends)} to {max(ends)} by seed), points: "
        f"{'; '.join(tried)}"
    )
    wins = ", ".join(
        f"{other} at {(part['low'] > 0).sum()} (behind at {(part['high'] < 0).sum()}) of {len(part)}"
        for other, part in difference.groupby("other", sort=False)
    )
    return Claim(
        id="C9",
        claim="layer 6 is the best source layer; 0–5 are unstable, and it falls after",
        paper="sweep on Llama-7B, arithmetic: 93.2 at layer 6, 67.1 without",
        ours=(
            f"two-hop, n = {int(same['n'])} questions, {seeds} seeds, rates found at layer 6: {told}; there "
            f"{_points(ahead)} points against layer 6 and {_points(same)} against the same module on its own layer, "
            f"which passes {sum(control)} of the first four checks too (back attention {sum(passed[:4])}); ahead with "
            f"the whole interval of {wins} layers; {digits}"
        ),
        kind="band over seeds",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="04_layer_ablation",
        figure="04_layers",
    )


def _placement(
    arm: str, chosen: pd.DataFrame, unrest: pd.DataFrame, accuracy: pd.DataFrame
) -> tuple[list[bool], list[bool], str]:
    """The first four checks of C9 for one arm: (passed, against, in words)."""
    mine = [table[table["arm"] == arm] for table in (chosen, unrest, accuracy)]
    choice, level = mine[0].iloc[0], 0.05 / 3
    range_of = {int(choice[name]) for name in ("source_layer", "lowest", "highest")}
    passed, against = [range_of <= {5, 6, 7}], [int(choice["source_layer"]) not in (5, 6, 7)]
    told = [f"chosen on validation is layer {int(choice['source_layer'])} ({min(range_of)} to {max(range_of)} by seed)"]
    low = mine[1]["source_layer"] < 6
    for name, unit in (("spread", "points"), ("jump", "nats")):
        below, above = mine[1].loc[low, name], mine[1].loc[~low, name]
        higher, lower = (stats.mannwhitneyu(below, above, alternative=side).pvalue for side in ("greater", "less"))
        passed.append(bool(higher < level))
        against.append(bool(lower < level))
        told.append(f"median {name} {below.median():.2f} {unit} at 0–5, {above.median():.2f} above (p = {higher:.2g})")
    after = mine[2][mine[2]["source_layer"] >= 6]
    fall = stats.spearmanr(after["source_layer"], after["accuracy"])
    passed.append(bool(fall.statistic < 0 and fall.pvalue < level))
    against.append(bool(fall.statistic > 0 and fall.pvalue < level))
    told.append(f"from layer 6 on Spearman of layer and accuracy {fall.statistic:+.2f} (p = {fall.pvalue:.2g})")
    return passed, against, "; ".join(told)


def small_keeps_its_gain(share: pd.Series, kept: pd.DataFrame, gain: pd.DataFrame) -> Claim:
    """C11 as a question of use. share: dim and share of the width nearest to the paper's share of the weights; kept:
    arm and `comparison.kept_share` of that width's arms, against the best width of back attention and zero-shot; gain:
    `comparison.difference_table` of back attention with that width.

    Four checks, each with the whole interval: more than half (our choice) of the best width's gain is kept; and it is
    ahead of each arm that costs as few weights or fewer: the same module on its own layer, residual LoRA, a bias. What
    these keep of the gain is told.
    """
    by, part = gain.set_index("other"), kept.set_index("arm")
    rivals, own = [by.loc[other] for other in ("same layer", "residual LoRA", "bias")], part.loc["back attention"]
    passed = [own["low"] > 0.5, *(row["low"] > 0 for row in rivals)]
    against = [own["high"] < 0.5, *(row["high"] < 0 for row in rivals)]
    less = ", ".join(
        f"{row.name} {_points(row)} (keeps {part.loc[row.name, 'kept']:.0%}, "
        f"{'more than half' if part.loc[row.name, 'low'] > 0.5 else 'not surely half'})"
        for row in rivals
    )
    return Claim(
        id="C11",
        claim="so small a back attention keeps most of the gain, and the gain is its own",
        paper="0.002 % of Llama3-8B; on Llama3.1-8B the mean of five datasets rises by 30 points",
        ours=(
            f"two-hop, d′ = {int(share['dim'])} ({100 * share['share']:.4f} % of the weights): "
            f"{_points(by.loc['zero-shot'])} points over zero-shot, {own['kept']:.0%} [{own['low']:.0%}, "
            f"{own['high']:.0%}] of what the width chosen gains; less arms of no more weights: {less}; "
            f"n = {int(own['n'])} questions, rates found at that width"
        ),
        kind="band over seeds",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="06_capacity",
        figure="06_dims",
    )


def several_layers_help(accuracy: pd.DataFrame, against_one: pd.DataFrame, against_lora: pd.DataFrame) -> Claim:
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


def bridge_failures_mended(mended: pd.DataFrame, differences: pd.DataFrame) -> Claim:
    """N2. mended, differences: from `controls.mended_shares` and `controls.mended_differences`.

    Two checks, each with its whole interval: back attention mends a larger share of the failures that say e2 than of
    the others, and a larger share of them than the same module on its own layer.
    """
    by = mended[mended["arm"] == "back attention"].set_index("before")
    rows = differences.set_index("more").loc[["than other failures", "than same layer"]]
    less = ", ".join(f"{name} {_points(row)} points" for name, row in differences.set_index("more").iterrows())
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
        passed += [route["low"] > max(HALF, control["high"]), hidden["high"] < min(MOST, other["low"])]
        against += [route["high"] < HALF, hidden["low"] > MOST]
        parts = [*ONLY_HIGH, *R1_HIDDEN, "only r1", *(test for test in by.index if "third" in test)]
        told.append(f"{name}: {', '.join(f'{test} {_kept(by.loc[test])}' for test in parts)}; n = {int(route['n'])}")
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


def gain_is_flow(models: dict[str, pd.DataFrame], control: pd.DataFrame, difference: pd.DataFrame) -> Claim:
    """B3, put as its opposite: the gain is cross-layer flow, not training. models: name -> `controls.memory_table`, of
    back attention; control: the same of the same module on its own layer; difference: back attention less that module
    over all datasets, `comparison.difference_table`.

    Two checks per model and one more, each with the whole interval: with another question's memory of the same
    relations, and with the mean memory, less than half of the gain is kept (against: more); and back attention is ahead
    of the same module on its own layer (against: by less than NO_MORE). How much the control keeps is told.
    """

    def rows(table: pd.DataFrame) -> list[pd.Series]:
        return [table.set_index("test").loc[test] for test in ANOTHER]  # of the same relations, and the mean

    def words(name: str, table: pd.DataFrame) -> str:
        return f"{name}: {', '.join(f'{row.name} {_kept(row)}' for row in rows(table))}, n = {int(table['n'].iloc[0])}"

    same = difference[(difference["other"] == "same layer") & (difference["dataset"] == "all")].iloc[0]
    passed = [row["high"] < HALF for table in models.values() for row in rows(table)] + [same["low"] > 0]
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


def costs_as_computed(costs: pd.DataFrame, answered: pd.DataFrame) -> Claim:
    """Q3. costs, answered: from `costs.cost_table` and `costs.one_pass_table`.

    Two checks, of the operations of back attention in two passes at every source layer and length, the unembedding,
    which runs once, left out: the prompt's are within 5 % of 1 + (L − s) / L times the plain model's, and so are a new
    token's. What times were measured is in the figure: they change from run to run.
    """
    by = {name: costs[costs["way"] == name] for name in dict.fromkeys(costs["way"])}
    twice, once = by["back attention"], by["back attention, new tokens in one pass"]
    passed = [bool((np.abs(twice[f"{part}_layers"] / twice["bound"] - 1) < 0.05).all()) for part in ("first", "each")]

    def told(table: pd.DataFrame, column: str) -> str:
        rows = table.sort_values("context").groupby("source_layer")[column].agg(["min", "max"])
        return ", ".join(f"{layer}: {row['min']:.2f}–{row['max']:.2f}" for layer, row in rows.iterrows())

    bounds = ", ".join(
        f"{layer}: {bound:.2f}" for layer, bound in twice.groupby("source_layer")["bound"].first().items()
    )
    lost = ", ".join(
        f"{_points(row)} points on {row['dataset']} (n = {row['n']}, {row['seeds']} seeds)"
        for _, row in answered.iterrows()
    )
    return Claim(
        id="Q3",
        claim="inference costs 1 + (L − s) / L times the operations",
        paper="open question; 1.81 at layer 6 of 32",
        ours=f"operations over the plain model's, by source layer: computed {bounds}; without the unembedding: prompt "
        f"{told(twice, 'first_layers')}, new token {told(twice, 'each_layers')}; with it: prompt "
        f"{told(twice, 'first_ratio')}, new token {told(twice, 'each_ratio')}, new token in one pass "
        f"{told(once, 'each_ratio')}, which changes accuracy by {lost}",
        kind="exact",
        verdict=_verdict(passed),
        notebook="08_beyond_facts_and_cost",
        figure="08_costs",
    )


def arithmetic_has_stages(models: dict[str, tuple[pd.DataFrame, int]], knockouts: pd.DataFrame) -> Claim:
    """Q2. models: name -> (`stages.order_table` of `arithmetic`'s groups, n); knockouts: `stages.knockout_table` of the
    first model, of stages A to D, layer 0 left out.

    Three checks per model: each of A→B, B→C, C→D is surely more than half a layer (against: less than minus half). Less
    only compares shares of flow within a layer, which is what a model of two layers has much of. Four of the first
    model: each stage's own layers are `needed` (against: they surely cost less than others). Raises ValueError for
    other stages.
    """
    if list(knockouts["stage"]) != list("ABCD"):
        raise ValueError(f"Knock-outs of stages A to D are needed, one row each, not of {list(knockouts['stage'])}.")
    passed, against, told = list(knockouts["needed"]), list(knockouts["difference_high"] < 0), []
    for name, (order, n) in models.items():
        steps = order[order["step"]]
        passed += list(steps["low"] > 0.5)
        against += list(steps["high"] < -0.5)
        gaps = ", ".join(f"{r.earlier}→{r.later} {r.gap:+.1f} [{r.low:.1f}, {r.high:.1f}]" for r in steps.itertuples())
        told.append(f"{name}: {gaps}, n = {n}")
    needed = ", ".join(knockouts.loc[knockouts["needed"], "stage"]) or "none"
    return Claim(
        id="Q2",
        claim="arithmetic runs through the stages of recall, operands for the entity and operator for the relation",
        paper="open question",
        ours=f"layers between stages: {'; '.join(told)}; in {next(iter(models))} own layers needed more than every "
        f"random set: {needed}, n = {int(knockouts['n'].iloc[0])}, {int(knockouts['draws'].iloc[0])} random sets",
        kind="tolerance",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="08_beyond_facts_and_cost",
        figure="08_stages",
    )


# ---------------------------------------------------------------- break conditions, each put as what it would break


def one_after_the_other(order: pd.DataFrame, n: int) -> Claim:
    """B1. order: `stages.order_table` with the pairs of notebook 01.

    Three checks, each with its whole interval above zero: FFNs work on the relation's word after they work on the
    entity (C relation after A) and after attention has read the entity (after B), and what gives the answer comes after
    that too (D after B).
    """
    by, pairs = order.set_index(["earlier", "later"]), (("A", "C relation"), ("B", "C relation"), ("B", "D"))
    rows = [by.loc[pair] for pair in pairs]
    gaps = ", ".join(
        f"{a}→{b} {row['gap']:+.1f} [{row['low']:.1f}, {row['high']:.1f}]"
        for (a, b), row in zip(pairs, rows, strict=True)
    )
    return Claim(
        id="B1",
        claim="entity and relation are processed one after the other, not in parallel",
        paper="break condition",
        ours=f"layers between stages: {gaps}; n = {n}",
        kind="tolerance",
        verdict=_weighed([bool(row["low"] > 0) for row in rows], [bool(row["high"] < 0) for row in rows]),
        notebook="01_stage_discovery",
        figure="01_stages",
    )


def conflict_not_ignorance(census: pd.DataFrame) -> Claim:
    """B2. census: wording, examples, outcome, share, low, high over prompts whose hops are known and whose shortcut is
    not answered with e3.

    Two checks, in the paper's wording behind one-hop examples, each with its whole interval: more than half of these
    prompts fail all the same; and more say e2 than name none of the entities.
    """
    mine = census[(census["wording"] == "possessive") & (census["examples"] == "one-hop")].set_index("outcome")
    right, bridge, other = (mine.loc[name] for name in ("e3", "e2", "other"))
    told = ", ".join(f"{r.name} {r['share']:.0%} [{r['low']:.0%}, {r['high']:.0%}]" for r in (right, bridge, other))
    return Claim(
        id="B2",
        claim="two-hop failures are conflict, not missing knowledge",
        paper="break condition",
        ours=f"both hops known, shortcut not: {told}; n = {int(right['n'])}",
        kind="tolerance",
        verdict=_weighed(
            [bool(right["high"] < 0.5), bool(bridge["low"] > other["high"])],
            [bool(right["low"] > 0.5), bool(bridge["high"] < other["low"])],
        ),
        notebook="02_failure_analysis",
        figure="02_census",
    )


def r1_is_needed(against_donor: pd.DataFrame, models: dict[str, pd.DataFrame]) -> Claim:
    """B4. against_donor: `failures.against_donor`; models: name -> `controls.memory_table`.

    One check of back-patching and one per model, each with its whole interval: r1's own high states mend more wrong
    cases than another prompt's do, by any pair of layers; and with r1 hidden from back attention less than MOST of its
    gain is kept (against: more).
    """
    own = against_donor.set_index(["place", "how"]).loc[("r1", "oracle")].rename({"mean": "difference"})
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
