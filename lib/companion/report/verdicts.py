"""Verdicts on the paper's claims: each a rule over result tables, so that none can be written by hand."""

from dataclasses import asdict, dataclass

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
            raise ValueError(
                f"Unknown verdict {self.verdict!r}; choose one of {', '.join(VERDICTS)}."
            )


def ledger(claims: list[Claim]) -> pd.DataFrame:
    """The claims as a table."""
    return pd.DataFrame([asdict(claim) for claim in claims])


def _verdict(passed: list[bool]) -> str:
    return "reproduced" if all(passed) else "partly" if any(passed) else "contradicted"


def _weighed(passed: list[bool], against: list[bool]) -> str:
    """Like `_verdict`, but where nothing passed it takes evidence against the claim to contradict it."""
    return _verdict(passed) if any(passed) or all(against) else "not at this scale"


def _points(row) -> str:
    """A difference of accuracies with its interval, in points."""
    return f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


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
    partial = (
        table[table["other"].isin(set(controls) - set(trained["other"]))].groupby("other").tail(1)
    )
    passed = [*(untrained["low"] > 0), *(trained["low"] > 0)]
    against = [*(untrained["high"] < 0), *(trained["high"] < 0)]
    gains = ", ".join(f"{row['dataset']} {_points(row)}" for _, row in untrained.iterrows())
    ahead = ", ".join(f"{row['other']} {_points(row)}" for _, row in trained.iterrows())
    told = "".join(
        f"; on {row['dataset']} less {row['other']} {_points(row)}" for _, row in partial.iterrows()
    )
    words = f"less zero-shot, points: {gains}; over all datasets less {ahead}{told}"
    return list(map(bool, passed)), list(map(bool, against)), words
