"""Facts, prompts and what each token of a prompt is for.

A single-hop prompt is "X's r is": the entity stands before the relation, as in the paper's examples, so that the
relation and last positions can read the entity but not the other way round. Two worked examples stand in front,
because a small model does not answer the bare form.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

TEMPLATE = "{subject}'s {relation} is"

GROUPS = ("entity", "relation", "last", "context")


def single_hop(
    frame: pd.DataFrame, shots: int = 2, per_relation: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Write the prompts of a frame of facts.

    Args:
        frame: relation, subject, answer (see `facts`), largest first within each relation.
        shots: worked examples in front, the same for all prompts of a relation, with different answers, drawn from
            its 40 largest subjects. Facts with one of their answers are not asked: it would stand in the prompt.
        per_relation: at most this many prompts per relation, the largest subjects first; None keeps all.
        seed: of the draw of the examples.

    Returns the facts with: prompt, entity and relation_span, the last two as (begin, end) characters of the prompt.
    """
    draw, rows = np.random.default_rng(seed), []
    for relation, part in frame.groupby("relation", sort=True):
        shown = (
            part.head(40)
            .iloc[draw.permutation(min(40, len(part)))]
            .drop_duplicates("answer")
            .head(shots)
        )
        if len(shown) < shots:
            raise ValueError(
                f"{relation!r} has only {len(shown)} different answers to show: ask for fewer shots."
            )
        examples = [
            f"{_statement(row.subject, relation)} {row.answer}. " for row in shown.itertuples()
        ]
        asked = part[~part["answer"].isin(shown["answer"])]
        asked = asked.head(per_relation) if per_relation else asked
        for row in asked.to_dict("records"):
            head = "".join(examples)
            prompt = head + _statement(row["subject"], relation)
            spans = {
                "entity": span(prompt, row["subject"], len(head)),
                "relation_span": span(prompt, relation, len(head) + len(row["subject"])),
            }
            rows.append({**row, "prompt": prompt, **spans})
    return pd.DataFrame(rows)


def _statement(subject: str, relation: str) -> str:
    return TEMPLATE.format(subject=subject, relation=relation)


def span(prompt: str, words: str, start: int = 0) -> tuple[int, int]:
    """Where `words` stand in a prompt, from character `start` on; raises ValueError when they do not."""
    begin = prompt.find(words, start)
    if not words or begin < 0:
        raise ValueError(f"{words!r} does not occur in the prompt {prompt!r}.")
    return begin, begin + len(words)


def position_groups(tokenizer, frame: pd.DataFrame) -> list[np.ndarray]:
    """The group of every token of every prompt: "entity", "relation", "last" or "context" (all else).

    Args:
        tokenizer: a fast tokenizer (it must give character offsets).
        frame: prompt, entity, relation_span as made by `single_hop`.
    """
    return label_tokens(
        tokenizer, frame["prompt"], {"entity": frame["entity"], "relation": frame["relation_span"]}
    )


def label_tokens(
    tokenizer, prompts: Sequence[str], spans: dict[str, Sequence[tuple[int, int]]]
) -> list[np.ndarray]:
    """A label for every token of every prompt: the name of the span it lies in, "last", or "context" (all else).

    spans: name -> (begin, end) characters, one per prompt. Raises ValueError when a span holds no token but the last.
    """
    groups = []
    for row, prompt in enumerate(prompts):
        offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        labels = np.array(["context"] * len(offsets), dtype=object)
        for name, places in spans.items():
            begin, end = list(places)[row]
            labels[[a < end and b > begin for a, b in offsets]] = name
        labels[-1] = "last"
        for name in spans:
            if name not in labels:
                raise ValueError(f"No token of {prompt!r} belongs to {name!r} alone.")
        groups.append(labels)
    return groups


def last_token_positions(labels: Sequence[np.ndarray], places: Sequence[str]) -> list[list[int]]:
    """The last token of each place in every prompt: [n][places]; raises ValueError when a prompt has none of one."""
    for row in labels:
        missing = [place for place in places if place not in row]
        if missing:
            raise ValueError(f"A prompt has no token in the group {missing[0]!r}.")
    return [[int(np.flatnonzero(row == place)[-1]) for place in places] for row in labels]


@dataclass(frozen=True)
class Template:
    """How a question is worded: `phrase` names one hop, `sentence` asks for it. Phrases nest.

    Raises ValueError naming the slot that is missing.
    """

    phrase: str
    sentence: str

    def __post_init__(self):
        for text, slots in ((self.phrase, ("entity", "relation")), (self.sentence, ("phrase",))):
            for slot in slots:
                if text.count(f"{{{slot}}}") != 1:
                    raise ValueError(f"The template {text!r} must have the slot {{{slot}}} once.")

    def say(self, entity: str, *relations: str) -> str:
        """The question for relations followed in this order; a relation that holds {} is a phrase of its own."""
        for relation in relations:
            own = "{}" in relation
            entity = (
                relation.format(entity)
                if own
                else self.phrase.format(entity=entity, relation=relation)
            )
        text = self.sentence.format(phrase=entity)
        return text[0].upper() + text[1:]


TEMPLATES = {
    "possessive": Template("{entity}'s {relation}", "{phrase} is"),
    "of": Template("the {relation} of {entity}", "{phrase} is"),
    "question": Template("the {relation} of {entity}", "Question: What is {phrase}? Answer:"),
}


