"""How cost grows: seconds and memory of every analysis against width, layers, prompt length, batch
and vocabulary, on random Llama-shaped models, in one run.

    .venv/bin/python benchmarks/scaling.py            # about twenty minutes on one thread
    .venv/bin/python benchmarks/scaling.py --quick    # the small half of each range, two minutes

One size is changed at a time, the others stay at BASE. Printed are seconds and GiB at BASE, also as
multiples of a plain forward pass there, and for each size the exponent of the growth of seconds and
of memory, fitted over the upper half of its range (1: linear, 2: quadratic). Then the longest
prompt whose layer and neuron flow fits into a GiB. Memory is the peak above what the model takes,
polled; each point runs in a process of its own.
"""

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from backattn import (
    BackAttentionConfig,
    flow_back,
    get_back_attention_model,
    logit_flow,
    runtime,
)
from backattn.analysis.circuits import Circuit, Pairs
from backattn.models.tokens import Batch

BASE = {"width": 512, "layers": 4, "length": 32, "batch": 4, "vocabulary": 8192}
RANGES = {
    "width": (256, 512, 1024, 2048, 4096),
    "layers": (2, 4, 8, 16),
    "length": (16, 64, 256, 1024, 2048),
    "batch": (1, 4, 16, 64),
    "vocabulary": (4096, 16_384, 65_536, 131_072),
}
CALLS = ("forward", "layer", "head", "screen", "exact", "flow back", "circuit", "step", "token")


class Ids:
    """A tokenizer of numbers: "17 4 9" are three tokens."""

    pad_token_id = 0

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __call__(self, texts, **_):
        return {"input_ids": [list(map(int, text.split())) for text in texts]}

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def calls(size: dict[str, int]) -> dict[str, Callable[[], object]]:
    """What is timed, each on a model and prompts of a size."""
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["width"],
        intermediate_size=3 * size["width"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["width"] // 64,
        num_key_value_heads=max(1, size["width"] // 256),
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model, tokenizer = LlamaForCausalLM(config).eval(), Ids(size["vocabulary"])
    ids = torch.randint(1, size["vocabulary"], (size["batch"], size["length"]))
    texts, answers = [tokenizer.decode(row.tolist()) for row in ids], [1] * len(ids)
    batch, other = (Batch(x, torch.ones_like(x)) for x in (ids, ids.flip(0).roll(1, 1)))
    pairs = Pairs(batch, other, torch.full((len(ids),), 1), torch.full((len(ids),), 2))
    circuit = Circuit(model)
    keep = np.arange(len(circuit.nodes)) % 2 == 0
    wrapped = get_back_attention_model(model, BackAttentionConfig(1, dim=64))
    states = wrapped.first_pass_states(**batch.inputs)
    cache = wrapped(**batch.inputs, use_cache=True).past_key_values

    def plain(call: Callable[[], object]) -> Callable[[], object]:
        def alone():
            with wrapped.disable_adapter(), torch.no_grad():
                return call()

        return alone

    def flow(level: str, method: str = "screen"):
        whole = {"level": level, "method": method, "batch_size": len(ids)}
        return plain(lambda: logit_flow(model, tokenizer, texts, answers, **whole))

    def step():
        logits = wrapped(**batch.inputs, first_pass=states, logits_to_keep=1).logits
        logits.float().log_softmax(-1)[..., 1].sum().backward()

    def token():
        with torch.no_grad():
            mask = torch.ones(len(ids), size["length"] + 1, dtype=torch.long)
            wrapped(ids[:, -1:], mask, past_key_values=cache, use_cache=True)
            cache.crop(-1)

    kept = flow("layer")()
    return {
        "forward": plain(lambda: model(**batch.inputs, use_cache=False, logits_to_keep=1)),
        "layer": flow("layer"),
        "head": flow("head"),
        "screen": flow("neuron"),
        "exact": flow("neuron", "exact"),
        "flow back": plain(lambda: flow_back(model, tokenizer, kept, "linear", len(ids))),
        "circuit": plain(lambda: circuit.kept(pairs, keep)),
        "step": step,
        "token": token,
    }


def measured(call: Callable[[], object], most: float) -> tuple[float, float]:
    """(seconds, GiB above what was there): the least of up to three times within `most` seconds."""
    process, peak, stop = psutil.Process(), [0], threading.Event()
    gc.collect()
    before = process.memory_info().rss

    def poll() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread, took, began = threading.Thread(target=poll), [], time.perf_counter()
    thread.start()
    try:
        while len(took) < 3 and (not took or time.perf_counter() - began < most):
            start = time.perf_counter()
            call()
            took.append(time.perf_counter() - start)
    finally:
        stop.set()
        thread.join()
    return min(took), max(0, peak[0] - before) / 2**30


def point(size: dict[str, int], names: list[str]) -> list[dict]:
    """One size, measured in this process."""
    runtime.use_threads()
    made = calls(size)
    made["forward"]()  # warms up
    return [
        dict(zip(("seconds", "gib"), measured(made[n], 20), strict=True), call=n) for n in names
    ]


def exponent(sizes: pd.Series, values: pd.Series) -> float:
    """Slope of log value against log size, over the upper half of the sizes."""
    upper = sizes >= sizes.median()
    return float(np.polyfit(np.log(sizes[upper]), np.log(values[upper].clip(lower=1e-6)), 1)[0])


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true")
    p.add_argument("--point", help=argparse.SUPPRESS)
    p.add_argument("--calls", nargs="*", default=list(CALLS))
    arguments = p.parse_args()
    if arguments.point:
        print(json.dumps(point(json.loads(arguments.point), arguments.calls)))
        return 0
    rows, done = [], {}
    for name, values in RANGES.items():
        for value in values[: 3 if arguments.quick else None]:
            size = json.dumps({**BASE, name: value})
            if size not in done:
                command = [sys.executable, __file__, "--point", size, "--calls", *arguments.calls]
                found = subprocess.run(command, capture_output=True, text=True)
                if found.returncode:
                    print(f"{name} {value}: {found.stderr.strip().splitlines()[-1:]}", flush=True)
                    continue
                done[size] = json.loads(found.stdout.splitlines()[-1])
            rows += [{"size": name, "value": value, **one} for one in done[size]]
            print(f"{name} {value} done", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    base = pd.DataFrame(done.get(json.dumps(BASE)) or done[json.dumps({**BASE, "width": 512})])
    base = base.set_index("call")
    base["forwards"] = base["seconds"] / base.loc["forward", "seconds"]
    print(base.round(4).to_string())
    for unit in ("seconds", "gib"):
        grown = {
            name: {
                call: exponent(x["value"], x[unit]) for call, x in part.groupby("call", sort=False)
            }
            for name, part in table.groupby("size", sort=False)
        }
        print(f"\nexponents of {unit}\n{pd.DataFrame(grown).round(2).to_string()}")
    long = table[(table["size"] == "length") & table["call"].isin(["layer", "screen"])]
    for call, part in long.groupby("call"):
        per = part.assign(each=part["gib"] / BASE["batch"])
        grows = max(0.1, exponent(per["value"], per["each"]))
        last = per.iloc[-1]
        fits = last["value"] * (1 / max(last["each"], 1e-6)) ** (1 / grows)
        print(f"{call}: about {fits:,.0f} tokens of one prompt per GiB (by extrapolation)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
