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
    """C1. Each of A→B, B→C, C→D must have its whole interval above zero, and each of the four stages' own layers
    must cost more than equally many other layers (whole interval of the difference above zero)."""
    steps = order[order["step"]]
    own = knockouts[knockouts["stage"].isin(list("ABCD"))]
    passed = [*steps["after"].tolist(), *(own["difference_low"] > 0).tolist()]
    gaps = ", ".join(f"{r.earlier}→{r.later} {r.gap:+d} layers [{r.low:.0f}, {r.high:.0f}]" for r in steps.itertuples())
    needed = ", ".join(own.loc[own["difference_low"] > 0, "stage"]) or "none"
    return Claim(
        id="C1",
        claim="single-hop recall runs through four stages A, B, C, D in this order",
        paper="A–B layers ≈7–20, C–D ≈20–31 of Llama2-7B",
        ours=f"{gaps}; stages whose own layers matter more than others: {needed}; n = {n}",
        kind="tolerance",
        verdict=_verdict(passed),
        notebook="01_stage_discovery",
        figure="01_stages",
    )


def entity_cannot_tell(contest: pd.DataFrame, stage_b: int, n: int) -> Claim:
    """C2. contest: position, layer, mean, low, high, clusters; stage_b: the layer of stage B's middle.

    A position tells the answers apart from state l on when the interval is above zero in every state from l to the
    end. Three checks: the entity never does; relation and last do; they do not begin to before stage B has acted,
    that is in the states that leave layer `stage_b` or a later one.
    """
    since = {}
    for position, part in contest.groupby("position", sort=False):
        above = (part["low"] > 0).to_numpy()
        run = int(np.argmin(above[::-1])) if not above.all() else len(above)  # states at the end that are above zero
        since[position] = int(part["layer"].to_numpy()[len(above) - run]) if run else None
    readers = [since["relation"], since["last"]]
    can = None not in readers
    passed = [since["entity"] is None, can, can and min(readers) > stage_b]
    told = ", ".join(f"{name} {'never' if layer is None else f'from state {layer}'}" for name, layer in since.items())
    final = contest[contest["layer"] == contest["layer"].max()].set_index("position")
    sizes = ", ".join(f"{p} {r['mean']:+.1f} [{r['low']:.1f}, {r['high']:.1f}]" for p, r in final.iterrows())
    return Claim(
        id="C2",
        claim="the entity position cannot tell the correct from the conflicting answer; relation and last can, after B",
        paper="figure",
        ours=f"tells them apart: {told}; in the final state: {sizes}; stage B acts in layer {stage_b}; "
        f"n = {n} prompts about {contest['clusters'].iloc[0]} subjects",
        kind="tolerance",
        verdict=_verdict(passed),
        notebook="01_stage_discovery",
        figure="01_conflict",
    )
