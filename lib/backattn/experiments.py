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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import census, datasets, runtime
from .arch import input_device
from .back_attention import BackAttentionConfig, TwoPassModel, get_back_attention_model
from .baselines import ARMS, LoopLoRA, Return, make_arm
from .models import EMBEDDED, load_model, one_device
from .paths import BUILD, DATA
from .training import Items, Recipe, evaluate, first_tokens, numbers, perplexity, train, written

CHECKPOINTS = DATA / "checkpoints"
VERSION = 1  # raised when the same configuration would give another result
UNTRAINED = ("zero-shot", "few-shot")
OF_TRAINED = ("source_layer", "dim", "memory_layers", "steps")  # fields that mean nothing where nothing is trained
SHOTS = 4
MOST_RATES = 4
SCRATCH = "scratch"  # the model of runs from scratch
SCRATCH_ARMS = {
    "1 layer": "the baseline",
    "1 layer + back attention": "d′ = 160, reading the embedding's and the layer's own states",
    "2 layers": "what it is said to match",
    "1 layer, wide": "the FFN widened to the weights of back attention",
    "1 layer, twice": "the same layer run two times (weight-tied)",
}
COMPOSING_ARMS = {
    "2 layers": "the baseline",
    "2 layers + back attention": "d′ = 32, in layer 0, reading all states",
    "2 layers + same layer": "the same module reading the embedding's states only: no second pass",
    "2 layers + loop": "as many weights, a map of the final state at the same position into layer 0; layers run again",
    "2 layers + return": "one number: the final state itself, times it, in layer 0; layers run again",
    "2 layers, twice": "the same layers run two times (weight-tied)",
    "4 layers": "as many operations as the layers run twice",
}
DECAYS = (
    0.1,
    0.3,
    1.0,
)  # weight decays tried for them: with little, compositions are learnt by heart (Wang et al. 2024)
SIZED = ("1 layer + back attention", "1 layer, wide")  # whose weights depend on d′


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
    dtype: str = "bfloat16"  # of the frozen model in training; it is tested in fp32, see `tested_in`
    memory_layers: tuple[int, ...] | None = None  # what back attention reads; None: from the source layer up
    width: int = 440  # of a model from scratch
    weight_decay: float | None = None  # None: 0.01 from scratch, else none

    @property
    def fold(self) -> int | None:
        """See `datasets.split`: models from scratch are all tested on the same questions."""
        return None if self.model == SCRATCH else self.seed % datasets.FOLDS

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
            weight_decay=self.weight_decay if self.weight_decay is not None else 0.01 if scratch else 0.0,
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
    return {f.name: value for f in fields(settings) if (value := getattr(settings, f.name)) != f.default}


RATES = {  # learning rates tried first for each arm, see `search`
    **dict.fromkeys(ARMS, (2.5e-4, 1e-3, 4e-3)),
    "bias": (4e-3, 1.6e-2, 6.4e-2),
    **dict.fromkeys([*SCRATCH_ARMS, *COMPOSING_ARMS], (5e-4, 1e-3, 2e-3)),
}


@functools.cache
def data_hash(dataset: str) -> str:
    """Hash of a dataset's questions, answers (other names included), groups, and of how groups are split."""
    rules = [datasets.FOLDS, datasets.VALIDATION]
    if dataset.lower() in datasets.PUBLISHED:  # the file's own hash: its results can be read where it cannot be had
        sha256 = datasets.PUBLISHED[dataset.lower()][2]
        return hashlib.sha256(f"{rules}{datasets.TWINS}{sha256}".encode()).hexdigest()[:16]
    frame = datasets.load(dataset)
    columns = [n for n in ("prompt", "answer", "group", "tested", "e3_aliases", "split") if n in frame]
    return hashlib.sha256(f"{rules}{frame[columns].to_csv(index=False)}".encode()).hexdigest()[:16]


# ---------------------------------------------------------------- questions as a model gets them


def asked(run: Run, split: str) -> pd.DataFrame:
    """A split of the run's dataset, as `datasets` has it."""
    return _drawn(run, _folded(run.dataset, run.fold), split)


def _drawn(run: Run, frame: pd.DataFrame, split: str) -> pd.DataFrame:
    counts = {"train": run.train_items, "validation": run.validation_items, "test": run.test_items}
    return datasets.draw(frame, split, counts[split])


def test_groups(run: Run, result: dict) -> np.ndarray:
    """The name or names of each test question of a finished run: [n]."""
    return np.array(result["groups"]) if "groups" in result else asked(run, "test")["group"].to_numpy()


