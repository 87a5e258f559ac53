"""Prompts, and what each of their tokens is for."""

import copy
import re

import numpy as np
import pandas as pd
import pytest
from tokenizers.processors import TemplateProcessing

from companion.questions.facts import facts, two_hop_facts
from companion.questions.prompts import (
    EXAMPLES,
    TEMPLATES,
    label_tokens,
    last_token_positions,
    left_out,
    position_groups,
    single_hop,
    span,
    two_hop_prompts,
    two_hop_spans,
)

FACTS = pd.DataFrame(
    {
        "e1": ["Milan", "Lyon", "Munich", "Osaka", "Bergen", "Nice"],
        "e2": ["Italy", "France", "Germany", "Japan", "Norway", "France"],
        "e3": ["Rome", "Paris", "Berlin", "Tokyo", "Oslo", "Paris"],
    }
).assign(pair="x", r1="country", r2="capital", e2_aliases="", e3_aliases="")


def test_prompts_end_with_the_question_and_do_not_show_its_answer():
    prompts = single_hop(facts(), shots=2, per_relation=20)
    for row in prompts.itertuples():
        assert row.prompt.endswith(f"{row.subject}'s {row.relation} is")
        assert row.prompt[slice(*row.entity)] == row.subject
        assert row.prompt[slice(*row.relation_span)] == row.relation
        assert f" {row.answer}. " not in row.prompt  # the worked examples do not give it away
    assert (prompts.groupby("relation").size() <= 20).all()
    for _, part in prompts.groupby("relation"):  # worked examples are not asked
        head = part["prompt"].iloc[0][: part["entity"].iloc[0][0]]
        shown = {sentence.split("'s ")[0] for sentence in head.split(". ") if sentence}
        assert len(shown) == 2 and not shown & set(part["subject"])
    assert len(single_hop(facts(), shots=0)) == len(facts())
    with pytest.raises(ValueError, match="'continent' has only 5 different answers"):
        single_hop(facts(), shots=7)


def test_position_groups_name_every_token(llama):
    _, tokenizer = llama
    prompts = single_hop(facts(), per_relation=3)
    for labels, row in zip(position_groups(tokenizer, prompts), prompts.itertuples(), strict=True):
        offsets = tokenizer(row.prompt, return_offsets_mapping=True)["offset_mapping"]
        assert len(labels) == len(offsets)
        assert labels[-1] == "last" and list(labels).count("last") == 1
        for name, (begin, end) in (("entity", row.entity), ("relation", row.relation_span)):
            pairs = zip(labels, offsets, strict=True)
            covered = "".join(row.prompt[a:b] for label, (a, b) in pairs if label == name)
            assert covered.strip() == row.prompt[begin:end]
    other, mark = copy.deepcopy(tokenizer), tokenizer.bos_token  # put before every prompt
    special = [(mark, tokenizer.bos_token_id)]
    other.backend_tokenizer.post_processor = TemplateProcessing(f"{mark} $A", None, special)
    for labels, plain in zip(
        position_groups(other, prompts), position_groups(tokenizer, prompts), strict=True
    ):
        assert labels.tolist() == ["context", *plain]


def test_a_place_that_is_not_there_is_named(llama):
    labels = [np.array(["entity", "relation", "last"]), np.array(["entity", "entity", "last"])]
    assert last_token_positions(labels, ["entity", "last"]) == [[0, 2], [1, 2]]
    with pytest.raises(ValueError, match="'relation'"):
        last_token_positions(labels, ["entity", "relation"])
    with pytest.raises(ValueError, match=r"'Paris' does not occur in the prompt"):
        span("France's capital is", "Paris")
    with pytest.raises(ValueError, match="No token of 'Rome is' belongs to 'e1' alone"):
        label_tokens(llama[1], ["Rome is"], {"e1": [(5, 7)]})


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("examples", EXAMPLES)
def test_two_hop_prompts_hold_their_spans_and_no_answer(template, examples):
    written = two_hop_prompts(FACTS, template, examples)
    assert len(written)
    for row in written.itertuples():
        for name in ("e1", "r1", "r2"):
            begin, end = getattr(row, f"{name}_span")
            assert row.two_hop[begin:end] == getattr(row, name) and begin >= len(row.head)
        assert row.e3 not in row.two_hop and row.e2 not in row.two_hop
        assert row.e2 not in row.first and row.e3 not in row.second + row.shortcut_prompt


