"""Invented facts and their compositions."""

from collections import Counter

import numpy as np
import pandas as pd

INVENTED, RELATIONS, HELD_OUT = 60, 20, {"validation": 70, "test": 200}  # of `compositions`


def compositions(draw_seed: int = 2) -> pd.DataFrame:
    """Invented facts and their compositions, for models that know nothing else (as Wang et al. 2024, smaller).

    Of 60 entities each has 10 of 20 relations to others: 600 facts, "e3 r7" -> " e41", all of which are trained on. One
    in five is "OOD": no two-hop question with it is trained on. `kind` says of which facts a question "e3 r7 r12" is
    made, "ID/ID" (first/second hop), "ID/OOD", "OOD/ID", "OOD/OOD", or "fact". A fifth of ID/ID is held out, only where
    other questions with both facts, in the same places, are trained on. HELD_OUT questions of each kind are for
    validation and test. The split is part of the dataset; a group is a bridge entity, which is what is resampled.

    Raises ValueError for a draw_seed with too few questions of a kind.
    """
    draw, facts = np.random.default_rng(draw_seed), {}
    for entity in range(INVENTED):
        for relation in draw.permutation(RELATIONS)[: RELATIONS // 2]:
            facts[entity, int(relation)] = int(draw.integers(INVENTED))
    apart = {fact: ("ID", "OOD")[int(draw.random() < 0.2)] for fact in facts}
    rows = [(f"e{e} r{r}", f" e{to}", f"e{to}", "fact", "train") for (e, r), to in facts.items()]
    two: dict[str, list[tuple]] = {}
    for (e, r1), bridge in facts.items():
        for r2 in (r2 for r2 in range(RELATIONS) if (bridge, r2) in facts):
            question = (f"e{e} r{r1} r{r2}", f" e{facts[bridge, r2]}", f"e{bridge}")
            two.setdefault(f"{apart[e, r1]}/{apart[bridge, r2]}", []).append(
                (question, (e, r1), (bridge, r2))
            )
    for kind, own in sorted(two.items()):
        own = [own[i] for i in draw.permutation(len(own))]
        if kind == "ID/ID":
            left = Counter((place, both[place]) for _, *both in own for place in (0, 1))
            held_out = []
            for question in own:
                places = [(place, fact) for place, fact in enumerate(question[1:])]
                if len(held_out) < len(own) // 5 and all(left[place] > 1 for place in places):
                    held_out.append(question)
                    left.subtract(places)
            kept = {question for question, *_ in held_out}
            rows += [(*question, kind, "train") for question, *_ in own if question not in kept]
            own = held_out
        if len(own) < sum(HELD_OUT.values()):
            raise ValueError(
                f"draw_seed {draw_seed} has only {len(own)} questions of kind {kind}: choose another."
            )
        for split in HELD_OUT:
            rows += [(*question, kind, split) for question, *_ in own[: HELD_OUT[split]]]
            own = own[HELD_OUT[split] :]
    frame = pd.DataFrame(rows, columns=["prompt", "answer", "group", "kind", "split"])
    return frame.assign(tested=frame["kind"] != "fact", r2=frame["prompt"].str.split().str[-1])
