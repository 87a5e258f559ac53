"""What a training step costs: ours against two plain passes, and against a step of peft's LoRA, in
the same run.

    .venv/bin/python benchmarks/training.py [--model smollm2] [--steps 10] [--batch 32]

Ours keeps the first pass's states, begins the second pass at the source layer, and takes logits
only where answers are. The plain way runs the first pass each time and takes all logits, twice.
LoRA acts on queries and values of all layers, with the nearest number of weights. The three
alternate step by step; figures are medians. Exits with 1 when a goal is missed.
"""

import argparse
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from backattn import load_model, runtime
from backattn.adapters.arms import make_arm
from backattn.models.hooks import hooks
from backattn.training.batches import IGNORED, collate, numbers
from backattn.training.evaluation import FirstPasses, answer_logits
from companion.questions.datasets import one_digit_composite
from companion.questions.splits import draw, split

GOAL_PLAIN, GOAL_LORA, GOAL_ERROR = 1.6, 1.0, 1e-3


def plain_two_passes(wrapped, batch):
    """Logits of two full passes, the way one would first write it: run, attend, run again from the
    embedding."""
    arguments = dict(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    layer, seen = wrapped.sources[0], {}
    modules = [*(block.module for block in wrapped._arch.blocks), wrapped._arch.final_norm_module]
    visible = torch.ones(
        batch.input_ids.shape[1], batch.input_ids.shape[1], dtype=torch.bool
    ).tril()
    visible = (visible & batch.attention_mask.bool()[:, None]) | torch.eye(
        len(visible), dtype=torch.bool
    )
    with wrapped.disable_adapter():
        with (
            torch.no_grad(),
            hooks(*((modules[t], "input", partial(seen.__setitem__, t)) for t in wrapped.needed)),
        ):
            wrapped(**arguments)
        update = wrapped.updates[str(layer)]
        keys, values = update.remember(torch.stack([seen[t] for t in wrapped.memory_layers]))
        with hooks((modules[layer], "input", lambda h: h + update(h, keys, values, visible))):
            return wrapped(**arguments).logits[:, -batch.labels.shape[1] :].float()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--source-layer", type=int, default=6)
    parser.add_argument("--dim", type=int, default=64)
    options = parser.parse_args()
    runtime.use_threads()
    frame = draw(split(one_digit_composite(), 0), "train", options.batch)
    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "LoRA": []}
    models = {}
    for name, arm in (("ours", "back attention"), ("LoRA", "LoRA q,v")):
        model, tokenizer = load_model(options.model)
        torch.manual_seed(0)
        models[name] = make_arm(arm, model, options.source_layer, options.dim)
    models["plain"] = models["ours"]
    items = numbers(tokenizer, frame)
    rows = list(range(len(items)))
    batch = collate(items, rows)
    kept = FirstPasses(models["ours"], items)
    begin = time.perf_counter()
    kept(rows, batch)
    once = time.perf_counter() - begin
    losses: dict[str, float] = {}
    for turn in range(options.steps + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            if name == "plain":
                logits = plain_two_passes(model, batch)
            else:
                logits = answer_logits(model, batch, kept(rows, batch) if name == "ours" else None)
            loss = F.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
            )
            loss.backward()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - begin)
            losses[name] = loss.item()
            model.zero_grad(set_to_none=True)
    each = {name: float(np.median(values)) for name, values in seconds.items()}
    weights = {
        name: sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        for name in ("ours", "LoRA")
    }
    error = abs(losses["ours"] - losses["plain"])
    faster, lora = each["plain"] / each["ours"], each["LoRA"] / each["ours"]
    table = pd.DataFrame(
        [
            ("ours, seconds per step", each["ours"], "", ""),
            ("two plain passes, seconds per step", each["plain"], "", ""),
            ("peft LoRA, seconds per step", each["LoRA"], "", ""),
            ("two plain passes / ours", faster, f"≥ {GOAL_PLAIN}", faster >= GOAL_PLAIN),
            ("peft LoRA / ours", lora, f"≥ {GOAL_LORA}", lora >= GOAL_LORA),
            ("first pass of the batch, once, seconds", once, "", ""),
            ("trained weights, ours", weights["ours"], "", ""),
            ("trained weights, LoRA", weights["LoRA"], "", ""),
            (
                "difference of the loss, ours and plain",
                error,
                f"≤ {GOAL_ERROR:g}",
                error <= GOAL_ERROR,
            ),
        ],
        columns=["figure", "value", "goal", "met"],
    )
    print(
        f"batch of {options.batch}, {batch.input_ids.shape[1]} tokens each, "
        f"{torch.get_num_threads()} thread(s)\n"
    )
    print(table.assign(value=table["value"].map(lambda x: f"{x:.3g}")).to_markdown(index=False))
    return 0 if all(met in ("", True) for met in table["met"]) else 1


if __name__ == "__main__":
    sys.exit(main())
