"""The static site: every page there, no broken link, code folded."""

import re
from urllib.parse import unquote

import pytest
import yaml

from companion import paths
from companion.runner import committed, site


def test_every_page_is_there_no_link_is_broken_and_code_is_folded(tmp_path):
    root = site.build(tmp_path / "html").parent
    contents = yaml.safe_load((paths.NOTEBOOKS / "_toc.yml").read_text(encoding="utf-8"))
    pages = [page["file"] for part in contents["parts"] for page in part["chapters"]]
    assert [name for name in pages if name.startswith("notebooks/")] == [
        f"notebooks/{path.stem}" for path in committed.notebooks()
    ]
    texts = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in root.rglob("*.html")
        if "_static" not in path.parts
    }
    assert {"index.html", *(f"{name}.html" for name in [contents["root"], *pages])} <= set(texts)
    broken = []
    for name, text in texts.items():
        for link in re.findall(r'(?:href|src)="(?!https?:|data:|mailto:)([^"]+)"', text):
            file, _, place = unquote(link).partition("#")
            goal = (root / name).parent / file.split("?")[0] if file else root / name
            inside = place and goal.suffix == ".html"
            if not goal.exists() or (inside and f'id="{place}"' not in goal.read_text("utf-8")):
                broken.append((name, link))
    assert not broken and sum(text.count("href=") for text in texts.values()) > 500
    text = (root / "notebooks/06_capacity.html").read_text(encoding="utf-8")
    assert text.count("<img") >= 4 and "Show code cell source" in text
    assert "git clone" not in text  # the set-up cell
    for file in ("names.js", "narrow.css"):
        assert f"_static/{file}" in text and (root / "_static" / file).exists()


def test_a_page_that_links_to_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/_config.yml").write_text("title: T\nonly_build_toc_files: true\n")
    (tmp_path / "notebooks/_toc.yml").write_text("format: jb-book\nroot: README\n")
    (tmp_path / "README.md").write_text("# What held\n\n[gone](notebooks/10_nothing.ipynb)\n")
    with pytest.raises(RuntimeError, match="10_nothing"):
        site.build(tmp_path / "html")
    assert not (tmp_path / "html").exists()
