"""Training and testing one run."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from backattn import runtime
from backattn.adapters.arms import make_arm
from backattn.models.devices import one_device
from backattn.models.devices import input_device
from backattn.models.load import load_model
from backattn.training.batches import Items
from backattn.training.evaluation import evaluate, perplexity, written
from backattn.training.loop import train
from companion.questions.datasets import DATASETS, held_out_text
from companion.runs.as_asked import asked, questions
from companion.runs.run import SCRATCH, UNTRAINED, Run, tested_in
from companion.runs.scratch import scratch_model
from companion.runs.store import Store, answers_right


@functools.lru_cache(maxsize=2)
def _base(name: str, dtype: str, device: str):
    model, tokenizer = load_model(name, dtype=getattr(torch, dtype), device=device)
    return model, tokenizer


@contextlib.contextmanager
def with_adapter(run: Run, dtype: str, device: str = "cpu") -> Iterator[tuple[nn.Module, object]]:
    """The run's model with its untrained arm, drawn from the run's seed, and the tokenizer; taken off afterwards."""
    if run.model == SCRATCH:
        torch.manual_seed(run.seed)
        model, tokenizer = scratch_model(run)
        model = model.to(one_device(device))
    else:
        base, tokenizer = _base(run.model, dtype, device)
        torch.manual_seed(run.seed)
        model = (
            base
            if run.arm in UNTRAINED
            else make_arm(run.arm, base, run.source_layer, run.dim, run.memory_layers)
        )
    model.set_attn_implementation(
        "eager"
    )  # its backward pass is the faster one on CPUs for short texts
    try:
        yield model, tokenizer
    finally:
        if hasattr(model, "unload"):
            model.unload()


@contextlib.contextmanager
def load_trained(
    run: Run, store: "Store", device: str = "cpu"
) -> Iterator[tuple[nn.Module, object]]:
    """`armed` as it is tested, with the weights that were kept; raises FileNotFoundError where they are not there."""
    weights = store.weights(run)
    with with_adapter(run, tested_in(run), device) as (model, tokenizer):
        put_weights(model, weights)
        yield model, tokenizer


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that require gradients, by name, as fp16 copies: what is kept of a run."""
    return {
        n: p.detach().to("cpu", torch.float16).contiguous()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put kept weights back; raises ValueError when they belong to another arm."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if own.keys() != weights.keys() or any(own[n].shape != weights[n].shape for n in own):
        raise ValueError("These weights belong to another arm, another width or another model.")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])


def train_and_test(run: Run, store: Store, device: str = "cpu") -> dict:
    """Train and test one run, unless it is finished; a stopped one goes on. Returns its result. Under `accelerate
    launch` all processes train it together (see `training.train`) and the first one keeps it.

    A result holds: run, trained (number of weights), seconds (of training), curve (rows of `training.train`),
    hardware. A run without test adds validation (share right) and validation_loss. Others add right (one 0 or 1 per
    test question), groups (of each question, where the questions are not part of this repository), perplexity (of
    held-out text, language models only), flops (of a forward pass over the first question).
    """
    done, world = store.result(run), runtime.process_state()
    world.wait_for_everyone()  # all have looked before one writes
    if done is not None:
        return done
    place = store.place(run)
    place.mkdir(parents=True, exist_ok=True)
    weights, curve, result = {}, [], {"run": asdict(run), "trained": 0, "seconds": 0.0}
    if run.arm not in UNTRAINED:
        with with_adapter(run, run.dtype if run.model != SCRATCH else "float32", device) as (
            model,
            tokenizer,
        ):
            items, validation = (
                questions(run, tokenizer, split) for split in ("train", "validation")
            )
            curve = train(model, items, run.recipe, validation, place / "training.pt").to_dict(
                "records"
            )
            weights = trained_weights(model)
            result["trained"] = sum(tensor.numel() for tensor in weights.values())
            result["seconds"] = round(curve[-1]["seconds"], 1)
    with with_adapter(run, tested_in(run), device) as (model, tokenizer):
        if weights:
            put_weights(model, weights)  # what is tested is what is kept
        if run.test_items == 0:
            items = questions(run, tokenizer, "validation")
            right, loss = evaluate(model, items)
            if items.kinds:  # what a rate is chosen on must be like what is trained on
                right = right[np.array(items.kinds) == "ID/ID"]
            result |= {"validation": float(right.mean()), "validation_loss": loss}
        else:
            result |= _test(run, model, tokenizer)
    result |= {"curve": curve, "hardware": runtime.hardware()}
    if world.is_main_process:
        store.keep(run, result, weights)
        (place / "training.pt").unlink(missing_ok=True)
    world.wait_for_everyone()
    return result


