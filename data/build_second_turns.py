"""Makes data/03_second_turns.csv: which two-hop questions SmolLM2 answers right after each second
turn without training (E7), on validation and test questions. From the repository's root:

    python data/build_second_turns.py
"""

from dataclasses import replace

import pandas as pd

from backattn import runtime
from backattn.files import atomic_file
from companion.measures.second_turns import TURNS, second_turns
from companion.paths import DATA
from companion.runs.perform import base_model
from companion.runs.plans import SEEDS
from companion.runs.run import Run

if __name__ == "__main__":
    runtime.use_threads()
    model, tokenizer = base_model("smollm2")
    run, parts = Run("two-hop", "zero-shot"), []
    for turn in runtime.progress(TURNS, "second turns", unit="turn"):
        parts.append(second_turns(model, tokenizer, run, "validation", [turn]))
        parts += [
            second_turns(model, tokenizer, replace(run, seed=seed), "test", [turn])
            for seed in SEEDS
        ]
    with atomic_file(DATA / "03_second_turns.csv") as temporary:
        pd.concat(parts).to_csv(temporary, index=False, lineterminator="\n")
