"""Plans of runs that are wanted, how their learning rates are found; `complete` makes them."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch  # puts the environment back as it was

from backattn import runtime
from backattn.adapters.arms import ARMS, UNTRAINED
from backattn.models.packaged import EMBEDDED
from companion.questions.datasets import AGAIN, DATASETS, ONE_HOP, PLANTED, WIDE
from companion.questions.splits import FOLDS
from companion.runs.perform import train_and_test
from companion.runs.run import BACK_ATTENTION, OWN, SCRATCH, Run
from companion.runs.scratch import COMPOSING_ARMS, SCRATCH_ARMS, arm_of
from companion.runs.store import CHECKPOINTS, Store

Names, Ints = Sequence[str], Sequence[int]
MOST_RATES = 4  # tried for one arm
DECAYS = (0.1, 0.3, 1.0)  # with little, compositions are learnt by heart (Wang et al. 2024)
CORE_ARMS = ("back attention", "same layer", "residual LoRA")  # equal weights, one place
BUDGET_ARMS = (*CORE_ARMS, "bias")
# Of all comparisons of arms; the others are asked in notebooks 03, 07 and 08 alone.
ALONE = ("shuffled memory", "previous token")
TRIED = {name: arm for name, arm in ARMS.items() if name not in ALONE}
SEEDS = (0, 1, 2)
OF_TRAINED = {
    "source_layer",
    "dim",
    "memory_layers",
    "steps",
    "kl",
}  # nothing where nothing is trained


@dataclass(frozen=True)
class Planned:
    """A run that is wanted, and the runs that are tried with several learning rates to find its
    own: one, or one for each weight decay; none where nothing is trained. most: rates at most."""

    run: Run
    trials: tuple[Run, ...] = ()
    most: int = MOST_RATES


def scratch_runs(
    seeds: Ints = (0, 1, 2, 3, 4), widths: Ints = (440,), dims: Ints = (160,), tried_for: int = 250
) -> list[Planned]:
    """Claims C7 and C11: models of some widths, 750 steps, with each d′ where it counts; tried_for:
    steps after which a learning rate is judged."""
    shape = dict(model=SCRATCH, source_layer=0, batch_size=256, train_items=None, steps=750)
    shape |= dict(validation_items=1000, test_items=2000)
    runs = [
        Run("2-digit", arm.name, width=width, dim=dim, **shape)
        for width in widths
        for arm in SCRATCH_ARMS.values()
        for dim in (dims if arm.sized else [160])
    ]
    return [
        Planned(replace(run, seed=seed), (replace(run, steps=tried_for, test_items=0),))
        for seed in seeds
        for run in runs
    ]


def composing_runs() -> list[Planned]:
    """Two hops from scratch, COMPOSING_ARMS on `compositions`, each at its best learning rate and
    weight decay for ID/ID questions after 600 steps."""
    shape = dict(model=SCRATCH, source_layer=0, dim=32, width=100, batch_size=256, dtype="float32")
    shape |= dict(train_items=None, validation_items=None)
    plan = []
    for seed in SEEDS:
        for arm in COMPOSING_ARMS:
            trial = Run("compositions", arm, steps=600, test_items=0, **shape)
            run = replace(trial, seed=seed, steps=1600, test_items=None)
            plan.append(Planned(run, tuple(replace(trial, weight_decay=x) for x in DECAYS)))
    return plan


def adapter_runs(
    model: str = "smollm2", names: Names = ("two-hop",), arms: Names = tuple(TRIED), **sizes
) -> list[Planned]:
    """Claim C8: the untrained and some trained arms on some datasets, for all seeds; sizes: fields
    of `Run`. tested_in is that of `load_model` where it is left out, and float32 for a model that
    is packaged with its results."""
    plan, steps = [], sizes.pop("steps", 100)
    sizes.setdefault("tested_in", runtime.dtype_name())
    if model in EMBEDDED:
        sizes["tested_in"] = "float32"
    untrained = {name: value for name, value in sizes.items() if name not in OF_TRAINED}
    for name in names:
        dataset, place = DATASETS[name], DATASETS[name].tuned_on
        wanted = [Planned(Run(name, arm, model=model, **untrained)) for arm in UNTRAINED]
        for arm in arms:
            run = Run(name, arm, model=model, steps=steps * dataset.longer, **sizes)
            tried_for = steps * DATASETS[place].longer // 2
            trial = replace(run, dataset=place, steps=tried_for, test_items=0)
            wanted.append(Planned(run, (trial,)))
        plan += [replace(one, run=replace(one.run, seed=s)) for s in SEEDS for one in wanted]
    return plan


def main_runs(
    model: str = "smollm2",
    every_arm_on: Names = ("two-hop",),
    core_arms_on: Names = ("2-digit", "1DC", "SVAMP", "MultiArith"),
    **sizes,
) -> list[Planned]:
    """Claim C8 as notebook 03 asks it: every arm on some datasets, CORE_ARMS on others."""
    every = adapter_runs(model, every_arm_on, **sizes)
    return every + adapter_runs(model, core_arms_on, CORE_ARMS, **sizes)


def budget_runs(arms: Names = BUDGET_ARMS) -> list[Planned]:
    """E0: how long arms train before a comparison means anything, on `chains`; the rates are found
    at half of the steps."""
    sizes = dict(steps=1200, batch_size=16, train_items=None, test_items=None)
    return adapter_runs(names=["chains"], arms=arms, **sizes)


def lead_runs() -> list[Planned]:
    """E4: back attention where it leads, and the same layer, trained again."""
    arms = ["back attention", "same layer"]
    plan = adapter_runs(names=[AGAIN[0]], arms=arms, batch_size=16)
    plan += adapter_runs(names=[AGAIN[1]], arms=arms, source_layer=1)
    return [one for one in plan if one.trials]


def rival_runs(**sizes) -> list[Planned]:
    """E7: CORE_ARMS trained on single hops; back attention that reads the token before alone."""
    plan = adapter_runs(names=[ONE_HOP], arms=CORE_ARMS, **sizes)
    plan += adapter_runs(arms=["previous token"], **sizes)
    return [one for one in plan if one.trials]


def kl_runs(**sizes) -> list[Planned]:
    """E7: CORE_ARMS trained with a divergence on ordinary text."""
    return [one for one in adapter_runs(arms=CORE_ARMS, kl=1.0, **sizes) if one.trials]


def wide_runs(**sizes) -> list[Planned]:
    """E8: CORE_ARMS, trained three times in each fold, and the model without them, on questions of
    many first relations."""
    plan = adapter_runs(names=[WIDE], arms=CORE_ARMS, test_items=None, **sizes)
    again = [one for one in plan if one.trials]
    later = [
        replace(o, run=replace(o.run, seed=o.run.seed + k * FOLDS)) for k in (1, 2) for o in again
    ]
    return plan + later


def varied_runs(
    field: str, values: Sequence, arms: Names = CORE_ARMS, dataset: str = "two-hop", **sizes
) -> list[Planned]:
    """Claim C9: trained arms with every value of one field of `Run`, at the rates that are found at
    the field's default value."""
    trained = [one for one in adapter_runs(names=[dataset], arms=arms, **sizes) if one.trials]
    return [replace(o, run=replace(o.run, **{field: value})) for value in values for o in trained]


