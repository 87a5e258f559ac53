"""--fork OWNER/NAME[@TAG]: where the repository lives, changed in every file that says it."""

import re
import tomllib
from functools import partial
from pathlib import Path

from backattn.files import atomic_file
from companion import paths

FILES = ("pyproject.toml", "CITATION.cff", "codemeta.json", "codecheck.yml", "docs/api.md")
FILES += ("notebooks/*.ipynb",)
TAG = r"(?P<tag>[^\s/?\"\\]+)"
TAGGED = ("{slug}/blob/" + TAG + "/", "/gh/{slug}/" + TAG + r"\?", f"--depth=1 -b {TAG} ")
TAGGED += (r"git\+https://github.com/{slug}@" + TAG,)


def fork(home: str, root: Path = paths.ROOT) -> list[Path]:
    """Put another owner, name and tag (or branch; left out: as it is) into badges, set-up cells,
    citation and package; returns the files that changed. home: "owner/name" or "owner/name@tag".

    Raises ValueError for anything else, before any file is written.
    """
    slug, _, tag = home.partition("@")
    words = r"[A-Za-z0-9][\w.-]*"
    if not re.fullmatch(f"{words}/{words}(@{words})?", home):
        raise ValueError(f"--fork {home!r}: give owner/name, or owner/name@tag, as on GitHub.")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    old = project["urls"]["Repository"].removeprefix("https://github.com/")
    # In set-up cells the folder of a clone: `-e NAME || git clone`, "NAME/lib".
    folder = rf'(-e |\\"){re.escape(old.split("/")[1])}( \|\| git clone|/lib\\")'
    written = {}
    for path in (path for name in FILES for path in sorted(root.glob(name))):
        before = path.read_text(encoding="utf-8")
        text = before.replace(old, slug)
        text = re.sub(folder, lambda m: m[1] + slug.split("/")[1] + m[2], text)
        for pattern in TAGGED if tag else ():
            found = pattern.format(slug=re.escape(slug))
            text = re.sub(found, partial(_tagged, tag=tag), text)
        if text != before:
            written[path] = text
    for path, text in written.items():
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(written)


def _tagged(match: re.Match, tag: str) -> str:
    whole, (start, end) = match.string, match.span("tag")
    return whole[match.start() : start] + tag + whole[end : match.end()]
