"""Verdicts on the paper's claims, by rule: each answers two questions. Does the paper's own
comparison repeat? Does it survive the strictest control? What is claimed stands in data/claims.yml;
each rule in the study whose tables it reads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd
import yaml

from companion.paths import DATA

CLAIMS: dict[str, dict] = yaml.safe_load((DATA / "claims.yml").read_text(encoding="utf-8"))
VERDICTS = ("verified", "toy", "inconclusive", "falsified")
CONTROLS = ("ahead", "equal", "undecided", "behind", "none")
ZONE = 2.0  # points of accuracy within which two arms count as equal
POWER = (1.96 + 0.84) / 1.96  # of half an interval: what is seen in four of five repetitions
COLUMNS = ["id", "short", "claim", "paper", "ours", "kind", "verdict", "control", "checks", "says"]
COLUMNS += ["comparison", "effect", "low", "high", "unit"]
COLUMNS += ["highest_effect", "highest_low", "highest_high", "paper_low", "paper_high", "strictest"]
COLUMNS += ["control_effect", "control_low", "control_high", "control_unit", "seen"]
COLUMNS += ["notebook", "figure"]


@dataclass(frozen=True)
class Effect:
    """A number with its 95 % interval that a claim is judged by, put so that the claim expects it
    to be above zero (expects="more"), not below zero by more than the zone ("no less"), or nothing
    ("none"). what: the comparison in words; zone: up to what size a difference counts as none."""

    what: str
    value: float
    low: float
    high: float
    unit: str = "points"
    zone: float = ZONE
    expects: str = "more"

    @classmethod
    def of(cls, what: str, row: Mapping, value: str = "difference", less: float = 0.0, **options):
        """From a table's row with `low` and `high`: shares, of which `less` is taken, as points."""
        ends = (100 * (row[name] - less) for name in (value, "low", "high"))
        return cls(what, *(float(x) for x in ends), **options)

    @property
    def reading(self) -> str:
        if -self.zone <= self.low and self.high <= self.zone:
            return "equal"
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "undecided"

    @property
    def holds(self) -> bool | None:
        """Whether what the claim expects is so; None where the interval leaves it open."""
        yes, no = {
            "more": (self.reading == "ahead", self.reading in ("behind", "equal")),
            "no less": (self.low >= -self.zone, self.high < -self.zone),
            "none": (self.reading == "equal", self.low > self.zone or self.high < -self.zone),
        }[self.expects]
        return True if yes else False if no else None

    @property
    def seen(self) -> float:
        """The smallest true effect that would have been seen, with 80 % power."""
        return POWER * (self.high - self.low) / 2

    def __str__(self) -> str:
        digits = 1 if self.unit in ("points", "layers") or self.unit.startswith("%") else 2
        number, low, high = (f"{x:+.{digits}f}" for x in (self.value, self.low, self.high))
        ends = f" [{low}, {high}]" if self.low < self.high else ""
        return f"{self.what}: {number}{ends} {self.unit}"


def claim(
    key: str,
    ours: str,
    checks: Mapping[str, bool],
    repeats: Effect | Iterable[Effect],
    control: Effect | None = None,
    testable: bool = True,
) -> dict[str, object]:
    """A row of the ledger. key: in data/claims.yml; ours: what was measured, with n, interval;
    checks: name -> passed, all that was tried; repeats: the paper's own comparison, one for each
    model, of which the lowest (`effect`) and the highest are kept; control: the strictest.

    verdict: *verified* if the comparison repeats in all models (*toy*: in models trained from
    nothing), *falsified* if in none, by whole intervals, else *inconclusive*. control: how the
    claim stands against its strictest control: ahead, equal (within the zone), behind, undecided;
    none where there is none. says: the plain sentence, with the row's numbers in its braces.
    """
    effects = [repeats] if isinstance(repeats, Effect) else list(repeats)
    about, answers = CLAIMS[key], [effect.holds for effect in effects]
    verdict, passed = "inconclusive", [name for name, check in checks.items() if check]
    if testable and all(answers):
        verdict = "toy" if about.get("toy") else "verified"
    elif testable and all(answer is False for answer in answers):
        verdict = "falsified"
    lowest, highest = (which(effects, key=lambda effect: effect.value) for which in (min, max))
    counted = f"{len(passed)} of {len(checks)}"
    row = {"id": key, **about, "ours": ours, "verdict": verdict}
    row["paper_low"], row["paper_high"] = about.get("effect", (None, None))
    row |= {"checks": f"{counted}: {', '.join(passed)}" if passed else counted}
    row |= {"comparison": "; ".join(map(str, effects)), "effect": lowest.value}
    row |= {name: getattr(lowest, name) for name in ("low", "high", "unit")}
    if len(effects) > 1:
        row |= {f"highest_{name}": getattr(highest, name) for name in ("low", "high")}
        row["highest_effect"] = highest.value
    row["control"] = control.reading if control else "none"
    seen = f"; would have seen {control.seen:.2g}" if control and control.seen else ""
    row["strictest"] = f"{control}{seen}" if control else "none"
    if control:
        row |= {f"control_{name}": getattr(control, name) for name in ("low", "high", "unit")}
        row |= {"control_effect": control.value, "seen": control.seen}
    words = about["says"].get(f"{verdict}, {row['control']}", "{comparison}.")
    row["says"] = words.format(**row)
    return {name: row.get(name) for name in COLUMNS}


def strictest(table: pd.DataFrame, what: str = "less {}", by: str = "other", **options) -> Effect:
    """Of a table of differences from controls (column `by`), that with the smallest difference."""
    row = table.loc[table["difference"].idxmin()]
    return Effect.of(what.format(row[by]), row, **options)


def named(table: pd.DataFrame, passed: Iterable[bool], by: str = "other") -> dict[str, bool]:
    """Checks of a table's rows, named by one column."""
    return dict(zip(table[by], map(bool, passed), strict=True))


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