def test_no_real_prompt_shows_its_answer_in_the_examples():
    """Over many facts: no name or alias of e1, e2 or e3 stands in front of the question."""
    for row in two_hop_prompts(two_hop_facts(), per_pair=200).itertuples():
        names = [row.e1, row.e2, row.e3, *f"{row.e2_aliases}|{row.e3_aliases}".split("|")]
        hops = (text.rpartition(". ")[0] for text in (row.first, row.second))
        front = ".".join([row.head, *hops, ""])
        shown = [n for n in names if n and re.search(rf"\b{re.escape(n)}\b", front)]
        assert not shown, (shown, front)


def test_the_head_of_a_pair_keeps_the_files_order_and_equal_words_are_told_apart():
    kin = two_hop_facts().query("pair == 'person-kin-kin'")
    rows = kin[["e1", "r1", "r2"]].agg("|".join, axis=1).tolist()
    asked = two_hop_prompts(kin, per_pair=20)[["e1", "r1", "r2"]].agg("|".join, axis=1)
    places = [rows.index(row) for row in asked]
    assert len(places) == 20 and places == sorted(places)
    for template, order in (("possessive", 1), ("of", -1)):
        row = two_hop_prompts(FACTS.assign(r1="father", r2="father"), template).iloc[0]
        assert order * (row["r2_span"][0] - row["r1_span"][0]) > 0


def test_bad_requests_for_prompts_are_named():
    for frame, options, message in (
        (FACTS, {"template": "haiku"}, "Unknown template 'haiku'"),
        (FACTS, {"examples": "many"}, "Unknown examples 'many'"),
        (FACTS.head(1), {}, "give more facts"),
    ):
        with pytest.raises(ValueError, match=message):
            two_hop_prompts(frame, **options)


def test_a_name_in_small_letters_is_found_at_the_sentence_s_beginning():
    phone = FACTS.replace({"e1": {"Nice": "iPhone"}})
    row = two_hop_prompts(phone, examples="none").set_index("e1").loc["iPhone"]
    assert row["two_hop"][slice(*row["e1_span"])] == "IPhone"


@pytest.mark.parametrize(
    "r1, r2, said, places",
    [
        (
            "the country that {} lives in",
            "the capital of {}",
            "The capital of the country that Ann lives in is",
            ("lives in", "the capital of"),
        ),
        (
            "the country that {} is a citizen of",
            "the continent that {} lies in",
            "The continent that the country that Ann is a citizen of lies in is",
            ("is a citizen of", "lies in"),
        ),
        ("{}'s father", "{}'s father", "Ann's father's father is", ("'s father", "'s father")),
    ],
)
def test_a_phrase_around_its_slot_has_the_place_behind_it(r1, r2, said, places):
    prompt = TEMPLATES["possessive"].say("Ann", r1, r2)
    spans = two_hop_spans(prompt, "Ann", r1, r2)
    found = [prompt[slice(*spans[name])] for name in ("r1_span", "r2_span")]
    assert prompt == said and [x.lower() for x in found] == list(places)
    assert spans["r1_span"] != spans["r2_span"]


def test_what_is_not_asked_is_counted():
    every = two_hop_facts()
    asked = two_hop_prompts(every)
    out = left_out(asked, every)
    assert sum(out.values()) == len(every) - len(asked) and min(out.values()) > 0
    rare = every.groupby(["pair", "r1", "r2"]).filter(lambda part: len(part) < 2)
    assert out["no two facts to show"] >= len(rare)
