"""09: what back attention costs in use: time, memory and operations (question Q3)."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

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
from backattn.training.evaluation import written
from companion.report.intervals import summary
from companion.report.verdicts import claim, points
from companion.runs.as_asked import questions, test_groups
from companion.runs.perform import load_trained, operations_of
from companion.runs.run import Run
from companion.runs.store import Store


class Way(NamedTuple):
    """One way to write on after a prompt; label: its name in tables."""

    label: str
    adapter: bool
    one_pass: bool = False


PLAIN = Way("plain", adapter=False)
TWO_PASSES = Way("back attention", adapter=True)
ONE_PASS = Way("back attention, new tokens in one pass", adapter=True, one_pass=True)
WAYS = (PLAIN, TWO_PASSES, ONE_PASS)
PARTS = ("first", "each")  # until the first token, and each further one


def cost_table(
    model: nn.Module,
    source_layers: Sequence[int],
    contexts: Sequence[int],
    dim: int = 64,
    new_tokens: int = 8,
    repeats: int = 3,
) -> pd.DataFrame:
    """Time, memory and operations of writing on after a prompt, one text at a time.

    The WAYS alternate, token by token, so that what else the machine does falls on all alike. An
    untrained module costs what a trained one does.

    Returns one row per way, source layer and context (tokens of the prompt): way, source_layer,
    context, timed_first (seconds until the first token, median over repeats), timed_each (seconds
    per further token, median over all), both over the plain model's (timed_first_ratio,
    timed_each_ratio), cache (MiB, after all tokens), first_flops and each_flops (operations),
    first_ratio and each_ratio (operations over the plain model's), first_layers and each_layers
    (the same without the unembedding, which runs once in any case) and bound (layers that run for a
    token of the prompt, over all: 1 + (L − s) / L). Raises ValueError for a layer that the model
    does not have.
    """
    settings = [(layer, context) for layer in source_layers for context in contexts]
    tables = []
    for layer, context in progress(settings, "costs", unit="setting"):
        wrapped = get_back_attention_model(model, BackAttentionConfig(layer, dim))
        try:
            table = _costs(wrapped, context, new_tokens, repeats)
        finally:
            wrapped.unload()
        layers = model.config.num_hidden_layers
        bound = 1 + (layers - layer) / layers
        table["bound"] = np.where(table["way"] == PLAIN.label, 1.0, bound)
        table.insert(1, "source_layer", layer)
        table.insert(2, "context", context)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _costs(
    wrapped: BackAttentionModel, context: int, new_tokens: int, repeats: int
) -> pd.DataFrame:
    """Rows of `cost_table` for one adapter and one length of the prompt."""
    model, draw = wrapped.base_model, torch.Generator().manual_seed(0)
    shape = (1, context + new_tokens)  # what the tokens say does not matter for the cost
    ids = torch.randint(10, model.config.get_text_config().vocab_size, shape, generator=draw)
    ids = ids.to(input_device(model))
    seconds, caches = _seconds(wrapped, ids, context, repeats)
    rows = []
    for way in WAYS:
        row = {"way": way.label}
        row |= {f"timed_{part}": float(np.median(seconds[way, part])) for part in PARTS}
        cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[way].layers)
        row |= {"cache": cached / 2**20, **_operations(wrapped, ids, context, way)}
        rows.append(row)
    table, plain = pd.DataFrame(rows), rows[0]
    unembedding = 2 * describe(model).unembedding_module.weight.numel()  # of the last position
    for place, part in enumerate(PARTS):
        table.insert(
            3 + place, f"timed_{part}_ratio", table[f"timed_{part}"] / plain[f"timed_{part}"]
        )
    for part in PARTS:
        table[f"{part}_ratio"] = table[f"{part}_flops"] / plain[f"{part}_flops"]
    for part in PARTS:
        layers = table[f"{part}_flops"] - unembedding
        table[f"{part}_layers"] = layers / (plain[f"{part}_flops"] - unembedding)
    return table


def _seconds(
    wrapped: BackAttentionModel, ids: Tensor, context: int, repeats: int
) -> tuple[dict[tuple[Way, str], list[float]], dict[Way, DynamicCache]]:
    """All ways through the same tokens, alternating: (way, part) -> seconds, and their caches."""
    seconds = {(way, part): [] for way in WAYS for part in PARTS}
    for _ in range(repeats):
        caches = {way: DynamicCache(config=wrapped.base_model.config) for way in WAYS}
        for end in range(context, ids.shape[1]):
            part, begin = ("first", 0) if end == context else ("each", end - 1)
            for way in WAYS:
                start = time.perf_counter()
                _step(wrapped, way, ids[:, begin:end], caches[way])
                if ids.is_cuda:
                    torch.cuda.synchronize(ids.device)
                seconds[way, part].append(time.perf_counter() - start)
    return seconds, caches


@torch.no_grad()
def _step(wrapped: BackAttentionModel, way: Way, ids: Tensor, cache: DynamicCache) -> None:
    wrapped.enabled, wrapped.one_pass = way.adapter, way.one_pass
    try:
        wrapped(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        wrapped.enabled, wrapped.one_pass = True, False


def _operations(wrapped: BackAttentionModel, ids: Tensor, context: int, way: Way) -> dict[str, int]:
    """Operations until the first token, and of the next one, as torch counts them."""
    cache = DynamicCache(config=wrapped.base_model.config)
    parts = {"first": ids[:, :context], "each": ids[:, context : context + 1]}
    return {
        f"{part}_flops": operations_of(lambda own=own: _step(wrapped, way, own, cache))
        for part, own in parts.items()
    }


def tokens_of_thought(costs: pd.DataFrame, answer: int) -> pd.DataFrame:
    """How many more tokens the plain model could write in the time back attention takes longer.

    costs: `cost_table`; answer: tokens of the answer, which both write. Returns: way, source_layer,
    context, answer, timed_thought (tokens), thought (tokens by operations instead of time).
    """
    keys = ["source_layer", "context"]
    plain = costs[costs["way"] == PLAIN.label]
    both = costs[costs["way"] != PLAIN.label].merge(plain, on=keys, suffixes=("", "_plain"))

    def longer(first: str, each: str) -> pd.Series:
        more = both[first] - both[f"{first}_plain"]
        more = more + (answer - 1) * (both[each] - both[f"{each}_plain"])
        return more / both[f"{each}_plain"]

    thought = both[["way", *keys]].assign(answer=answer)
    thought["timed_thought"] = longer("timed_first", "timed_each")
    return thought.assign(thought=longer("first_flops", "each_flops"))


def one_pass_answers(
    runs: Sequence[Run], store: Store, count: int, device: str = "cpu"
) -> pd.DataFrame:
    """Trained back attention asked its first `count` test questions, new tokens in one and two
    passes.

    Returns one row per run and question: dataset, seed, group, two, one (whether the number written
    is right) and difference (one less two).
    """
    rows = []
    for run in progress(list(runs), "writing", unit="run"):
        groups = test_groups(run, store.result(run))[:count]
        with load_trained(run, store, device) as (wrapped, tokenizer):
            items = questions(replace(run, test_items=len(groups)), tokenizer, "test")
            right = {}
            for name in ("two", "one"):
                wrapped.one_pass = name == "one"
                right[name] = written(wrapped, tokenizer, items).astype(float)
        rows.append(
            pd.DataFrame({"dataset": run.dataset, "seed": run.seed, "group": groups, **right})
        )
    answered = pd.concat(rows, ignore_index=True)
    return answered.assign(difference=answered["one"] - answered["two"])


def one_pass_table(answered: pd.DataFrame) -> pd.DataFrame:
    """`one_pass_answers` by dataset: dataset, two, one (accuracies), difference (one less two),
    low, high (95 %, over groups), n, seeds."""
    parts = answered.groupby("dataset", sort=False)
    less = summary(answered, "difference", "dataset", cluster="group")
    table = parts[["two", "one"]].mean().reset_index().merge(less, on="dataset")
    table = table.rename(columns={"mean": "difference"})
    return table.assign(seeds=parts["seed"].nunique().to_numpy())


def costs_as_computed(costs: pd.DataFrame, answered: pd.DataFrame) -> dict:
    """Q3. costs, answered: from `cost_table` and `one_pass_table`.

    Two checks, of the operations of back attention in two passes at every source layer and length,
    the unembedding, which runs once, left out: the prompt's are within 5 % of 1 + (L − s) / L times
    the plain model's, and so are a new token's. What times were measured is in the figure: they
    change from run to run.
    """
    twice, once = (costs[costs["way"] == way.label] for way in (TWO_PASSES, ONE_PASS))
    passed = [((twice[f"{part}_layers"] / twice["bound"] - 1).abs() < 0.05).all() for part in PARTS]

    def ranges(table: pd.DataFrame, column: str) -> str:
        rows = table.sort_values("context").groupby("source_layer")[column].agg(["min", "max"])
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
    return claim("Q3", ours, passed)
