"""Invented facts and their compositions."""

from collections import Counter, defaultdict

import numpy as np
import pandas as pd

ENTITIES, RELATIONS, HELD_OUT = 60, 20, {"validation": 70, "test": 200}
WORDS = (*(f"e{i}" for i in range(ENTITIES)), *(f"r{i}" for i in range(RELATIONS)))


def invented_facts(
    draw: np.random.Generator, entities: int, relations: int
) -> dict[tuple[int, int], int]:
    """(entity, relation) -> entity: each entity has half of the relations, to any others."""
    return {
        (entity, int(relation)): int(draw.integers(entities))
        for entity in range(entities)
        for relation in draw.permutation(relations)[: relations // 2]
    }


def compositions(draw_seed: int = 2) -> pd.DataFrame:
    """Invented facts and their compositions (as Wang et al. 2024, smaller): prompt, answer, group
    (bridge entity), kind, split, tested, r2.

    Of 60 entities each has 10 of 20 relations to others: 600 facts, "e3 r7" -> " e41", all of which
    are trained on. One in five is "OOD": no two-hop question with it is trained on. `kind` is
    "fact" or, of a question "e3 r7 r12", that of its facts, "ID/OOD" (first/second hop). A fifth of
    ID/ID is held out, only where other questions with both facts, in the same places, are trained
    on; HELD_OUT of each kind. Raises ValueError for a draw_seed with too few questions of a kind.
    """
    draw, by_kind = np.random.default_rng(draw_seed), defaultdict(list)
    facts = invented_facts(draw, ENTITIES, RELATIONS)
    domain = {fact: ("ID", "OOD")[int(draw.random() < 0.2)] for fact in facts}
    rows = [(f"e{e} r{r}", f" e{to}", f"e{to}", "fact", "train") for (e, r), to in facts.items()]
    for (e, r1), bridge in facts.items():
        for r2 in (r2 for r2 in range(RELATIONS) if (bridge, r2) in facts):
            question = (f"e{e} r{r1} r{r2}", f" e{facts[bridge, r2]}", f"e{bridge}")
            kind = f"{domain[e, r1]}/{domain[bridge, r2]}"
            by_kind[kind].append((question, (e, r1), (bridge, r2)))  # and its facts
    for kind, held_out in sorted(by_kind.items()):
        held_out = [held_out[i] for i in draw.permutation(len(held_out))]
        if kind == "ID/ID":
            every, held_out = held_out, []
            left = Counter(place for _, *both in every for place in enumerate(both))
            for question in every:
                places = list(enumerate(question[1:]))
                if len(held_out) < len(every) // 5 and all(left[place] > 1 for place in places):
                    held_out.append(question)
                    left.subtract(places)
                else:
                    rows.append((*question[0], kind, "train"))
        if len(held_out) < sum(HELD_OUT.values()):
            raise ValueError(
                f"draw_seed {draw_seed} has only {len(held_out)} questions of kind {kind}: choose "
                "another."
            )
        splits = np.repeat(list(HELD_OUT), list(HELD_OUT.values()))
        rows += [(*q, kind, str(split)) for (q, *_), split in zip(held_out, splits, strict=False)]
    frame = pd.DataFrame(rows, columns=["prompt", "answer", "group", "kind", "split"])
    return frame.assign(tested=frame["kind"] != "fact", r2=frame["prompt"].str.split().str[-1])
