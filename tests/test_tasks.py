"""Facts, prompts, position groups, and knowing what the model knows."""

import runpy
import warnings

import numpy as np
import pandas as pd
import pytest

from backattn.models.next_token import next_log_probs
from backattn.models.tokens import encode
from companion import paths
from companion.questions import asking
from companion.questions.asking import score
from companion.questions.facts import facts as the_facts
from companion.questions.prompts import last_token_positions, position_groups, single_hop, span


@pytest.fixture(scope="module")
def facts():
    return the_facts()


def test_the_shipped_facts_are_what_the_script_makes(tmp_path, facts):
    build = runpy.run_path(str(paths.DATA / "build_facts.py"))
    build["main"](tmp_path / "facts.csv")
    assert (tmp_path / "facts.csv").read_bytes() == (paths.DATA / "facts.csv").read_bytes()


def test_facts_are_unique_and_do_not_echo(facts):
    assert not facts.duplicated(["relation", "subject"]).any()
    echoed = [
        a.lower() in s.lower() or s.lower() in a.lower()
        for s, a in zip(facts["subject"], facts["answer"], strict=True)
    ]
    assert not any(echoed)
    assert facts["relation"].nunique() >= 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("relation,subject\ncapital,France\n", "lacks column 'answer'"),
        ("relation,subject,answer,answer\ncapital,France,Paris,Paris\n", "repeats column 'answer'"),
        (
            "relation,subject,answer\ncapital,France,Paris\ncapital,Spain,\n",
            "empty 'answer' in row 3",
        ),
    ],
)
def test_a_bad_table_names_its_column_or_row(tmp_path, text, message):
    file = tmp_path / "facts.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        the_facts(file)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv is missing"):
        the_facts(tmp_path / "nothing.csv")


def test_prompts_end_with_the_question_and_do_not_show_its_answer(facts):
    prompts = single_hop(facts, shots=2, per_relation=20)
    for row in prompts.itertuples():
        assert row.prompt.endswith(f"{row.subject}'s {row.relation} is")
        assert row.prompt[slice(*row.entity)] == row.subject
        assert row.prompt[slice(*row.relation_span)] == row.relation
        assert f" {row.answer}. " not in row.prompt  # the worked examples do not give it away
    assert (prompts.groupby("relation").size() <= 20).all()
    assert len(single_hop(facts, shots=0)) == len(facts)


def test_worked_examples_are_not_asked(facts):
    prompts = single_hop(facts, shots=2)
    for _, part in prompts.groupby("relation"):
        head = part["prompt"].iloc[0][: part["entity"].iloc[0][0]]
        shown = {sentence.split("'s ")[0] for sentence in head.split(". ") if sentence}
        assert len(shown) == 2 and not shown & set(part["subject"])


def test_more_worked_examples_than_answers_is_refused(facts):
    with pytest.raises(ValueError, match="'continent' has only 5 different answers"):
        single_hop(facts, shots=7)


def test_position_groups_name_every_token(llama, facts):
    _, tokenizer = llama
    prompts = single_hop(facts, per_relation=3)
    for labels, row in zip(position_groups(tokenizer, prompts), prompts.itertuples(), strict=True):
        offsets = tokenizer(row.prompt, return_offsets_mapping=True)["offset_mapping"]
        assert len(labels) == len(offsets)
        assert labels[-1] == "last" and list(labels).count("last") == 1
        for name, (begin, end) in (("entity", row.entity), ("relation", row.relation_span)):
            covered = [
                row.prompt[a:b]
                for label, (a, b) in zip(labels, offsets, strict=True)
                if label == name
            ]
            assert "".join(covered).strip() == row.prompt[begin:end]


def test_an_entity_that_is_not_in_the_prompt_is_named():
    with pytest.raises(ValueError, match=r"'Paris' does not occur in the prompt"):
        span("France's capital is", "Paris")


def test_a_prompt_without_a_place_is_an_error():
    labels = [np.array(["entity", "relation", "last"]), np.array(["entity", "entity", "last"])]
    assert last_token_positions(labels, ["entity", "last"]) == [[0, 2], [1, 2]]
    with pytest.raises(ValueError, match="'relation'"):
        last_token_positions(labels, ["entity", "relation"])


def test_score_agrees_with_asking_one_by_one(llama, facts):
    model, tokenizer = llama
    prompts = single_hop(facts, per_relation=4)
    scored = score(model, tokenizer, prompts, batch_size=7)
    for row in scored.itertuples():
        logs = next_log_probs(model, encode(tokenizer, [row.prompt]))[0]
        assert row.log_prob == pytest.approx(logs[row.answer_id].item(), abs=1e-4)
        assert row.correct == (logs.argmax().item() == row.answer_id)


def test_known_keeps_only_what_the_first_token_can_tell(llama):
    scored = pd.DataFrame(
        {
            "relation": ["r"] * 4,
            "correct": [True, True, True, False],
            "shared": [False, True, False, False],
            "tokens": [1, 1, 2, 1],
        }
    )
    assert len(asking.answerable(scored)) == 1
    with pytest.raises(ValueError, match="answers none"):
        asking.answerable(scored.assign(correct=False))


def test_the_paper_notebook_has_its_two_hundred_prompts(smollm2, facts):
    """What notebook 01 rests on: 200 known prompts over at least four relations (a sample of a third here)."""
    model, tokenizer = smollm2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = asking.answerable(score(model, tokenizer, single_hop(facts, per_relation=40)))
    assert known["relation"].nunique() >= 4
    assert len(known) >= 200 / 3
    assert np.isfinite(known["log_prob"]).all()
