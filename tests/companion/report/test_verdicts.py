"""Verdicts follow from checks, and what is claimed stands in one file."""

import pytest

from companion.report.verdicts import CLAIMS, VERDICTS, claim, ledger, percent, points


@pytest.mark.parametrize(
    "passed, against, expected",
    [
        ([True, True], [False, False], "reproduced"),
        ([True, False], [False, True], "partly"),
        ([False, False], [False, True], "not at this scale"),
        ([False, False], [True, True], "contradicted"),
        ([False, False], None, "contradicted"),
    ],
)
def test_verdicts_follow_from_checks(passed, against, expected):
    assert claim("C5", "x", passed, against)["verdict"] == expected and expected in VERDICTS
    assert claim("C5", "x", passed, against, testable=False)["verdict"] == "not testable here"


def test_a_row_says_what_is_claimed():
    table = ledger([claim("C11-size", "0.1 %", [True]), claim("C11-use", "87%", [False])])
    assert table["id"].tolist() == ["C11", "C11"] and table["ours"].tolist() == ["0.1 %", "87%"]
    assert table["verdict"].tolist() == ["reproduced", "contradicted"]
    assert not table.isna().any(axis=None) and set(table["claim"][:1]) != set(table["claim"][1:])
    assert all({"claim", "paper", "kind", "notebook", "figure"} <= set(c) for c in CLAIMS.values())


def test_numbers_come_with_their_intervals():
    assert points({"difference": 0.0123, "low": -0.01, "high": 0.2}) == "+1.2 [-1.0, +20.0]"
    assert percent({"kept": 0.874, "low": 0.74, "high": 1.0}, "kept") == "87% [74%, 100%]"
