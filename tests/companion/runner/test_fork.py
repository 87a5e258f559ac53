"""A fork has its own badges, set-up cells and citation after one command."""

import json
import re
import shutil
import tomllib

import pytest

from companion import paths
from companion.runner.fork import FILES, fork


@pytest.fixture
def copy(tmp_path):
    for name in FILES:
        for path in paths.ROOT.glob(name):
            (tmp_path / path.relative_to(paths.ROOT)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, tmp_path / path.relative_to(paths.ROOT))
    return tmp_path


def home(folder):
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def texts(folder):
    return {p.name: p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}


def test_every_badge_and_set_up_cell_leads_to_the_fork(copy):
    before = texts(copy)
    changed = fork("Ann-B/main.copy@v1.2", copy)
    assert {path.name for path in changed} == set(before)
    for name, text in texts(copy).items():
        assert home(copy) == "Ann-B/main.copy" and before[name] != text
        if name.endswith(".ipynb"):
            title, setup = ("".join(c["source"]) for c in json.loads(text)["cells"][:2])
            assert f"/github/Ann-B/main.copy/blob/v1.2/notebooks/{name})" in title
            assert f"/gh/Ann-B/main.copy/v1.2?labpath=notebooks%2F{name})" in title
            assert "--depth=1 -b v1.2 https://github.com/Ann-B/main.copy\n" in setup
            assert '"main.copy/lib"' in setup


def test_there_and_back_changes_nothing(copy):
    before, original = texts(copy), home(copy)
    tag = re.search(r"-b (\S+) https", before["00_start_here.ipynb"])[1]
    fork("ann/companion@v2", copy)
    fork("bob/other", copy)
    assert "bob/other/blob/v2/" in texts(copy)["00_start_here.ipynb"]
    fork(f"{original}@{tag}", copy)
    assert texts(copy) == before


@pytest.mark.parametrize("home", ["", "ann", "ann/", "a/b/c", "a b/c", "a/b@", "https://x.org/a/b"])
def test_what_is_no_home_changes_nothing(copy, home):
    before = texts(copy)
    with pytest.raises(ValueError, match="owner/name"):
        fork(home, copy)
    assert texts(copy) == before
