"""Guards over the committed notebooks: valid, executed, clean, with the parts each must have."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import nbformat
import pandas as pd
import pytest
import yaml

from companion import paths
from companion.runner import committed
from companion.studies.claims import conditions, in_short, whole_ledger

NOTEBOOKS = committed.notebooks()
TAGS = {"setup", "parameters", "nbval-check-output", "nbval-skip", "hide-input", "remove-cell"}
LEAST_IMAGES = {"00_start_here": 2, "01_stage_discovery": 5, "02_failure_analysis": 2}
LEAST_IMAGES |= {"02b_conflict_inside": 5}
LEAST_IMAGES |= {"03_back_attention_training": 4, "04_layer_ablation": 5, "05_what_it_reads": 7}
LEAST_IMAGES |= {"06_capacity": 3, "07_controls": 4, "08_composition": 1}
LEAST_IMAGES |= {"09_other_reasoning_and_cost": 3, "10_attribution_benchmark": 4, "11_claims": 1}
LEAST_IMAGES |= {"demo_logit_flow": 1, "demo_memory_switch": 1}
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


def test_it_is_valid_small_clean_and_was_run_in_order(path, notebook):
    nbformat.validate(notebook)
    assert path.stat().st_size < MEGABYTES * 2**20
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    assert all(set(cell.metadata) <= {"tags", "mystnb"} for cell in notebook.cells)
    machine = r"/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\|0x[0-9a-f]{8}"
    assert not re.search(machine, path.read_text(encoding="utf-8"))
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    assert not any(output.get("name") == "stderr" for output in outputs)


def test_it_has_its_parts_in_order(notebook):
    cells = notebook.cells
    assert cells[0].cell_type == "markdown"
    rows = ("| reads |", "| writes |", "| takes |")
    assert all(part in cells[0].source for part in rows)
    assert has_tag(cells[1], "setup") and has_tag(cells[2], "parameters")
    assert "claims" in code(notebook)[-1].source or "print" in code(notebook)[-1].source
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert any(re.search(r"^#+ Verdict", text, re.MULTILINE) for text in texts)


def test_tags_are_known_and_checked_cells_have_output(notebook):
    for cell in notebook.cells:
        assert set(cell.metadata.get("tags", [])) <= TAGS
        assert cell.outputs if has_tag(cell, "nbval-check-output") else True, cell.source
    assert sum(has_tag(cell, "nbval-check-output") for cell in notebook.cells) >= 3
    # tags only, one way of marking
    assert "NBVAL" not in json.dumps([cell.source for cell in notebook.cells])


def test_it_shows_its_figures_each_with_a_finding(path, notebook):
    shown = 0
    for index, cell in enumerate(notebook.cells):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            after = notebook.cells[index + 1 : index + 3]
            assert any(c.source.startswith("**Finding.**") for c in after), cell.source
            # in words, for who does not see it
            assert len(cell.metadata["mystnb"]["image"]["alt"]) > 20, cell.source
            shown += 1
    assert shown >= LEAST_IMAGES[path.stem]


def test_every_figure_has_its_finding_as_a_title(notebook):
    for cell in code(notebook):
        source = re.sub(r"^[!%].*", "", cell.source, flags=re.MULTILINE)
        for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) == "out.figure":
                title = {k.arg: k.value for k in call.keywords}["title"].value
                assert title is None or 3 <= len(title.split()) <= 9, title


def test_every_saved_figure_and_table_is_committed(notebook):
    source = "\n".join(cell.source for cell in code(notebook))
    saved = re.findall(r'out\.(figure|table)\([^"]*?"((?:\d\d[a-z]?|demo)_\w+)"', source)
    assert "figure" in {kind for kind, _ in saved}
    for kind, name in saved:
        folder = paths.FIGURES / ("" if kind == "figure" else "tables")
        for suffix in ("pdf", "png", "csv") if kind == "figure" else ("csv", "md", "tex"):
            assert (folder / f"{name}.{suffix}").exists()


def test_the_index_of_figures_is_whole():
    assert [path.stem for path in NOTEBOOKS] == list(LEAST_IMAGES)
    index = (paths.FIGURES / "README.md").read_text(encoding="utf-8")
    assert index.startswith("# Figures and tables\n")
    assert index == committed.figure_index()
    listed = re.findall(r"^- \*\*(\w+)\*\*", index, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in paths.FIGURES.glob("*.png"))
    checked = (paths.ROOT / "codecheck.yml").read_text(encoding="utf-8")
    assert checked == committed.codecheck()
    files = [one["file"] for one in yaml.safe_load(checked)["manifest"]]
    assert len(files) == len(listed) and all((paths.ROOT / file).exists() for file in files)


def test_no_algorithm_and_no_test_branch_in_a_notebook(notebook):
    for cell in code(notebook)[1:]:
        assert not re.search(r"^\s*(def|class|while|try|if) ", cell.source, re.MULTILINE)
        imports = [n for n in ast.parse(cell.source).body if isinstance(n, ast.ImportFrom)]
        lines = len(cell.source.splitlines())
        lines -= sum(node.end_lineno - node.lineno + 1 for node in imports)
        assert lines <= 20, cell.source


def test_parameters_are_plain_literals_and_profiles_use_them(path, notebook):
    names = set()
    for node in ast.parse(code(notebook)[1].source).body:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)
        targets = [n for target in node.targets for n in ast.walk(target)]
        names |= {n.id for n in targets if isinstance(n, ast.Name)}
    for profile, sizes in committed.profiles().items():
        assert set(sizes) <= {path.stem for path in NOTEBOOKS}
        assert set(sizes.get(path.stem, {})) <= names, profile
    assert {"model_name", "device"} <= names


def test_set_up_cells_and_badges_are_alike_and_agree_with_pyproject():
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    slug, sources = address.removeprefix("https://github.com/"), set()
    for path in NOTEBOOKS:
        title, setup = (cell.source for cell in nbformat.read(path, as_version=4).cells[:2])
        tag = re.search(r" -b (\S+) ", setup)[1]
        colab = f"colab.research.google.com/github/{slug}/blob/{tag}/notebooks/{path.name}"
        binder = f"mybinder.org/v2/gh/{slug}/{tag}?labpath=notebooks%2F{path.name}"
        assert colab in title and binder in title
        assert f" {address}\n" in setup and "pip" not in setup
        assert setup.endswith(f'out = notebook.setup("{path.stem}")')
        sources.add(setup.replace(path.stem, "NAME"))
    assert len(sources) == 1 and len([line for line in setup.splitlines() if line]) <= 6


@pytest.mark.parametrize("place", ["notebooks", "root", "hosted"])
def test_the_set_up_cell_finds_or_fetches_the_library(tmp_path, place):
    """Where backattn is not installed: in a checkout, or hosted, with the notebook alone."""
    source = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    tag, home = re.search(r" -b (\S+) https://\S+/(\S+)", source).groups()
    checkout, folder, environment = paths.ROOT, tmp_path, {**os.environ, "BACKATTN_OUTPUT": ""}
    environment.pop("PYTHONPATH", None)
    if place == "hosted":
        folder, checkout = tmp_path / "content", tmp_path / "content" / home
        folder.mkdir()
        shutil.copytree(paths.ROOT / "lib", tmp_path / "repository/lib")
        (tmp_path / "repository/data").mkdir()
        (tmp_path / "repository/data/README.md").touch()
        git = ["git", "-C", str(tmp_path / "repository"), "-c", "user.name=n", "-c", "user.email=e"]
        for command in (["init", "-q", "-b", tag], ["add", "."], ["commit", "-qm", "All"]):
            subprocess.run([*git, *command], check=True)
        address = re.search(r"https://\S+", source)[0]
        instead = f"url.file://{tmp_path}/repository.insteadOf"
        environment |= {"GIT_CONFIG_KEY_0": instead, "GIT_CONFIG_VALUE_0": address}
        environment |= {"GIT_CONFIG_COUNT": "1"}
    else:
        folder = paths.ROOT / ("notebooks" if place == "notebooks" else "")
    program = f"""
