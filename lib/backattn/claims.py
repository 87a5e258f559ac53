"""Verdicts on the paper's claims: each a rule over result tables, so that none can be written by hand."""

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

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
