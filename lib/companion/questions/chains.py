"""Two invented hops, both told in the prompt: a task that needs flow and no knowledge."""

import numpy as np
import pandas as pd
import yaml

from companion.paths import DATA
from companion.questions.prompts import TEMPLATES
from companion.questions.splits import place_of

NAMES: dict[str, list[str]] = {
    kind: names.split()
    for kind, names in yaml.safe_load((DATA / "names.yml").read_text(encoding="utf-8")).items()
}
COUNTS = {"train": 12_000, "validation": 400, "test": 600}


def chains() -> pd.DataFrame:
    """Two people, their countries and the countries' capitals, in random order; one is asked for.

    "Peru's capital is Oslo. Ann's country is Peru. Tom's country is Chad. Chad's capital is Rome.
    Ann's country's capital is". Chance is one half. Who names only a city that was told of, or the
    one told last, is right in half of the cases. A quarter of the countries is for the test, and
    half of the cities are never told of in training: `kind` says whether a question's two cities
    were ("seen" or "unseen"). The split is part of the dataset; a group is the two countries.
    """
    draw, say = np.random.default_rng(0), TEMPLATES["possessive"].say
    places = {name: place_of(name) for name in NAMES["countries"] + NAMES["cities"]}
    ends = {"train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}
    countries = {
        split: [c for c in NAMES["countries"] if low <= places[c] < high]
        for split, (low, high) in ends.items()
    }
    cities = {
        "seen": [c for c in NAMES["cities"] if places[c] < 0.5],
        "unseen": [c for c in NAMES["cities"] if places[c] >= 0.5],
    }
    rows = []
    for split, count in COUNTS.items():
        for index in range(count):
            kind = "unseen" if split != "train" and index % 2 else "seen"
            who, e2, e3 = (
                draw.choice(names, 2, replace=False)
                for names in (NAMES["people"], countries[split], cities[kind])
            )
            told = [f"{say(a, 'country')} {b}." for a, b in zip(who, e2, strict=True)]
            told += [f"{say(b, 'capital')} {c}." for b, c in zip(e2, e3, strict=True)]
            prompt = " ".join([*draw.permutation(told), say(who[0], "country", "capital")])
            names = {"e1": who[0], "r1": "country", "e2": e2[0], "r2": "capital", "e3": e3[0]}
            about = {"prompt": prompt, "answer": f" {e3[0]}", "group": "|".join(e2), "kind": kind}
            rows.append({**names, "other": e3[1], **about, "split": split})
    return pd.DataFrame(rows).assign(e2_aliases="", e3_aliases="", shortcut="", tested=True)
