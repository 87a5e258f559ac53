"""01: four stages in single-hop recall, two routes to the flow, and two answers in conflict (claims
C1, C2, B1)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from backattn.analysis.logit_flow import LogitFlow
from backattn.models.activations import capture
from backattn.models.lens import read_states
from backattn.models.tokens import encode
from companion.measures.layers import mean_by_layer
from companion.questions.prompts import last_token_positions
from companion.report.verdicts import Effect, claim, named, with_interval

CONTESTED = ("entity", "relation", "last")  # position groups at which two answers are compared


def normaliser_diagnostics(
    model, tokenizer, flow: LogitFlow, prompts: Sequence[int]
) -> pd.DataFrame:
    """How small the normalisers of route "parts" are, for the neurons of some prompts of `flow`.

    The shares w·x_k / w·x of a neuron's residual inputs k (embedding, and each earlier attention
    and FFN output) sum to 1, but may be large and of both signs when w·x is near zero.

    Returns: prompt, layer, kind, position, increase, normaliser (|w·x| / Σ|w·x_k|), amplification
    (Σ|share|); the last two are means over both rows w of a gated neuron.
    """
    if flow.level != "neuron":
        raise ValueError('There are no neurons in this flow: call logit_flow with level="neuron".')
    texts = [flow.prompts[index] for index in prompts]
    stream = capture(model, encode(tokenizer, texts, device=model.device))
    neurons, tables = flow.frame[flow.frame["prompt"].isin(prompts)].dropna(subset="neuron"), []
    for (kind, layer), table in neurons.groupby(["kind", "layer"], observed=True):
        block, row = stream.arch.blocks[layer], table["prompt"].map(list(prompts).index)
        where = table.assign(row=row)[["row", "position", "head", "neuron"]].fillna(0)
        where = torch.tensor(where.to_numpy(np.int64), device=stream.hidden.device)
        row, place, head, neuron = where.T
        place = place + stream.batch.start[row]
        norm, state = block.norm(f"{kind}_norm"), stream.input(kind, layer)
        if kind == "ffn":
            _, *outputs = block.neurons(state)
            pairs = [pair for pair in zip(block.ffn_in, outputs, strict=True) if pair[0]]
            weights = [linear.weight[neuron] for linear, _ in pairs]
        else:
            group = head // (block.heads // block.kv_heads)
            pairs = [(block.value, stream.values[layer].flatten(2))]
            weights = [block.value.weight[group * block.head_dim + neuron]]
        stream.prove_inputs(layer, kind, *pairs)
        earlier = layer + (kind == "ffn" and not stream.arch.parallel)
        parts = torch.cat([stream.hidden[:1], stream.attention[:earlier], stream.ffn[:layer]])
        read = norm.linear(parts[:, row, place], norm.scale(state[row, place]))  # [P, n, D]
        products = torch.stack([(read * weight).sum(-1) for weight in weights])  # [1 or 2, P, n]
        sizes, totals = products.abs().sum(1), products.sum(1).abs()
        table = table[["prompt", "layer", "kind", "position", "increase"]].assign(
            normaliser=(totals / sizes).mean(0).cpu().numpy(),
            amplification=(sizes / totals.clamp(min=1e-12)).mean(0).cpu().numpy(),
        )
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def contest(model, tokenizer, asked: pd.DataFrame, groups: Sequence) -> pd.DataFrame:
    """Logit of the correct less that of the conflicting answer, by the logit lens, at the last
    token of each of CONTESTED: position, layer (whose input it is), mean, low, high, clusters
    (subjects, over which the 95 % intervals are).

    asked: prompt, answer_id, answer_id_other, subject; groups: a label per token of each prompt.
    Raises ValueError when there are no prompts, or a position group is missing from one.
    """
    if asked.empty:
        raise ValueError("There is no prompt with a conflicting answer: ask more facts.")
    where, by_prompt = last_token_positions(groups, CONTESTED), asked.groupby("prompt", sort=False)
    row, pair = by_prompt.ngroup().to_numpy(), 2 * by_prompt.cumcount().to_numpy()
    tokens = np.zeros((by_prompt.ngroups, pair.max() + 2), dtype=int)  # all that one is asked for
    tokens[row, pair], tokens[row, pair + 1] = asked["answer_id"], asked["answer_id_other"]
    once = np.flatnonzero(pair == 0)
    prompts, where = asked["prompt"].iloc[once].tolist(), [where[i] for i in once]
    logits, _ = read_states(model, tokenizer, prompts, where, tokens.tolist())
    less = logits[row, ..., pair] - logits[row, ..., pair + 1]  # [n, positions, L+1]
    table = mean_by_layer(less, asked["subject"], CONTESTED, column="position")
    return table.assign(clusters=asked["subject"].nunique())


def _gaps(steps: pd.DataFrame) -> str:
    return ", ".join(
        f"{row['earlier']}→{row['later']} {with_interval(row, 'gap', '+.1f', '.1f')}"
        for row in steps.to_dict("records")
    )


def stages_in_order(order: pd.DataFrame, knockouts: pd.DataFrame, n: int) -> dict[str, str]:
    """C1. order, knockouts: `stages.order_table` without layer 0, `stages.knockout_table`.

    Seven checks: A→B, B→C, C→D have their whole intervals above zero; each stage's layers are
    `needed`, of A and C without layer 0, whose FFN acts as a part of the embedding. The paper's
    comparison is the smallest of the three steps; the strictest control, what the least needed
    stage costs more than random layers do.
    """
    steps = order[order["step"]]
    tested = knockouts[knockouts["stage"].isin(["A above 0", "B", "C above 0", "D"])]
    needed = ", ".join(tested.loc[tested["needed"], "stage"]) or "none"
    ours = (
        f"layers between stages, layer 0 left out: {_gaps(steps)}; own layers needed more than "
        f"every random set outside of all stages: {needed}; n = {n}"
    )
    steps = steps.assign(step=steps["earlier"] + "→" + steps["later"])
    checks = {**named(steps, steps["after"], "step"), **named(tested, tested["needed"], "stage")}
    smallest, least = (t.loc[t[by].idxmin()] for t, by in ((steps, "gap"), (tested, "difference")))
    what = f"smallest step between stages, {smallest['step']}"
    step = Effect(what, *smallest[["gap", "low", "high"]], unit="layers", zone=0)
    ends = least[["difference", "difference_low", "difference_high"]]
    what = f"ablating stage {least['stage']} less random layers"
    return claim("C1", ours, checks, step, Effect(what, *ends, unit="nats", zone=0))


def entity_cannot_tell(contest: pd.DataFrame, stage_b: float, n: int) -> dict[str, str]:
    """C2. contest: from the function of that name; stage_b: the middle of stage B, in layers.

    A position tells the answers apart from where on its interval stays above zero. Three checks:
    the entity's stays below a tenth of what the last position reaches in the end; relation and last
    (else it is not testable) tell them apart; they begin to above stage B's layer. The paper's
    comparison is of two parts: the last position's interval in the end less the entity's, and a
    tenth of the former less the latter's largest. There is no other control.
    """
    since, final = {}, {}
    for position in CONTESTED:
        table = contest[contest["position"] == position].sort_values("layer")
        above = (table["low"] > 0)[::-1].cummin()[::-1]  # here and in every later state
        since[position] = table.loc[above, "layer"].min()  # NaN: never
        final[position] = table.iloc[-1]
    entity, limit = contest[contest["position"] == "entity"], final["last"]["mean"] / 10
    small = entity["high"].max() < limit and entity["low"].min() > -limit
    readers = [since["relation"], since["last"]]
    starts = ", ".join(
        f"{p} {'never' if np.isnan(state) else f'from state {state}'}" for p, state in since.items()
    )
    sizes = ", ".join(f"{p} {with_interval(r, 'mean', '+.1f', '.1f')}" for p, r in final.items())
    ours = (
        f"tells them apart: {starts}; in the final state: {sizes}; middle of stage B: layer "
        f"{stage_b:.1f}; n = {n} prompts about {contest['clusters'].iloc[0]} subjects"
    )
    checks = {
        "entity cannot": small,
        "relation and last can": not np.isnan(readers).any(),
        "after stage B": np.min(readers) > stage_b,  # NaN is not above
    }
    last, own, most = final["last"], final["entity"], entity.loc[entity["mean"].idxmax()]
    ends = last["mean"] - own["mean"], last["low"] - own["high"], last["high"] - own["low"]
    more = Effect("last position less entity", *ends, unit="logits", zone=0)
    ends = (limit - most[name] for name in ("mean", "high", "low"))
    what = "a tenth of the last position less entity"
    blind = Effect(what, *ends, unit="logits", zone=0)
    testable = not np.isnan(since["last"])
    return claim("C2", ours, checks, [more, blind], testable=testable)


def in_parallel(order: pd.DataFrame, n: int) -> dict[str, str]:
    """B1, that they are processed in parallel. order: `stages.order_table` without layer 0, with
    the pairs of notebook 01.

    Three checks, each with its whole interval: FFNs work on the relation's word before those at the
    entity (A) and before attention has read it (B), and what gives the answer (D) does not wait for
    B. The comparison is the first, the strictest control the last.
    """
    pairs = [("A", "C relation"), ("B", "C relation"), ("B", "D")]
    rows = order.set_index(["earlier", "later"]).loc[pairs].reset_index()
    ours = f"layers between stages, layer 0 left out: {_gaps(rows)}; n = {n}"
    effects = [
        Effect(f"{r.later} before {r.earlier}", -r.gap, -r.high, -r.low, unit="layers", zone=0)
        for r in rows.itertuples()
    ]
    checks = {effect.what: effect.low > 0 for effect in effects}
    return claim("B1", ours, checks, effects[0], effects[-1])
