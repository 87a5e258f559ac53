"""An invented world in which the paper's premise can be set: e2 known at r1, e3 recallable low."""

import numpy as np
import pandas as pd

from companion.questions.compositions import invented_facts
from companion.questions.splits import SPLITS, place_of

ENTITIES, RELATIONS, TESTED = 200, 20, 1000
WORDS = (*(f"e{i}" for i in range(ENTITIES)), *(f"r{i}" for i in range(RELATIONS)))
ROLES = {"base": 60, "adapters": 140}  # bridge entities


def world() -> pd.DataFrame:
    """All facts and all their compositions: prompt, answer, group (bridge entity, of a fact its
    end), kind ("fact" or "two-hop"), role (of the bridge), shown (half of the two-hop questions).

    Each of 200 entities has ten of twenty relations to others: 2,000 facts, "e3 r7" -> " e41". The
    states at r7 are the same in "e3 r7" and in "e3 r7 r12", so what a model knows of the bridge it
    has there in both. `shown` questions may be in a frozen model's training; the others are for
    adapters.
    """
    draw = np.random.default_rng(6)
    facts = invented_facts(draw, ENTITIES, RELATIONS)
    of = np.repeat([*ROLES], [*ROLES.values()])
    roles = dict(zip(draw.permutation(ENTITIES), of, strict=True))
    rows = [(f"e{e} r{r}", to, to, "fact") for (e, r), to in facts.items()]
    rows += [
        (f"e{e} r{r1} r{r2}", facts[bridge, r2], bridge, "two-hop")
        for (e, r1), bridge in facts.items()
        for r2 in range(RELATIONS)
        if (bridge, r2) in facts
    ]
    frame = pd.DataFrame(rows, columns=["prompt", "answer", "group", "kind"])
    frame["role"], frame["shown"] = frame["group"].map(roles), draw.random(len(frame)) < 0.5
    answer, group = (frame[name].astype(str).radd("e") for name in ("answer", "group"))
    return frame.assign(answer=" " + answer, group=group)


def premise() -> pd.DataFrame:
    """The questions of adapters on the frozen models: two-hop ones that are not `shown`, of bridges
    for adapters; the columns of `world`, split, tested, r2.

    Three tenths of the second facts ("e41 r12") are for the test (1,000 questions), one for
    validation: the bridge was seen in training, what is asked of it was in no two-hop question.
    """
    frame = world().query("kind == 'two-hop' and not shown and role == 'adapters'")
    frame = frame.assign(tested=True, r2=frame["prompt"].str.split().str[-1])
    places = (frame["group"] + " " + frame["r2"]).map(place_of)
    frame["split"] = np.array(SPLITS)[np.searchsorted([0.6, 0.7], places, side="right")]
    extra = frame[frame["split"] == "test"].sample(frac=1, random_state=0).index[TESTED:]
    return frame.drop(index=extra).reset_index(drop=True)
