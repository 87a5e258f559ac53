"""What `companion.runs.launch` says before training against what the training then takes, in the
same run.

    .venv/bin/python benchmarks/estimate.py

Some of notebook 03's final runs on SmolLM2 are made anew, in a folder that is thrown away: back
attention, which keeps its first passes, and LoRA on all layers, on two-hop questions, and residual
LoRA on sums, which are answered in several tokens. The memory measured is the most that the process
took (Linux), Python and torch included. Exits with 1 when time or memory is off by more than a
factor of GOAL.
"""

import resource
import sys
import tempfile
import time

import pandas as pd

from backattn import runtime
from companion.runs.launch import estimate
from companion.runs.perform import train_and_test
from companion.runs.plans import found, main_runs
from companion.runs.store import Store

GOAL = 2.0
CHOSEN = (("two-hop", "back attention"), ("two-hop", "LoRA q,v"), ("1DC", "residual LoRA"))


def main() -> int:
    runtime.use_threads()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        plan = main_runs()
        final = found(plan, store)
        runs = [run for run in final if (run.dataset, run.arm) in CHOSEN and run.seed == 0]
        for run in runs:
            del store.shipped[run.key]
        said = estimate(plan, store)
        print(said, flush=True)
        rows = []
        for run in runs:
            begin = time.perf_counter()
            train_and_test(run, store)
            rows.append(
                {"dataset": run.dataset, "arm": run.arm, "seconds": time.perf_counter() - begin}
            )
    print(pd.DataFrame(rows).round(1).to_string(index=False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes
    table = pd.DataFrame(
        {
            "estimated": [said.seconds, (said.weights + said.states + said.batch) / 2**30],
            "measured": [sum(row["seconds"] for row in rows), peak / 2**30],
        },
        index=[f"{len(runs)} runs, seconds", "memory, GiB"],
    )
    table["ratio"] = table["measured"] / table["estimated"]
    print(f"{runtime.hardware()}\n{table.round(2).to_string()}")
    return int(not table["ratio"].between(1 / GOAL, GOAL).all())


if __name__ == "__main__":
    sys.exit(main())
