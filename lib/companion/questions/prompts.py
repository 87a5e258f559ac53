"""Facts, prompts and what each token of a prompt is for. In "X's r is", as in the paper, relation
and last can read the entity, and not the other way round. Two worked examples stand in front: a
small model does not answer the bare form."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from backattn.models.tokens import encode

GROUPS = ("entity", "relation", "last", "context")
SHOWN_FROM = 40  # facts, the largest, from which worked examples are drawn
EXAMPLES = ("one-hop", "two-hop", "none")


def single_hop(
    frame: pd.DataFrame, shots: int = 2, per_relation: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """The prompts of `facts` (relation, subject, answer, largest first within each relation), with
    prompt, entity and relation_span, the last two as (begin, end) characters. shots: worked
    examples in front, the same for all of a relation, with different answers, drawn by `seed` from
    its SHOWN_FROM largest; facts with one of their answers are not asked."""
    check_text(frame, ["relation", "subject", "answer"])
    draw, rows = np.random.default_rng(seed), []
    for relation, part in frame.groupby("relation", sort=True):
        shown = _pool(part, draw).drop_duplicates("answer").head(shots)
        if len(shown) < shots:
            raise ValueError(
                f"{relation!r} has only {len(shown)} different answers to show: ask for fewer "
                "shots."
            )
        head = "".join(f"{r.subject}'s {relation} is {r.answer}. " for r in shown.itertuples())
        asked = part[~part["answer"].isin(shown["answer"])]
        for row in asked.head(per_relation or len(asked)).to_dict("records"):
            prompt = f"{head}{row['subject']}'s {relation} is"
            entity = span(prompt, row["subject"], len(head))
            relation_span = span(prompt, relation, entity[1])
            rows.append({**row, "prompt": prompt, "entity": entity, "relation_span": relation_span})
    return pd.DataFrame(rows)


def check_text(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raises ValueError naming a cell that is no text, or empty: numbers may have lost zeros, and
    what pandas takes for a missing value would be asked as "nan"."""
    for name in columns:
        for row, cell in frame[name].items():
            if not isinstance(cell, str) or not cell.strip():
                raise ValueError(
                    f"{name!r} of fact {row} is {cell!r}, no text: read a CSV with `read_table` "
                    "or pd.read_csv(…, dtype=str, keep_default_na=False)."
                )


def _pool(part: pd.DataFrame, draw: np.random.Generator) -> pd.DataFrame:
    """The largest facts of some that are alike, in a random order."""
    return part.head(SHOWN_FROM).iloc[draw.permutation(min(SHOWN_FROM, len(part)))]


def span(prompt: str, words: str, start: int = 0) -> tuple[int, int]:
    """Where `words` stand in a prompt, from character `start` on, or ValueError."""
    begin = prompt.find(words, start)
    if not words or begin < 0:
        raise ValueError(f"{words!r} does not occur in the prompt {prompt!r}.")
    return begin, begin + len(words)


def position_groups(tokenizer, frame: pd.DataFrame) -> list[np.ndarray]:
    """The group (one of GROUPS) of every token of every prompt of `single_hop`."""
    spans = {"entity": frame["entity"], "relation": frame["relation_span"]}
    return label_tokens(tokenizer, frame["prompt"], spans)


def label_tokens(
    tokenizer, prompts: Sequence[str], spans: dict[str, Sequence[tuple[int, int]]]
) -> list[np.ndarray]:
    """A label for every token of every prompt: the name of the span it lies in, "last", or
    "context". tokenizer: a fast one; spans: name -> (begin, end) characters, one per prompt. Raises
    ValueError when a span holds no token but the last."""
    groups = []
    for prompt, *places in zip(prompts, *spans.values(), strict=True):
        count, plain = len(encode(tokenizer, [prompt]).rows[0]), {"add_special_tokens": False}
        plain |= {"padding": False, "truncation": False, "return_offsets_mapping": True}
        offsets = tokenizer(prompt, **plain)["offset_mapping"]
        offsets = [(0, 0)] * (count - len(offsets)) + offsets[-count:]  # what stands before it
        labels = np.array(["context"] * len(offsets), dtype=object)
        for name, (begin, end) in zip(spans, places, strict=True):
            labels[[a < end and b > begin for a, b in offsets]] = name
        labels[-1] = "last"
        for name in spans:
            if name not in labels:
                raise ValueError(f"No token of {prompt!r} belongs to {name!r} alone.")
        groups.append(labels)
    return groups


def last_token_positions(labels: Sequence[np.ndarray], places: Sequence[str]) -> list[list[int]]:
    """The last token of each place in every prompt, [n][places]; ValueError where there is none."""
    for place in places:
        if not all(place in row for row in labels):
            raise ValueError(f"A prompt has no token in the group {place!r}.")
    return [[int(np.flatnonzero(row == place)[-1]) for place in places] for row in labels]


@dataclass(frozen=True)
class Template:
    """How a question is worded: `phrase` names one hop, `sentence` asks for it. Phrases nest."""

    phrase: str
    sentence: str

    def say(self, entity: str, *relations: str) -> str:
        """The question for relations, the first one first; one that holds {} is a phrase itself."""
        for relation in relations:
            phrase = relation if "{}" in relation else self.phrase
            entity = phrase.format(entity, entity=entity, relation=relation)
        text = self.sentence.format(phrase=entity)
        return text[0].upper() + text[1:]