def complete(
    plan: Sequence[Planned], store: Store, processes: int = 1, device: str = "cpu"
) -> list[Run]:
    """Make what is unfinished of a plan; returns its runs with their learning rates, in order."""
    while waiting := [run for run in tried(plan, store) if store.result(run) is None]:
        sweep(waiting, store, processes, device)
    runs = found(plan, store)
    sweep(runs, store, processes, device)
    return runs


def tried(plan: Sequence[Planned], store: Store) -> list[Run]:
    """The runs that find the learning rates of a plan, as far as is known by now."""
    trials = dict.fromkeys((trial, one.most) for one in plan for trial in one.trials)
    return [run for trial, most in trials for run in rates_tried(trial, store, most)]


def rates_tried(trial: Run, store: Store, most: int = MOST_RATES) -> list[Run]:
    """A run with the three rates of its arm; while the best of them is the lowest or the highest,
    with one more beyond, up to `most` in all."""
    runs = [replace(trial, learning_rate=rate) for rate in arm_of(trial).rates]
    while len(runs) < most and all(store.result(run) is not None for run in runs):
        best, rates = best_of(runs, store).learning_rate, sorted(run.learning_rate for run in runs)
        if rates[0] < best < rates[-1]:
            break
        factor = rates[1] / rates[0]
        beyond = best / factor if best == rates[0] else best * factor
        runs.append(replace(trial, learning_rate=beyond))
    return runs


