"""The house: imports run one way, a study imports no other study, and backattn knows nothing of
this paper."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import backattn

LIB = Path(__file__).resolve().parents[1] / "lib"
# Each room may import what is written at or before its own place; top-level files of a package lie
# below its rooms.
FLOORS = [
    {"backattn"},
    {"backattn.models"},
    {"backattn.analysis", "backattn.adapters"},
    {"backattn.training"},
    {"companion"},
    {"companion.questions", "companion.report"},
    {"companion.runs"},
    {"companion.measures"},
    {"companion.studies"},
    {"companion.runner"},
]
FLOOR = {room: place for place, rooms in enumerate(FLOORS) for room in rooms}
FACADES = {"backattn/__init__.py", "companion/notebook.py"}  # what is called from outside


def room_of(module: str) -> str:
    return (
        ".".join(module.split(".")[:2])
        if ".".join(module.split(".")[:2]) in FLOOR
        else module.split(".")[0]
    )


def study_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[:2] == ["companion", "studies"] and len(parts) > 2 else None


def imports_of(path: Path) -> list[str]:
    found = []
    package = list(path.relative_to(LIB).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{stem}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] in ("backattn", "companion")]


def wrong_imports(path: Path) -> list[str]:
    """Sentences on the imports of one file that go up, or sideways between studies."""
    module = ".".join(path.relative_to(LIB).with_suffix("").parts)
    own, problems = room_of(module), []
    for name in imports_of(path):
        other = room_of(name)
        if FLOOR[other] > FLOOR[own] or (FLOOR[other] == FLOOR[own] and other != own):
            problems.append(f"{module} imports {name}, which lies above or beside it")
        if study_of(name) and study_of(module) and study_of(name) != study_of(module):
            problems.append(f"{module} imports {name}, another study")
    return problems


@pytest.mark.parametrize(
    "path", sorted(LIB.rglob("*.py")), ids=lambda path: str(path.relative_to(LIB))
)
def test_imports_only_go_down(path):
    if str(path.relative_to(LIB)) not in FACADES:
        assert wrong_imports(path) == []


def test_a_wrong_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LIB", tmp_path)
    for name, line in (
        ("backattn/models/bad.py", "from companion.runs import store"),
        ("companion/studies/one/bad.py", "from companion.studies.another import table"),
        ("companion/questions/bad.py", "import companion.runs.store"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(line)
        assert wrong_imports(tmp_path / name)


def test_the_companion_without_its_repository_says_what_it_needs(tmp_path):
    """A pip install has its code and not its data."""
    shutil.copytree(LIB / "companion", tmp_path / "site" / "companion")
    command = [sys.executable, "-c", "import companion"]
    done = subprocess.run(command, cwd=tmp_path / "site", capture_output=True, text=True)
    assert done.returncode and "clone the repository" in done.stderr


def test_the_runner_starts_without_torch():
    """Which takes seconds to import, and every notebook's kernel imports it anyway."""
    code = "import sys, companion.runner.cli; print(*{'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


def test_what_the_package_offers_is_found_when_asked_for():
    for name in backattn.__all__:
        assert getattr(backattn, name).__name__ == name
    assert set(backattn.__all__) == set(backattn._HOMES) and set(backattn.__all__) <= {
        *dir(backattn)
    }
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        backattn.nothing  # noqa: B018
