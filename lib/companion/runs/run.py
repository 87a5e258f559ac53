"""What a training run is: its configuration, and the key that names it."""

import functools
import hashlib
import json
from dataclasses import dataclass, fields

from backattn import runtime
from backattn.models.packaged import EMBEDDED
from backattn.training.loop import Recipe
from companion.questions.datasets import DATASETS, TWINS, load
from companion.questions.splits import FOLDS, VALIDATION

VERSION = 1  # raised when the same configuration would give another result

UNTRAINED = ("zero-shot", "few-shot")

OF_TRAINED = (
    "source_layer",
    "dim",
    "memory_layers",
    "steps",
)  # fields that mean nothing where nothing is trained

SHOTS = 4

SCRATCH = "scratch"  # the model of runs from scratch


@dataclass(frozen=True)
class Run:
    """One training run. Sizes are numbers of questions.

    A seed decides initial weights and the order of questions and, for adapters, which fold is tested. A run that only
    tries a learning rate has test_items=0 and never sees the test.
    """

    dataset: str
    arm: str
    seed: int = 0
    learning_rate: float = 0.0
    steps: int = 0
    model: str = "smollm2"
    source_layer: int | tuple[int, ...] = 6
    dim: int = 64
    batch_size: int = 32
    train_items: int | None = 1500
    validation_items: int | None = 200
    test_items: int | None = 300
    dtype: str = (
        "bfloat16"  # of the frozen model in training; it is tested in fp32, see `tested_in`
    )
    memory_layers: tuple[int, ...] | None = (
        None  # what back attention reads; None: from the source layer up
    )
    width: int = 440  # of a model from scratch
    weight_decay: float | None = None  # None: 0.01 from scratch, else none

    @property
    def fold(self) -> int | None:
        """See `datasets.split`: models from scratch are all tested on the same questions."""
        return None if self.model == SCRATCH else self.seed % FOLDS

    @property
    def key(self) -> str:
        """16 hexadecimal digits that name the run; what has its default value does not count, so that a field that is
        added later leaves the names of earlier runs what they are."""
        source = EMBEDDED[self.model].sha256 if self.model in EMBEDDED else None
        about = [VERSION, _own(self), _own(self.recipe), data_hash(self.dataset), source, SHOTS]
        if tested_in(self) != "float32":  # what is tested in another dtype is another result
            about.append(tested_in(self))
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def recipe(self) -> Recipe:
        scratch = self.model == SCRATCH
        return Recipe(
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay
            if self.weight_decay is not None
            else 0.01
            if scratch
            else 0.0,
            seed=self.seed,
            evaluations=12 if scratch else 3,
            autocast=scratch and self.dtype == "bfloat16",
        )


def tested_in(run: Run) -> str:
    """The dtype of a run's test: fp32, or for models whose results are not shipped that of `load_model`."""
    ours = run.model == SCRATCH or run.model in EMBEDDED
    return "float32" if ours else str(runtime.dtype()).removeprefix("torch.")


def _own(settings) -> dict:
    """The fields of a dataclass that have not their default values."""
    return {
        f.name: value for f in fields(settings) if (value := getattr(settings, f.name)) != f.default
    }


@functools.cache
def data_hash(dataset: str) -> str:
    """Hash of a dataset's questions, answers (other names included), groups, and of how groups are split."""
    rules = [FOLDS, VALIDATION]
    # The file's own hash: its results can be read where it cannot be had.
    if published := DATASETS[dataset].published:
        text = f"{rules}{TWINS}{published.sha256}"
    else:
        text = f"{rules}{load(dataset)[list(DATASETS[dataset].columns)].to_csv(index=False)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
