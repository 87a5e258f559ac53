"""The list of what is hard to read: counted as a reader would, and never a failure."""

import nbformat
import pytest

from companion import paths
from companion.runner import words

SHORT = "Back attention answers 40 % [31, 48] of the questions."


@pytest.mark.parametrize(
    "text, what",
    [
        ("**Finding.** " + "It is so. " * 21, "finding of 63 words"),
        ("It is so. " * 41, "123 words"),
        ("word " * 26 + ".", "26 words a sentence"),
        ("It is 2 % [1, 3], or −1.5 points [−2.4, +0.3].", "2 intervals in a sentence: It is"),
    ],
)
def test_each_kind_of_outlier_is_found_and_alone(text, what):
    ((times, found),) = words.too_much(text)
    assert found.startswith(what) and times > 1


@pytest.mark.parametrize(
    "text",
    [
        f"**Finding.** {SHORT} {SHORT}\n\n" + "Its caption is not the finding. " * 10,
        "| a table | of words |\n" * 99,
        f"```python\n{'code ' * 200}\n```\n\n{SHORT}\n\n- {'item ' * 20}\n- {'item ' * 20}",
        "",
    ],
)
def test_captions_tables_code_and_lists_are_not_taken_for_long_sentences(text):
    assert list(words.too_much(text)) == []


def test_notebooks_and_pages_are_read_and_the_worst_come_first(monkeypatch, tmp_path):
    cells = [("a", "It is so. " * 41), ("b", "[1, 2] and [3, 4] and [5, 6]."), ("c", SHORT)]
    made = [nbformat.v4.new_markdown_cell(source, id=name) for name, source in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made), tmp_path / "01_long.ipynb")
    for name in ("ROOT", "DATA", "NOTEBOOKS"):
        monkeypatch.setattr(paths, name, tmp_path)
    (tmp_path / "README.md").write_text(
        f"# Top\n\n{SHORT}\n\n```\n# no title\n```\n\n## Part\n\n" + "word " * 50
    )
    lines = words.outliers()
    assert [line.split(" · ")[1] for line in lines[:2]] == ["b", "Part"]
    assert {line.split(" · ")[0] for line in lines} == {"01_long.ipynb", "README.md"}
    monkeypatch.setattr(words, "SHOWN", 1)
    assert words.outliers() == lines[:1]
