"""Guards over the committed notebooks: valid, executed, clean, and with the parts each must have."""

import json
import re
import tomllib

import nbformat
import pytest

from companion import paths
from companion.runner.check import notebooks
from companion.runner.cli import PROFILES, figure_index

NOTEBOOKS = notebooks()
TAGS = {"setup", "parameters", "nbval-check-output", "nbval-skip"}
LEAST_IMAGES = {
    "00_start_here": 2,
    "01_stage_discovery": 5,
    "02_failure_analysis": 7,
    "03_back_attention_training": 4,
    "04_layer_ablation": 5,
    "05_what_it_reads": 7,
    "06_capacity": 3,
    "07_controls": 4,
    "08_beyond_facts_and_cost": 3,
    "09_claims": 1,
    "demo_logit_flow": 1,
}
MEGABYTES = 1.5


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_tag(cell, tag):
    return tag in cell.metadata.get("tags", [])


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == list(LEAST_IMAGES)


def test_it_is_valid_and_small(path, notebook):
    nbformat.validate(notebook)
    assert path.stat().st_size < MEGABYTES * 2**20
    assert notebook.metadata.kernelspec.name == "python3"


def test_it_was_run_in_order_without_errors(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(
        range(1, len(code(notebook)) + 1)
    )
    kinds = {output.output_type for cell in code(notebook) for output in cell.outputs}
    assert "error" not in kinds
    assert not any(o.get("name") == "stderr" for cell in code(notebook) for o in cell.outputs)


def test_it_has_its_parts_in_order(path, notebook):
    cells = notebook.cells
    assert cells[0].cell_type == "markdown"
    for needed in (
        "| reads |",
        "| writes |",
        "| takes |",
        "colab.research.google.com",
        "mybinder.org",
    ):
        assert needed in cells[0].source
    assert has_tag(cells[1], "setup") and has_tag(cells[2], "parameters")
    assert "claims" in code(notebook)[-1].source or "print" in code(notebook)[-1].source
    titles = [
        line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines()
    ]
    assert any(re.match(r"#+ Verdict", line) for line in titles)


def test_tags_are_known_and_checked_cells_have_output(notebook):
    checked = 0
    for cell in notebook.cells:
        assert set(cell.metadata.get("tags", [])) <= TAGS
        if has_tag(cell, "nbval-check-output"):
            checked += 1
            assert cell.outputs, cell.source
    assert checked >= 3
    assert "NBVAL" not in json.dumps(
        [cell.source for cell in notebook.cells]
    )  # tags only, one way of marking


def test_metadata_is_clean(notebook):
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


def test_no_path_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\|0x[0-9a-f]{8}", text)


def test_it_shows_its_figures_each_with_a_finding(path, notebook):
    images = [
        i
        for i, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and any("image/png" in o.get("data", {}) for o in cell.outputs)
    ]
    assert len(images) >= LEAST_IMAGES[path.stem]
    for index in images:
        after = [
            cell.source
            for cell in notebook.cells[index + 1 : index + 3]
            if cell.cell_type == "markdown"
        ]
        assert any(text.startswith("**Finding.**") for text in after), notebook.cells[index].source


def test_every_saved_figure_and_table_is_committed(notebook):
    source = "\n".join(cell.source for cell in code(notebook))
    figures = re.findall(r'run\.figure\(.*?, "((?:\d\d|demo)_\w+)"', source)
    tables = re.findall(r'run\.table\(.*?, "((?:\d\d|demo)_\w+)"', source)
    assert figures
    for name in figures:
        assert all(
            (paths.FIGURES / f"{name}.{suffix}").exists() for suffix in ("pdf", "png", "csv")
        )
    for name in tables:
        assert all(
            (paths.FIGURES / "tables" / f"{name}.{suffix}").exists()
            for suffix in ("csv", "md", "tex")
        )


def test_the_index_of_figures_is_whole():
    told = (paths.FIGURES / "README.md").read_text(encoding="utf-8")
    assert told == figure_index()
    listed = re.findall(r"^- \*\*(\w+)\*\*", told, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in paths.FIGURES.glob("*.png"))


def test_no_algorithm_and_no_test_branch_in_a_notebook(notebook):
    for cell in code(notebook)[1:]:
        assert not re.search(r"^\s*(def|class|while|try|if) ", cell.source, re.MULTILINE), (
            cell.source
        )
        assert len(cell.source.splitlines()) <= 20, cell.source


def test_parameters_are_plain_literals_and_profiles_use_them(path, notebook):
    import ast

    names = set()
    for node in ast.parse(code(notebook)[1].source).body:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)
        names |= {
            n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)
        }
    for profile, sizes in PROFILES.items():
        assert set(sizes.get(path.stem, {})) <= names, profile
    assert {"model_name", "device"} <= names


def test_set_up_cells_are_the_same_and_install_nothing_heavy():
    sources = set()
    for path in NOTEBOOKS:
        source = code(nbformat.read(path, as_version=4))[0].source
        assert f'notebook.setup("{path.stem}")' in source
        assert "pip" not in source
        sources.add(source.replace(path.stem, "NAME"))
    assert len(sources) == 1


def test_badges_and_clone_address_agree_with_pyproject():
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    slug = address.removeprefix("https://github.com/")
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        assert f"github/{slug}/blob/main/notebooks/{path.name}" in notebook.cells[0].source
        assert f"gh/{slug}/main?labpath=notebooks%2F{path.name}" in notebook.cells[0].source
        assert f'"{address}"' in code(notebook)[0].source


def test_the_set_up_cell_is_safe_to_run_twice_in_a_fresh_clone(tmp_path):
    """As on a hosted notebook: backattn is not installed, the notebook lies in a checkout."""
    import subprocess
    import sys

    source, lib = code(nbformat.read(NOTEBOOKS[0], as_version=4))[0].source, str(paths.ROOT / "lib")
    program = (
        f"import sys\nsys.path = [p for p in sys.path if p != {lib!r} and '__editable__' not in p]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"{source}\n{source}\nprint(run.name, sys.path.count({lib!r}))"
    )
    folder = paths.ROOT / "notebooks"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [NOTEBOOKS[0].stem, "1"], done.stderr


def test_readme_says_what_the_tables_say():
    import pandas as pd

    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"\b(TIME|MEM)_[A-Z]+|^BENCHMARK$", readme, re.MULTILINE)
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in readme
    for file in sorted((paths.FIGURES / "tables").glob("*_claims.csv")):
        for row in pd.read_csv(file).itertuples():
            assert f"{row.id} {row.verdict}" in readme
