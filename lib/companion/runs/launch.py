"""Make notebook 03's training runs for any model, on one device or on several, and say first what
they take: accelerate launch --num_processes 4 -m companion.runs.launch --model org/name. Finished
runs go to build/runs, which all processes must see, and where the notebook finds them."""

import argparse
import copy
import sys
import timeit
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

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
from companion.runs.perform import trained_in
from companion.runs.plans import Planned, complete, found, main_runs, tried
from companion.runs.run import Run, located
from companion.runs.scratch import arm_of
from companion.runs.store import Store

NEW_TOKENS = 8  # that a number is read from, as in `training.evaluation.written`


class Estimate(NamedTuple):  # of unfinished runs
    runs: int
    seconds: float
    weights: int  # bytes, as the following
    states: int  # of first passes that are held
    batch: int  # held for its backward pass
    free: int  # on the device

    def __str__(self) -> str:
        hours, (weights, states, batch, free) = self.seconds / 3600, (x / 2**30 for x in self[2:])
        need = weights + states + batch
        fits = "fits" if need <= MEMORY_SHARE * free else "does not fit"
        return (
            f"{self.runs} runs to make, about {hours:.1f} hours one after the other on one device. "
            f"Memory: about {need:.1f} GiB (weights {weights:.1f}, states of first passes "
            f"{states:.1f}, a batch {batch:.1f}); {free:.1f} GiB are free, so that it {fits}."
        )


def estimate(plan: Sequence[Planned], store: Store, device: str = "cpu") -> Estimate:
    """What the unfinished runs of a plan for one model take: one layer and three of its shape, with
    random weights, are timed; time, and what the backward pass needs, grow linearly; all else is
    counted. Raises UnsupportedModelError for another family, OSError where something is missing."""
    place = one_device(device)
    free, listed = runtime.free_bytes(place), [*tried(plan, store), *found(plan, store)]
    runs = [run for run in dict.fromkeys(listed) if store.result(run) is None]
    if not runs:
        return Estimate(0, 0.0, 0, 0, 0, free)
    model = runs[0].model
    if model in EMBEDDED or model.startswith("tiny-"):
        whole, tokenizer = load_model(model)
        config = whole.config
    else:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        check_supported(config)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    first = replace(runs[0], dtype=trained_in(runs[0], device))
    layers, dtype = config.num_hidden_layers, getattr(torch, first.dtype)
    lengths = {  # mean tokens of a dataset's questions
        name: float(questions(replace(run, arm="zero-shot"), tokenizer, "train").lengths.mean())
        for name, run in {run.dataset: run for run in runs}.items()
    }
    usual = round(np.mean(list(lengths.values())))
    one, three = (_timed(config, count, first, usual, place) for count in (1, 3))
    layer, forward, activations = (np.subtract(three, one) / 2).clip(min=0).tolist()  # per layer
    rest = max(one[0] - layer, 0)
    seconds, again, states, deepest = 0.0, 0.0, 0.0, 0
    for run in runs:
        arm, above = arm_of(run), layers - int(np.min(run.source_layer))
        trained = 0 if run.steps == 0 else layers if arm.trains == "all" else above
        learnt, longer = (run.train_items or 0) * bool(trained), lengths[run.dataset] / usual
        validated, tested = 3 * (run.validation_items or 0) * bool(trained), run.test_items or 0
        new_tokens = 1 if DATASETS[run.dataset].judge == "first token" else NEW_TOKENS
        passes = 1 + above / layers if arm.two_passes else 1
        batches = (learnt + passes * (validated + new_tokens * tested)) / run.batch_size
        steps = run.steps * (trained * layer + rest)
        seconds += (steps + batches * layers * forward) * longer
        again += run.steps * layers * forward * longer
        numbers = (above + 1) * learnt * lengths[run.dataset] * config.hidden_size
        states, deepest = max(states, numbers * dtype.itemsize), max(deepest, trained)
    dtypes = {dtype, getattr(torch, runs[0].tested_in)}  # a copy of the model in each
    weights = sum(weight_bytes(config, each) for each in dtypes)
    if states > (free - weights) / 4:  # `train` runs first passes again then, at each step
        seconds, states = seconds + again, 0.0
    return Estimate(len(runs), seconds, weights, round(states), round(deepest * activations), free)


def _timed(config, layers: int, run: Run, tokens: int, device: torch.device) -> list[float]:
    """[seconds of a training step of a run from the lowest layer on, of a forward pass, bytes held
    for the backward pass], of a random model of `layers` layers and a batch of `tokens` tokens."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, run.dtype))
    model = model.to(device).eval()
    model.set_attn_implementation("eager")
    weights, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    ids = torch.arange(run.batch_size * tokens, device=device) % config.vocab_size
    batch = Batch(ids.view(-1, tokens), torch.ones_like(ids).view(-1, tokens))
    wrapped = get_back_attention_model(model, BackAttentionConfig(0, run.dim))
    places = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    first = wrapped.first_pass_states(batch.input_ids, **places)
    inputs = {"input_ids": batch.input_ids, **places, "use_cache": False, "logits_to_keep": 1}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    def step() -> None:
        logits = wrapped(**inputs, first_pass=first).logits
        F.cross_entropy(logits[:, -1].float(), batch.input_ids[:, 0]).backward()
        wait()

    def forward() -> None:
        with torch.no_grad(), wrapped.disable_adapter():
            wrapped(**inputs)
        wait()

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        step()  # warms up, too
    forward()
    # The least: what else the machine does can only add.
    took = [min(timeit.repeat(call, number=1, repeat=3)) for call in (step, forward)]
    wrapped.unload()
    return [*took, sum(held.values())]


def main(argv: list[str] | None = None) -> int:
    runtime.use_terminal()
    p = argparse.ArgumentParser(prog="companion.runs.launch", description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, help="a Hugging Face id, a folder or a packaged name")
    p.add_argument("--dtype", choices=runtime.DTYPES, default="float32", help="of the test")
    p.add_argument("--device", help="where one process trains; default: a GPU if there is one")
    p.add_argument("--source-layer", type=int, default=6)
    p.add_argument("--dim", type=int, default=64, help="d′; other arms get as many weights")
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--estimate", action="store_true", help="only say what it takes")
    sizes = vars(p.parse_args(argv))
    dtype, only_estimate = sizes.pop("dtype"), sizes.pop("estimate")
    try:
        model = located(sizes.pop("model"), Path.cwd())
    except ValueError as error:
        p.error(f"--model: {error}")
    runtime.use_threads()
    world, store = runtime.process_state(), Store()
    device = sizes.pop("device") or str(world.device)
    plan = main_runs(model, tested_in=dtype, **sizes)
    if world.is_main_process:
        try:
            what = estimate(plan, store, device)
        except OSError as error:
            what = f"no estimate could be made ({error})"
        print(f"{model}, tested in {dtype}, on {device}: {what}", flush=True)
    if not only_estimate:
        world.wait_for_everyone()
        complete(plan, store, 1, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
