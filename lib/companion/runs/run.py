"""What a training run is: its configuration, and the key that names it."""

import functools
import hashlib
import json
from dataclasses import dataclass, fields

from backattn.adapters.arms import UNTRAINED as UNTRAINED
from backattn.models.packaged import EMBEDDED
from backattn.training.loop import Recipe
from companion.questions.datasets import DATASETS, TWINS, load
from companion.questions.splits import FOLDS, VALIDATION

VERSION = 1  # raised when the same configuration would give another result

SHOTS = 4  # worked examples of "few-shot"

SCRATCH = "scratch"  # the model of runs from scratch


@dataclass(frozen=True)
class Run:
    """One training run. Sizes are numbers of questions.

    A seed decides initial weights and the order of questions and, for adapters, which fold is
    tested. A run that only tries a learning rate has test_items=0 and never sees the test.
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
    dtype: str = "bfloat16"  # of the frozen model in training
    memory_layers: tuple[int, ...] | None = None  # that back attention reads; None: all from source
    width: int = 440  # of a model from scratch
    weight_decay: float | None = None  # None: 0.01 from scratch, else none
    tested_in: str = "float32"  # dtype of the model in the test

    @property
    def fold(self) -> int | None:
        """See `splits.split`: models from scratch are all tested on the same questions."""
        return None if self.model == SCRATCH else self.seed % FOLDS

    @property
    def recipe(self) -> Recipe:
        scratch = self.model == SCRATCH
        decay = self.weight_decay
        return Recipe(
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=decay if decay is not None else 0.01 if scratch else 0.0,
            seed=self.seed,
            evaluations=12 if scratch or self.steps >= 1000 else 3,  # curves of long runs
            autocast=scratch and self.dtype == "bfloat16",
        )

    @property
    def key(self) -> str:
        """16 hexadecimal digits that name the run.

        What has its default value does not count, so that a field that is added later leaves the
        names of earlier runs what they are.
        """
        source = EMBEDDED[self.model].sha256 if self.model in EMBEDDED else None
        settings, recipe = _changed(self), _changed(self.recipe)
        about = [VERSION, settings, recipe, data_hash(self.dataset), source, SHOTS]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _changed(settings) -> dict:
    """The fields of a dataclass that have not their default values."""
    values = {field: getattr(settings, field.name) for field in fields(settings)}
    return {field.name: value for field, value in values.items() if value != field.default}


@functools.cache
def data_hash(dataset: str) -> str:
    """Hash of a dataset's questions, answers (other names included), groups, and of their split.

    Of a published one the file's own hash: its results can be read where it cannot be had.
    """
    if published := DATASETS[dataset].published:
        content = f"{TWINS}{published.sha256}"
    else:
        content = load(dataset)[list(DATASETS[dataset].columns)].to_csv(index=False)
    return hashlib.sha256(f"{[FOLDS, VALIDATION]}{content}".encode()).hexdigest()[:16]
