"""Verdicts on the paper's claims: each a rule over result tables, so that none can be written by hand."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy import stats

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

    One check per dataset: ahead of zero-shot, the paper's comparison. One for few-shot and one per control, over all
    datasets: ahead of worked examples, and of an arm trained on the same questions. Each with its whole interval. A
    control that was not tried on all datasets is told and not checked.

    Raises ValueError when the table has no row for one of them.
    """
    table = difference[difference["model"] == model]
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
    return Claim(
        id="C8",
        claim="back attention on a frozen LLM raises accuracy on five reasoning datasets",
        paper="Llama3.1-8B, mean 46.9 → 77.0 at source layer 6, against zero-shot",
        ours=f"less zero-shot, points: {gains}; over all datasets less {ahead}{told}",
        kind="band over seeds",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="03_back_attention_training",
        figure="03_arms",
    )


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
) -> Claim:
    """C9. chosen: `comparison.choose`; against_six: `comparison.setting_differences` of back attention from layer 6;
    unrest: `comparison.unrest`; accuracy: arm, source_layer, accuracy; difference: back attention less the others, from
    `comparison.difference_table`, by source_layer.

    Five checks. The layer chosen on validation questions is 5, 6 or 7, and so is every single seed's (against: another
    is chosen, and ahead of layer 6 on the test with its whole interval). Seeds differ more, and losses jump higher, at
    layers 0 to 5 than from 6 on (Mann-Whitney); accuracy falls from layer 6 on (Spearman); these three with
    p < 0.05 / 3. At the chosen layer back attention is ahead of the same module on its own layer, with the whole
    interval: a curve that any trained map has would not be back attention's. Which of the first four the control passes
    too is told.
    """
    best, seeds = (int(chosen.set_index("arm").loc["back attention", name]) for name in ("source_layer", "seeds"))
    ahead = against_six.set_index("source_layer").loc[best]
    passed, against, told = _placement("back attention", chosen, unrest, accuracy)
    against[0] = against[0] and bool(ahead["low"] > 0)
    control = _placement("same layer", chosen, unrest, accuracy)[0]
    same = difference[(difference["other"] == "same layer") & (difference["source_layer"] == best)].iloc[0]
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
            f"which passes {sum(control)} of the first four checks too (back attention {sum(passed)}); ahead with the "
            f"whole interval of {wins} layers"
        ),
        kind="band over seeds",
        verdict=_weighed([*passed, bool(same["low"] > 0)], [*against, bool(same["high"] < 0)]),
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
