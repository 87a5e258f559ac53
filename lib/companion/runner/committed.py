"""What is committed: notebooks, profiles, figures, what runs took; how a run replaces it."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd
import yaml

from backattn.files import atomic_file
from backattn.runtime import hardware
from companion import paths


def notebooks() -> list[Path]:
    """The numbered notebooks, in order, then the demo."""
    kinds = ("[0-9][0-9]*_*.ipynb", "demo_*.ipynb")
    return [path for kind in kinds for path in sorted(paths.NOTEBOOKS.glob(kind))]


def profiles() -> dict[str, dict[str, dict]]:
    """Profile -> notebook -> the parameters that it changes, from notebooks/profiles.yml."""
    return yaml.safe_load((paths.NOTEBOOKS / "profiles.yml").read_text(encoding="utf-8"))


def manifest() -> dict:
    """data/MANIFEST.json: `runs`, what notebooks took; `results`, checksums of shipped results."""
    path = paths.DATA / "MANIFEST.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def took(profile: str) -> dict[str, dict]:
    """Notebook -> seconds, peak megabytes and hardware of its last committed run."""
    return manifest().get("runs", {}).get(profile, {})


def figure_index() -> str:
    """figures/README.md: its head as it is, then committed notebook -> claims, data, command and
    what it takes -> figure -> first sentence of its "**Finding.**"."""
    index = paths.FIGURES / "README.md"
    head = index.read_text(encoding="utf-8").partition("## [")[0] if index.exists() else ""
    claims = paths.FIGURES / "tables" / "claims.csv"
    lines, ledger = [head.rstrip() + "\n"], pd.read_csv(claims, dtype=str, keep_default_na=False)
    for path in notebooks():
        cells = nbformat.read(path, as_version=4).cells
        reads = re.search(r"^\| reads \| (.+) \|$", cells[0].source, re.MULTILINE)
        claims = [row.id for row in ledger.itertuples() if path.stem in row.notebook.split(", ")]
        named, data = ", ".join(dict.fromkeys(claims)) or "none", reads[1] if reads else "nothing"
        lines.append(f"## [{path.stem}](../notebooks/{path.name})\n")
        found = list(_figures(cells))
        run = _costs(path, [name for name, _ in found])
        lines.append(f"Claims: {named}. Reads: {data}. Run: {run}.\n")
        for name, sentence in found:
            whose = ", ".join(dict.fromkeys(ledger.loc[ledger["figure"] == name, "id"]))
            files = ", ".join(f"[{kind}]({name}.{kind})" for kind in ("png", "pdf", "csv"))
            lines.append(f"- **{name}** ({files}){f', {whose}' if whose else ''}: {sentence}")
        lines.append("")
    return "\n".join(lines)


def _costs(notebook: Path, figures: list[str]) -> str:
    """The command that makes a notebook's figures and tables, and what it takes."""
    number, stem = notebook.stem.split("_")[0], notebook.stem
    only, run = stem if number == "demo" else number, took("paper").get(stem)
    made = {path for name in [*figures, stem] for path in paths.FIGURES.glob(f"{name}.*")}
    made |= {*(paths.FIGURES / "tables").glob(f"{number}_*")}
    space = f"{sum(path.stat().st_size for path in made) / 1e6:.1f} MB of disk"
    costs = "{seconds:.0f} s, {peak_megabytes} MB of memory".format(**run) if run else "not timed"
    return f"`./run_all.sh --only {only}`, {costs}, {space}"


def _figures(cells: list) -> Iterator[tuple[str, str]]:
    """Of the cells of a notebook, each figure's name and the first sentence of its finding."""
    for place, cell in enumerate(cells):
        code = cell.source if cell.cell_type == "code" else ""
        for name in re.findall(r'out\.figure\([^"]*"(\w+)"', code):
            later = (c.source for c in cells[place:] if c.source.startswith("**Finding.**"))
            finding = " ".join(next(later, "–.").removeprefix("**Finding.** ").split())
            yield name, re.match(r"(?:\(.*?\) )?(.+?(?<!et al)[.?!](?= |$)|.+)", finding)[1]


def codecheck() -> str:
    """codecheck.yml: every committed figure and what it shows, for who checks that the code makes
    them (https://codecheck.org.uk)."""
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    manifest = [
        {"file": f"figures/{name}.pdf", "comment": f"{path.stem}: {sentence}"}
        for path in notebooks()
        for name, sentence in _figures(nbformat.read(path, as_version=4).cells)
    ]
    about = {"version": "https://codecheck.org.uk/spec/config/1.0/"}
    about |= {"source": citation["repository-code"]}
    names = [{"name": f"{x['given-names']} {x['family-names']}"} for x in paper["authors"]]
    about["paper"] = {"title": paper["title"], "authors": names}
    about["paper"]["reference"] = f"https://doi.org/{paper['doi']}"
    about["manifest"] = manifest
    return yaml.safe_dump(about, sort_keys=False, allow_unicode=True, width=1000)


def update(path: Path, profile: str, stamp: dict) -> None:
    """Replace what is committed by this run's, and note what it took: the paper profile replaces
    notebook, figures and tables, the full profile results in data/. stamp: of `execute`."""
    folder, noted = paths.run_folder(profile), manifest()
    run = {name: stamp[name] for name in ("seconds", "peak_megabytes")} | {"hardware": hardware()}
    for name in stamp["written"]:
        if profile == "paper" and name.startswith("figures/"):
            _copy(folder / name, paths.FIGURES / name.removeprefix("figures/"))
        elif profile == "full" and name.startswith("data/"):
            goal = paths.DATA / name.removeprefix("data/")
            if goal.suffix == ".jsonl":  # one for each notebook; here they are one
                goal = paths.DATA / goal.name
                join_lines(folder / name, goal)
            else:
                _copy(folder / name, goal)
            result = {"sha256": hashlib.sha256(goal.read_bytes()).hexdigest()}
            result |= {"made by": path.stem, "hardware": hardware()}
            noted.setdefault("results", {})[goal.name] = result
    noted.setdefault("runs", {}).setdefault(profile, {})[path.stem] = run
    _write(paths.DATA / "MANIFEST.json", json.dumps(noted, indent=1, sort_keys=True) + "\n")
    if profile == "paper":
        _copy(folder / "notebooks" / path.name, path)
        _write(paths.FIGURES / "README.md", figure_index())
        _write(paths.FIGURES.parent / "codecheck.yml", codecheck())


def _copy(source: Path, goal: Path) -> None:
    goal.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, goal)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def join_lines(new: Path, goal: Path) -> None:
    """Put keyed JSON lines into another file, in place of the same keys."""
    lines = {}
    for path in (goal, new):
        texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines |= {json.loads(text)["key"]: text for text in texts}
    _write(goal, "".join(f"{lines[key]}\n" for key in sorted(lines)))
