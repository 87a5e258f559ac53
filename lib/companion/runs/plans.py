"""Which runs are made."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from backattn import runtime
from backattn.adapters.arms import ARMS
from companion.questions.datasets import DATASETS
from companion.runs.perform import train_and_test
from companion.runs.run import OF_TRAINED, SCRATCH, UNTRAINED, Run
from companion.runs.scratch import COMPOSING_ARMS, SCRATCH_ARMS
from companion.runs.store import CHECKPOINTS, Store

MOST_RATES = 4

DECAYS = (
    0.1,
    0.3,
    1.0,
)  # weight decays tried for them: with little, compositions are learnt by heart (Wang et al. 2024)

SIZED = ("1 layer + back attention", "1 layer, wide")  # whose weights depend on d′

RATES = {  # learning rates tried first for each arm, see `search`
    **dict.fromkeys(ARMS, (2.5e-4, 1e-3, 4e-3)),
    "bias": (4e-3, 1.6e-2, 6.4e-2),
    **dict.fromkeys([*SCRATCH_ARMS, *COMPOSING_ARMS], (5e-4, 1e-3, 2e-3)),
}

CORE_ARMS = ("back attention", "same layer", "residual LoRA")  # equal weights, one place

SEEDS = (0, 1, 2)


def scratch_runs(
    store: Store,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    widths: Sequence[int] = (440,),
    dims: Sequence[int] = (160,),
    tried_for: int = 250,
) -> tuple[list[Run], list[Run]]:
    """Claims C7 and C11: (runs that try learning rates, runs of 750 steps at the best of them for all seeds), for
    models of some widths, with each d′ where it counts (SIZED).

    tried_for: steps after which a learning rate is judged. The first list grows while the best is at an end (`search`);
    the second is empty until that is done.
    """
    shape = dict(model=SCRATCH, source_layer=0, dim=160, batch_size=256, train_items=None)
    shape |= dict(validation_items=1000, test_items=2000, steps=750)
    plans = [Run("2-digit", arm, width=width, **shape) for width in widths for arm in SCRATCH_ARMS]
    plans = [
        replace(run, dim=dim) for run in plans for dim in (dims if run.arm in SIZED else [run.dim])
    ]
    tried, best = _search_all(plans, store, steps=tried_for)
    if None in best:
        return tried, []
    return tried, [replace(run, seed=seed) for seed in seeds for run in best]


def composing_runs(
    store: Store, seeds: Sequence[int] = (0, 1, 2), steps: int = 1600, tried_for: int = 600
) -> tuple[list[Run], list[Run]]:
    """Two hops from scratch, COMPOSING_ARMS on `datasets.compositions`, each at its best learning rate and weight decay
    for ID/ID questions; see `scratch_runs` for the two lists."""
    shape = dict(
        model=SCRATCH,
        source_layer=0,
        dim=32,
        width=100,
        batch_size=256,
        dtype="float32",
        steps=steps,
    )
    shape |= dict(train_items=None, validation_items=None, test_items=None)
    plans = [
        Run("compositions", arm, weight_decay=decay, **shape)
        for arm in COMPOSING_ARMS
        for decay in DECAYS
    ]
    tried, best = _search_all(plans, store, steps=tried_for)
    if None in best:
        return tried, []
    best = [best_of([run for run in tried if run.arm == arm], store) for arm in COMPOSING_ARMS]
    return tried, [
        replace(run, seed=seed, steps=steps, test_items=None) for seed in seeds for run in best
    ]


def _search_all(
    runs: Sequence[Run], store: Store, steps: int
) -> tuple[list[Run], list[Run | None]]:
    found = [search(run, store, steps) for run in runs]
    return [one for tried, _ in found for one in tried], [best for _, best in found]


def adapter_runs(
    store: Store,
    model: str = "smollm2",
    names: Sequence[str] = ("two-hop",),
    arms: Sequence[str] = tuple(ARMS),
    **sizes,
) -> tuple[list[Run], list[Run]]:
    """Claim C8: (runs that try learning rates, runs at the best of them for all seeds and without training).

    See `scratch_runs` for the two lists. sizes: fields of `Run`, for every run; some datasets take longer (`Dataset.longer`).
    """
    sizes = {"steps": 100, **sizes}
    places = list(dict.fromkeys(DATASETS[name].tuned_on for name in names))
    tried, best = [], []
    for place in places:
        steps = sizes["steps"] * DATASETS[place].longer
        plans = [Run(place, arm, model=model, **{**sizes, "steps": steps}) for arm in arms]
        here, found = _search_all(plans, store, steps=steps // 2)
        tried, best = tried + here, best + found
    if None in best:
        return tried, []
    final = []
    for name in names:
        plain = Run(
            name,
            "zero-shot",
            model=model,
            **{k: v for k, v in sizes.items() if k not in OF_TRAINED},
        )
        steps = sizes["steps"] * DATASETS[name].longer
        tuned = [
            replace(run, steps=steps) for run in best if run.dataset == DATASETS[name].tuned_on
        ]
        mine = [plain, replace(plain, arm="few-shot"), *tuned]
        final += [replace(run, dataset=name, seed=seed) for seed in SEEDS for run in mine]
    return tried, final


def main_runs(
    store: Store,
    model: str = "smollm2",
    every_arm_on: Sequence[str] = ("two-hop",),
    core_arms_on: Sequence[str] = ("2-digit", "1DC", "SVAMP", "MultiArith"),
    **sizes,
) -> tuple[list[Run], list[Run]]:
    """Claim C8 as notebook 03 asks it: every arm on some datasets, CORE_ARMS on others; see `adapter_runs`."""
    wanted = [
        (names, arms)
        for names, arms in ((every_arm_on, tuple(ARMS)), (core_arms_on, CORE_ARMS))
        if names
    ]
    parts = [adapter_runs(store, model, names, arms, **sizes) for names, arms in wanted]
    tried, final = ([run for part in lists for run in part] for lists in zip(*parts, strict=True))
    return tried, final if all(part for _, part in parts) else []


def varied_runs(
    store: Store,
    field: str,
    values: Sequence,
    arms: Sequence[str] = CORE_ARMS,
    dataset: str = "two-hop",
    **sizes,
) -> tuple[list[Run], list[Run]]:
    """Claim C9: trained arms with every value of one field of `Run`, at the rates of `adapter_runs`.

    Rates are found at the field's default value only. See `scratch_runs` for the two lists.
    """
    tried, final = adapter_runs(store, names=[dataset], arms=arms, **sizes)
    mine = [run for run in final if run.arm in arms]
    return tried, [replace(run, **{field: value}) for value in values for run in mine]


def complete(
    plan: Callable[[Store], tuple[list[Run], list[Run]]],
    store: Store,
    processes: int = 1,
    device: str = "cpu",
) -> list[Run]:
    """Perform what is unfinished of a plan (`scratch_runs`, `adapter_runs` and others), and return its second list."""
    while True:
        tried, final = plan(store)
        sweep(tried, store, processes, device)
        if final:
            sweep(final, store, processes, device)
            return final


def ship(
    plans: Iterable[Callable[[Store], tuple[list[Run], list[Run]]]],
    store: Store,
    folder: Path,
    weights: bool = True,
) -> int:
    """Write what this repository ships of finished plans into `folder`, unless all of it was shipped before.

    All results, and the weights of back attention on a language model, of the other arms there for the first seed, and
    of back attention from scratch for the first seed. With weights=False results only, without those runs that are in
    the repository with their weights, so that the two stay together. Returns the number of results that are new.
    """
    runs = [run for plan in plans for part in plan(store) for run in part]
    if not weights:
        runs = [run for run in runs if not (CHECKPOINTS / f"{run.key}.safetensors").exists()]
    new = [run for run in runs if run.key not in store.shipped]
    if new:
        tested = [run for run in runs if run.test_items != 0 and run.arm not in UNTRAINED]
        first = [
            run
            for run in tested
            if run.seed == 0 and (run.model != SCRATCH or "back attention" in run.arm)
        ]
        more = [run for run in tested if run.seed != 0 and run.arm == "back attention"]
        store.ship(runs, first + more if weights else [], folder)
    return len(new)


def sweep(runs: Iterable[Run], store: Store, processes: int = 1, device: str = "cpu") -> None:
    """Perform all runs, the unfinished ones in `processes` processes at a time.

    Where the environment variable BACKATTN_CLUSTER holds the address of a dask scheduler (`--cluster`), its workers
    make them instead: two or more, with one thread each, that see the store's folder. Raises OSError when the scheduler
    does not answer or its workers are others.
    """
    from joblib import Parallel, delayed

    waiting = [run for run in runs if store.result(run) is None]
    if waiting:
        jobs = (delayed(_job)(run, store, device) for run in waiting)
        with _workers(processes) as count:
            made = Parallel(n_jobs=count, return_as="generator_unordered")(jobs)
            for _ in runtime.progress(made, "runs", total=len(waiting), unit="run"):
                pass


@contextlib.contextmanager
def _workers(processes: int) -> Iterator[int]:
    """How many jobs run at a time: in processes here, or on the cluster named by BACKATTN_CLUSTER."""
    address = os.environ.get(runtime.CLUSTER)
    if not address:
        yield processes
        return
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
                f"{address} must have two workers or more, of one thread each: dask worker --nworkers 2 --nthreads 1."
            )
        yield -1


def _job(run: Run, store: Store, device: str) -> None:
    runtime.use_threads()
    bars = os.environ.pop(runtime.PROGRESS_FILE, None)  # the bar of the sweep is enough
    try:
        train_and_test(run, store, device)
    except FloatingPointError as error:  # too high a learning rate is a result
        if runtime.process_state().is_main_process:
            store.keep(run, {"run": asdict(run), "diverged": str(error)}, {})
        runtime.process_state().wait_for_everyone()
    finally:
        if bars is not None:
            os.environ[runtime.PROGRESS_FILE] = bars


def best_of(tried: Sequence[Run], store: Store) -> Run:
    """The finished run that did best on the validation questions; of equals, the one with the lower loss there.

    Raises ValueError when no run is finished or all diverged.
    """
    scored = [(run, store.result(run)) for run in tried]
    scored = [
        (run, result) for run, result in scored if result is not None and "diverged" not in result
    ]
    if not scored:
        raise ValueError(
            f"None of {len(tried)} runs of {tried[0].arm!r} on {tried[0].dataset!r} gave a result."
        )
    return max(scored, key=lambda pair: (pair[1]["validation"], -pair[1]["validation_loss"]))[0]


def search(run: Run, store: Store, steps: int) -> tuple[list[Run], Run | None]:
    """Learning rates to try for a run: (runs of `steps` steps, `run` at the best rate once it is known).

    The three RATES of its arm; while the best is the lowest or the highest, one more beyond, up to MOST_RATES in all.
    Only validation questions decide: the runs that try have no test.
    """
    tried = [replace(run, learning_rate=rate, steps=steps, test_items=0) for rate in RATES[run.arm]]
    while all(store.result(one) is not None for one in tried):
        best, rates = best_of(tried, store), sorted(one.learning_rate for one in tried)
        factor = rates[1] / rates[0]
        beyond = {rates[0]: rates[0] / factor, rates[-1]: rates[-1] * factor}.get(
            best.learning_rate
        )
        if beyond is None or len(tried) == MOST_RATES:
            return tried, replace(run, learning_rate=best.learning_rate)
        tried.append(replace(tried[0], learning_rate=beyond))
    return tried, None