def _test(run: Run, model: nn.Module, tokenizer) -> dict:
    """The part of a result that concerns the test."""
    test = questions(run, tokenizer, "test")
    result = {"right": "".join(map(str, answer_test(run, model, tokenizer, test).astype(int)))}
    if DATASETS[run.dataset].published:
        result["groups"] = asked(run, "test")["group"].tolist()
    if run.model != SCRATCH:
        result["perplexity"] = perplexity(model, tokenizer, held_out_text())
    result["flops"] = forward_flops(
        model, torch.tensor([test.prompts[0]], device=input_device(model))
    )
    return result


def answer_test(run: Run, model: nn.Module, tokenizer, test: Items) -> np.ndarray:
    """Which test questions are answered right: [n] bool.

    A language model's numbers are read from what it writes; first tokens, and the characters of models from scratch,
    from the logits.
    """
    if test.accepted is None and run.model != SCRATCH:
        return written(model, tokenizer, test)
    return evaluate(model, test)[0]


def recheck(runs: Iterable[Run], store: Store, count: int, device: str = "cpu") -> pd.DataFrame:
    """Ask trained arms their first `count` test questions again, with the weights that were kept.

    Returns: dataset, arm, seed, n, accuracy (now), kept (as it was on the same questions), agree (share of questions
    with the same outcome). Raises FileNotFoundError where a run's weights are not there.
    """
    rows = []
    for run in runtime.progress(list(runs), "asking again", unit="run"):
        kept = answers_right(store.result(run))[:count]
        with load_trained(run, store, device) as (model, tokenizer):
            test = questions(replace(run, test_items=len(kept)), tokenizer, "test")
            right = answer_test(run, model, tokenizer, test)
        about = {"dataset": run.dataset, "arm": run.arm, "seed": run.seed, "n": len(kept)}
        rows.append(
            {
                **about,
                "accuracy": right.mean(),
                "kept": kept.mean(),
                "agree": (right == kept).mean(),
            }
        )
    return pd.DataFrame(rows)


def before_and_after(run: Run, store: Store, count: int, device: str = "cpu") -> pd.DataFrame:
    """The first `count` test questions of a trained adapter: question, before (the next token without it), after,
    answer."""
    rows = []
    with load_trained(run, store, device) as (model, tokenizer):
        for question in asked(run, "test").head(count).itertuples():
            ids = tokenizer(question.prompt, return_tensors="pt")["input_ids"].to(
                input_device(model)
            )
            with torch.no_grad():
                after = model(ids).logits[0, -1].argmax()
                with model.disable_adapter():
                    before = model(ids).logits[0, -1].argmax()
            said = {
                "before": tokenizer.decode(before).strip(),
                "after": tokenizer.decode(after).strip(),
            }
            rows.append({"question": question.prompt, **said, "answer": question.answer.strip()})
    return pd.DataFrame(rows)


def forward_flops(model: nn.Module, ids: Tensor) -> int:
    """Operations (`operations_of`) of one forward pass over ids [B, T], logits of the last token only."""
    return operations_of(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=False))


def operations_of(call: Callable[[], object]) -> int:
    """Floating-point operations of what `call` runs, as torch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The fused attention of CPUs is not counted: take it apart.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