@functools.cache
def _folded(dataset: str, fold: int | None) -> pd.DataFrame:
    """A dataset with the split of each question; not to be changed."""
    return datasets.split(datasets.load(dataset), fold)


def questions(run: Run, tokenizer, split: str) -> Items:
    """A split of the run's dataset as the run asks it."""
    frame = _folded(run.dataset, run.fold)
    if run.dataset in datasets.BY_FIRST_TOKEN:
        frame = census.candidates(tokenizer, frame)
    part = _drawn(run, frame, split)
    if run.arm == "few-shot":
        shown = datasets.draw(frame, "train", SHOTS, seed=run.seed)
        part = part.assign(
            prompt=("".join(f"{p}{a}. " for p, a in shown[["prompt", "answer"]].to_numpy())) + part["prompt"]
        )
    if run.dataset == "compositions":
        return replace(first_tokens(tokenizer, part), kinds=part["kind"].tolist())
    if run.model == SCRATCH:
        part = _fixed_width(part)
    if run.dataset not in datasets.BY_FIRST_TOKEN:
        return numbers(tokenizer, part, end=";" if run.model == SCRATCH else ".")
    return first_tokens(tokenizer, part, part["e3_ids"].tolist())


def _fixed_width(part: pd.DataFrame) -> pd.DataFrame:
    """Sums as models from scratch read them, "07+83=" and "0090" or "-021": a digit's place tells what it is worth."""
    prompts = part["prompt"].str.replace(r"\d+", lambda number: number[0].zfill(2), regex=True)
    return part.assign(prompt=prompts, answer=[f"{int(answer):04d}" for answer in part["answer"]])


