"""What training adapters on a model takes, in time and memory, known before and without weights.

One layer and three of the model's shape, with random weights, are timed on the device that is to be
used; time, and what the backward pass needs, grow linearly with layers. All else is counted.
"""

import copy
import time
from collections.abc import Callable, Sequence
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
from companion.runs.plans import Planned, found, tried
from companion.runs.scratch import arm_of
from companion.runs.store import Store

TIMED = (1, 3)  # layers

REPEATS, PATIENCE = 3, 5.0  # timings of one thing, at most, and the seconds that are enough

NEW_TOKENS = 8  # that a number is read from, as in `training.evaluation.written`


@dataclass(frozen=True)
class Estimate:
    """What the unfinished runs of a plan take.

    runs: how many; seconds; bytes of the weights, of the first passes' states that are held, of
    what one batch needs for its backward pass, and of what is free on the device.
    """

    runs: int
    seconds: float
    weights: int
    states: int
    batch: int
    free: int

    def __str__(self) -> str:
        parts = (self.weights, self.states, self.batch)
        weights, states, batch, need, free = (x / 2**30 for x in (*parts, sum(parts), self.free))
        fits = "fits" if need <= MEMORY_SHARE * free else "does not fit"
        return (
            f"{self.runs} runs to make, about {self.seconds / 3600:.1f} hours one after the other "
            f"on one device. Memory: about {need:.1f} GiB (weights {weights:.1f}, states of first "
            f"passes {states:.1f}, a batch {batch:.1f}); {free:.1f} GiB are free, "
            f"so that it {fits}."
        )


def estimate(plan: Sequence[Planned], store: Store, device: str = "cpu") -> Estimate:
    """What the unfinished runs of a plan for one language model take, its learning rates in three
    trials each.

    Of the model only configuration and tokenizer are fetched, and the questions where they are
    published ones. Raises UnsupportedModelError for another family, and OSError where something
    cannot be had.
    """
    place = one_device(device)
    free = runtime.free_bytes(place)
    listed = dict.fromkeys([*tried(plan, store), *found(plan, store)])
    runs = [run for run in listed if store.result(run) is None]
    if not runs:
        return Estimate(0, 0.0, 0, 0, 0, free)
    config, tokenizer = _config_and_tokenizer(runs[0].model)
    layers, dtype = config.num_hidden_layers, getattr(torch, runs[0].dtype)  # of training
    lengths = {}  # mean tokens of a dataset's questions
    for run in {run.dataset: run for run in runs}.values():
        items = questions(replace(run, arm="zero-shot"), tokenizer, "train")
        lengths[run.dataset] = float(items.lengths.mean())
    usual, size = round(np.mean(list(lengths.values()))), runs[0].batch_size
    few, many = (_timed(config, n, size, usual, runs[0].dim, place, dtype) for n in TIMED)
    growth = (np.subtract(many, few) / (TIMED[1] - TIMED[0])).clip(min=0)  # per layer
    layer, forward, activations = growth.tolist()
    rest = max(few[0] - TIMED[0] * layer, 0)
    seconds, again, states, deepest = 0.0, 0.0, 0.0, 0
    for run in runs:
        arm, above = arm_of(run), layers - int(np.min(run.source_layer))
        trained = 0 if run.steps == 0 else layers if arm.trains == "all" else above
        learnt, validated = (run.train_items or 0), 3 * (run.validation_items or 0)
        if not trained:
            learnt = validated = 0
        new_tokens = 1 if DATASETS[run.dataset].judge == "first token" else NEW_TOKENS
        passes = 1 + above / layers if arm.two_passes else 1
        questions_run = learnt + passes * (validated + new_tokens * (run.test_items or 0))
        steps = run.steps * (trained * layer + rest)
        longer = lengths[run.dataset] / usual
        seconds += (steps + questions_run / size * layers * forward) * longer
        again += run.steps * layers * forward * longer
        tokens = learnt * lengths[run.dataset]
        states = max(states, (above + 1) * tokens * config.hidden_size * dtype.itemsize)
        deepest = max(deepest, trained)
    dtypes = {dtype, getattr(torch, runs[0].tested_in)}  # a copy of the model in each
    weights = sum(weight_bytes(config, each) for each in dtypes)
    if states > (free - weights) / 4:  # `train` runs first passes again then, at each step
        seconds, states = seconds + again, 0.0
    return Estimate(len(runs), seconds, weights, round(states), round(deepest * activations), free)


def _config_and_tokenizer(model: str):
    if model in EMBEDDED or model.startswith("tiny-"):
        whole, tokenizer = load_model(model)
        return whole.config, tokenizer
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    check_supported(config)
    return config, AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def _timed(
    config, layers: int, size: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float, int]:
    """(seconds of a training step from the lowest layer on, seconds of a forward pass, bytes held
    for the backward pass) of a random model of `layers` layers, for `size` questions."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    model.set_attn_implementation("eager")
    ids = torch.arange(size * tokens, device=device).view(size, tokens) % config.vocab_size
    batch = Batch(ids, torch.ones_like(ids))
    last = torch.tensor([tokens - 1], device=device)
    inputs = dict(input_ids=ids, attention_mask=batch.attention_mask, logits_to_keep=last)
    weights, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    wrapped = get_back_attention_model(model, BackAttentionConfig(0, dim))
    positions = batch.position_ids
    first = wrapped.first_pass_states(ids, batch.attention_mask, positions)

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    def step() -> None:
        out = wrapped(**inputs, position_ids=positions, first_pass=first, use_cache=False)
        F.cross_entropy(out.logits[:, -1].float(), ids[:, 0]).backward()

    def forward() -> None:
        with torch.no_grad(), wrapped.disable_adapter():
            wrapped(**inputs, use_cache=False)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        step()  # warms up, too
    forward()
    took = _seconds(step, device), _seconds(forward, device), sum(held.values())
    wrapped.unload()
    return took


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The least of some timings: what else the machine does can only add."""
    took: list[float] = []
    while len(took) < REPEATS and sum(took) < PATIENCE:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - begin)
    return min(took)
