"""Logit flow against a plain forward pass and against TransformerLens, in one run on SmolLM2.

    .venv/bin/python benchmarks/peers.py [--prompts 16] [--turns 3] [--heads]

TransformerLens is optional. Install it into a folder of its own, and put that on PYTHONPATH
(one command):

    pip install --no-deps --target DIR transformer_lens==4.3.0 jaxtyping wadler_lindig beartype
        better_abc fancy_einsum einops datasets pyarrow dill multiprocess xxhash

Without it its rows are left out. Figures are the least user CPU time of some turns, in which the
ways alternate; one thread. --heads also scores heads exactly, which takes minutes. Linear scores
are compared with TransformerLens' direct logit attribution of the same raw logit. *By products
alone* counts the multiplications of exact scores, a softmax each, in plain forward passes. Exits
with 1 when a goal is missed. Training against LoRA is in training.py, new tokens in generation.py.
"""

import argparse
import os
import sys
from functools import partial

import numpy as np
import pandas as pd
import torch

from backattn import load_model, logit_flow, runtime
from backattn.models.tokens import encode
from companion.questions.facts import facts
from companion.questions.prompts import single_hop

try:
    from transformer_lens.model_bridge import TransformerBridge
except ImportError:
    TransformerBridge = None

GOALS = {"layer": 1.5, "neuron": 6.0, "head": 2.0}  # times a plain forward pass
GOAL_LINEAR, GOAL_ERROR = 1.0, 1e-3  # times TransformerLens' time; logits


def seconds(call) -> float:
    begin = os.times().user
    call()
    return os.times().user - begin


@torch.no_grad()
def plain(model, batch):
    return model(**batch.inputs, use_cache=False).logits


@torch.no_grad()
def lens_attribution(bridge, batch, answers, level: str) -> np.ndarray:
    """Direct logit attribution at the last position: [components, prompts]."""
    _, cache = bridge.run_with_cache(batch.input_ids)
    if level == "head":
        cache.compute_head_results()
        stack = cache.stack_head_results(layer=-1, pos_slice=-1)
    else:
        stack = cache.decompose_resid(layer=-1, pos_slice=-1)
    return cache.logit_attrs(stack, answers, pos_slice=-1, has_batch_dim=True).numpy()


def ours_linear(model, tokenizer, prompts, level: str) -> np.ndarray:
    frame = logit_flow(model, tokenizer, prompts, level=level, method="linear").frame
    if level == "head":
        frame = frame[frame["kind"] == "attention"]
        frame = frame.groupby(["layer", "head", "prompt"])["increase"].sum().reset_index()
    return frame["increase"].to_numpy()


def by_products(model, tokens: int, prompts: int) -> dict[str, float]:
    """What exact scores cost in plain forward passes, by multiplications alone: for layers, the
    pass and the logits of each state on the way; for heads also, once for all prompts, what each
    channel of attention writes as logits, and the sums of a head's at each source position."""
    config = model.config
    layers, width, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
    below = sum(p.numel() for p in model.model.layers.parameters())
    logits, channels = width * vocabulary, config.num_attention_heads * config.head_dim
    plain_pass = (below + logits) * tokens
    layer = below * tokens + (2 * layers + 1) * logits
    shared, sums = layers * channels * logits, layers * channels * vocabulary * tokens
    head = layer + shared / prompts + sums
    return {"layer": layer / plain_pass, "head": head / plain_pass}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--heads", action="store_true", help="score heads exactly, too")
    options = parser.parse_args()
    runtime.use_threads()
    model, tokenizer = load_model("smollm2")
    asked = single_hop(facts(), shots=2)["prompt"]
    asked = asked[[len(ids) == 17 for ids in tokenizer(asked.tolist())["input_ids"]]]
    prompts = asked.sample(options.prompts, random_state=0).tolist()
    batch = encode(tokenizer, prompts)
    score = partial(logit_flow, model, tokenizer, prompts)
    ways = {
        "plain forward": partial(plain, model, batch),
        "layer, exact": partial(score, level="layer"),
        "neuron, screen": partial(score, level="neuron"),
        "layer, linear": partial(score, level="layer", method="linear"),
        "head, linear": partial(score, level="head", method="linear"),
    }
    if options.heads:
        ways["head, exact"] = partial(score, level="head")
    theirs_of = {}
    if TransformerBridge is None:
        print("TransformerLens is not installed: its rows are left out (see this file's head).\n")
    else:
        bridge = TransformerBridge.boot_transformers(
            "smollm2", hf_model=load_model("smollm2")[0], tokenizer=tokenizer
        )
        # γ goes into the unembedding; nothing is centred, so that the logits stay the model's own.
        bridge.process_weights(fold_ln=True, center_writing_weights=False, center_unembed=False)
        answers = plain(model, batch)[:, -1].argmax(-1)
        for level in ("layer", "head"):
            theirs = partial(lens_attribution, bridge, batch, answers, level)
            ways[f"{level}, TransformerLens"] = theirs_of[level] = theirs
    turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(options.turns)]
    took = pd.DataFrame(turns).min()
    rows = [(f"{name}, user CPU seconds", value, "", "") for name, value in took.items()]
    for level, goal in GOALS.items():
        for name in (name for name in took.index if name.startswith(level)):
            ratio, asked = took[name] / took["plain forward"], name.endswith(("exact", "screen"))
            goals = (f"≤ {goal}", ratio <= goal) if asked else ("", "")
            rows.append((f"{name} / plain forward", ratio, *goals))
    least = by_products(model, batch.input_ids.shape[1], len(prompts))
    rows += [(f"{level}, exact: by products alone", x, "", "") for level, x in least.items()]
    for level in theirs_of:
        ratio = took[f"{level}, linear"] / took[f"{level}, TransformerLens"]
        name = f"{level}, linear / TransformerLens"
        rows.append((name, ratio, f"≤ {GOAL_LINEAR}", ratio <= GOAL_LINEAR))
        ours, theirs = ours_linear(model, tokenizer, prompts, level), theirs_of[level]()
        # ours: prompt by prompt, or component by component; theirs: component by component
        theirs = theirs.T.ravel() if level == "layer" else theirs.ravel()
        error = np.abs(ours - theirs).max()
        name = f"{level}, linear: largest difference from TransformerLens, logits"
        rows.append((name, error, f"≤ {GOAL_ERROR:g}", error <= GOAL_ERROR))
    table = pd.DataFrame(rows, columns=["figure", "value", "goal", "met"])
    print(f"{len(prompts)} prompts of {batch.input_ids.shape[1]} tokens, 1 thread\n")
    shown = table.assign(
        value=table["value"].map(lambda x: f"{x:.3g}"),
        met=["" if not goal else "yes" if met else "NO" for *_, goal, met in rows],
    )
    print(shown.to_markdown(index=False, disable_numparse=True))
    return 0 if "NO" not in set(shown["met"]) else 1


if __name__ == "__main__":
    sys.exit(main())