def scratch_model(run: Run) -> tuple[nn.Module, object]:
    """A run's untrained small Llama, as for claim C7, and its tokenizer: of characters, or of the words of
    `datasets.compositions`.

    FFN of 8/3 of the width with a gate (as many weights as one of 4 times the width without), 10 heads; dim: d′ of back
    attention, or what widens the FFN by as many weights. Raises ValueError for an unknown arm.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    composing, arm = run.dataset == "compositions", run.arm
    arms = COMPOSING_ARMS if composing else SCRATCH_ARMS
    if arm not in arms:
        raise ValueError(f"Unknown arm {arm!r}; choose one of {', '.join(arms)}.")
    words, split = ["<pad>", *"0123456789+-=;"], pre_tokenizers.Split("", "isolated")
    if composing:
        named = (("e", datasets.INVENTED), ("r", datasets.RELATIONS))
        words, split = ["<pad>", *(f"{x}{i}" for x, n in named for i in range(n))], pre_tokenizers.WhitespaceSplit()
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    ffn, layers = round(8 * run.width / 3), int(arm[0])
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=run.width,
        intermediate_size=ffn + (round(4 * run.dim / 3) if arm == "1 layer, wide" else 0),
        num_hidden_layers=layers * (2 if arm.endswith("twice") else 1),
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    for k in range(layers, config.num_hidden_layers):
        model.model.layers[k] = model.model.layers[k - layers]
    if arm.endswith(("loop", "return")):
        update = LoopLoRA(run.width, 2 * run.dim) if arm.endswith("loop") else Return()
        return TwoPassModel(model, {0: update}, memory=(layers,), freeze_base=False), tokenizer
    if "+" in arm:
        memory = (0,) if arm.endswith("same layer") else run.memory_layers
        config = BackAttentionConfig(0, run.dim, memory_layers=memory)
        return get_back_attention_model(model, config, freeze_base=False), tokenizer
    return model, tokenizer


@functools.lru_cache(maxsize=2)
def _base(name: str, dtype: str, device: str):
    model, tokenizer = load_model(name, dtype=getattr(torch, dtype), device=device)
    return model, tokenizer


@contextlib.contextmanager
def armed(run: Run, dtype: str, device: str = "cpu") -> Iterator[tuple[nn.Module, object]]:
    """The run's model with its untrained arm, drawn from the run's seed, and the tokenizer; taken off afterwards."""
    if run.model == SCRATCH:
        torch.manual_seed(run.seed)
        model, tokenizer = scratch_model(run)
        model = model.to(one_device(device))
    else:
        base, tokenizer = _base(run.model, dtype, device)
        torch.manual_seed(run.seed)
        model = base if run.arm in UNTRAINED else make_arm(run.arm, base, run.source_layer, run.dim, run.memory_layers)
    model.set_attn_implementation("eager")  # its backward pass is the faster one on CPUs for short texts
    try:
        yield model, tokenizer
    finally:
        if hasattr(model, "unload"):
            model.unload()


@contextlib.contextmanager
def trained(run: Run, store: "Store", device: str = "cpu") -> Iterator[tuple[nn.Module, object]]:
    """`armed` as it is tested, with the weights that were kept; raises FileNotFoundError where they are not there."""
    weights = store.weights(run)
    with armed(run, tested_in(run), device) as (model, tokenizer):
        put_weights(model, weights)
        yield model, tokenizer


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
        """The trained weights of a finished run, made here or shipped.

        Raises FileNotFoundError where only its result was shipped, OSError for a shipped file with another sha256.
        """
        own, shipped = self.place(run) / "weights.safetensors", CHECKPOINTS / f"{run.key}.safetensors"
        if own.exists():
            return load_file(own)
        if shipped.exists():
            if _sha256(shipped) != self.shipped.get(run.key, {}).get("sha256"):
                raise OSError(
                    f"{shipped} is not the file that {DATA / 'runs.jsonl'} names (sha256): take both again from the "
                    "repository (git checkout)."
                )
            return load_file(shipped)
        raise FileNotFoundError(
            f"The weights of run {run.key} ({run.dataset}, {run.arm}, seed {run.seed}) are not shipped: train it with "
            "./run_all.sh --profile full."
        )

    def ship(self, runs: Iterable[Run], with_weights: Iterable[Run] = (), folder: Path = DATA) -> None:
        """Write the results of finished runs into `folder`, one a line, sorted by key, and the weights of some."""
        lines = dict(self.shipped)
        for run in runs:
            if self.result(run):
                lines[run.key] = {**lines.get(run.key, {}), "key": run.key, **self.result(run)}
        for run in with_weights:
            path = folder / "checkpoints" / f"{run.key}.safetensors"
            with runtime.atomic_file(path) as temporary:
                save_file(self.weights(run), temporary)
            lines[run.key]["sha256"] = _sha256(path)
        with runtime.atomic_file(folder / "runs.jsonl") as temporary:
            temporary.write_text("".join(f"{json.dumps(lines[key])}\n" for key in sorted(lines)), encoding="utf-8")

    def keep(self, run: Run, result: dict, weights: dict[str, Tensor]) -> None:
        """Weights first: a run is finished when its result is there."""
        place = self.place(run)
        if weights:
            with runtime.atomic_file(place / "weights.safetensors") as temporary:
                save_file(weights, temporary)
        with runtime.atomic_file(place / "result.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def perform(run: Run, store: Store, device: str = "cpu") -> dict:
    """Train and test one run, unless it is finished; a stopped one goes on. Returns its result. Under `accelerate
    launch` all processes train it together (see `training.train`) and the first one keeps it.

    A result holds: run, trained (number of weights), seconds (of training), curve (rows of `training.train`),
    hardware. A run without test adds validation (share right) and validation_loss. Others add right (one 0 or 1 per
    test question), groups (of each question, where the questions are not part of this repository), perplexity (of
    held-out text, language models only), flops (of a forward pass over the first question).
    """
    done, world = store.result(run), runtime.world()
    world.wait_for_everyone()  # all have looked before one writes
    if done is not None:
        return done
    place = store.place(run)
    place.mkdir(parents=True, exist_ok=True)
    weights, curve, result = {}, [], {"run": asdict(run), "trained": 0, "seconds": 0.0}
    if run.arm not in UNTRAINED:
        with armed(run, run.dtype if run.model != SCRATCH else "float32", device) as (model, tokenizer):
            items, validation = (questions(run, tokenizer, split) for split in ("train", "validation"))
            curve = train(model, items, run.recipe, validation, place / "training.pt").to_dict("records")
            weights = trained_weights(model)
            result["trained"] = sum(tensor.numel() for tensor in weights.values())
            result["seconds"] = round(curve[-1]["seconds"], 1)
    with armed(run, tested_in(run), device) as (model, tokenizer):
        if weights:
            put_weights(model, weights)  # what is tested is what is kept
        if run.test_items == 0:
            items = questions(run, tokenizer, "validation")
            right, loss = evaluate(model, items)
            if items.kinds:  # what a rate is chosen on must be like what is trained on
                right = right[np.array(items.kinds) == "ID/ID"]
            result |= {"validation": float(right.mean()), "validation_loss": loss}
        else:
            result |= _test(run, model, tokenizer)
    result |= {"curve": curve, "hardware": runtime.hardware()}
    if world.is_main_process:
        store.keep(run, result, weights)
        (place / "training.pt").unlink(missing_ok=True)
    world.wait_for_everyone()
    return result


def _test(run: Run, model: nn.Module, tokenizer) -> dict:
    """The part of a result that concerns the test."""
    test = questions(run, tokenizer, "test")
    result = {"right": "".join(map(str, tested(run, model, tokenizer, test).astype(int)))}
    if run.dataset.lower() in datasets.PUBLISHED:
        result["groups"] = asked(run, "test")["group"].tolist()
    if run.model != SCRATCH:
        result["perplexity"] = perplexity(model, tokenizer, datasets.held_out_text())
    result["flops"] = forward_flops(model, torch.tensor([test.prompts[0]], device=input_device(model)))
    return result


def tested(run: Run, model: nn.Module, tokenizer, test: Items) -> np.ndarray:
    """Which test questions are answered right: [n] bool.

    A language model's numbers are read from what it writes; first tokens, and the characters of models from scratch,
    from the logits.
    """
    if test.accepted is None and run.model != SCRATCH:
        return written(model, tokenizer, test)
    return evaluate(model, test)[0]


def right_of(result: dict) -> np.ndarray:
    """Which test questions a kept result has right: [n] bool."""
    return np.array([character == "1" for character in result["right"]])


def recheck(runs: Iterable[Run], store: Store, count: int, device: str = "cpu") -> pd.DataFrame:
    """Ask trained arms their first `count` test questions again, with the weights that were kept.

    Returns: dataset, arm, seed, n, accuracy (now), kept (as it was on the same questions), agree (share of questions
    with the same outcome). Raises FileNotFoundError where a run's weights are not there.
    """
    rows = []
    for run in runtime.progress(list(runs), "asking again", unit="run"):
        kept = right_of(store.result(run))[:count]
        with trained(run, store, device) as (model, tokenizer):
            test = questions(replace(run, test_items=len(kept)), tokenizer, "test")
            right = tested(run, model, tokenizer, test)
        about = {"dataset": run.dataset, "arm": run.arm, "seed": run.seed, "n": len(kept)}
        rows.append({**about, "accuracy": right.mean(), "kept": kept.mean(), "agree": (right == kept).mean()})
    return pd.DataFrame(rows)


def before_and_after(run: Run, store: Store, count: int, device: str = "cpu") -> pd.DataFrame:
    """The first `count` test questions of a trained adapter: question, before (the next token without it), after,
    answer."""
    rows = []
    with trained(run, store, device) as (model, tokenizer):
        for question in asked(run, "test").head(count).itertuples():
            ids = tokenizer(question.prompt, return_tensors="pt")["input_ids"].to(input_device(model))
            with torch.no_grad():
                after = model(ids).logits[0, -1].argmax()
                with model.disable_adapter():
                    before = model(ids).logits[0, -1].argmax()
            said = {"before": tokenizer.decode(before).strip(), "after": tokenizer.decode(after).strip()}
            rows.append({"question": question.prompt, **said, "answer": question.answer.strip()})
    return pd.DataFrame(rows)


def forward_flops(model: nn.Module, ids: Tensor) -> int:
    """Operations (`operations_of`) of one forward pass over ids [B, T], logits of the last token only."""
    return operations_of(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=False))


def operations_of(call: Callable[[], object]) -> int:
    """Floating-point operations of what `call` runs, as torch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The fused attention of CPUs is not counted: take it apart.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# ---------------------------------------------------------------- many runs

