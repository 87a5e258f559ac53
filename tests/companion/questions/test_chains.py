"""The task that needs flow and no knowledge."""

from companion.questions.datasets import load


def test_a_chain_is_asked_whose_answer_no_shortcut_gives():
    frame = load("chains")
    first = frame.iloc[0]
    for told in (f"{first.e1}'s country is {first.e2}.", f"{first.e2}'s capital is {first.e3}."):
        assert told in first["prompt"]
    assert first["prompt"].endswith(f"{first.e1}'s country's capital is")
    assert (frame["prompt"].str.count(r"\.") == 4).all() and frame["prompt"].is_unique
    assert (frame["e3"] != frame["other"]).all() and (frame["answer"] == " " + frame["e3"]).all()
    last = frame["prompt"].str.extract(r".*capital is (\w+)\.")[0]  # the city told last
    assert 0.45 < (last == frame["e3"]).mean() < 0.55


def test_the_test_has_other_countries_and_partly_other_cities():
    frame = load("chains")
    by = {split: part for split, part in frame.groupby("split")}
    countries = {split: set(part["group"].str.split("|").explode()) for split, part in by.items()}
    assert not countries["train"] & (countries["test"] | countries["validation"])
    seen = set(by["train"]["e3"]) | set(by["train"]["other"])
    for kind, part in by["test"].groupby("kind"):
        assert len(part) == 300
        assert (part["e3"].isin(seen) == (kind == "seen")).all()
