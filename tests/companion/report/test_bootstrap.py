"""Bootstrap over clusters, and Wilson's interval."""

import numpy as np

from companion.report import intervals


def test_bootstrap_interval_covers():
    generator, hits = np.random.default_rng(1), 0
    for _ in range(60):
        _, low, high = intervals.mean_interval(generator.standard_normal(80), range(80))
        hits += low <= 0 <= high
    assert 50 <= hits <= 60


def test_bootstrap_keeps_clusters_together():
    weights = intervals.bootstrap(["a", "a", "b", "c"], resamples=50)
    assert np.allclose(weights.sum(1), 1) and np.allclose(weights[:, 0], weights[:, 1])
    values = np.array([1.0, -1.0] * 40)  # pairs that cancel: no spread between clusters
    _, low, high = intervals.mean_interval(values, np.arange(80) // 2)
    assert np.allclose((low, high), 0)


def test_wilson_is_the_textbooks():
    z, p, n = 1.959964, 0.8, 10
    middle = (p + z**2 / 2 / n) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5
    assert np.allclose(intervals.wilson(8, 10), (middle - half, middle + half), atol=1e-5)