CORE_ARMS = ("back attention", "same layer", "residual LoRA")  # equal weights, one place
TUNED_ON = {
    name: name for name in ("two-hop", *datasets.OTHER_PROMPTS)
}  # where a dataset's learning rates are chosen; "1DC" for all others
LONGER = {"1DC": 3, "2-digit": 3}  # digits are learnt slowly: so many times the steps
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
    plans = [replace(run, dim=dim) for run in plans for dim in (dims if run.arm in SIZED else [run.dim])]
    tried, best = _search_all(plans, store, steps=tried_for)
    if None in best:
        return tried, []
    return tried, [replace(run, seed=seed) for seed in seeds for run in best]


def composing_runs(
    store: Store, seeds: Sequence[int] = (0, 1, 2), steps: int = 1600, tried_for: int = 600
) -> tuple[list[Run], list[Run]]:
    """Two hops from scratch, COMPOSING_ARMS on `datasets.compositions`, each at its best learning rate and weight decay
    for ID/ID questions; see `scratch_runs` for the two lists."""
    shape = dict(model=SCRATCH, source_layer=0, dim=32, width=100, batch_size=256, dtype="float32", steps=steps)
    shape |= dict(train_items=None, validation_items=None, test_items=None)
    plans = [Run("compositions", arm, weight_decay=decay, **shape) for arm in COMPOSING_ARMS for decay in DECAYS]
    tried, best = _search_all(plans, store, steps=tried_for)
    if None in best:
        return tried, []
    best = [best_of([run for run in tried if run.arm == arm], store) for arm in COMPOSING_ARMS]
    return tried, [replace(run, seed=seed, steps=steps, test_items=None) for seed in seeds for run in best]


