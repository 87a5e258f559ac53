"""What a new token costs with back attention: cached, against the plain model and against full
recomputation.

    .venv/bin/python benchmarks/generation.py [--model smollm2] [--batch 2] [--prompt 64] [--tokens
    32]

One run; the three ways alternate, and each step's time is the median over steps. The logits of
cached generation are compared with full recomputation at every step, in a batch with padding. Exits
with 1 when a goal is missed.
"""

import argparse
import resource
import sys
import time

import numpy as np
import pandas as pd
import torch
from transformers import DynamicCache

from backattn import BackAttentionConfig, get_back_attention_model, load_model, runtime
from companion.runs.perform import forward_flops

GOAL_TIME, GOAL_ERROR = 2.2, 1e-4


def step(model, ids, mask, cache):
    """(logits of the last position, seconds) of one call."""
    begin = time.perf_counter()
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        ).logits
    return logits[:, -1], time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens")
    parser.add_argument("--source-layer", type=int, default=6)
    parser.add_argument("--dim", type=int, default=64)
    options = parser.parse_args()
    runtime.use_threads()
    torch.manual_seed(0)
    model, _ = load_model(options.model)
    wrapped = get_back_attention_model(
        model, BackAttentionConfig(options.source_layer, options.dim)
    )
    torch.nn.init.normal_(wrapped.updates[str(options.source_layer)].o_proj.weight, std=0.02)
    ids = torch.randint(
        10, model.config.vocab_size, (options.batch, options.prompt + options.tokens)
    )
    mask = torch.ones_like(ids)
    mask[0, : options.prompt // 3] = 0  # one prompt is shorter

    caches = {
        "plain": DynamicCache(config=model.config),
        "cached": DynamicCache(config=model.config),
    }
    seconds: dict[str, list[float]] = {"plain": [], "cached": [], "recomputed": []}
    errors = []
    for end in range(options.prompt, ids.shape[1] + 1):
        start = 0 if end == options.prompt else end - 1
        with wrapped.disable_adapter():
            seconds["plain"].append(
                step(wrapped, ids[:, start:end], mask[:, :end], caches["plain"])[1]
            )
        fast, took = step(wrapped, ids[:, start:end], mask[:, :end], caches["cached"])
        seconds["cached"].append(took)
        full, took = step(wrapped, ids[:, :end], mask[:, :end], None)
        seconds["recomputed"].append(took)
        errors.append((fast - full).abs().max().item())
    first = {name: values[0] for name, values in seconds.items()}
    each = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    sizes = {
        name: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        for name, cache in caches.items()
    }
    layers = model.config.num_hidden_layers
    bound = 1 + (layers - options.source_layer) / layers
    with wrapped.disable_adapter():
        plain_flops = forward_flops(wrapped, ids[:1, : options.prompt])
    ratio = each["cached"] / each["plain"]
    rows = [
        ("plain model, ms per new token", 1e3 * each["plain"], "", ""),
        ("back attention cached, ms per new token", 1e3 * each["cached"], "", ""),
        ("back attention recomputed, ms per new token", 1e3 * each["recomputed"], "", ""),
        ("cached / plain", ratio, f"≤ {GOAL_TIME}", ratio <= GOAL_TIME),
        ("bound by layers that run, 1 + (L−s)/L", bound, "", ""),
        ("recomputed / cached", each["recomputed"] / each["cached"], "", ""),
        ("prompt: with / without back attention, time", first["cached"] / first["plain"], "", ""),
        (
            "prompt: with / without, floating-point operations",
            forward_flops(wrapped, ids[:1, : options.prompt]) / plain_flops,
            "",
            "",
        ),
        ("cache of the plain model, MiB", sizes["plain"] / 2**20, "", ""),
        ("cache with second pass and memory, MiB", sizes["cached"] / 2**20, "", ""),
        (
            "peak memory of this process, MiB",
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
            "",
            "",
        ),
        (
            "largest difference of a logit, cached and recomputed",
            max(errors),
            f"≤ {GOAL_ERROR:g}",
            max(errors) <= GOAL_ERROR,
        ),
    ]
    table = pd.DataFrame(rows, columns=["figure", "value", "goal", "met"])
    print(
        f"batch of {options.batch} with padding, prompt of {options.prompt}, "
        f"{options.tokens} new tokens, "
        f"{torch.get_num_threads()} thread(s)\n"
    )
    print(table.assign(value=table["value"].map(lambda x: f"{x:.3g}")).to_markdown(index=False))
    return 0 if all(met in ("", True) for met in table["met"]) else 1


if __name__ == "__main__":
    sys.exit(main())
