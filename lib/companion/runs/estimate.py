"""What training adapters on a model would take, in time and memory, before it begins and without the model's weights.

One layer and three of the model's own shape, with random weights, are timed on the device that is to be used; time, and
what is kept for the backward pass, grow linearly with layers. All else is counted.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from backattn import runtime
from backattn.adapters.back_attention import get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from backattn.models.devices import MEMORY_SHARE, one_device, weight_bytes
from backattn.models.families import check_supported
from backattn.models.load import load_model
from backattn.models.packaged import EMBEDDED
from backattn.models.tokens import Batch
from companion.questions.datasets import DATASETS
from companion.runs.as_asked import questions
from companion.runs.plans import RATES, main_runs
from companion.runs.run import Run, tested_in
from companion.runs.store import Store

TIMED = (1, 3)  # layers

REPEATS = 3

PATIENCE = 5.0  # seconds for the timings of one thing

NEW_TOKENS = 8  # that a number is read from, as in `training.written`


@dataclass(frozen=True)
class Estimate:
    """Of some runs of one model: how many are unfinished; seconds; bytes of the weights, of the first passes' states
    that are kept, of what one batch keeps for its backward pass; bytes that are free on the device."""

    runs: int
    seconds: float
    weights: int
    states: int
    batch: int
    free: int

    def __str__(self) -> str:
        parts = (self.weights, self.states, self.batch)
        weights, states, batch, need, free = (x / 2**30 for x in (*parts, sum(parts), self.free))
        return (
            f"{self.runs} runs to make, about {self.seconds / 3600:.1f} hours one after the other on one device. "
            f"Memory: about {need:.1f} GiB (weights {weights:.1f}, states of first passes {states:.1f}, a batch "
            f"{batch:.1f}); {free:.1f} GiB are free, so that it {'fits' if need <= MEMORY_SHARE * free else 'does not fit'}."
        )


def estimate(model: str, store: Store, device: str = "cpu", **sizes) -> Estimate:
    """What the unfinished runs of `experiments.main_runs(store, model, **sizes)` take.

    Of the model only configuration and tokenizer are fetched, and the questions where they are published ones. Raises
    UnsupportedModelError for another family, and OSError where something cannot be had.
    """
    config, tokenizer = _about(model)
    place, layers = one_device(device), config.num_hidden_layers
    listed = [run for part in main_runs(_Guess(store), model, **sizes) for run in part]
    runs = [run for run in dict.fromkeys(listed) if store.result(run) is None]
    free = runtime.free_bytes(place)
    if not runs:
        return Estimate(0, 0.0, 0, 0, 0, free)
    lengths = {name: _tokens(name, runs, tokenizer) for name in {run.dataset for run in runs}}
    usual, size = round(np.mean(list(lengths.values()))), runs[0].batch_size
    dtype = getattr(torch, runs[0].dtype)  # in which the model is trained on
    few, many = (_timed(config, count, size, usual, runs[0].dim, place, dtype) for count in TIMED)
    layer, forward, kept = (
        max(b - a, 0) / (TIMED[1] - TIMED[0]) for a, b in zip(few, many, strict=True)
    )
    rest = max(few[0] - TIMED[0] * layer, 0)
    seconds, states, deepest = 0.0, 0.0, 0
    for run in runs:
        above = layers - run.source_layer
        trained = 0 if run.steps == 0 else layers if run.arm == "LoRA q,v" else above
        twice = 1 + above / layers if run.arm in ("back attention", "loop LoRA") else 1
        learnt = (run.train_items or 0) * (trained > 0)
        told = 1 if DATASETS[run.dataset].judge == "first token" else NEW_TOKENS
        asked = learnt + twice * (
            (run.validation_items or 0) * 3 * (trained > 0) + told * (run.test_items or 0)
        )
        own = run.steps * (trained * layer + rest) + asked / size * layers * forward
        seconds += own * lengths[run.dataset] / usual
        states = max(
            states,
            (above + 1) * learnt * lengths[run.dataset] * config.hidden_size * dtype.itemsize,
        )
        deepest = max(deepest, trained)
    kinds = {dtype, getattr(torch, tested_in(runs[0]))}  # a copy of the model in each
    need = sum(weight_bytes(config, each) for each in kinds)
    if (
        states > (free - need) / 4
    ):  # `training.train` does not keep them then, and runs both passes at each step
        states = 0.0
        seconds += sum(run.steps * layers * forward * lengths[run.dataset] / usual for run in runs)
    return Estimate(len(runs), seconds, need, round(states), round(deepest * kept), free)


class _Guess(Store):
    """Another store's results; for what is unfinished there, that the middle learning rate did best: what a plan comes
    to."""

    def __init__(self, store: Store):
        self.folder, self.shipped = store.folder, store.shipped

    def result(self, run: Run) -> dict:
        done = super().result(run)
        if done is not None:
            return done
        middle = RATES.get(run.arm, (1, 1, 1))[1]
        return {
            "validation": 0.0,
            "validation_loss": abs(np.log(max(run.learning_rate, 1e-9) / middle)),
        }


def _about(model: str):
    """(configuration, tokenizer) of a model."""
    if model in EMBEDDED or model.startswith("tiny-"):
        whole, tokenizer = load_model(model)
        return whole.config, tokenizer
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    check_supported(config)
    return config, AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def _tokens(name: str, runs: Sequence[Run], tokenizer) -> float:
    """Mean tokens of a dataset's questions."""
    run = next(run for run in runs if run.dataset == name)
    return float(questions(replace(run, arm="zero-shot"), tokenizer, "train").lengths.mean())


def _timed(
    config, layers: int, size: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float, int]:
    """(seconds of a training step from the lowest layer on, seconds of a forward pass, bytes kept for the backward
    pass) of a random model of `layers` layers, for a batch of `size` questions."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    model.set_attn_implementation("eager")
    ids = torch.arange(size * tokens, device=device).view(size, tokens) % config.vocab_size
    batch = Batch(ids, torch.ones_like(ids))
    wrapped = get_back_attention_model(model, BackAttentionConfig(0, dim))
    sizes, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def step() -> None:
        out = wrapped(
            input_ids=ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, first_pass=first,
            logits_to_keep=last, use_cache=False,
        )  # fmt: skip
        F.cross_entropy(out.logits[:, -1].float(), ids[:, 0]).backward()

    def forward() -> None:
        with torch.no_grad(), wrapped.disable_adapter():
            wrapped(
                input_ids=ids,
                attention_mask=batch.attention_mask,
                logits_to_keep=last,
                use_cache=False,
            )

    last = torch.tensor([tokens - 1], device=device)
    first = wrapped.first_pass_states(ids, batch.attention_mask, batch.position_ids)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        step()  # warms up, too
    forward()
    took = _seconds(step, device), _seconds(forward, device), sum(sizes.values())
    wrapped.unload()
    return took


def _seconds(what, device: torch.device) -> float:
    """The least of some timings: what else the machine does can only add."""
    took: list[float] = []
    while len(took) < REPEATS and sum(took) < PATIENCE:
        begin = time.perf_counter()
        what()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - begin)
    return min(took)
