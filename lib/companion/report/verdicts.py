"""Verdicts on the paper's claims: each by a rule over result tables, so that none can be written by
hand. What is claimed stands in data/claims.yml; each rule in the study whose tables it reads."""

from collections.abc import Iterable, Mapping

import pandas as pd
import yaml

from companion.paths import DATA

Checks = Iterable[bool]
VERDICTS = ("reproduced", "partly", "not at this scale", "contradicted", "not testable here")
CLAIMS: dict[str, dict] = yaml.safe_load((DATA / "claims.yml").read_text(encoding="utf-8"))
COLUMNS = ["id", "claim", "paper", "ours", "kind", "verdict", "notebook", "figure"]


def claim(
    key: str, ours: str, passed: Checks, against: Checks | None = None, testable: bool = True
) -> dict[str, str]:
    """A row of the ledger; key: in data/claims.yml; ours: what was measured, with n, interval. All
    checks passed: reproduced; some: partly; none: contradicted, if there is evidence against the
    claim in every check."""
    passed = [bool(check) for check in passed]
    verdict = "partly" if any(passed) else "not at this scale"
    if all(passed):
        verdict = "reproduced"
    elif not any(passed) and (against is None or all(against)):
        verdict = "contradicted"
    row = {"id": key, **CLAIMS[key], "ours": ours}
    row["verdict"] = verdict if testable else "not testable here"
    return {name: row[name] for name in COLUMNS}


def ledger(rows: Iterable[Mapping]) -> pd.DataFrame:
    """Rows of `claim` as a table."""
    return pd.DataFrame(list(rows), columns=COLUMNS)


def with_interval(
    row: Mapping, value: str, form: str, ends: str | None = None, scale: float = 1.0
) -> str:
    """The text "0.4 [0.3, 0.5]": a column of a row with `low` and `high`, of form `ends`."""
    low, high = (format(scale * row[name], ends or form) for name in ("low", "high"))
    return f"{format(scale * row[value], form)} [{low}, {high}]"


def points(row: Mapping, value: str = "difference") -> str:
    """A difference of accuracies with its interval, in points."""
    return with_interval(row, value, "+.1f", scale=100)


def percent(row: Mapping, value: str = "share") -> str:
    """A share with its interval, in per cent."""
    return with_interval(row, value, ".0%")
