"""What a training run is, where its result lies, and how many of them are made.

A run is its configuration; its key is a hash of that, of the data and of this file's VERSION. A finished run leaves
result.json and weights.safetensors in a folder named by the key, so that a sweep is a list of runs of which the
finished ones are skipped and the stopped ones go on.
"""

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import census, datasets, runtime
from .back_attention import BackAttentionConfig, get_back_attention_model
from .baselines import ARMS, make_arm
from .models import load_model
from .paths import BUILD, DATA
from .training import Items, Recipe, evaluate, first_tokens, numbers, perplexity, train

CHECKPOINTS = DATA / "checkpoints"
VERSION = 1  # raised when the same configuration would give another result
UNTRAINED = ("zero-shot", "few-shot")
SHOTS = 4
SCRATCH = "scratch"  # the model of runs from scratch
SCRATCH_ARMS = {
    "1 layer": "the baseline",
    "1 layer + back attention": "d′ = 160, reading the embedding's and the layer's own states",
    "2 layers": "what it is said to match",
    "1 layer, wide": "the FFN widened to the weights of back attention",
    "1 layer, twice": "the same layer run two times (weight-tied)",
}


@dataclass(frozen=True)
class Run:
    """One training run. Sizes are numbers of questions; a seed decides initial weights and the order of questions."""

    dataset: str
    arm: str
    seed: int = 0
    learning_rate: float = 0.0
    steps: int = 0
    model: str = "smollm2"
    source_layer: int = 6
    dim: int = 64
    batch_size: int = 32
    train_items: int | None = 1500
    validation_items: int | None = 200
    test_items: int | None = 300
    dtype: str = "bfloat16"  # of the frozen model in training; it is tested in fp32

    @property
    def key(self) -> str:
        """16 hexadecimal digits that name the run."""
        about = [VERSION, asdict(self), data_hash(self.dataset)]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def recipe(self) -> Recipe:
        scratch = self.model == SCRATCH
        return Recipe(
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=0.01 if scratch else 0.0,
            seed=self.seed,
            evaluations=12 if scratch else 3,
            autocast=scratch and self.dtype == "bfloat16",
        )


RATES = {  # learning rates tried for each arm, as many for all
    **dict.fromkeys(ARMS, (2.5e-4, 1e-3, 4e-3)),
    "bias": (4e-3, 1.6e-2, 6.4e-2),
    **dict.fromkeys(SCRATCH_ARMS, (5e-4, 1e-3, 2e-3)),
}


@functools.cache
def data_hash(dataset: str) -> str:
    """Hash of a dataset's questions, answers and splits."""
    frame = datasets.load(dataset)[["prompt", "answer", "split"]]
    return hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- questions as a model gets them


def questions(run: Run, tokenizer, split: str) -> Items:
    """A split of the run's dataset as the run asks it."""
    counts = {"train": run.train_items, "validation": run.validation_items, "test": run.test_items}
    frame = datasets.load(run.dataset)
    part = datasets.draw(frame, split, counts[split])
    if run.arm == "few-shot":
        shown = datasets.draw(frame, "train", SHOTS, seed=run.seed)
        part = part.assign(
            prompt=("".join(f"{p}{a}. " for p, a in shown[["prompt", "answer"]].to_numpy())) + part["prompt"]
        )
    if run.model == SCRATCH:
        part = part.assign(answer=part["answer"].str.strip())
    if "e3_aliases" not in part:
        return numbers(tokenizer, part, end=";" if run.model == SCRATCH else ".")
    ids = census.candidates(tokenizer, frame).set_index(["pair", "e1", "r1", "r2"])["e3_ids"]
    keys = zip(part["pair"], part["e1"], part["r1"], part["r2"], strict=True)
    return first_tokens(tokenizer, part, [ids[key] for key in keys])


