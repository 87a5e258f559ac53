"""01: four stages in single-hop recall, and two routes to the flow."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats

from backattn.analysis.flow_back import FlowBack
from backattn.analysis.logit_flow import LogitFlow
from backattn.models.activations import capture
from backattn.models.lens import read_states
from backattn.models.tokens import encode
from companion.measures.stages import stage_table
from companion.questions.prompts import last_token_positions
from companion.report.intervals import mean_interval
from companion.report.verdicts import Claim, _verdict, _weighed


def normaliser_diagnostics(
    model, tokenizer, flow: LogitFlow, prompts: Sequence[int] | None = None, batch_size: int = 16
) -> pd.DataFrame:
    """How route "parts" behaves where its normaliser is small.

    prompts: indices of the prompts to look at; None takes all.

    For each neuron of `flow` the shares w·x_k / w·x of its residual input's parts k (embedding, and each earlier
    attention and FFN output) sum to 1, but they may be large and of both signs when w·x is near zero.

    Returns: prompt, layer, kind, position, increase, normaliser (|w·x| relative to Σ|w·x_k|, between 0 and 1; for a
    gated neuron the mean of both rows) and amplification = Σ|share| (for a gated neuron the mean of both rows).
    """
    if flow.level != "neuron":
        raise ValueError('There are no neurons in this flow: call logit_flow with level="neuron".')
    rows, chosen = [], list(range(len(flow.prompts)) if prompts is None else prompts)
    for start in range(0, len(chosen), batch_size):
        mine = chosen[start : start + batch_size]
        batch = encode(tokenizer, [flow.prompts[index] for index in mine], device=model.device)
        stream = capture(model, batch)
        values = flow.frame[flow.frame["prompt"].isin(mine) & flow.frame["neuron"].notna()]
        values = values.assign(
            prompt=values["prompt"].map({index: row for row, index in enumerate(mine)})
        )
        for (kind, layer), part in values.groupby(["kind", "layer"], observed=True):
            block = stream.arch.blocks[layer]
            b, neuron, place = (
                torch.tensor(part[name].to_numpy(np.int64), device=model.device)
                for name in ("prompt", "neuron", "position")
            )
            place = place + batch.start[b]
            earlier = layer + (kind == "ffn" and not stream.arch.parallel)
            pieces = torch.cat(
                [stream.hidden[:1], stream.attention[:earlier], stream.ffn[:layer]]
            )  # [P, B, T, D]
            pieces = pieces[:, b, place]  # [P, n, D]
            if kind == "ffn":
                norm, state = block.norm("ffn_norm"), stream.ffn_input(layer)[b, place]
                weights = [
                    linear.weight[neuron] for linear in block.ffn_in if linear is not None
                ]  # [n, D] each
            else:
                norm, state = block.norm("attention_norm"), stream.attention_input(layer)[b, place]
                head = torch.tensor(part["head"].to_numpy(np.int64), device=model.device)
                group = head // (block.heads // block.kv_heads)
                weights = [block.value.weight[group * block.head_dim + neuron]]
            read = norm.linear(pieces, norm.scale(state))
            products = [(read * weight).sum(-1) for weight in weights]  # [P, n]
            sizes = torch.stack([p.abs().sum(0) for p in products])  # [1 or 2, n]
            totals = torch.stack([p.sum(0).abs() for p in products])
            table = part[["prompt", "layer", "kind", "position", "increase"]]
            table = table.assign(prompt=np.array(mine)[part["prompt"]])
            table["normaliser"] = (totals / sizes).mean(0).cpu().numpy()
            table["amplification"] = (sizes / totals.clamp(min=1e-12)).mean(0).cpu().numpy()
            rows.append(table)
    return pd.concat(rows, ignore_index=True)


def agreement(one: FlowBack, other: FlowBack) -> pd.DataFrame:
    """How far two routes agree: correlation of their flows over (layer, kind, position), per prompt.

    Returns: prompt, pearson, spearman.
    """
    keys = ["prompt", "layer", "kind", "position"]
    joined = one.frame.merge(other.frame, on=keys, suffixes=("_one", "_other"))
    rows = [
        {
            "prompt": prompt,
            "pearson": part["flow_one"].corr(part["flow_other"]),
            "spearman": part["flow_one"].corr(part["flow_other"], method="spearman"),
        }
        for prompt, part in joined.groupby("prompt")
    ]
    return pd.DataFrame(rows)


def trend_test(
    profiles: dict[str, np.ndarray], order: Sequence[str] = tuple("ABCD")
) -> dict[str, float]:
    """Page's test that the stages' centres of flow rise in this order within prompts.

    Returns: L, p, and `share`, the part of the prompts whose centres stand in exactly this order (by chance 1/24).
    """
    layers = np.arange(next(iter(profiles.values())).shape[1])
    positive = [np.clip(profiles[stage], 0, None) for stage in order]
    centres = np.stack(
        [(x * layers).sum(1) / np.maximum(x.sum(1), 1e-12) for x in positive], axis=1
    )  # [n, stages]
    test = stats.page_trend_test(centres)
    return {
        "L": float(test.statistic),
        "p": float(test.pvalue),
        "share": float((np.diff(centres) > 0).all(1).mean()),
    }


def contest(
    model,
    tokenizer,
    prompts: Sequence[str],
    groups: Sequence,
    correct: Sequence[int],
    conflicting: Sequence[int],
    clusters: Sequence,
    positions: Sequence[str] = ("entity", "relation", "last"),
    batch_size: int = 16,
) -> pd.DataFrame:
    """Logit of the correct less that of the conflicting answer, read at the last token of each position group.

    The lens recomputes the norm's scale in every state. Layer l is the state that enters layer l; the highest is the
    state that leaves the model.

    clusters: see `intervals.bootstrap`.

    Returns: position, layer, mean, low, high (95 % intervals), clusters (their number).

    Raises ValueError when there are no prompts, or a position group is missing from one.
    """
    if not len(prompts):
        raise ValueError("There is no prompt with a conflicting answer: ask more facts.")
    pairs = np.stack([correct, conflicting], axis=1)  # [n, 2]
    logits, _ = read_states(
        model,
        tokenizer,
        prompts,
        last_token_positions(groups, positions),
        pairs,
        batch_size=batch_size,
    )
    mean, low, high = mean_interval(logits[..., 0] - logits[..., 1], clusters)  # [positions, L+1]
    parts = [
        pd.DataFrame(
            {
                "position": name,
                "layer": range(mean.shape[1]),
                "mean": mean[i],
                "low": low[i],
                "high": high[i],
            }
        )
        for i, name in enumerate(positions)
    ]
    return pd.concat(parts, ignore_index=True).assign(clusters=len(set(clusters)))


def other_relation(known: pd.DataFrame) -> pd.DataFrame:
    """Rows of `known` with the subject's answer to another relation: relation_other, answer_other, answer_id_other.

    Every pair of answers occurs both ways round, once as correct and once as conflicting, so that no relation's
    answers are favoured.
    """
    joined = known.merge(
        known[["subject", "relation", "answer", "answer_id"]], on="subject", suffixes=("", "_other")
    )
    different = (joined["relation"] != joined["relation_other"]) & (
        joined["answer_id"] != joined["answer_id_other"]
    )
    return joined[different].reset_index(drop=True)


def other_entity(known: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`known` with answer_id_other: another entity's answer to the same relation, with another first token."""
    generator, parts = np.random.default_rng(seed), []
    for _, part in known.groupby("relation", sort=True):
        ids = part["answer_id"].to_numpy()
        if len(np.unique(ids)) < 2:
            continue
        picks = [generator.choice(ids[ids != own]) for own in ids]
        parts.append(part.assign(answer_id_other=picks))
    if not parts:
        raise ValueError(
            "Every relation has a single answer here, so nothing conflicts: ask more facts."
        )
    return pd.concat(parts).reset_index(drop=True)


