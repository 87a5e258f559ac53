"""Make data/two_hop_known.csv: the two-hop facts both of whose hops SmolLM2 answers, by the rule of
notebook 02.

About four minutes on one core. The examples in front and the first-token rule are those of
`companion.studies.failure_analysis.census`.
"""

import sys

from backattn import load_model, runtime
from companion import paths
from companion.questions.asking import candidates
from companion.questions.datasets import TWO_HOP_KEYS
from companion.questions.facts import two_hop_facts
from companion.questions.prompts import two_hop_prompts
from companion.studies.failure_analysis.census import hops


def main() -> None:
    runtime.use_threads()
    model, tokenizer = load_model("smollm2")
    asked = hops(model, tokenizer, candidates(tokenizer, two_hop_prompts(two_hop_facts())))
    known = asked[asked["known"]].sort_values(TWO_HOP_KEYS)
    table = known[TWO_HOP_KEYS].assign(shortcut_right=~known["kept"])
    table.to_csv(paths.DATA / "two_hop_known.csv", index=False, lineterminator="\n")
    print(f"{len(known)} of {len(asked)} facts are known", file=sys.stderr)


if __name__ == "__main__":
    main()