import sys
ours = ({str(paths.ROOT)!r}, {str(paths.ROOT / "lib")!r})
sys.path = [p for p in sys.path if p not in ours and "__editable__" not in p]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell()
for _ in range(2):
    shell.run_cell({source!r}).raise_error()
print(shell.user_ns["out"].name, sys.modules["companion.paths"].ROOT)
"""
    how = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", program], **how)
    assert done.stdout.split() == [NOTEBOOKS[0].stem, str(checkout)], done.stdout + done.stderr


def test_readme_is_short_and_says_what_the_tables_say():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"notebooks/{path.name}" in readme for path in NOTEBOOKS)
    assert len(readme.split()) <= 1100
    ledger = whole_ledger([paths.FIGURES / "tables"])
    assert in_short(ledger) in readme and conditions(ledger) in readme
    exchanged = pd.read_csv(paths.FIGURES / "tables/11_exchange.csv").set_index("model") * 100
    own, other = exchanged.loc["two layers, from scratch", ["its own", "another's"]]
    assert f"from {own:.0f} % to {other:.0f} %" in readme
    lost = (exchanged["its own"] - exchanged["another's"]).map("{:.0f}".format)
    assert f"SmolLM2 loses {lost['smollm2']} point on facts it recalls, " in readme
    assert f" {lost['smollm2, in context']} where the prompt gives the first hop, " in readme
    assert f" and {lost['smollm2, 1DC']} on sums at layer 1." in readme


def test_every_link_of_a_page_leads_somewhere():
    pages = [*paths.ROOT.glob("*.md"), *paths.ROOT.glob("docs/*.md"), paths.FIGURES / "REPORT.md"]
    for page in [*pages, paths.ROOT / "benchmarks/README.md", paths.FIGURES / "README.md"]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
