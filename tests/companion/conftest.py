"""Answers of made-up runs, as `results.answers` has them; and a module that reads."""

import numpy as np
import pandas as pd
import pytest

from companion import paths
from companion.measures.memory import MemoryProbes


@pytest.fixture
def answers_of():
    """A function that makes the rows of one arm: right [seeds, questions]; groups: names of the
    questions; folds: each seed has questions of its own; more columns by name."""

    def make(right, groups=None, arm="back attention", folds=True, **more) -> pd.DataFrame:
        right = np.atleast_2d(np.asarray(right, dtype=float))
        seeds, count = right.shape
        seed, place = np.repeat(range(seeds), count), np.tile(range(count), seeds)
        groups = [f"g{k}" for k in range(count)] if groups is None else groups
        about = {"model": "m", "dataset": "d", "arm": arm, "seed": seed, "learning_rate": 1e-3}
        about |= {"question": [f"{s * folds} {k}" for s, k in zip(seed, place, strict=True)]}
        about |= {"group": np.tile(np.asarray(groups, dtype=object), seeds), "right": right.ravel()}
        about |= {"trained": 4, "seconds": 2.0, "flops": 10, "perplexity": 20.0}
        return pd.DataFrame({**about, **more})

    return make


@pytest.fixture
def probe(kept):
    """The questions of the run `kept`, to be asked."""
    probes = iter(MemoryProbes(kept[:1], kept[1]))  # at its end the adapter comes off
    yield next(probes)


@pytest.fixture
def committed():
    """A function that reads a committed table."""
    return lambda name: pd.read_csv(paths.FIGURES / "tables" / f"{name}.csv")
