"""What nbval must not compare, in the notebooks as in the tests."""


def pytest_collectstart(collector):
    """HTML tables differ by pandas version and repeat the plain text; fetching talks on stderr."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("text/html", "stderr")