def normaliser_bins(sample: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """Neurons in groups of equal size by their normaliser; sample: normaliser, amplification, a row per neuron.

    Returns per group the medians of both, and low and high, the 10th and 90th percentiles of the amplification.
    """
    groups = sample.groupby(pd.qcut(sample["normaliser"], bins, labels=False))
    low, high = (groups["amplification"].quantile(q) for q in (0.1, 0.9))
    middle = groups[["normaliser", "amplification"]].median()
    return middle.assign(low=low, high=high, neurons=groups.size()).reset_index(drop=True)


def route_summary(agree: pd.DataFrame, sample: pd.DataFrame) -> pd.DataFrame:
    """Agreement of the two routes and behaviour near small normalisers, as one table: quantity, mean, low, high.

    low and high are the 2.5 and 97.5 percentiles over prompts (agreement) or neurons (normaliser, amplification).
    """
    columns = {
        "Pearson correlation of the routes, per prompt": agree["pearson"],
        "Spearman correlation of the routes, per prompt": agree["spearman"],
        "normaliser |w·x| / Σ|w·x_k|, per neuron": sample["normaliser"],
        "amplification Σ|share|, per neuron": sample["amplification"],
    }
    rows = [
        {
            "quantity": name,
            "mean": x.mean(),
            "low": x.quantile(0.025),
            "high": x.quantile(0.975),
            "extreme": x.max(),
        }
        for name, x in columns.items()
    ]
    return pd.DataFrame(rows)


def table_by(
    labels: Sequence, profiles: dict[str, np.ndarray], clusters: Sequence, least: int = 8
) -> pd.DataFrame:
    """`stage_table` for all prompts ("all") and for each label that at least `least` carry, with a column label."""
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    parts = [stage_table(profiles, clusters).assign(label="all")]
    for label in np.unique(labels):
        mine = labels == label
        if mine.sum() >= least:
            part = stage_table(
                {stage: profile[mine] for stage, profile in profiles.items()}, clusters[mine]
            )
            parts.append(part.assign(label=label))
    return pd.concat(parts, ignore_index=True)


def stages_in_order(order: pd.DataFrame, knockouts: pd.DataFrame, n: int) -> Claim:
    """C1. order, knockouts: from `stages.order_table` and `stages.knockout_table`.

    Seven checks: each of A→B, B→C, C→D has its whole interval above zero; and each stage's own layers are `needed`.
    Layer 0, whose FFN acts as a part of the embedding, is left out of A and C for the second kind.
    """
    steps = order[order["step"]]
    own = knockouts[knockouts["stage"].isin(["A above 0", "B", "C above 0", "D"])]
    gaps = ", ".join(
        f"{r.earlier}→{r.later} {r.gap:+.1f} [{r.low:.1f}, {r.high:.1f}]"
        for r in steps.itertuples()
    )
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
    since, by_position = (
        {},
        {name: part.sort_values("layer") for name, part in contest.groupby("position")},
    )
    for position, part in by_position.items():
        above = (part["low"] > 0).to_numpy()
        run = (
            int(np.argmin(above[::-1])) if not above.all() else len(above)
        )  # states at the end that are above zero
        since[position] = int(part["layer"].to_numpy()[len(above) - run]) if run else None
    entity, reached = by_position["entity"], by_position["last"]["mean"].iloc[-1]
    small = bool((entity["high"] < reached / 10).all() and (entity["low"] > -reached / 10).all())
    readers = [since["relation"], since["last"]]
    can = None not in readers
    verdict = _verdict([small, can, can and min(readers) > stage_b])
    order = ("entity", "relation", "last")
    told = ", ".join(
        f"{p} {'never' if since[p] is None else f'from state {since[p]}'}" for p in order
    )
    final = {p: by_position[p].iloc[-1] for p in order}
    sizes = ", ".join(
        f"{p} {r['mean']:+.1f} [{r['low']:.1f}, {r['high']:.1f}]" for p, r in final.items()
    )
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


def one_after_the_other(order: pd.DataFrame, n: int) -> Claim:
    """B1. order: `stages.order_table` with the pairs of notebook 01.

    Three checks, each with its whole interval above zero: FFNs work on the relation's word after they work on the
    entity (C relation after A) and after attention has read the entity (after B), and what gives the answer comes after
    that too (D after B).
    """
    by, pairs = (
        order.set_index(["earlier", "later"]),
        (("A", "C relation"), ("B", "C relation"), ("B", "D")),
    )
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
        verdict=_weighed(
            [bool(row["low"] > 0) for row in rows], [bool(row["high"] < 0) for row in rows]
        ),
        notebook="01_stage_discovery",
        figure="01_stages",
    )
