"""Which questions a model answers right."""

import re
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from backattn import load_model
from backattn.adapters.arms import make_arm
from backattn.training.batches import Items, collate, first_tokens, numbers
from backattn.training.evaluation import (
    AS_IT_IS,
    NUMBER,
    FirstPasses,
    align_to_length,
    answer_logits,
    by_length,
    evaluate,
    perplexity,
    right_answers,
    written,
)
from backattn.training.loop import Recipe, train


def test_right_means_what_greedy_generation_writes(tiny, sums):
    """`right_answers` against actual generation, with the model's own words as answers."""
    model, tok = tiny
    items = replace(numbers(tok, sums), number_continuations=frozenset())
    for row, prompt in enumerate(items.prompts):
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=3, eos_token_id=-1, do_sample=False
        )[0]
        items.answers[row] = made[len(prompt) :].tolist()
    assert evaluate(model, items)[0].all()
    items.answers[1][0] = (items.answers[1][0] + 1) % 100
    assert evaluate(model, items)[0].tolist() == [True, False, True]


def test_an_answer_that_goes_on_as_another_number_is_wrong(llama, sums):
    items = numbers(llama[1], sums)
    assert items.number_continuations and all(
        llama[1].decode([i]).strip()[:1].isdigit() for i in items.number_continuations
    )
    batch = collate(items, [0])
    logits = torch.zeros(1, batch.labels.shape[1], len(llama[1]))
    for place, token in enumerate(items.answers[0]):
        logits[0, place, token] = 1
    assert right_answers(logits, items, [0], batch).item()
    logits[0, -1, next(iter(items.number_continuations))] = 2
    assert not right_answers(logits, items, [0], batch).item()
    logits[0, -1, next(iter(items.number_continuations))] = 0
    logits[0, -1, llama[1](" red")["input_ids"][0]] = 2  # any other end is fine
    assert right_answers(logits, items, [0], batch).item()


def test_first_tokens_accept_aliases(llama, sums):
    accepted = [frozenset([5, 6]), frozenset([7]), frozenset([8])]
    items = first_tokens(llama[1], sums, accepted)
    batch = collate(items, [0, 1, 2])
    logits = torch.zeros(3, 1, 20)
    for row, said in enumerate([6, 5, 8]):
        logits[row, 0, said] = 1
    assert right_answers(logits, items, [0, 1, 2], batch).tolist() == [True, False, True]


def test_numbers_are_read_from_what_is_written(llama, sums, monkeypatch):
    items, texts = numbers(llama[1], sums), [" 3 pens", "\n6. And", " 12,5"]
    monkeypatch.setattr(type(llama[1]), "batch_decode", lambda self, rows: texts)
    (order,) = by_length(items, 3)
    expected = [
        bool(re.match(rf"\s*{items.texts[row].strip()}(?![\d,])", text))
        for row, text in sorted(zip(order, texts, strict=True))
    ]
    assert written(llama[0], llama[1], items).tolist() == expected


@pytest.mark.parametrize(
    "text, number",
    [
        *((" 75.", "75"), ("-12", "-12"), ("\n 4 pens", "4"), (" 75.89", "75"), ("1234", "1234")),
        *(("x 3", None), ("7,5", None)),
    ],
)
def test_numbers_in_a_text(text, number):
    found = NUMBER.match(text)
    assert (found and found[1]) == number


def test_perplexity_is_that_of_the_words(llama):
    model, tok = load_model("tiny-llama")
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    assert perplexity(model, tok, "one two three four " * 20, window=8) == pytest.approx(len(tok))


def test_what_first_passes_take_is_known_before(items):
    wrapped = make_arm("back attention", load_model("tiny-llama")[0], 1, 4)
    passes = FirstPasses(wrapped, items, group=5)
    passes([0, 7], collate(items, [0, 7]))
    assert 0 < len(passes.kept) <= 10
    for row in range(len(items)):
        passes([row], collate(items, [row]))
    size = sum(states.numel() * 4 for states in passes.kept.values())
    assert FirstPasses.gigabytes(wrapped, items) == pytest.approx(size / 2**30)


