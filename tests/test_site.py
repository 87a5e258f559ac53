"""The static site: every page there, no broken link, code folded."""

import re
from urllib.parse import unquote

import pytest

from companion.runner import site
from companion.runner.check import notebooks


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return site.build(tmp_path_factory.mktemp("html") / "html", notebooks()).parent


def test_every_page_is_there_and_no_link_is_broken(root):
    pages = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in root.rglob("*.html")
    }
    pages = {name: text for name, text in pages.items() if not name.startswith("_static")}
    wanted = {"index.html", *(f"{name}.html" for name in site.PAGES)}
    assert wanted | {f"notebooks/{path.stem}.html" for path in notebooks()} <= set(pages)
    broken = []
    for name, text in pages.items():
        for link in re.findall(r'(?:href|src)="(?!https?:|data:|mailto:)([^"]+)"', text):
            file, _, place = unquote(link).partition("#")
            goal = (root / name).parent / file.split("?")[0] if file else root / name
            if not goal.exists() or (
                place and goal.suffix == ".html" and f'id="{place}"' not in goal.read_text("utf-8")
            ):
                broken.append((name, link))
    assert not broken and sum(text.count("href=") for text in pages.values()) > 500


def test_figures_are_shown_and_code_is_folded(root):
    text = (root / "notebooks/06_capacity.html").read_text(encoding="utf-8")
    assert text.count("<img") >= 4 and "Show code cell source" in text
    assert "google.colab" not in text  # the set-up cell


def test_a_page_that_links_to_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        site, "ledger_page", lambda: "# What held\n\n[gone](notebooks/10_nothing.ipynb)\n"
    )
    with pytest.raises(RuntimeError, match="10_nothing"):
        site.build(tmp_path / "html", notebooks())
