"""What is hard to read in notebooks' cells and pages' paragraphs: listed by --check, no failure.

Tables, code, headings and addresses of links do not count. A finding is its first paragraph.
"""

import re
from collections.abc import Iterator

import nbformat

from companion import paths
from companion.runner import committed

FINDING, CELL, SENTENCE, SHOWN = 60, 120, 25, 20  # words; lines
INTERVAL = r"\[[−+-]?[\d.]+ ?%?, [−+-]?[\d.]+ ?%?\]"
CODE = r"(?s:```.*?```)"
SKIPPED = CODE + r"|<[^>]+>|^[|#].*$|!\[[^\]]*\]|\]\([^)]*\)"
ENDS = r"\n\s*\n|\n\s*(?=[-*] |\d+\. )|(?<=[.!?:])[*_)]*\s+(?=[*_(`]*[A-Z])"


def outliers() -> list[str]:
    """At most SHOWN lines, "file · cell · what", the worst first: by how many times its limit."""
    texts = [(*place, found) for *place, text in _texts() for found in too_much(text)]
    texts.sort(key=lambda row: -row[-1][0])
    return [f"{file} · {cell} · {what}" for file, cell, (_, what) in texts[:SHOWN]]


def too_much(text: str) -> Iterator[tuple[float, str]]:
    """(how many times its limit, what) of each thing that is over it in a cell or paragraph."""
    plain = re.sub(SKIPPED, "", text, flags=re.M)
    sentences = [" ".join(s.split()) for s in re.split(ENDS, plain) if _words(s)]
    words = sum(map(_words, sentences))
    if text.startswith("**Finding.**"):
        finding = _words(plain.strip().split("\n\n")[0]) - 1
        if finding > FINDING:
            yield finding / FINDING, f"finding of {finding} words"
    if words > CELL:
        yield words / CELL, f"{words} words"
    if words > SENTENCE * len(sentences):
        mean = words / len(sentences)
        yield mean / SENTENCE, f"{mean:.0f} words a sentence"
    for sentence in sentences:
        many = len(re.findall(INTERVAL, sentence))
        if many > 1:
            yield float(many), f"{many} intervals in a sentence: {sentence[:40]}…"


def _words(text: str) -> int:
    return len(re.findall(r"\w\S*", text))


def _texts() -> Iterator[tuple[str, str, str]]:
    for path in committed.notebooks():
        cells = nbformat.read(path, as_version=4).cells
        yield from ((path.name, c.id, c.source) for c in cells if c.cell_type == "markdown")
    pages = [*sorted(paths.ROOT.glob("*.md")), *sorted(paths.ROOT.glob("docs/*.md"))]
    for path in [*pages, paths.DATA / "README.md"]:
        title, text = "top", re.sub(CODE, "", path.read_text(encoding="utf-8"))
        for paragraph in re.split(r"\n\s*\n|\n(?=- |\d+\. )", text):
            title = paragraph.strip("# \n") if paragraph.startswith("#") else title
            yield str(path.relative_to(paths.ROOT)), title, paragraph
