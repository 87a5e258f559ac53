"""Verdicts follow from intervals, and what is claimed stands in one file."""

import pytest

from companion.report.verdicts import (
    CLAIMS,
    CONTROLS,
    VERDICTS,
    Effect,
    claim,
    ledger,
    percent,
    points,
)


def effect(low: float, high: float, **options) -> Effect:
    return Effect("x", (low + high) / 2, low, high, **options)


@pytest.mark.parametrize(
    "low, high, reading",
    [
        (3, 5, "ahead"),
        (-5, -3, "behind"),
        (-1, 5, "undecided"),
        (-1, 2, "equal"),
        (0.5, 1.5, "equal"),  # surely more than nothing, and as surely no more than the zone
        (1, 5, "ahead"),
    ],
)
def test_a_reading_is_of_the_whole_interval(low, high, reading):
    assert effect(low, high).reading == reading and reading in CONTROLS
    assert effect(low, high, zone=0).reading in (reading, "ahead", "undecided")


@pytest.mark.parametrize(
    "expects, verified, falsified, inconclusive",
    [
        ("more", (3, 5), (-1, 1), (-1, 5)),
        ("no less", (-1, 9), (-5, -3), (-5, 1)),
        ("none", (-1, 1), (3, 5), (1, 5)),
    ],
)
def test_verdicts_follow_from_what_is_expected(expects, verified, falsified, inconclusive):
    ends = {"verified": verified, "falsified": falsified, "inconclusive": inconclusive}
    for verdict, (low, high) in ends.items():
        one = effect(low, high, expects=expects)
        assert claim("C8", "", {}, one)["verdict"] == verdict and verdict in VERDICTS
        assert claim("C8", "", {}, one, testable=False)["verdict"] == "inconclusive"
        toy = claim("C7", "", {}, one)["verdict"]
        assert toy == ("toy" if verdict == "verified" else verdict)


def test_models_that_disagree_decide_nothing():
    row = claim("C10", "", {}, [effect(3, 5), effect(-5, -3)], effect(-1, 1))
    assert row["verdict"] == "inconclusive" and (row["effect"], row["control"]) == (-4, "equal")
    assert "+4.0" in row["comparison"] and "-4.0" in row["comparison"]


def test_a_row_says_what_is_claimed():
    checks = {"first": True, "second": False}
    rows = [
        claim("C11-size", "0.1 %", checks, effect(3, 5), effect(-1, 2)),
        claim("C5", "", {}, effect(0, 0)),
    ]
    table = ledger(rows)
    assert table["id"].tolist() == ["C11", "C5"] and table["checks"][0] == "1 of 2: first"
    assert table["seen"][0] == pytest.approx(2.14, abs=0.01) and table["control"][1] == "none"
    written = {"claim", "paper", "kind", "notebook", "figure", "says"}
    assert all(written <= set(about) for about in CLAIMS.values())


def test_a_plain_sentence_is_for_its_outcome_alone():
    outcomes = [key.split(", ") for about in CLAIMS.values() for key in about["says"]]
    assert all(one in VERDICTS and other in CONTROLS for one, other in outcomes)
    expected = claim("C8", "", {}, effect(3, 5), effect(-1, 5))
    assert expected["says"] == CLAIMS["C8"]["says"]["verified, undecided"]
    other = claim("C8", "", {}, effect(-5, -3), effect(-1, 5))
    assert other["says"] == f"{other['comparison']}." == "x: -4.0 [-5.0, -3.0] points."


def test_numbers_come_with_their_intervals():
    assert points({"difference": 0.0123, "low": -0.01, "high": 0.2}) == "+1.2 [-1.0, +20.0]"
    assert percent({"kept": 0.874, "low": 0.74, "high": 1.0}, "kept") == "87% [74%, 100%]"
