"""Where the results of runs lie."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from backattn.files import atomic_file
from companion.paths import BUILD, DATA
from companion.runs.run import Run

CHECKPOINTS = DATA / "checkpoints"


class Store:
    """Results and weights of finished runs, and what stopped ones left, in a folder; shipped: a
    file with results of finished runs, one a line, or None."""

    def __init__(self, folder: Path = BUILD / "runs", shipped: Path | None = DATA / "runs.jsonl"):
        self.folder, self.shipped = Path(folder), {}
        if shipped is not None and shipped.exists():
            lines = map(json.loads, shipped.read_text(encoding="utf-8").splitlines())
            self.shipped = {line["key"]: line for line in lines}

    def place(self, run: Run) -> Path:
        return self.folder / run.key

    def result(self, run: Run) -> dict | None:
        """The result of a finished run, else None."""
        try:
            return json.loads((self.place(run) / "result.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return self.shipped.get(run.key)

    def weights(self, run: Run) -> dict[str, Tensor]:
        """The trained weights of a finished run. Raises FileNotFoundError where only its result was
        shipped, OSError for a shipped file with another sha256."""
        local = self.place(run) / "weights.safetensors"
        shipped = CHECKPOINTS / f"{run.key}.safetensors"
        if local.exists():
            return load_file(local)
        if not shipped.exists():
            raise FileNotFoundError(
                f"The weights of run {run.key} ({run.dataset}, {run.arm}, seed {run.seed}) are not "
                "shipped: train it with ./run_all.sh --profile full."
            )
        if _sha256(shipped) != self.shipped.get(run.key, {}).get("sha256"):
            raise OSError(
                f"{shipped} is not the file that {DATA / 'runs.jsonl'} names (sha256): take both "
                "again from the repository (git checkout)."
            )
        return load_file(shipped)

    def keep(self, run: Run, result: dict, weights: dict[str, Tensor]) -> None:
        """Weights first: a run is finished when its result is there."""
        if weights:
            _save(weights, self.place(run) / "weights.safetensors")
        with atomic_file(self.place(run) / "result.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")

    def export(self, runs: Iterable[Run], with_weights: Iterable[Run], folder: Path = DATA) -> None:
        """Write all shipped results and those of `runs`, sorted by key, and the weights of some."""
        lines = dict(self.shipped)
        for run in runs:
            if result := self.result(run):
                lines[run.key] = {**lines.get(run.key, {}), "key": run.key, **result}
        for run in with_weights:
            path = folder / "checkpoints" / f"{run.key}.safetensors"
            _save(self.weights(run), path)
            lines[run.key]["sha256"] = _sha256(path)
        with atomic_file(folder / "runs.jsonl") as temporary:
            temporary.write_text("".join(f"{json.dumps(lines[key])}\n" for key in sorted(lines)))


def _save(weights: dict[str, Tensor], path: Path) -> None:
    with atomic_file(path) as temporary:
        save_file(weights, temporary)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def answers_right(result: dict) -> np.ndarray:
    """Which test questions a result has right: [n] bool."""
    return np.array([character == "1" for character in result["right"]])
