"""For the notebooks, the tests and the examples in docstrings alike."""

import pytest


def pytest_collectstart(collector):
    """What nbval must not compare: HTML tables differ by pandas version and repeat the plain text;
    a model that is fetched tells so on stderr."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("text/html", "stderr")


@pytest.fixture(autouse=True)
def _model_of_the_examples(request):
    """Examples know `model, tokenizer = load_model("tiny-llama")` and `encode`."""
    if isinstance(request.node, pytest.DoctestItem):
        from backattn import load_model
        from backattn.models.tokens import encode

        model, tokenizer = load_model("tiny-llama")
        names = {"model": model, "tokenizer": tokenizer, "encode": encode}
        request.getfixturevalue("doctest_namespace").update(names)
