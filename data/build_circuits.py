"""Scores and evaluates every entrant of notebook 10, data/10_circuits.safetensors: some hours on
one core (MODELS=smollm2 DRAWS=1,2 in the environment makes a part). What is finished lies in
build/circuits, or was shipped, so that a stopped run goes on.

.venv/bin/python data/build_circuits.py
"""

import itertools
import os

import numpy as np
from safetensors.numpy import load_file, save_file

from backattn import load_model, runtime
from backattn.analysis.circuits import Circuit
from backattn.files import atomic_file
from companion.paths import BUILD
from companion.questions.contrasts import TASKS, fit
from companion.studies.attribution_benchmark import (
    DRAWS,
    ENTRANTS,
    MODELS,
    RESULTS,
    Draw,
    judged,
    read_results,
)

FOLDER = BUILD / "circuits"


def made(units: str, models, draws, tasks=tuple(TASKS)) -> None:
    shipped = set(read_results()) if RESULTS.exists() else set()
    for model in models:
        network, tokenizer = load_model(model)
        circuit, usable = Circuit(network, units), {}
        for draw, task in itertools.product(draws, tasks):
            entrants = [e for e in ENTRANTS.values() if units in e.units]
            goals = {e: place("~".join((units, model, task, str(draw), e.name))) for e in entrants}
            wanted = {
                e: goal
                for e, goal in goals.items()
                if not goal.exists() and (units, model, task, draw, e.name) not in shipped
            }
            if wanted and task not in usable:
                usable[task] = fit(network, tokenizer, task)
            ready = Draw.of(circuit, tokenizer, usable[task], draw) if wanted else None
            for entrant, goal in wanted.items():
                found = judged(circuit, tokenizer, ready, entrant)
                with atomic_file(goal) as temporary:
                    save_file({k: np.ascontiguousarray(x) for k, x in found.items()}, temporary)
                print(goal.stem, flush=True)


def place(key: str):
    return FOLDER / f"{key}.safetensors"


def joined() -> None:
    """All that is finished, in one file; logits as fp16, which is far finer than an interval."""
    everything = load_file(RESULTS) if RESULTS.exists() else {}
    for path in sorted(FOLDER.glob("*.safetensors")):
        for name, x in load_file(path).items():
            key = "/".join([*path.stem.split("~"), name])
            everything[key] = x.astype(np.float16) if x.ndim == 2 or name == "stable" else x
    with atomic_file(RESULTS) as temporary:
        save_file(everything, temporary)
    print(RESULTS, RESULTS.stat().st_size)


if __name__ == "__main__":
    runtime.use_threads()
    models = os.environ.get("MODELS", ",".join(MODELS)).split(",")
    draws = [int(x) for x in os.environ.get("DRAWS", ",".join(map(str, DRAWS))).split(",")]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for draw in draws:  # the first draw of all first
        made("nodes", models, [draw])
        if draw == 0 and "smollm2" in models:
            made("neurons", ["smollm2"], [draw], ["capitals", "indirect object"])
    joined()
