"""What so few weights keep, and the rule of C11."""

import numpy as np
import pandas as pd
import pytest
from ledger_rows import held

from companion.studies.capacity import kept_share, small_keeps_its_gain


def test_the_share_of_a_gain_that_is_kept(answers_of):
    draw = np.random.default_rng(0)
    narrow, best, base = (
        answers_of([draw.permutation(np.arange(100) < count) for count in counts])
        for counts in ((40, 60), (80, 80), (40, 40))
    )
    share = kept_share(narrow, best, base)
    assert share["kept"] == pytest.approx(0.25) and share["low"] < 0.25 < share["high"]
    assert share["n"] == 200
    with pytest.raises(ValueError, match="too small"):
        kept_share(narrow, base, best)
    with pytest.raises(ValueError, match="same questions"):
        kept_share(narrow[:150], best, base)


@pytest.mark.parametrize(
    "low, high, less, verdict",
    [
        (0.6, 0.9, (0.05, 0.05, 0.05), "all"),
        (0.6, 0.9, (0.05, -0.01, 0.0), "some"),
        (0.4, 0.7, (0.05, 0.0, 0.0), "some"),
        (0.4, 0.7, (0.0, 0.0, -0.1), "none"),
        (0.1, 0.4, (-0.1, -0.1, -0.1), "none"),
    ],
)
def test_c11_asks_whether_so_little_is_enough(low, high, less, verdict):
    rivals = ["same layer", "residual LoRA", "bias"]
    gain = pd.DataFrame({"other": [*rivals, "zero-shot"], "difference": [*less, 0.2]})
    gain = gain.assign(low=gain["difference"] - 0.02, high=gain["difference"] + 0.02)
    share = pd.Series({"dim": 1, "share": 1.7e-5})
    kept = {"kept": (low + high) / 2, "low": low, "high": high, "n": 436}
    kept = pd.DataFrame({"arm": ["back attention", *rivals], **kept})
    row = small_keeps_its_gain(share, kept, gain)
    assert held(row) == verdict and "0.0017 %" in row["ours"]
    assert f"[{low:.0%}, {high:.0%}]" in row["ours"]
    assert row["ours"].count("more than half") == 3 * (low > 0.5)