def _search_all(runs: Sequence[Run], store: Store, steps: int) -> tuple[list[Run], list[Run | None]]:
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

    See `scratch_runs` for the two lists. sizes: fields of `Run`, for every run; some datasets take LONGER.
    """
    sizes = {"steps": 100, **sizes}
    places = list(dict.fromkeys(TUNED_ON.get(name, "1DC") for name in names))
    tried, best = [], []
    for place in places:
        steps = sizes["steps"] * LONGER.get(place, 1)
        plans = [Run(place, arm, model=model, **{**sizes, "steps": steps}) for arm in arms]
        here, found = _search_all(plans, store, steps=steps // 2)
        tried, best = tried + here, best + found
    if None in best:
        return tried, []
    final = []
    for name in names:
        plain = Run(name, "zero-shot", model=model, **{k: v for k, v in sizes.items() if k not in OF_TRAINED})
        steps = sizes["steps"] * LONGER.get(name, 1)
        tuned = [replace(run, steps=steps) for run in best if run.dataset == TUNED_ON.get(name, "1DC")]
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
    wanted = [(names, arms) for names, arms in ((every_arm_on, tuple(ARMS)), (core_arms_on, CORE_ARMS)) if names]
    parts = [adapter_runs(store, model, names, arms, **sizes) for names, arms in wanted]
    tried, final = ([run for part in lists for run in part] for lists in zip(*parts, strict=True))
    return tried, final if all(part for _, part in parts) else []


def varied_runs(
    store: Store, field: str, values: Sequence, arms: Sequence[str] = CORE_ARMS, dataset: str = "two-hop", **sizes
) -> tuple[list[Run], list[Run]]:
    """Claim C9: trained arms with every value of one field of `Run`, at the rates of `adapter_runs`.

    Rates are found at the field's default value only. See `scratch_runs` for the two lists.
    """
    tried, final = adapter_runs(store, names=[dataset], arms=arms, **sizes)
    mine = [run for run in final if run.arm in arms]
    return tried, [replace(run, **{field: value}) for value in values for run in mine]


def complete(
    plan: Callable[[Store], tuple[list[Run], list[Run]]], store: Store, processes: int = 1, device: str = "cpu"
) -> list[Run]:
    """Perform what is unfinished of a plan (`scratch_runs`, `adapter_runs` and others), and return its second list."""
    while True:
        tried, final = plan(store)
        sweep(tried, store, processes, device)
        if final:
            sweep(final, store, processes, device)
            return final


def ship(
    plans: Iterable[Callable[[Store], tuple[list[Run], list[Run]]]], store: Store, folder: Path, weights: bool = True
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
        first = [run for run in tested if run.seed == 0 and (run.model != SCRATCH or "back attention" in run.arm)]
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
        perform(run, store, device)
    except FloatingPointError as error:  # too high a learning rate is a result
        if runtime.world().is_main_process:
            store.keep(run, {"run": asdict(run), "diverged": str(error)}, {})
        runtime.world().wait_for_everyone()
    finally:
        if bars is not None:
            os.environ[runtime.PROGRESS_FILE] = bars


def best_of(tried: Sequence[Run], store: Store) -> Run:
    """The finished run that did best on the validation questions; of equals, the one with the lower loss there.

    Raises ValueError when no run is finished or all diverged.
    """
    scored = [(run, store.result(run)) for run in tried]
    scored = [(run, result) for run, result in scored if result is not None and "diverged" not in result]
    if not scored:
        raise ValueError(f"None of {len(tried)} runs of {tried[0].arm!r} on {tried[0].dataset!r} gave a result.")
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
        beyond = {rates[0]: rates[0] / factor, rates[-1]: rates[-1] * factor}.get(best.learning_rate)
        if beyond is None or len(tried) == MOST_RATES:
            return tried, replace(run, learning_rate=best.learning_rate)
        tried.append(replace(tried[0], learning_rate=beyond))
    return tried, None
