"""environment.yml is the one list of dependencies, docs/layout.md the one list of files."""

import ast
import json
import re
import sys
import tomllib

import pytest
import yaml

from companion import paths

PACKAGES = {"backattn", "companion"}  # our own
PARTS = {"tokenizers", "huggingface_hub", "IPython"}  # come with transformers and ipykernel
# data/build_legs.py and benchmarks/peers.py say how to get them.
AUTHORS_ONLY = {"reasoning_gym", "transformer_lens"}
IMPORTED_AS = {"pyyaml": "yaml"}
RELEASED = ("pyproject.toml", "CITATION.cff", "codemeta.json", "CHANGELOG.md")


@pytest.fixture(scope="module")
def text():
    return (paths.ROOT / "environment.yml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def listed(text):
    """Names of packages as they are imported, lower case."""
    names = [
        entry.split("==")[0].lower() for entry in yaml.safe_load(text)["dependencies"][2]["pip"]
    ]
    return {IMPORTED_AS.get(name, name) for name in names}


def imported():
    names = set()
    for folder in ("lib", "tests", "benchmarks", "data"):
        for file in (paths.ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names.add(node.module.split(".")[0])
    siblings = [*paths.DATA.glob("*.py"), *(paths.ROOT / "tests").rglob("*.py")]  # of each other
    return names - PACKAGES - {file.stem for file in siblings} - set(sys.stdlib_module_names)


def test_conda_installs_python_and_pip_only_and_every_pin_is_exact(text):
    python, pip, listed = yaml.safe_load(text)["dependencies"]
    assert (python, pip, [*listed]) == ("python=3.11", "pip", ["pip"])
    first, *lines = [line.strip() for line in text.partition("- pip:\n")[2].splitlines()]
    assert first.startswith("- --extra-index-url")
    assert all(re.fullmatch(r"- [\w-]+==[\w.]+ # .+", line) for line in lines)  # where it is used


def test_every_import_and_floor_is_in_the_list(listed):
    assert imported() - PARTS - AUTHORS_ONLY <= listed
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = {re.split(r"[>=<]", name)[0].lower() for name in project["dependencies"]}
    assert {IMPORTED_AS.get(name, name) for name in floors} <= listed
    assert project["requires-python"] == ">=3.11,<3.14"


def test_the_layout_lists_every_file_of_lib_with_five_words():
    page = (paths.ROOT / "docs/layout.md").read_text(encoding="utf-8")
    tree = page.split("```")[1].partition("\nnotebooks/")[0]
    listed, folders = set(), []
    for line in tree.strip().splitlines():
        name, words = line.split(maxsplit=1)
        folders = [*folders[: (len(line) - len(line.lstrip())) // 2], name]
        if name.endswith(".py"):
            listed.add("".join(folders))
            assert len(words.split()) <= 7, line
    files = (paths.ROOT / "lib").rglob("*.py")
    there = {file.relative_to(paths.ROOT).as_posix() for file in files}
    assert listed == {name for name in there if not name.endswith("__init__.py")}


def test_every_file_names_the_same_version_and_day():
    read = {name: (paths.ROOT / name).read_text(encoding="utf-8") for name in RELEASED}
    cited, described = yaml.safe_load(read["CITATION.cff"]), json.loads(read["codemeta.json"])
    last = re.search(r"^## (\S+) \((\S+)\)$", read["CHANGELOG.md"], re.MULTILINE)
    project = tomllib.loads(read["pyproject.toml"])["project"]
    assert {cited["version"], described["version"], project["version"]} == {last[1]}
    assert {str(cited["date-released"]), described["datePublished"]} == {last[2]}
