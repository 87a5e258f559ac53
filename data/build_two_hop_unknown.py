"""Make data/two_hop_unknown.csv: two-hop facts of which SmolLM2 answers a hop wrongly, and whether
it answers the shortcut with e3.

All facts that `build_two_hop_known.py` asked and did not find known; at most 100 of each pair of
relations, drawn by a hash of their names. A few minutes on one core.
"""

import sys

from backattn import load_model, runtime
from companion import paths
from companion.questions.asking import ask, candidates
from companion.questions.datasets import TWO_HOP_KEYS
from companion.questions.facts import read_table, two_hop_facts
from companion.questions.prompts import two_hop_prompts
from companion.studies.failure_analysis.census import shuffled

PER_PAIR = 100


def main() -> None:
    runtime.use_threads()
    model, tokenizer = load_model("smollm2")
    facts = candidates(tokenizer, two_hop_prompts(two_hop_facts()))
    known = read_table(paths.DATA / "two_hop_known.csv", [*TWO_HOP_KEYS, "shortcut_right"])
    facts = facts[~facts["collides"]].merge(known, on=TWO_HOP_KEYS, how="left", indicator=True)
    asked = shuffled(facts[facts["_merge"] == "left_only"]).groupby("pair").head(PER_PAIR)
    distinct = asked.drop_duplicates("shortcut_prompt")
    alike = distinct["pair"] + distinct["r1"] + distinct["r2"]
    said, _ = ask(model, tokenizer, distinct["shortcut_prompt"], alike)
    by_prompt = dict(zip(distinct["shortcut_prompt"], said, strict=True))
    right = [
        by_prompt[prompt] in ids
        for prompt, ids in zip(asked["shortcut_prompt"], asked["e3_ids"], strict=True)
    ]
    table = asked[TWO_HOP_KEYS].assign(shortcut_right=right).sort_values(TWO_HOP_KEYS)
    table.to_csv(paths.DATA / "two_hop_unknown.csv", index=False, lineterminator="\n")
    print(f"{len(table)} facts of {table['pair'].nunique()} pairs of relations", file=sys.stderr)


if __name__ == "__main__":
    main()