def test_every_window_begins_as_a_prompt_does():
    """As Gemma needs its <bos> before every text."""
    (model, tok), seen, text = load_model("tiny-llama"), [], "one two three four " * 20

    def see(_, __, inputs):
        seen.append(inputs["input_ids"])

    model.register_forward_pre_hook(see, with_kwargs=True)
    plain, words = perplexity(model, tok, text, window=8), torch.cat(seen)
    seen.clear()
    tok.bos_token, begin = "<s>", ("<s>", tok.convert_tokens_to_ids("<s>"))
    tok.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[begin])
    assert perplexity(model, tok, text, window=8) != plain
    begins = torch.full((len(words), 1), begin[1])
    assert torch.equal(torch.cat(seen), torch.cat([begins, words], dim=1))


@pytest.fixture
def adapted():
    wrapped = make_arm("back attention", load_model("tiny-llama")[0], 1, 8)
    torch.nn.init.normal_(wrapped.updates["1"].o_proj.weight)
    return wrapped


@pytest.mark.parametrize("keep", [0.0, None])  # first passes computed each time, or kept
def test_questions_read_the_memory_of_the_texts_that_are_named(adapted, items, keep):
    rows, firsts = [0, 1, 2], [answer[:1] for answer in items.answers]
    items = replace(items, answers=firsts, accepted=list(map(frozenset, firsts)))
    batch, own = collate(items, rows), replace(items, memories=items.prompts)
    with torch.no_grad():
        plain = answer_logits(adapted, batch)
        told = replace(items, memories=[[9, 8, 7], *items.prompts[:-1]])
        made = answer_logits(adapted, collate(told, rows))
        alone, places = torch.tensor([told.memories[0]]), torch.arange(3)[None]
        states = adapted.first_pass_states(alone, torch.ones_like(alone), places)[:, 0]
        one = collate(items, [0])
        with adapted.edited(memory=align_to_length(states, one.input_ids.shape[1])[:, None]):
            assert torch.allclose(answer_logits(adapted, one)[0], made[0], atol=1e-5)
        assert torch.allclose(answer_logits(adapted, collate(own, rows)), plain, atol=1e-5)
    assert not torch.allclose(made[0], plain[0], atol=1e-3)
    before = evaluate(adapted, told)[1]
    train(adapted, told, Recipe(20, 0.02, batch_size=2), keep_first_passes=keep)
    assert evaluate(adapted, told)[1] < before - 0.1


def test_memories_are_refused_where_none_is_read(llama, items):
    told = replace(items, memories=items.prompts)
    with pytest.raises(ValueError, match="reads none"):
        evaluate(make_arm("bias", load_model("tiny-llama")[0], 1, 8), told)
    wrapped = make_arm("back attention", load_model("tiny-llama")[0], 1, 8)
    states = torch.zeros(4, 3, 9, 32)
    with pytest.raises(ValueError, match="exchange those"), wrapped.edited(memory=states):
        evaluate(wrapped, told)
    with pytest.raises(ValueError, match="reads its own"):
        written(*llama, told)


def test_what_a_generation_config_asks_for_changes_no_answer(llama, sums):
    model, tok = llama
    items = numbers(tok, sums)
    before = model.generation_config.repetition_penalty
    ids = torch.tensor([items.prompts[0]])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, **AS_IT_IS)
    model.generation_config.repetition_penalty = 0.001  # words of the prompt, by all means
    try:
        again = model.generate(ids, max_new_tokens=12, do_sample=False, **AS_IT_IS)
        otherwise = model.generate(ids, max_new_tokens=12, do_sample=False)
    finally:
        model.generation_config.repetition_penalty = before
    assert torch.equal(plain, again) and not torch.equal(plain, otherwise)


def test_questions_that_are_too_long_are_refused():
    model, _ = load_model("tiny-llama")
    items = Items([[5] * 300], [[8]], ["a"], None, frozenset())
    with pytest.raises(ValueError, match="300 tokens; this model takes at most 256"):
        evaluate(model, items)
