"""What back attention costs when it is used: time, memory and operations, by source layer and length (question Q3)."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

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
from companion.report.intervals import mean_interval
from companion.report.verdicts import Claim, _points, _verdict
from companion.runs.as_asked import questions, test_groups
from companion.runs.perform import load_trained, operations_of
from companion.runs.run import Run
from companion.runs.store import Store

WAYS = PLAIN, TWICE, ONCE = "plain", "back attention", "back attention, new tokens in one pass"

PARTS = ("first", "each")  # until the first token, and each further one


@dataclass
class _Way:
    """One way to write on after a prompt, and what it took so far."""

    name: str
    cache: DynamicCache
    first: list[float] = field(default_factory=list)  # seconds for the prompt
    each: list[float] = field(default_factory=list)  # seconds per new token


def cost_table(
    model: nn.Module,
    source_layers: Sequence[int],
    contexts: Sequence[int],
    dim: int = 64,
    new_tokens: int = 8,
    repeats: int = 3,
) -> pd.DataFrame:
    """Time, memory and operations of writing on after a prompt, one text at a time.

    Three ways: the plain model; back attention, where prompt and new tokens have two passes; and back attention with
    new tokens in one pass (`BackAttentionModel.one_pass`). They alternate, token by token, so that what else the
    machine does falls on all alike. An untrained module costs what a trained one does.

    Returns one row per way, source layer and context (tokens of the prompt): way, source_layer, context, timed_first
    (seconds until the first token, median over repeats), timed_each (seconds per further token, median over all), both
    over the plain model's (timed_first_ratio, timed_each_ratio), cache (MiB, after all tokens), first_flops and
    each_flops (operations), first_ratio and each_ratio (operations over the plain model's), first_layers and
    each_layers (the same without the unembedding, which runs once in any case) and bound (layers that run for a token
    of the prompt, over all: 1 + (L − s) / L). Raises ValueError for a layer that the model does not have.
    """
    once = 2 * describe(model).unembedding_module.weight.numel()  # of the last position
    rows, places = [], [(layer, context) for layer in source_layers for context in contexts]
    layers = model.config.num_hidden_layers
    for layer, context in progress(places, "costs", unit="setting"):
        wrapped = get_back_attention_model(model, BackAttentionConfig(layer, dim))
        try:
            ids = _text(model, context + new_tokens)
            counts = {name: _flops(wrapped, ids, context, name) for name in WAYS}
            ways = [made for _ in range(repeats) for made in _written(wrapped, ids, context)]
            took = {
                (name, part): float(
                    np.median([t for way in ways if way.name == name for t in getattr(way, part)])
                )
                for name in WAYS
                for part in PARTS
            }
            for name in WAYS:
                row = {"way": name, "source_layer": layer, "context": context}
                row |= {f"timed_{part}": took[name, part] for part in PARTS}
                row |= {
                    f"timed_{part}_ratio": took[name, part] / took[PLAIN, part] for part in PARTS
                }
                row |= {
                    "cache": _mebibytes(next(w.cache for w in ways if w.name == name)),
                    **counts[name],
                }
                ratios = {
                    part: counts[name][f"{part}_flops"] / counts[PLAIN][f"{part}_flops"]
                    for part in PARTS
                }
                row |= {f"{part}_ratio": ratio for part, ratio in ratios.items()}
                for part in PARTS:
                    own, plain = (counts[which][f"{part}_flops"] - once for which in (name, PLAIN))
                    row[f"{part}_layers"] = own / plain
                rows.append(
                    {**row, "bound": 1.0 if name == PLAIN else 1 + (layers - layer) / layers}
                )
        finally:
            wrapped.unload()
    return pd.DataFrame(rows)


def _text(model: nn.Module, length: int) -> Tensor:
    """Token ids [1, length]; what they say does not matter for the cost."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.get_text_config().vocab_size, (1, length), generator=draw)
    return ids.to(input_device(model))


def _written(wrapped: BackAttentionModel, ids: Tensor, context: int) -> Iterator[_Way]:
    """All three ways through the same tokens, alternating."""
    ways = [_Way(name, DynamicCache(config=wrapped.base_model.config)) for name in WAYS]
    for end in range(context, ids.shape[1]):
        for way in ways:
            begin = time.perf_counter()
            _step(
                wrapped,
                way.name,
                ids[:, :context] if end == context else ids[:, end - 1 : end],
                way.cache,
            )
            if ids.is_cuda:
                torch.cuda.synchronize(ids.device)
            (way.first if end == context else way.each).append(time.perf_counter() - begin)
    yield from ways


@torch.no_grad()
def _step(wrapped: BackAttentionModel, name: str, ids: Tensor, cache: DynamicCache) -> None:
    wrapped.enabled, wrapped.one_pass = name != PLAIN, name == ONCE
    try:
        wrapped(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        wrapped.enabled, wrapped.one_pass = True, False


def _mebibytes(cache: DynamicCache) -> float:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 2**20


def _flops(wrapped: BackAttentionModel, ids: Tensor, context: int, name: str) -> dict[str, int]:
    """Operations until the first token, and of the next one, as torch counts them."""
    cache = DynamicCache(config=wrapped.base_model.config)
    prompt = operations_of(lambda: _step(wrapped, name, ids[:, :context], cache))
    token = operations_of(lambda: _step(wrapped, name, ids[:, context : context + 1], cache))
    return {"first_flops": prompt, "each_flops": token}


def tokens_of_thought(costs: pd.DataFrame, answer: int) -> pd.DataFrame:
    """How many more tokens the plain model could write in the time that back attention takes longer.

    costs: `cost_table`; answer: tokens of the answer, which both write. Returns: way, source_layer, context, answer,
    timed_thought (tokens), thought (tokens by operations instead of time).
    """
    plain = costs[costs["way"] == PLAIN].set_index(["source_layer", "context"])
    rows = []
    for row in costs[costs["way"] != PLAIN].itertuples():
        base = plain.loc[(row.source_layer, row.context)]
        about = {
            "way": row.way,
            "source_layer": row.source_layer,
            "context": row.context,
            "answer": answer,
        }
        longer = (
            row.timed_first
            - base["timed_first"]
            + (answer - 1) * (row.timed_each - base["timed_each"])
        )
        more = (
            row.first_flops
            - base["first_flops"]
            + (answer - 1) * (row.each_flops - base["each_flops"])
        )
        rows.append(
            {
                **about,
                "timed_thought": longer / base["timed_each"],
                "thought": more / base["each_flops"],
            }
        )
    return pd.DataFrame(rows)


def one_pass_answers(
    runs: Sequence[Run], store: Store, count: int, device: str = "cpu"
) -> pd.DataFrame:
    """Trained back attention asked its first `count` test questions, with new tokens in two passes and in one.

    Returns one row per run and question: dataset, seed, group, two, one (whether the number written is right).
    """
    rows = []
    for run in progress(list(runs), "writing", unit="run"):
        groups = test_groups(run, store.result(run))[:count]
        with load_trained(run, store, device) as (wrapped, tokenizer):
            items = questions(replace(run, test_items=len(groups)), tokenizer, "test")
            right = {}
            for way, one_pass in (("two", False), ("one", True)):
                wrapped.one_pass = one_pass
                right[way] = written(wrapped, tokenizer, items).astype(float)
        rows.append(
            pd.DataFrame({"dataset": run.dataset, "seed": run.seed, "group": groups, **right})
        )
    return pd.concat(rows, ignore_index=True)


def one_pass_table(answered: pd.DataFrame) -> pd.DataFrame:
    """`one_pass_answers` by dataset: dataset, two, one (accuracies), difference (one less two), low, high (95 %, over
    groups), n, seeds."""
    rows = []
    for dataset, part in answered.groupby("dataset", sort=False):
        mean, low, high = mean_interval((part["one"] - part["two"]).to_numpy(), part["group"])
        row = {
            "dataset": dataset,
            "two": part["two"].mean(),
            "one": part["one"].mean(),
            "difference": float(mean),
        }
        rows.append(
            {
                **row,
                "low": float(low),
                "high": float(high),
                "n": len(part),
                "seeds": part["seed"].nunique(),
            }
        )
    return pd.DataFrame(rows)


def costs_as_computed(costs: pd.DataFrame, answered: pd.DataFrame) -> Claim:
    """Q3. costs, answered: from `costs.cost_table` and `costs.one_pass_table`.

    Two checks, of the operations of back attention in two passes at every source layer and length, the unembedding,
    which runs once, left out: the prompt's are within 5 % of 1 + (L − s) / L times the plain model's, and so are a new
    token's. What times were measured is in the figure: they change from run to run.
    """
    by = {name: costs[costs["way"] == name] for name in dict.fromkeys(costs["way"])}
    twice, once = by["back attention"], by["back attention, new tokens in one pass"]
    passed = [
        bool((np.abs(twice[f"{part}_layers"] / twice["bound"] - 1) < 0.05).all())
        for part in ("first", "each")
    ]

    def told(table: pd.DataFrame, column: str) -> str:
        rows = table.sort_values("context").groupby("source_layer")[column].agg(["min", "max"])
        return ", ".join(
            f"{layer}: {row['min']:.2f}–{row['max']:.2f}" for layer, row in rows.iterrows()
        )

    bounds = ", ".join(
        f"{layer}: {bound:.2f}"
        for layer, bound in twice.groupby("source_layer")["bound"].first().items()
    )
    lost = ", ".join(
        f"{_points(row)} points on {row['dataset']} (n = {row['n']}, {row['seeds']} seeds)"
        for _, row in answered.iterrows()
    )
    return Claim(
        id="Q3",
        claim="inference costs 1 + (L − s) / L times the operations",
        paper="open question; 1.81 at layer 6 of 32",
        ours=f"operations over the plain model's, by source layer: computed {bounds}; without the unembedding: prompt "
        f"{told(twice, 'first_layers')}, new token {told(twice, 'each_layers')}; with it: prompt "
        f"{told(twice, 'first_ratio')}, new token {told(twice, 'each_ratio')}, new token in one pass "
        f"{told(once, 'each_ratio')}, which changes accuracy by {lost}",
        kind="exact",
        verdict=_verdict(passed),
        notebook="08_beyond_facts_and_cost",
        figure="08_costs",
    )
