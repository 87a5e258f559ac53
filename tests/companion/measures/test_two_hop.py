"""Two-hop prompts: donors, contrasts of right and wrong cases, and what can be read."""

import numpy as np
import pandas as pd
import pytest

from backattn.models.next_token import next_log_probs
from backattn.models.tokens import encode
from companion.measures.two_hop import contrast, donors, first_token_pairs, read_conflict
from companion.questions.facts import two_hop_facts
from companion.questions.prompts import two_hop_prompts


@pytest.fixture(scope="module")
def facts() -> pd.DataFrame:
    """A few facts, with several about one bridge entity."""
    return two_hop_facts().query("pair == 'city-country-capital'").head(40).reset_index(drop=True)


def test_contrast_finds_a_difference_within_strata_and_none_between():
    draw = np.random.default_rng(0)
    strata, clusters = np.repeat(["a", "b"], 60), np.arange(120)
    right = np.r_[draw.random(60) < 0.8, draw.random(60) < 0.2]
    between, within = draw.normal(size=120) + 5 * (strata == "a"), draw.normal(size=120)
    values = np.stack([between, within + 1.5 * right], axis=1)
    test = contrast(values, right, strata, clusters, permutations=400)
    assert abs(test["difference"][0]) < 0.6 and test["p"][0] > 0.05
    assert abs(test["difference"][1] - 1.5) < 0.6 and test["p"][1] < 0.05
    with pytest.raises(ValueError, match="both right and wrong"):
        contrast(values, strata == "a", strata, clusters)


@pytest.mark.parametrize("copies", [True, False])
def test_contrast_is_not_fooled_by_copies_of_one_bridge_entity(copies):
    """Ten prompts about each of four entities, all of an entity alike: four points, which can show
    nothing at 5 %."""
    names = np.repeat(np.arange(4), 10)
    values = (names < 2)[:, None] + np.random.default_rng(0).normal(size=4)[names][:, None] / 100
    clusters = names if copies else np.arange(40)
    p = contrast(values, names < 2, np.zeros(40), clusters, permutations=400)["p"][0]
    assert (p > 0.05) == copies


def test_donors_know_none_of_the_right_answers(facts):
    frame = facts.drop_duplicates("e2").head(5).reset_index(drop=True)
    frame.loc[4, "e3"] = frame["e3"][0]  # a donor that would bring the first prompt's answer
    frame.loc[3, "e3_aliases"] = frame["e3"][2]
    for row, donor in enumerate(donors(frame)):
        answers = {frame["e3"][row], frame["e2"][row], *frame["e3_aliases"][row].split("|")}
        assert not {frame["e2"][donor], frame["e3"][donor]} & answers
    with pytest.raises(ValueError, match="No other prompt is about other entities"):
        donors(facts[facts["e2"] == facts["e2"][0]])
    with pytest.raises(ValueError, match='choose "same" or "any"'):
        donors(frame, relations="none")


def test_donors_of_any_relations_stay_when_a_prompt_goes():
    facts = two_hop_facts().sample(200, random_state=0).reset_index(drop=True)
    whole, less = (f["e1"].to_numpy()[donors(f, 0, "any")] for f in (facts, facts.drop(index=7)))
    assert (np.delete(whole, 7) == less).mean() > 0.95 and len(set(whole)) > 60
    pairs = facts.drop_duplicates("e1").set_index("e1")["pair"]
    assert (pairs[whole].to_numpy() != facts["pair"].to_numpy()).mean() > 0.7


def test_the_difference_read_is_the_models_own_at_the_end(llama, facts):
    model, tokenizer = llama
    asked = two_hop_prompts(facts)
    reading = read_conflict(model, tokenizer, asked, places=["last"])
    logs = next_log_probs(model, encode(tokenizer, asked["two_hop"].tolist(), side="left")).numpy()
    ids = first_token_pairs(tokenizer, asked)
    expected = [row[e3] - row[e2] for row, (e3, e2) in zip(logs, ids, strict=True)]
    assert np.allclose(reading.difference[:, 0, -1], expected, atol=1e-3)
    assert set(np.unique(reading.wins["e3"])) <= {0, 0.5, 1}