TEMPLATES = {
    "possessive": Template("{entity}'s {relation}", "{phrase} is"),
    "of": Template("the {relation} of {entity}", "{phrase} is"),
    "question": Template("the {relation} of {entity}", "Question: What is {phrase}? Answer:"),
}


def two_hop_prompts(
    frame: pd.DataFrame,
    template: str = "possessive",
    examples: str = "one-hop",
    per_pair: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The four prompts of every one of some `two_hop_facts`, worded as TEMPLATES[template]: the
    facts with first, second, shortcut_prompt, two_hop, head (the examples before two_hop), and
    `two_hop_spans`.

    Two worked examples, drawn by `seed`, stand in front, the same for all facts with the same two
    relations: two first hops before the first hop; two second hops before the second hop and the
    shortcut; before the two-hop question one of each ("one-hop"), two such questions ("two-hop") or
    "none". Facts one of whose names or aliases stands in them are not asked, nor those whose pair
    of relations has no two to show (`left_out` counts both). per_pair: at most.
    """
    for what, name, names in (("template", template, TEMPLATES), ("examples", examples, EXAMPLES)):
        if name not in names:
            raise ValueError(f"Unknown {what} {name!r}; choose one of {', '.join(names)}.")
    check_text(frame, ["pair", "e1", "r1", "e2", "r2", "e3"])
    say, draw, rows = TEMPLATES[template].say, np.random.default_rng(seed), {}
    for _, part in frame.groupby(["pair", "r1", "r2"], sort=True):
        shown = _pool(part, draw).drop_duplicates("e3").drop_duplicates("e2").head(2)
        if len(shown) < 2:
            continue
        one, other = shown.to_dict("records")
        firsts, seconds, both = (
            [f"{say(fact[start], *map(fact.get, hops))} {fact[end]}. " for fact in (one, other)]
            for start, hops, end in (
                ("e1", ["r1"], "e2"),
                ("e2", ["r2"], "e3"),
                ("e1", ["r1", "r2"], "e3"),
            )
        )
        first, second = "".join(firsts), "".join(seconds)
        heads = {"one-hop": firsts[0] + seconds[1], "two-hop": "".join(both), "none": ""}
        for index, row in zip(part.index, part.to_dict("records"), strict=True):
            e1, e2, r1, r2 = (row[name] for name in ("e1", "e2", "r1", "r2"))
            names = f"{row['e1']}|{e2}|{row['e2_aliases']}|{row['e3']}|{row['e3_aliases']}".split(
                "|"
            )
            pattern = "|".join(re.escape(name) for name in names if name)
            if re.search(rf"\b(?:{pattern})\b", first + second + heads["two-hop"]):
                continue
            head = heads[examples]
            prompts = {"first": first + say(e1, r1), "second": second + say(e2, r2)}
            prompts |= {"shortcut_prompt": second + say(e1, r2)}
            prompts |= {"two_hop": head + say(e1, r1, r2), "head": head}
            try:
                spans = two_hop_spans(prompts["two_hop"], e1, r1, r2, len(head))
            except ValueError as error:
                raise ValueError(f"Fact {index} ({row['pair']}, {e1}): {error}") from error
            rows[index] = {**row, **prompts, **spans}
    if not rows:
        raise ValueError(
            "No pair of relations has two facts to show and one to ask: give more facts."
        )
    written = pd.DataFrame([rows[index] for index in sorted(rows)])
    return (written.groupby("pair").head(per_pair) if per_pair else written).reset_index(drop=True)


def left_out(asked: pd.DataFrame, frame: pd.DataFrame) -> dict[str, int]:
    """Why facts of `frame` are not among those that `two_hop_prompts` made of it (without
    `per_pair`), with counts."""
    kinds = ["pair", "r1", "r2"]
    given = frame.groupby(kinds).size()
    shown = given.index.isin(pd.MultiIndex.from_frame(asked[kinds]))
    few = int(given[~shown].sum())
    return {"no two facts to show": few, "named in an example": len(frame) - len(asked) - few}


def two_hop_spans(
    prompt: str, e1: str, r1: str, r2: str, start: int = 0
) -> dict[str, tuple[int, int]]:
    """e1_span, r1_span, r2_span: (begin, end) in a two-hop question, from character `start` on, or
    ValueError. A relation stands after e1 if the wording puts it there, else before it; r1 is the
    nearer one. Of a phrase around its slot ("the country that {} lives in") it is what stands
    behind the slot, where e1 can be read."""
    named = e1 if e1 in prompt[start:] else e1[:1].upper() + e1[1:]  # it may begin the sentence
    entity = span(prompt, named, start)
    spans = {"e1_span": entity}
    for name, relation, nearness in (("r1_span", r1, 0), ("r2_span", r2, -1)):
        head, _, tail = (words.strip() for words in relation.partition("{}"))
        words = tail or head
        # Case does not count: the words may begin the sentence.
        places = [m.span() for m in re.finditer(re.escape(words), prompt, re.IGNORECASE)]
        after = [place for place in places if place[0] >= entity[1]]
        before = [place for place in places if start <= place[0] and place[1] <= entity[0]]
        nearest_first = after or (before[::-1] if not tail else [])
        if not words or not nearest_first:
            raise ValueError(f"{words!r} does not occur in the prompt {prompt!r}.")
        spans[name] = nearest_first[nearness]
    return spans
