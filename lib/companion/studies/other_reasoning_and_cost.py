"""09: sums (question Q2), two hops asked in other ways (claim N1), and what back attention costs in
use (question Q3).

Do sums run through the stages of single-hop recall? The operands take the entity's place, the
operator the relation's. So stage A is flow through FFNs at the operands, B through attention that
reads them, C through FFNs at the operator and the last position, D through attention that reads
these, and straight to the answer from FFNs at the last position (`companion.measures.stages`).
"""

import copy
import functools
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from backattn.adapters.back_attention import BackAttentionModel, get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from backattn.models.decoder import describe
from backattn.models.devices import input_device
from backattn.runtime import progress
from companion.measures.gains import gain_claim
from companion.questions.prompts import label_tokens, span
from companion.report.verdicts import Effect, claim, named, points, with_interval
from companion.runs.perform import operations_of

PLAIN, TWO_PASSES = "plain", "back attention"
ONE_PASS = "back attention, new tokens in one pass"
# What the model with the adapter is switched to: enabled, one_pass.
WAYS = {PLAIN: (False, False), TWO_PASSES: (True, False), ONE_PASS: (True, True)}
PARTS = ("first", "each")  # until the first token, and each further one
NEW_TOKENS = 8


def sum_labels(tokenizer, frame: pd.DataFrame) -> list[np.ndarray]:
    """The group of every token, in the words of `measures.stages`: "entity" (operands), "relation"
    (operator), "last" or "context" (worked examples, "=", digits of the answer)."""
    spans: dict[str, list[tuple[int, int]]] = {"first": [], "relation": [], "second": []}
    for prompt, start, operator in frame[["prompt", "start", "operator"]].to_numpy():
        place, equals = prompt.index(operator, start + 1), prompt.index("=", start)
        spans["first"].append(span(prompt, prompt[start:place].strip(), start))
        spans["relation"].append((place, place + 1))
        spans["second"].append(span(prompt, prompt[place + 1 : equals].strip(), place + 1))
    labels = label_tokens(tokenizer, frame["prompt"].tolist(), spans)
    return [np.where(np.isin(row, ("first", "second")), "entity", row) for row in labels]


def cost_table(
    model: nn.Module, source_layers: Sequence[int], contexts: Sequence[int], dim: int, repeats: int
) -> pd.DataFrame:
    """Time, memory and operations of writing on after a prompt, one text at a time, with an
    untrained module, which costs what a trained one does.

    Returns one row per way, source layer and context (tokens of the prompt), with what the first
    new token takes and what each further one does: timed_… (seconds, medians), …_flops
    (operations), …_ratio (of either, over the plain model's), …_layers (operations over the plain
    model's without the unembedding, which runs once in any case); cache (MiB, after all tokens) and
    bound (layers that run for a token of the prompt, over all: 1 + (L − s) / L).
    """
    layers, rows = model.config.num_hidden_layers, []
    settings = [(layer, context) for layer in source_layers for context in contexts]
    for layer, context in progress(settings, "costs", unit="setting"):
        wrapped = get_back_attention_model(model, BackAttentionConfig(layer, dim))
        try:
            for row in _ways(wrapped, context, repeats):
                bound = 1.0 if row["way"] == PLAIN else 1 + (layers - layer) / layers
                rows.append({**row, "source_layer": layer, "context": context, "bound": bound})
        finally:
            wrapped.unload()
    table = pd.DataFrame(rows)
    unembedding = 2 * describe(model).unembedding_module.weight.numel()  # of the last position
    plain = table.groupby(["source_layer", "context"]).transform("first")
    for part in PARTS:
        timed, flops = f"timed_{part}", f"{part}_flops"
        table[f"{timed}_ratio"] = table[timed] / plain[timed]
        table[f"{part}_ratio"] = table[flops] / plain[flops]
        table[f"{part}_layers"] = (table[flops] - unembedding) / (plain[flops] - unembedding)
    columns = ["timed_{}", "timed_{}_ratio", "cache", "{}_flops", "{}_ratio", "{}_layers"]
    columns = dict.fromkeys(name.format(part) for name in columns for part in PARTS)
    return table[["way", "source_layer", "context", *columns, "bound"]]