def best_of(runs: Sequence[Run], store: Store) -> Run:
    """The run that did best on the validation questions; of equals, the one with the lower loss.
    Raises ValueError when no run is finished or all diverged."""
    pairs = [(run, store.result(run) or {}) for run in runs]
    scores = {r: (x["validation"], -x["validation_loss"]) for r, x in pairs if "validation" in x}
    if not scores:
        raise ValueError(
            f"None of {len(runs)} runs of {runs[0].arm!r} on {runs[0].dataset!r} gave a result."
        )
    return max(scores, key=scores.__getitem__)


def found(plan: Sequence[Planned], store: Store) -> list[Run]:
    """The runs of a plan with the learning rates that are found; 0 where trials are unfinished."""
    settings = {}
    for trials, most in {(one.trials, one.most) for one in plan}:
        runs = [run for trial in trials for run in rates_tried(trial, store, most)]
        if runs and all(store.result(run) is not None for run in runs):
            best = best_of(runs, store)
            settings[trials] = {n: getattr(best, n) for n in ("learning_rate", "weight_decay")}
    return [replace(one.run, **settings.get(one.trials, {})) for one in plan]


def ship(
    plans: Iterable[Sequence[Planned]], store: Store, folder: Path, weights: bool = True
) -> int:
    """Write what this repository ships of plans into `folder`, unless all of it was shipped before;
    returns the number of results that are new. Weights are those of back attention (from scratch:
    of the first seed) and, on pretrained models, of other adapters' first seed; weights=False:
    results only, and none of runs whose weights are in the repository: the two stay together."""
    runs = [run for plan in plans for part in (tried, found) for run in part(plan, store)]
    runs = [run for run in runs if store.result(run) is not None]
    if not weights:
        runs = [run for run in runs if not (CHECKPOINTS / f"{run.key}.safetensors").exists()]
    new = [run for run in runs if run.key not in store.shipped]
    trained = [run for run in runs if run.test_items != 0 and run.arm not in UNTRAINED]
    whole = [run for run in trained if weights and _keeps_weights(run)]
    if new:
        store.export(runs, whole, folder)
    return len(new)


def _keeps_weights(run: Run) -> bool:
    if run.dataset == AGAIN[0]:  # the demo asks it again
        return run.arm == "back attention" and run.seed == 0
    if run.dataset in (*PLANTED, *AGAIN, ONE_HOP, WIDE) or run.arm in ALONE or run.kl:
        return False  # their results say all that is asked of them
    if run.arm in BACK_ATTENTION:
        return run.seed == 0 or run.model != SCRATCH
    return run.seed == 0 and run.model not in (SCRATCH, *OWN)


def sweep(runs: Iterable[Run], store: Store, processes: int = 1, device: str = "cpu") -> None:
    """Make all unfinished runs, in `processes` processes at a time or, where BACKATTN_CLUSTER holds
    the address of a dask scheduler (`--cluster`), on its workers, which see the store's folder."""
    from joblib import Parallel, delayed

    waiting = [run for run in runs if store.result(run) is None]
    if waiting:
        address = os.environ.get(runtime.CLUSTER)
        with _cluster(address) if address else contextlib.nullcontext():
            pool = Parallel(-1 if address else processes, return_as="generator_unordered")
            made = pool(delayed(_job)(run, store, device) for run in waiting)
            for _ in runtime.progress(made, "runs", total=len(waiting), unit="run"):
                pass


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[None]:
    """Makes joblib's jobs run on the workers of a dask scheduler; OSError where they cannot."""
    from distributed import Client
    from joblib import parallel_config

    try:
        client = Client(address, timeout=20)
    except (OSError, TimeoutError, ValueError) as error:
        raise OSError(f"No dask scheduler answers at {address!r} (--cluster): {error}") from error
    with client, parallel_config(backend="dask"):
        # Threads would share one model, and with a single one joblib would stay here.
        if set(client.nthreads().values()) != {1} or len(client.nthreads()) < 2:
            raise OSError(
                f"{address} must have two workers or more, of one thread each: "
                "dask worker --nworkers 2 --nthreads 1."
            )
        yield


def _job(run: Run, store: Store, device: str) -> None:
    runtime.use_threads()
    with patch.dict(os.environ):
        os.environ.pop(runtime.PROGRESS_FILE, None)  # the bar of the sweep is enough
        train_and_test(run, store, device)