def scratch_model(arm: str) -> tuple[nn.Module, object]:
    """An untrained arm of the small Llama of claim C7 and its tokenizer of single characters.

    Width 440, FFN of 1173 with a gate (as many weights as one of 4 · 440 without), 10 heads. Raises ValueError for an
    unknown arm.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if arm not in SCRATCH_ARMS:
        raise ValueError(f"Unknown arm {arm!r}; choose one of {', '.join(SCRATCH_ARMS)}.")
    characters = ["<pad>", *"0123456789+-=;"]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    width, ffn, dim = 440, 1173, 160
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=width,
        intermediate_size=ffn + (round(4 * dim / 3) if arm == "1 layer, wide" else 0),
        num_hidden_layers=2 if arm in ("2 layers", "1 layer, twice") else 1,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    if arm == "1 layer, twice":
        model.model.layers[1] = model.model.layers[0]
    if arm == "1 layer + back attention":
        return get_back_attention_model(model, BackAttentionConfig(0, dim), freeze_base=False), tokenizer
    return model, tokenizer


@functools.lru_cache(maxsize=2)
def _base(name: str, dtype: str, device: str):
    model, tokenizer = load_model(name, dtype=getattr(torch, dtype), device=device)
    model.set_attn_implementation("eager")  # its backward pass is the faster one on CPUs for short texts
    return model, tokenizer


@contextlib.contextmanager
def armed(run: Run, dtype: str, device: str = "cpu") -> Iterator[tuple[nn.Module, object]]:
    """The run's model with its untrained arm, drawn from the run's seed, and the tokenizer; taken off afterwards."""
    if run.model == SCRATCH:
        torch.manual_seed(run.seed)
        model, tokenizer = scratch_model(run.arm)
        model = model.to(device)
    else:
        base, tokenizer = _base(run.model, dtype, device)
        torch.manual_seed(run.seed)
        model = base if run.arm in UNTRAINED else make_arm(run.arm, base, run.source_layer, run.dim)
    try:
        yield model, tokenizer
    finally:
        if hasattr(model, "unload"):
            model.unload()


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that require gradients, by name, as fp16 copies: what is kept of a run."""
    return {n: p.detach().to("cpu", torch.float16).contiguous() for n, p in model.named_parameters() if p.requires_grad}


def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put kept weights back; raises ValueError when they belong to another arm."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if own.keys() != weights.keys() or any(own[n].shape != weights[n].shape for n in own):
        raise ValueError("These weights belong to another arm, another width or another model.")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])


# ---------------------------------------------------------------- one run


