"""The page that moves: the question it opens on, and what it says to touch, keys and ears."""

import json
import re
from html import unescape

import pytest

from companion.report import moving

MEMORIES = {"own": "its own memory", "another": "another question's"}


def record(probabilities, right, sink=True):
    """Two words × MEMORIES, of a model with two tokens and two layers."""
    grid = [[0.5, -0.25], [0.0, 1.0]]
    entities = {"e1": "Ann", "e2": "Rome", "e3": "Italy"}
    texts = {"set": "a", "prompt": "p", "question": "q", "second": "s", **entities}
    tokens = {"tokens": ["Ann", " is"], "second_tokens": ["Rome", " is"]}
    flow = {"attention": grid, "ffn": grid}
    return {
        **texts,
        **tokens,
        "sink": sink,
        "words": [" Italy", " Peru"],
        "right": right,
        "probabilities": probabilities,
        "flow": flow,
        "second_flow": flow,
        "running": {name: [-3.0, -2.0, -1.0, -1.0, -0.5] for name in entities},
        "memory_layers": [1, 2],
        "reads": [[0.1, 0.2], [0.3, 0.4]],
    }


UNCHANGED = record([[0.9, 0.6], [0.1, 0.4]], [True, False])
WRONG = record([[0.1, 0.9], [0.9, 0.1]], [True, False])
LITTLE = record([[0.6, 0.4], [0.4, 0.6]], [True, False])
MUCH = record([[0.7, 0.1], [0.2, 0.3]], [True, False], sink=False)


@pytest.mark.parametrize(
    ("records", "place"),
    [
        ([UNCHANGED, WRONG, LITTLE, MUCH], 3),
        ([MUCH, LITTLE], 0),
        ([UNCHANGED, WRONG, LITTLE], 2),
        ([WRONG, UNCHANGED], 0),
    ],
)
def test_it_opens_on_the_right_answer_that_another_memory_changes_most(records, place):
    assert moving.strongest(records) == place
    page = moving.page(records, MEMORIES, {"a": "a kind"}, "T")
    assert f'at("question").value = {place};' in page


@pytest.fixture
def page():
    return moving.page([LITTLE, MUCH], MEMORIES, {"a": "a kind"}, "T")


def test_a_tap_and_a_pointer_are_read_out_below_every_plot_but_the_bars(page):
    for name in ("reads", "flow", "second", "running"):
        call = f"readOut('{name}', cb_obj.x, cb_obj.y)"
        found = re.findall(r'\["(\w+)",\[{[^{}]*{"code":"' + re.escape(call), unescape(page))
        assert found == ["tap", "mousemove"]
        assert f'id="{name}-cell"' in page and f'id="{name}-words"' in page


def test_every_plot_is_a_picture_with_a_name(page):
    plots = re.findall(r'<div ([^>]*role="img"[^>]*)>\s*<div id="[^"]*" data-root-id', page)
    assert len(plots) == 5
    # the bars are named by the script: their words change
    assert sum(len(re.findall('aria-label="[^"]{20,}"', plot)) for plot in plots) == 4
    assert '"answers-plot").setAttribute("aria-label"' in page


def test_a_sink_is_a_matter_of_the_model(page):
    data = page.partition('id="records">')[2].partition("</script>")[0]
    assert [one["sink"] for one in json.loads(data)] == [True, False]
    text = page.partition("<main>")[2].partition("</main>")[0]
    assert "sink" not in text  # only the script says it, for a model that has one
