"""Scores and evaluates every entrant of notebook 10, data/10_circuits.safetensors: some three hours
on one core. What is finished lies in build/circuits, so that a stopped run goes on.

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
from companion.studies.attribution_benchmark import DRAWS, ENTRANTS, MODELS, RESULTS, judged

FOLDER = BUILD / "circuits"


def made(models, draws, tasks=tuple(TASKS), entrants=tuple(ENTRANTS)) -> None:
    usable, loaded = {}, {}
    for draw, model, task, entrant in itertools.product(draws, models, tasks, entrants):
        goal = FOLDER / f"{model}~{task}~{draw}~{entrant}.safetensors"
        if goal.exists():
            continue
        if model not in loaded:
            loaded = {model: load_model(model)}
        network, tokenizer = loaded[model]
        if (model, task) not in usable:
            usable[model, task] = fit(network, tokenizer, task)
        found = judged(Circuit(network), tokenizer, usable[model, task], draw, ENTRANTS[entrant])
        goal.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(goal) as temporary:
            save_file({k: np.ascontiguousarray(x) for k, x in found.items()}, temporary)
        print(goal.stem, len(usable[model, task]), round(float(found["seconds"][0]), 2), flush=True)


def joined() -> None:
    """All that is finished, in one file; logits as fp16, which is far finer than an interval."""
    everything = {}
    for path in sorted(FOLDER.glob("*.safetensors")):
        for name, x in load_file(path).items():
            key = "/".join([*path.stem.split("~"), name])
            everything[key] = x if name == "seconds" else x.astype(np.float16)
    with atomic_file(RESULTS) as temporary:
        save_file(everything, temporary)
    print(RESULTS, RESULTS.stat().st_size)


if __name__ == "__main__":
    runtime.use_threads()
    models = os.environ.get("MODELS", ",".join(MODELS)).split(",")
    draws = [int(x) for x in os.environ.get("DRAWS", ",".join(map(str, DRAWS))).split(",")]
    made(models, draws)
    joined()