class Store:
    """Folders of finished and of stopped runs."""

    def __init__(self, folder: Path = BUILD / "runs", shipped: Path | None = DATA / "runs.jsonl"):
        """folder: where runs are made; shipped: a file with results of finished runs, one a line, or None."""
        self.folder, self.shipped = Path(folder), {}
        if shipped is not None and shipped.exists():
            for line in shipped.read_text(encoding="utf-8").splitlines():
                result = json.loads(line)
                self.shipped[result["key"]] = result

    def place(self, run: Run) -> Path:
        return self.folder / run.key

    def result(self, run: Run) -> dict | None:
        """The result of a finished run, made here or shipped, else None."""
        try:
            return json.loads((self.place(run) / "result.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return self.shipped.get(run.key)

    def weights(self, run: Run) -> dict[str, Tensor]:
        """The trained weights of a finished run; raises FileNotFoundError where only its result was shipped."""
        for path in (self.place(run) / "weights.safetensors", CHECKPOINTS / f"{run.key}.safetensors"):
            if path.exists():
                return load_file(path)
        raise FileNotFoundError(
            f"The weights of run {run.key} ({run.dataset}, {run.arm}, seed {run.seed}) are not shipped: train it with "
            "./run_all.sh --profile full."
        )

    def ship(self, runs: Iterable[Run], with_weights: Iterable[Run] = (), folder: Path = DATA) -> None:
        """Write the results of finished runs into `folder`, one a line, sorted by key, and the weights of some."""
        lines = {key: json.dumps(result) for key, result in self.shipped.items()}
        lines |= {run.key: json.dumps({"key": run.key, **self.result(run)}) for run in runs if self.result(run)}
        with runtime.atomic_file(folder / "runs.jsonl") as temporary:
            temporary.write_text("".join(f"{lines[key]}\n" for key in sorted(lines)), encoding="utf-8")
        for run in with_weights:
            with runtime.atomic_file(folder / "checkpoints" / f"{run.key}.safetensors") as temporary:
                save_file(self.weights(run), temporary)

    def keep(self, run: Run, result: dict, weights: dict[str, Tensor]) -> None:
        """Weights first: a run is finished when its result is there."""
        place = self.place(run)
        if weights:
            with runtime.atomic_file(place / "weights.safetensors") as temporary:
                save_file(weights, temporary)
        with runtime.atomic_file(place / "result.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")


def perform(run: Run, store: Store, device: str = "cpu") -> dict:
    """Train and test one run, unless it is finished; a stopped one goes on. Returns its result.

    A result holds: run, trained (number of weights), seconds (of training, the last sitting), validation (share right),
    validation_loss, right (one 0 or 1 per test question), perplexity (of held-out text, language models only), curve
    (rows of `training.train`), flops (of a forward pass over the first test question), hardware.
    """
    done = store.result(run)
    if done is not None:
        return done
    place, begin = store.place(run), time.monotonic()
    place.mkdir(parents=True, exist_ok=True)
    weights, curve, result = {}, [], {"run": asdict(run), "trained": 0}
    if run.arm not in UNTRAINED:
        with armed(run, run.dtype if run.model != SCRATCH else "float32", device) as (model, tokenizer):
            items, validation = (questions(run, tokenizer, split) for split in ("train", "validation"))
            curve = train(model, items, run.recipe, validation, place / "training.pt").to_dict("records")
            weights = trained_weights(model)
            result["trained"] = sum(tensor.numel() for tensor in weights.values())
    result["seconds"] = round(time.monotonic() - begin, 1)
    with armed(run, "float32", device) as (model, tokenizer):
        if weights:
            put_weights(model, weights)  # what is tested is what is kept
        validation, test = (questions(run, tokenizer, split) for split in ("validation", "test"))
        right, loss = evaluate(model, validation)
        result |= {"validation": float(right.mean()), "validation_loss": loss}
        result["right"] = "".join(map(str, evaluate(model, test)[0].astype(int)))
        if run.model != SCRATCH:
            result["perplexity"] = perplexity(model, tokenizer, datasets.held_out_text())
        result["flops"] = forward_flops(model, torch.tensor([test.prompts[0]], device=device))
    result |= {"curve": curve, "hardware": runtime.hardware()}
    store.keep(run, result, weights)
    return result


def recheck(runs: Iterable[Run], store: Store, count: int, device: str = "cpu") -> pd.DataFrame:
    """Ask trained arms their first `count` test questions again, with the weights that were kept.

    Returns: dataset, arm, seed, n, accuracy (now), kept (as it was on the same questions), agree (share of questions
    with the same outcome). Raises FileNotFoundError where a run's weights are not there.
    """
    rows = []
    for run in runtime.progress(list(runs), "asking again", unit="run"):
        kept = np.array([c == "1" for c in store.result(run)["right"][:count]])
        weights = store.weights(run)
        with armed(run, "float32", device) as (model, tokenizer):
            put_weights(model, weights)
            right = evaluate(model, questions(replace(run, test_items=len(kept)), tokenizer, "test"))[0]
        about = {"dataset": run.dataset, "arm": run.arm, "seed": run.seed, "n": len(kept)}
        rows.append({**about, "accuracy": right.mean(), "kept": kept.mean(), "agree": (right == kept).mean()})
    return pd.DataFrame(rows)


def forward_flops(model: nn.Module, ids: Tensor) -> int:
    """Floating-point operations of one forward pass over ids [B, T], logits of the last token only, as torch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, logits_to_keep=1, use_cache=False)
    return counter.get_total_flops()


# ---------------------------------------------------------------- many runs

C8_DATASETS = ("2-digit", "1DC", "two-hop", "legs, one kind", "legs, two kinds")
TUNED_ON = {"two-hop": "two-hop"}  # where a dataset's learning rates are chosen; "1DC" for all others
SEEDS = (0, 1, 2)


def scratch_runs(store: Store, seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> tuple[list[Run], list[Run]]:
    """Claim C7: (runs that try learning rates for a third of the time, runs at the best of them for all seeds).

    The second list is empty until the first is finished.
    """
    shape = dict(model=SCRATCH, source_layer=0, dim=160, batch_size=256, train_items=None)
    shape |= dict(validation_items=1000, test_items=2000)
    tried = [run for arm in SCRATCH_ARMS for run in grid(Run("2-digit", arm, steps=250, **shape))]
    if any(store.result(run) is None for run in tried):
        return tried, []
    return tried, [replace(run, steps=750) for run in tuned(tried, store, seeds)]


def adapter_runs(
    store: Store, model: str = "smollm2", names: Sequence[str] = C8_DATASETS, arms: Sequence[str] = tuple(ARMS), **sizes
) -> tuple[list[Run], list[Run]]:
    """Claim C8: (runs that try learning rates, runs at the best of them for all seeds and without training).

    The second list is empty until the first is finished. sizes: fields of `Run`, for every run.
    """
    steps = {"steps": 150, **sizes}
    places = list(dict.fromkeys(TUNED_ON.get(name, "1DC") for name in names))
    tried = {place: [r for arm in arms for r in grid(Run(place, arm, model=model, **steps))] for place in places}
    everything = [run for runs in tried.values() for run in runs]
    if any(store.result(run) is None for run in everything):
        return everything, []
    final = []
    for name in names:
        plain = Run(name, "zero-shot", model=model, **{**steps, "steps": 0})
        final += [plain, *(replace(plain, arm="few-shot", seed=seed) for seed in SEEDS)]
        final += [replace(run, dataset=name) for run in tuned(tried[TUNED_ON.get(name, "1DC")], store, SEEDS)]
    return everything, final


def complete(
    plan: Callable[[Store], tuple[list[Run], list[Run]]], store: Store, processes: int = 1, device: str = "cpu"
) -> list[Run]:
    """Perform what is unfinished of a plan (`scratch_runs`, `adapter_runs`), and return its second list."""
    sweep(plan(store)[0], store, processes, device)
    final = plan(store)[1]
    sweep(final, store, processes, device)
    return final


def sweep(runs: Iterable[Run], store: Store, processes: int = 1, device: str = "cpu") -> pd.DataFrame:
    """Perform all runs, the unfinished ones in `processes` processes at a time; returns `table` of them."""
    from joblib import Parallel, delayed

    runs = list(runs)
    waiting = [run for run in runs if store.result(run) is None]
    if waiting:
        jobs = (delayed(_job)(run, store, device) for run in waiting)
        made = Parallel(n_jobs=processes, return_as="generator_unordered")(jobs)
        for _ in runtime.progress(made, "runs", total=len(waiting), unit="run"):
            pass
    return table(runs, store)


def _job(run: Run, store: Store, device: str) -> None:
    runtime.use_threads()
    os.environ.pop(runtime.PROGRESS_FILE, None)  # the bar of the sweep is enough
    perform(run, store, device)


def table(runs: Sequence[Run], store: Store) -> pd.DataFrame:
    """One row per finished run: its configuration and its result, but for the curve; test is the share right."""
    rows = []
    for run in runs:
        result = store.result(run)
        if result is not None:
            kept = {k: v for k, v in result.items() if k not in ("key", "run", "curve")}
            rows.append(
                {"key": run.key, **result["run"], **kept, "test": float(np.mean([c == "1" for c in result["right"]]))}
            )
    return pd.DataFrame(rows)


def grid(run: Run) -> list[Run]:
    """The run at every learning rate that is tried for its arm."""
    return [replace(run, learning_rate=rate) for rate in RATES[run.arm]]


def tuned(grid: Sequence[Run], store: Store, seeds: Sequence[int]) -> list[Run]:
    """The runs at the learning rate that did best on the validation questions, for all seeds.

    grid: runs that differ in learning rate, finished, with one seed; grouped by everything else.
    """
    groups: dict[Run, list[Run]] = {}
    for run in grid:
        groups.setdefault(replace(run, learning_rate=0.0), []).append(run)
    chosen = []
    for candidates in groups.values():
        results = {run: store.result(run) for run in candidates}
        finished = [run for run in candidates if results[run] is not None]
        best = max(finished, key=lambda r: (results[r]["validation"], -results[r]["validation_loss"]))
        chosen += [replace(best, seed=seed) for seed in seeds]
    return chosen