def _ways(wrapped: BackAttentionModel, context: int, repeats: int) -> list[dict]:
    """Each of WAYS, the plain model first: timed_…, cache and …_flops of `cost_table`. They take
    turns, token by token, so that what else the machine does falls on all alike. ONE_PASS runs a
    prompt as TWO_PASSES does, and takes its time, cache and operations from there."""
    model, draw = wrapped.base_model, torch.Generator().manual_seed(0)
    shape = (1, context + NEW_TOKENS)  # what the tokens say does not matter for the cost
    ids = torch.randint(10, model.config.get_text_config().vocab_size, shape, generator=draw)
    ids = ids.to(input_device(model))

    @torch.no_grad()
    def step(way: str, ids: Tensor, cache: DynamicCache) -> None:
        wrapped.enabled, wrapped.one_pass = WAYS[way]
        wrapped(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    seconds = {(way, part): [] for way in WAYS for part in PARTS}
    for _ in range(repeats):
        caches = {way: DynamicCache(config=model.config) for way in WAYS}
        for end in range(context, ids.shape[1]):
            part, begin = ("first", 0) if end == context else ("each", end - 1)
            for way in WAYS:
                if way == ONE_PASS and part == "first":
                    caches[way] = copy.deepcopy(caches[TWO_PASSES])
                    seconds[way, part].append(seconds[TWO_PASSES, part][-1])
                    continue
                start = time.perf_counter()
                step(way, ids[:, begin:end], caches[way])
                if ids.is_cuda:
                    torch.cuda.synchronize(ids.device)
                seconds[way, part].append(time.perf_counter() - start)
    rows, filled, (first, new) = [], None, ids[:, : context + 1].split([context, 1], dim=1)
    for way in WAYS:
        row = {f"timed_{part}": float(np.median(seconds[way, part])) for part in PARTS}
        row |= {"cache": sum(x.keys.nbytes + x.values.nbytes for x in caches[way].layers) / 2**20}
        if way == ONE_PASS:
            cache = filled
        else:
            cache = DynamicCache(config=model.config)
            flops = operations_of(functools.partial(step, way, first, cache))
            filled = copy.deepcopy(cache)
        each = operations_of(functools.partial(step, way, new, cache))
        row |= {"first_flops": flops, "each_flops": each}
        rows.append({"way": way, **row})
    return rows


def arithmetic_has_stages(models: dict[str, tuple], knockouts: pd.DataFrame) -> dict:
    """Q2. models: name -> (`stages.order_table` of `sum_labels`, n); knockouts:
    `stages.knockout_table` of the first model, of stages A to D, layer 0 left out.

    Three checks per model: each of A→B, B→C, C→D is surely more than half a layer. Less only
    compares shares of flow within a layer, which is what a model of two layers has much of. Four of
    the first model: each stage's own layers are `needed`. The comparison is each model's smallest
    step; the strictest control, what the least needed stage costs more than random layers do.
    Raises ValueError for other stages.
    """
    stages, gaps = list(knockouts["stage"]), []
    if stages != list("ABCD"):
        raise ValueError(f"Knock-outs of stages A to D are needed, one row each, not of {stages}.")
    checks, smallest = named(knockouts, knockouts["needed"], "stage"), []
    for name, (order, n) in models.items():
        steps = order[order["step"]]
        each = steps["earlier"] + "→" + steps["later"]
        checks |= dict(zip(f"{name}: " + each, steps["low"] > 0.5, strict=True))
        least = steps.loc[steps["gap"].idxmin()]
        what = f"{name}: smallest step, {least['earlier']}→{least['later']}"
        smallest.append(Effect(what, *least[["gap", "low", "high"]], unit="layers", zone=0.5))
        numbers = [with_interval(row, "gap", "+.1f", ".1f") for _, row in steps.iterrows()]
        gaps.append(f"{name}: {', '.join(map(' '.join, zip(each, numbers, strict=True)))}, n = {n}")
    needed = ", ".join(knockouts.loc[knockouts["needed"], "stage"]) or "none"
    first = knockouts.iloc[0]
    ours = (
        f"layers between stages: {'; '.join(gaps)}; in {next(iter(models))} own layers needed more "
        f"than every random set: {needed}, n = {first['n']}, {first['draws']} random sets"
    )
    least = knockouts.loc[knockouts["difference"].idxmin()]
    ends = least[["difference", "difference_low", "difference_high"]]
    what = f"ablating stage {least['stage']} less random layers"
    return claim("Q2", ours, checks, smallest, Effect(what, *ends, unit="nats", zone=0))


def other_prompts_too(difference: pd.DataFrame, controls: Sequence[str]) -> dict:
    """N1. difference: of back attention on questions asked in other ways, by dataset and over all
    of them ("all", names resampled together); its checks: `gain_claim`."""
    counts = difference[difference["dataset"] != "all"].groupby("dataset", sort=False)["n"].first()
    n = ", ".join(f"{n:.0f} ({name})" for name, n in counts.items())
    return gain_claim("N1", difference, controls, f"; n = {n}, of the same second hops")


def costs_as_computed(costs: pd.DataFrame, answered: pd.DataFrame) -> dict:
    """Q3. costs: `cost_table`; answered: by dataset, what one pass changes.

    Two checks, of the operations of back attention in two passes at every source layer and length,
    the unembedding, which runs once, left out: the prompt's are within 5 % of 1 + (L − s) / L times
    the plain model's, and so are a new token's. What times were measured is in the figure: they
    change from run to run.
    """
    twice, once = (costs[costs["way"] == way] for way in (TWO_PASSES, ONE_PASS))
    off = {part: 100 * (twice[f"{part}_layers"] / twice["bound"] - 1) for part in PARTS}
    checks = {f"operations, {part}": (x.abs() < 5).all() for part, x in off.items()}
    most = max((x.loc[x.abs().idxmax()] for x in off.values()), key=abs)
    exact = Effect("largest difference", *[most] * 3, "% off the formula", 5, "none")

    def ranges(table: pd.DataFrame, column: str) -> str:
        rows = table.groupby("source_layer")[column].agg(["min", "max"])
        return ", ".join(f"{r.Index}: {r.min:.2f}–{r.max:.2f}" for r in rows.itertuples())

    bounds = twice.groupby("source_layer")["bound"].first()
    computed = ", ".join(f"{layer}: {bound:.2f}" for layer, bound in bounds.items())
    lost = ", ".join(
        f"{points(row)} points on {row['dataset']} (n = {row['n']}, {row['seeds']} seeds)"
        for _, row in answered.iterrows()
    )
    ours = (
        f"operations over the plain model's, by source layer: computed {computed}; without the "
        f"unembedding: prompt {ranges(twice, 'first_layers')}, new token "
        f"{ranges(twice, 'each_layers')}; with it: prompt {ranges(twice, 'first_ratio')}, new "
        f"token {ranges(twice, 'each_ratio')}, new token in one pass {ranges(once, 'each_ratio')}, "
        f"which changes accuracy by {lost}"
    )
    return claim("Q3", ours, checks, exact)