def two_hop_prompts(
    frame: pd.DataFrame,
    template: Template | str = "possessive",
    examples: str = "one-hop",
    per_pair: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Write the four prompts of every two-hop fact.

    Two worked examples stand in front, the same for all facts with the same two relations. The first hop is asked
    after two first hops, the second hop and the shortcut after two second hops. Facts one of
    whose names or aliases stands in the examples are not asked: their answer would stand in the prompt.

    Args:
        frame: see `two_hop_facts`.
        template: a `Template` or the name of one of TEMPLATES.
        examples: what stands before the two-hop question: "one-hop" (one first hop and one second hop), "two-hop" (two
            two-hop questions with their answers) or "none".
        per_pair: at most this many facts of each pair of relations, in the frame's order.
        seed: of the draw of the examples.

    Returns the facts with: first, second, shortcut_prompt, two_hop (the prompts), head (the examples before two_hop)
    and the spans e1_span, r1_span, r2_span in two_hop as (begin, end) characters.

    Raises ValueError for an unknown template or kind of examples, and when an entity is not in its prompt.
    """
    if isinstance(template, str) and template not in TEMPLATES:
        raise ValueError(
            f"Unknown template {template!r}; choose one of {', '.join(TEMPLATES)} or pass a Template."
        )
    if examples not in ("one-hop", "two-hop", "none"):
        raise ValueError(f'Unknown examples {examples!r}; choose "one-hop", "two-hop" or "none".')
    say = (TEMPLATES[template] if isinstance(template, str) else template).say
    draw, rows = np.random.default_rng(seed), []
    for _, part in frame.groupby(["pair", "r1", "r2"], sort=True):
        pool = part.head(40).iloc[draw.permutation(min(40, len(part)))]
        shown = pool.drop_duplicates("e3").drop_duplicates("e2").head(2).to_dict("records")
        if len(shown) < 2:
            continue
        a, b = shown
        firsts, seconds, both = (
            "".join(f"{say(x[start], *(x[r] for r in hops))} {x[end]}. " for x in shown)
            for start, hops, end in (
                ("e1", ["r1"], "e2"),
                ("e2", ["r2"], "e3"),
                ("e1", ["r1", "r2"], "e3"),
            )
        )
        one = f"{say(a['e1'], a['r1'])} {a['e2']}. {say(b['e2'], b['r2'])} {b['e3']}. "
        head = {"one-hop": one, "two-hop": both, "none": ""}[examples]
        for index, row in zip(part.index, part.to_dict("records"), strict=True):
            names = {
                row["e1"],
                row["e2"],
                row["e3"],
                *row["e2_aliases"].split("|"),
                *row["e3_aliases"].split("|"),
            } - {""}
            if any(re.search(rf"\b{re.escape(name)}\b", firsts + seconds + both) for name in names):
                continue
            prompt = head + say(row["e1"], row["r1"], row["r2"])
            try:
                spans = two_hop_spans(prompt, row["e1"], row["r1"], row["r2"], len(head))
            except ValueError as error:
                raise ValueError(f"Fact {index} ({row['pair']}, {row['e1']}): {error}") from error
            rows.append(
                {
                    **row,
                    "order": index,
                    "first": firsts + say(row["e1"], row["r1"]),
                    "second": seconds + say(row["e2"], row["r2"]),
                    "shortcut_prompt": seconds + say(row["e1"], row["r2"]),
                    "two_hop": prompt,
                    "head": head,
                    **spans,
                }
            )
    written = pd.DataFrame(rows)
    if written.empty:
        raise ValueError(
            "No pair of relations has two facts to show and one to ask: give more facts."
        )
    written = written.sort_values("order", kind="stable").drop(columns="order")
    return (written.groupby("pair").head(per_pair) if per_pair else written).reset_index(drop=True)


def two_hop_spans(
    prompt: str, e1: str, r1: str, r2: str, start: int = 0
) -> dict[str, tuple[int, int]]:
    """Where e1 and both relations stand in a two-hop question that begins at character `start` of a prompt.

    Returns e1_span, r1_span, r2_span as (begin, end) characters. Raises ValueError when one is not there.
    """
    entity = span(prompt, e1, start)
    # Outside the entity's own name the relations' words stand in the order of the wording.
    places = {
        f"{name}_span": _relation_span(prompt, r, entity, start, name == "r2")
        for name, r in zip(("r1", "r2"), (r1, r2), strict=True)
    }
    return {"e1_span": entity, **places}


def _relation_span(
    prompt: str, relation: str, entity: tuple[int, int], start: int, outer: bool
) -> tuple[int, int]:
    """Where a relation's words stand: after the entity if the wording puts them there, else before it."""
    words = relation.replace("{}", "").strip()
    places = [
        m.span() for m in re.finditer(re.escape(words), prompt, re.IGNORECASE)
    ]  # it may begin the sentence
    after = [place for place in places if place[0] >= entity[1]]
    before = [place for place in places if start <= place[0] and place[1] <= entity[0]]
    found = after or before
    if not found:
        raise ValueError(f"{words!r} does not occur in the prompt {prompt!r}.")
    farthest = found[-1] if after else found[0]  # the outer relation stands farther from the entity
    nearest = found[0] if after else found[-1]
    return farthest if outer else nearest
