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


def test_imports_only_go_down():
    """Outside of its functions a module imports only from its own room or from rooms that README names before it."""
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in readme.splitlines() if "`lib/`" in line)
    rooms = [re.findall(r"`(\w+)`", room) for room in line.split("only downward:")[1].split("·")]
    floor = {module: place for place, room in enumerate(rooms) for module in room}
    modules = {path.stem: path for path in (paths.ROOT / "lib/backattn").glob("*.py") if path.stem != "__init__"}
    assert floor.keys() == modules.keys()
    for name, path in modules.items():
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for other in [node.module] if node.module else [alias.name for alias in node.names]:
                    assert floor[other] <= floor[name], f"{name} imports {other}, which lies above it"
