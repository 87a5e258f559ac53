"""Training and testing one run."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from backattn import runtime
from backattn.adapters.arms import UNTRAINED, make_arm
from backattn.models.devices import input_device, one_device
from backattn.models.load import load_model
from backattn.models.packaged import quiet_transformers
from backattn.training.batches import Items
from backattn.training.evaluation import AS_IT_IS, evaluate, perplexity, written
from backattn.training.loop import train
from companion.questions.datasets import DATASETS, held_out_text
from companion.runs.as_asked import asked, questions
from companion.runs.run import OWN, READS_MEMORY, SCRATCH, Run, source_of
from companion.runs.scratch import scratch_model
from companion.runs.store import Store

_base: dict[tuple, tuple] = {}


def base_model(name: str, dtype: str = "float32", device: str = "cpu"):
    """(model, tokenizer) that adapters of runs are put on, kept until another is asked for."""
    key = name, source_of(name), dtype, device
    if key not in _base:
        _base.clear()  # before the other needs its memory
        runtime.release_memory()
        with quiet_transformers() if name in OWN else contextlib.nullcontext():
            _base[key] = load_model(OWN.get(name, name), dtype=getattr(torch, dtype), device=device)
    return _base[key]


@contextlib.contextmanager
def with_adapter(run: Run, dtype: str, device: str = "cpu") -> Iterator[tuple[nn.Module, object]]:
    """(model, tokenizer) of a run, the untrained arm drawn from its seed; taken off afterwards."""
    if run.model == SCRATCH:
        torch.manual_seed(run.seed)
        model, tokenizer = scratch_model(run)
        model = model.to(one_device(device))
    else:
        model, tokenizer = base_model(run.model, dtype, device)
        torch.manual_seed(run.seed)
        if run.arm not in UNTRAINED:
            model = make_arm(run.arm, model, run.source_layer, run.dim, run.memory_layers)
    model.set_attn_implementation("eager")  # its backward pass is faster on CPUs for short texts
    try:
        yield model, tokenizer
    finally:
        if hasattr(model, "unload"):
            model.unload()


@contextlib.contextmanager
def load_trained(run: Run, store: Store, device: str = "cpu") -> Iterator[tuple[nn.Module, object]]:
    """`with_adapter` as tested, with its trained weights; raises what `Store.weights` does."""
    weights = store.weights(run)
    with with_adapter(run, run.tested_in, device) as (model, tokenizer):
        put_weights(model, weights)
        yield model, tokenizer


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that require gradients, by name, as fp16 copies: what is stored of a run."""
    return {
        name: p.detach().to("cpu", torch.float16).contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put stored weights back; raises ValueError when they belong to another arm."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in trained.items()} != {n: w.shape for n, w in weights.items()}:
        raise ValueError("These weights belong to another arm, another width or another model.")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(weights[name])


def trained_in(run: Run, device: str) -> str:
    """The dtype of a run's matrix products in training: fp32 where the device has none in bf16."""
    slow = run.dtype == "bfloat16" and not runtime.multiplies_bf16(one_device(device))
    return "float32" if slow else run.dtype


def train_and_test(run: Run, store: Store, device: str = "cpu") -> dict:
    """Train and test one run, unless it is finished; a stopped one goes on. Returns its result.

    Under `accelerate launch` all processes train it together and the first one stores it. A result
    holds: run, trained (weights), trained_in (its dtype, where that is not the run's), seconds,
    curve (rows of `train`), hardware; without test validation (share right) and validation_loss;
    else right (a 0 or 1 per question), right_exchanged (token by token, with another memory, where
    the dataset has such) and right_own (so with its memory, of numbers), groups (of published
    datasets), perplexity (of held-out text, language models only), flops (of a forward pass). One
    whose loss is not a number, at too high a learning rate, holds run and diverged.
    """
    result, world = store.result(run), runtime.process_state()
    world.wait_for_everyone()  # all have looked before one writes
    if result is not None:
        return result
    checkpoint = store.place(run) / "training.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    result, weights = {"run": asdict(run)}, {}
    about = {"trained": 0, "seconds": 0.0, "curve": []}
    try:
        if run.arm not in UNTRAINED:
            dtype = trained_in(run, device)
            weights_in = "float32" if run.model == SCRATCH else dtype
            with with_adapter(run, weights_in, device) as (model, tokenizer):
                parts = (questions(run, tokenizer, part) for part in ("train", "validation"))
                text = own_text(model, tokenizer, run.seed) if run.kl else None
                curve = train(model, next(parts), run.recipe, next(parts), checkpoint, text=text)
                weights = trained_weights(model)
            about = {"trained": sum(tensor.numel() for tensor in weights.values())}
            if dtype != run.dtype:
                about["trained_in"] = dtype
            about |= {"seconds": round(float(curve["seconds"].iloc[-1]), 1)}
            about |= {"curve": curve.to_dict("records")}
        with with_adapter(run, run.tested_in, device) as (model, tokenizer):
            if weights:
                put_weights(model, weights)
            about |= _tested(run, model, tokenizer)
        result |= {**about, "hardware": runtime.hardware()}
    except FloatingPointError as error:
        result["diverged"] = str(error)
    if world.is_main_process:
        store.keep(run, result, weights)
        checkpoint.unlink(missing_ok=True)
    world.wait_for_everyone()
    return result


def own_text(
    model: nn.Module, tokenizer, seed: int, windows: int = 128, length: int = 64
) -> Tensor:
    """Ordinary text, as the model without its adapter writes it: token ids [windows, length], the
    first of them the beginning of text or, for a tokenizer that has none, the end of the text
    before. Raises ValueError for one that has neither."""
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    if first is None:
        raise ValueError("Text is sampled from its beginning on: this tokenizer marks none.")
    begins = torch.full((windows, 1), first, device=input_device(model))
    count = {"max_new_tokens": length - 1, "min_new_tokens": length - 1, "pad_token_id": 0}
    torch.manual_seed(seed)
    with torch.no_grad(), model.disable_adapter():
        return model.generate(
            input_ids=begins,
            attention_mask=torch.ones_like(begins),
            **count,
            **AS_IT_IS,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
        ).cpu()


def _tested(run: Run, model: nn.Module, tokenizer) -> dict:
    if run.test_items == 0:
        items = questions(run, tokenizer, "validation")
        right, loss = evaluate(model, items)
        if items.kinds:  # what a rate is chosen on must be like what is trained on
            like = np.isin(items.kinds, questions(run, tokenizer, "train").kinds)
            right = right[like] if like.any() else right
        return {"validation": float(right.mean()), "validation_loss": loss}
    test = questions(run, tokenizer, "test")
    result = {"right": "".join(map(str, answer_test(run, model, tokenizer, test).astype(int)))}
    other = DATASETS[run.dataset].exchanged
    if other and run.arm in READS_MEMORY:
        exchanged = questions(replace(run, dataset=other), tokenizer, "test")
        asked_for = {"right_exchanged": exchanged}
        if test.accepted is None:  # else `right` is asked in the same way
            asked_for["right_own"] = test
        for name, items in asked_for.items():
            right = evaluate(model, items)[0]
            result[name] = "".join(map(str, right.astype(int)))
    if DATASETS[run.dataset].published:
        result["groups"] = asked(run, "test")["group"].tolist()
    if DATASETS[run.dataset].words is None and run.model != SCRATCH:
        result["perplexity"] = perplexity(model, tokenizer, held_out_text())
    first = torch.tensor([test.prompts[0]], device=input_device(model))
    return {**result, "flops": forward_flops(model, first)}


def answer_test(run: Run, model: nn.Module, tokenizer, test: Items) -> np.ndarray:
    """Which test questions are answered right, [n] bool: a language model's numbers by what it
    writes; first tokens, and the characters of models from scratch, by the logits."""
    if test.accepted is None and run.model != SCRATCH:
        return written(model, tokenizer, test)
    return evaluate(model, test)[0]


def forward_flops(model: nn.Module, ids: Tensor) -> int:
    """Operations (`operations_of`) of a forward pass over ids [B, T], logits of the last token."""
    return operations_of(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=False))


def operations_of(call: Callable[[], object]) -> int:
    """Floating-point operations of what `call` runs, as torch counts them; the fused attention of
    CPUs, which it does not count, is taken apart."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
