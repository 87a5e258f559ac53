"""Makes data/03_second_turns.csv: which two-hop questions SmolLM2 answers right after each second
turn without training (E7), on validation and test questions. From the repository's root:

    python data/build_second_turns.py
"""

from backattn import runtime
from backattn.files import atomic_file
from companion.measures.second_turns import all_turns
from companion.paths import DATA
from companion.runs.perform import base_model

if __name__ == "__main__":
    runtime.use_threads()
    table = all_turns(*base_model("smollm2"), "smollm2").drop(columns="accuracy")
    with atomic_file(DATA / "03_second_turns.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
