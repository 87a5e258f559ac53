"""What a training run is: its configuration, and the key that names it."""

import functools
import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

from transformers.utils.hub import cached_file, extract_commit_hash

from backattn.adapters.arms import UNTRAINED as UNTRAINED
from backattn.models.packaged import EMBEDDED
from backattn.training.loop import Recipe
from companion.paths import DATA
from companion.questions.datasets import DATASETS, TWINS, load
from companion.questions.splits import FOLDS, VALIDATION

VERSION = 1  # raised when the same configuration would give another result
SHOTS = 4  # worked examples of "few-shot"
SCRATCH = "scratch"  # the model of runs from scratch
BACK_ATTENTION = ("back attention", "1 layer + back attention", "2 layers + back attention")
READS_MEMORY = (*BACK_ATTENTION, "same layer")  # another question's can stand in its place
# Small frozen models of this repository's own making, see `companion.runs.premise`.
OWN = {name: DATA / "models" / name.replace(" ", "_") for name in ("premise", "premise low")}


@dataclass(frozen=True)
class Run:
    """One training run; sizes are numbers of questions. A seed decides initial weights, the order
    of questions and, for adapters, which fold is tested. A run that only tries a learning rate has
    test_items=0 and never sees the test."""

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
    kl: float = 0.0  # weight of the divergence from the frozen model on text that it writes

    @property
    def fold(self) -> int | None:
        """See `splits.split`; None where all seeds are tested on the same questions: models from
        scratch, and datasets with a split of their own."""
        one_test = self.model == SCRATCH or "split" in DATASETS[self.dataset].columns
        return None if one_test else self.seed % FOLDS

    @property
    def recipe(self) -> Recipe:
        scratch, decay = self.model == SCRATCH, self.weight_decay
        if decay is None:
            decay = 0.01 if scratch else 0.0
        same = {n: getattr(self, n) for n in ("steps", "learning_rate", "batch_size", "seed")}
        autocast = scratch and self.dtype == "bfloat16"
        evaluations = 12 if scratch or self.steps >= 1000 else 3  # curves of long runs
        same |= dict(weight_decay=decay, evaluations=evaluations, autocast=autocast, kl=self.kl)
        return Recipe(**same)

    @property
    def key(self) -> str:
        """16 hexadecimal digits that name the run; defaults do not count, so that a field that is
        added later leaves the names of earlier runs what they are."""
        about = [VERSION, _changed(self), _changed(self.recipe), data_hash(self.dataset)]
        return _digest(json.dumps([*about, source_of(self.model), SHOTS], sort_keys=True))


def _changed(settings) -> dict:
    """The fields of a dataclass that have not their default values."""
    values = {field: getattr(settings, field.name) for field in fields(settings)}
    return {field.name: value for field, value in values.items() if value != field.default}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def located(model: str, folder: Path) -> str:
    """`model` as it is found from anywhere: a folder, as seen from `folder`, by its absolute path.
    Raises ValueError for what looks like a folder and holds no model."""
    path = (folder / Path(model).expanduser()).resolve()
    if model in EMBEDDED or not (path.is_dir() or model.startswith((".", "/", "~"))):
        return model
    if not (path / "config.json").is_file():
        raise ValueError(f"{model!r} is no folder with a model: there is no {path}/config.json.")
    return str(path)


def source_of(model: str) -> str | None:
    """What a model is made of: the sha256 of a packaged one, a hash of the files in a folder, the
    commit of one from the hub; None for one that code makes, or that cannot be reached."""
    if model in EMBEDDED:
        return EMBEDDED[model].sha256
    if model == SCRATCH or model.startswith("tiny-"):
        return None
    folder = Path(OWN.get(model, model))
    if not folder.is_dir():
        return _commit(model)
    files = [file for file in sorted(folder.glob("[!.]*")) if file.is_file()]
    states = [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in map(Path.stat, files)]
    return _digest(repr([*map(_file_hash, files, states)]))


@functools.cache
def _file_hash(path: Path, state: tuple[int, ...]) -> tuple[str, str]:  # another state: read again
    with path.open("rb") as file:
        return path.name, hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _commit(model: str) -> str | None:
    try:
        return extract_commit_hash(cached_file(model, "config.json"), None)
    except (OSError, ValueError):  # loading it says why
        return None


@functools.cache
def data_hash(dataset: str) -> str:
    """Hash of a dataset's questions, answers, groups and split; of a published one the file's own,
    so that its results can be read where it cannot be had."""
    if published := DATASETS[dataset].published:
        content = f"{TWINS}{published.sha256}"
    else:
        content = load(dataset)[list(DATASETS[dataset].columns)].to_csv(index=False)
    return _digest(f"{[FOLDS, VALIDATION]}{content}")
