"""environment.yml is the one list: pinned, commented, complete."""

import ast
import re
import sys
import tomllib

from companion import paths

PACKAGES = {"backattn", "conftest"}  # our own
PARTS = {"tokenizers", "huggingface_hub", "IPython"}  # come with transformers and ipykernel
AUTHORS_ONLY = {"reasoning_gym"}  # data/build_legs.py says how to get it


def pip_lines():
    text = (paths.ROOT / "environment.yml").read_text(encoding="utf-8")
    return [line.strip() for line in text.partition("- pip:\n")[2].splitlines()]


def imported():
    names = set()
    for folder in ("lib", "tests", "benchmarks", "data"):
        for file in (paths.ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names.add(node.module.split(".")[0])
    own = {file.stem for file in paths.DATA.glob("*.py")}  # scripts that import each other
    return names - PACKAGES - own - set(sys.stdlib_module_names)


def test_conda_installs_python_and_pip_only():
    text = (paths.ROOT / "environment.yml").read_text(encoding="utf-8")
    conda = re.findall(r"^  - (\S+)$", text, re.MULTILINE)
    assert conda == ["python=3.11", "pip", "pip:"]


def test_every_pin_is_exact_and_says_where_it_is_used():
    lines = pip_lines()
    assert lines[0].startswith("- --extra-index-url")
    for line in lines[1:]:
        assert re.fullmatch(r"- [\w-]+==[\w.]+ # .+", line), line


def test_every_import_is_in_the_list():
    listed = {re.split("==", line[2:])[0].lower() for line in pip_lines()[1:]}
    assert imported() - PARTS - AUTHORS_ONLY <= listed


def test_the_librarys_floors_name_only_listed_packages():
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = {re.split("==", line[2:])[0].lower() for line in pip_lines()[1:]}
    assert {re.split(r"[>=<]", name)[0].lower() for name in project["dependencies"]} <= listed
    assert project["requires-python"] == ">=3.11,<3.14"
