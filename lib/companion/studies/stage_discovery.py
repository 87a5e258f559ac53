"""01: four stages in single-hop recall, two routes to the flow, and two answers in conflict (claims
C1, C2, B1)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from backattn.analysis.flow_back import FlowBack
from backattn.analysis.logit_flow import LogitFlow
from backattn.models.activations import Stream, capture
from backattn.models.lens import read_states
from backattn.models.tokens import encode
from companion.measures.layers import mean_by_layer
from companion.questions.prompts import last_token_positions
from companion.report.verdicts import claim, with_interval

CONTESTED = ("entity", "relation", "last")  # position groups at which two answers are compared


def normaliser_diagnostics(
    model, tokenizer, flow: LogitFlow, prompts: Sequence[int] | None = None, batch_size: int = 16
) -> pd.DataFrame:
    """How route "parts" behaves where its normaliser is small.

    prompts: indices of the prompts to look at; None takes all.

    For each neuron of `flow` the shares w·x_k / w·x of its residual input's parts k (embedding, and
    each earlier attention and FFN output) sum to 1, but they may be large and of both signs when
    w·x is near zero.

    Returns: prompt, layer, kind, position, increase, normaliser (|w·x| relative to Σ|w·x_k|,
    between 0 and 1) and amplification = Σ|share|; both are the mean of both rows of a gated neuron.
    """
    if flow.level != "neuron":
        raise ValueError('There are no neurons in this flow: call logit_flow with level="neuron".')
    rows, chosen = [], list(range(len(flow.prompts)) if prompts is None else prompts)
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        texts = [flow.prompts[index] for index in part]
        stream = capture(model, encode(tokenizer, texts, device=model.device))
        neurons = flow.frame[flow.frame["prompt"].isin(part) & flow.frame["neuron"].notna()]
        for (kind, layer), table in neurons.groupby(["kind", "layer"], observed=True):
            row = table["prompt"].map(part.index)
            products = _input_products(stream, kind, layer, table.assign(row=row))  # [1 or 2, P, n]
            sizes, totals = products.abs().sum(1), products.sum(1).abs()
            table = table[["prompt", "layer", "kind", "position", "increase"]].assign(
                normaliser=(totals / sizes).mean(0).cpu().numpy(),
                amplification=(sizes / totals.clamp(min=1e-12)).mean(0).cpu().numpy(),
            )
            rows.append(table)
    return pd.concat(rows, ignore_index=True)


def _input_products(stream: Stream, kind: str, layer: int, neurons: pd.DataFrame) -> Tensor:
    """w·x_k of every part k of the input of some neurons of one sub-layer: [1 or 2 rows w, P, n].

    neurons: row (of the stream's batch), position, head, neuron.
    """

    def index(column: str) -> Tensor:
        return torch.tensor(neurons[column].to_numpy(np.int64), device=stream.hidden.device)

    block, row, neuron = stream.arch.blocks[layer], index("row"), index("neuron")
    place = index("position") + stream.batch.start[row]
    if kind == "ffn":
        norm, state = block.norm("ffn_norm"), stream.ffn_input(layer)
        weights = [linear.weight[neuron] for linear in block.ffn_in if linear is not None]
    else:
        norm, state = block.norm("attention_norm"), stream.attention_input(layer)
        group = index("head") // (block.heads // block.kv_heads)
        weights = [block.value.weight[group * block.head_dim + neuron]]
    earlier = layer + (kind == "ffn" and not stream.arch.parallel)
    parts = [stream.hidden[:1], stream.attention[:earlier], stream.ffn[:layer]]
    read = norm.linear(torch.cat(parts)[:, row, place], norm.scale(state[row, place]))  # [P, n, D]
    return torch.stack([(read * weight).sum(-1) for weight in weights])


def agreement(one: FlowBack, other: FlowBack) -> pd.DataFrame:
    """How far two routes agree: correlation of their flows over (layer, kind, position), per
    prompt.

    Returns: prompt, pearson, spearman.
    """
    keys = ["prompt", "layer", "kind", "position"]
    joined = one.frame.merge(other.frame, on=keys, suffixes=("_one", "_other"))
    pairs = joined.groupby("prompt")[["flow_one", "flow_other"]]
    found = {
        method: pairs.apply(lambda x, how=method: x.iloc[:, 0].corr(x.iloc[:, 1], method=how))
        for method in ("pearson", "spearman")
    }
    return pd.DataFrame(found).reset_index()


def trend_test(
    profiles: dict[str, np.ndarray], order: Sequence[str] = tuple("ABCD")
) -> dict[str, float]:
    """Page's test that the stages' centres of flow rise in this order within prompts.

    Returns: L, p, and `share`, the part of the prompts whose centres stand in exactly this order
    (by chance 1/24).
    """
    positive = np.clip([profiles[stage] for stage in order], 0, None)  # [stages, n, layers]
    layers = np.arange(positive.shape[-1])
    centres = (positive * layers).sum(-1) / np.maximum(positive.sum(-1), 1e-12)
    test = stats.page_trend_test(centres.T)
    share = (np.diff(centres, axis=0) > 0).all(0).mean()
    return {"L": float(test.statistic), "p": float(test.pvalue), "share": float(share)}


def contest(
    model, tokenizer, asked: pd.DataFrame, groups: Sequence, batch_size: int = 16
) -> pd.DataFrame:
    """Logit of the correct less that of the conflicting answer, read at the last token of each of
    the groups CONTESTED.

    The lens recomputes the norm's scale in every state. Layer l is the state that enters layer l;
    the highest is the state that leaves the model.

    asked: prompt, answer_id, answer_id_other, subject (resampled: see `intervals.bootstrap`);
    groups: one array of labels per prompt, one label per token.

    Returns: position, layer, mean, low, high (95 % intervals), clusters (their number).

    Raises ValueError when there are no prompts, or a position group is missing from one.
    """
    if asked.empty:
        raise ValueError("There is no prompt with a conflicting answer: ask more facts.")
    where, pairs = last_token_positions(groups, CONTESTED), asked[["answer_id", "answer_id_other"]]
    logits, _ = read_states(
        model, tokenizer, asked["prompt"].tolist(), where, pairs.to_numpy(), batch_size=batch_size
    )
    less = logits[..., 0] - logits[..., 1]  # [n, positions, L+1]
    table = mean_by_layer(less, asked["subject"], CONTESTED, column="position")
    return table.assign(clusters=asked["subject"].nunique())


def other_relation(known: pd.DataFrame) -> pd.DataFrame:
    """Rows of `known` with the subject's answer to another relation: relation_other, answer_other,
    answer_id_other.

    Every pair of answers occurs both ways round, once as correct and once as conflicting, so that
    no relation's answers are favoured.
    """
    others = known[["subject", "relation", "answer", "answer_id"]]
    joined = known.merge(others, on="subject", suffixes=("", "_other"))
    different = [joined[name] != joined[f"{name}_other"] for name in ("relation", "answer_id")]
    return joined[different[0] & different[1]].reset_index(drop=True)


def other_entity(known: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`known` with answer_id_other: another entity's answer to the same relation, with another
    first token. Relations with a single answer are left out; raises ValueError when none is left.
    """
    generator, parts = np.random.default_rng(seed), []
    for _, part in known.groupby("relation", sort=True):
        ids = part["answer_id"].to_numpy()
        if len(np.unique(ids)) > 1:
            picks = [generator.choice(ids[ids != answer]) for answer in ids]
            parts.append(part.assign(answer_id_other=picks))
    if not parts:
        raise ValueError(
            "Every relation has a single answer here, so nothing conflicts: ask more facts."
        )
    return pd.concat(parts).reset_index(drop=True)


def _gaps(steps: pd.DataFrame) -> str:
    """The gaps of `stages.order_table` with their intervals, as text."""
    rows = steps.to_dict("records")
    return ", ".join(
        f"{row['earlier']}→{row['later']} {with_interval(row, 'gap', '+.1f', '.1f')}"
        for row in rows
    )


def stages_in_order(order: pd.DataFrame, knockouts: pd.DataFrame, n: int) -> dict[str, str]:
    """C1. order, knockouts: from `stages.order_table` and `stages.knockout_table`.

    Seven checks: each of A→B, B→C, C→D has its whole interval above zero; and each stage's layers
    are `needed`. Layer 0, whose FFN acts as a part of the embedding, is left out of A and C for the
    second kind.
    """
    steps = order[order["step"]]
    tested = knockouts[knockouts["stage"].isin(["A above 0", "B", "C above 0", "D"])]
    needed = ", ".join(tested.loc[tested["needed"], "stage"]) or "none"
    ours = (
        f"layers between stages: {_gaps(steps)}; own layers needed more than every random set: "
        f"{needed}; n = {n}"
    )
    return claim("C1", ours, passed=[*steps["after"], *tested["needed"]])


def entity_cannot_tell(contest: pd.DataFrame, stage_b: float, n: int) -> dict[str, str]:
    """C2. contest: from the function of that name; stage_b: the middle of stage B, in layers.

    A position tells the answers apart from state l on when the interval is above zero in every
    state from l to the end. Three checks: the entity's interval stays, in every state, below a
    tenth of what the last position reaches in the end; relation and last tell them apart; they
    begin to in states that leave stage B's layer or a later one. Not testable where the last
    position does not tell them apart.
    """
    tables = {name: part.sort_values("layer") for name, part in contest.groupby("position")}
    since, final = {}, {}
    for position in CONTESTED:
        table = tables[position]
        above = (table["low"] > 0)[::-1].cummin()[::-1]  # here and in every later state
        since[position] = int(table.loc[above, "layer"].iloc[0]) if above.any() else None
        final[position] = table.iloc[-1]
    entity, limit = tables["entity"], final["last"]["mean"] / 10
    small = (entity["high"] < limit).all() and (entity["low"] > -limit).all()
    readers = [since["relation"], since["last"]]
    both = None not in readers
    starts = ", ".join(
        f"{p} {'never' if state is None else f'from state {state}'}" for p, state in since.items()
    )
    sizes = ", ".join(f"{p} {with_interval(r, 'mean', '+.1f', '.1f')}" for p, r in final.items())
    ours = (
        f"tells them apart: {starts}; in the final state: {sizes}; middle of stage B: layer "
        f"{stage_b:.1f}; n = {n} prompts about {contest['clusters'].iloc[0]} subjects"
    )
    passed = [small, both, both and min(readers) > stage_b]
    return claim("C2", ours, passed, testable=since["last"] is not None)


def one_after_the_other(order: pd.DataFrame, n: int) -> dict[str, str]:
    """B1. order: `stages.order_table` with the pairs of notebook 01.

    Three checks, each with its whole interval above zero: FFNs work on the relation's word after
    they work on the entity (C relation after A) and after attention has read the entity (after B),
    and what gives the answer comes after that too (D after B).
    """
    pairs = [("A", "C relation"), ("B", "C relation"), ("B", "D")]
    rows = order.set_index(["earlier", "later"]).loc[pairs].reset_index()
    ours = f"layers between stages: {_gaps(rows)}; n = {n}"
    return claim("B1", ours, passed=rows["low"] > 0, against=rows["high"] < 0)
