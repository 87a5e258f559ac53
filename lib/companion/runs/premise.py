"""Two small frozen models in which the paper's premise is set, and the adapters that they get."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from backattn.training.batches import first_tokens
from backattn.training.loop import Recipe, train
from companion.questions.premise import ENTITIES, WORDS, world
from companion.runs.plans import SEEDS, Planned
from companion.runs.run import Run
from companion.runs.scratch import tokenizer_of

LAYERS, WIDTH = 8, 96
ARMS = (
    *("back attention", "shuffled memory", "same layer", "residual LoRA", "loop LoRA"),
    "bias",
)
_facts = Recipe(1500, 2e-3, batch_size=256, weight_decay=0.1, warmup=0.05)
_natural = replace(_facts, steps=2600, weight_decay=1.0)  # stopped where half is right


def _llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"vocab_size": 1 + len(WORDS), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    size |= {"num_hidden_layers": layers, "max_position_embeddings": 32, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**size, **heads, tie_word_embeddings=True)).eval()


def make_base(name: str, folder: Path) -> None:
    """Train a frozen model of the premise from nothing, and save it as `load_model` reads it.

    "premise": eight layers learn all facts and the `shown` half of all two-hop questions.
    "premise low": four layers learn the facts alone and are frozen; four upper ones, which change
    nothing at first, then learn, beside all facts, two hops where the bridge is one of the "base"
    role. Facts are learnt at the beginning of a text and after another entity, as the second hop
    stands after the first. Ten minutes on one core.
    """
    tokenizer, questions = tokenizer_of(["<pad>", *WORDS], "words"), world()
    facts = questions[questions["kind"] == "fact"]
    facts = pd.concat([facts, facts, *(after_another(facts, seed) for seed in (1, 2))])
    two_hop = questions[(questions["kind"] == "two-hop") & questions["shown"]]
    torch.manual_seed(0)

    def learn(model: nn.Module, frames: Sequence[pd.DataFrame], recipe: Recipe) -> None:
        train(model, first_tokens(tokenizer, pd.concat(frames)), recipe)

    if name == "premise":
        model = _llama(LAYERS)
        learn(model, [facts, two_hop], _natural)
    else:
        low, model = _llama(LAYERS // 2), _llama(LAYERS)
        learn(low, [facts], _facts)
        model.load_state_dict(low.state_dict(), strict=False)
        model.requires_grad_(False)
        for layer in model.model.layers[LAYERS // 2 :]:
            layer.requires_grad_(True)
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        learn(model, [facts, two_hop[two_hop["role"] == "base"]], _facts)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def after_another(facts: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Facts told after any entity, "e9 e3 r7": columns as in `facts`."""
    others = np.random.default_rng(seed).integers(ENTITIES, size=len(facts)).astype(str)
    return facts.assign(prompt=[f"e{o} {p}" for o, p in zip(others, facts["prompt"], strict=True)])


def premise_runs(model: str, steps: int = 1000, arms: Sequence[str] = ARMS) -> list[Planned]:
    """E6: arms at source layer 0, d′ = 48, all questions of the training, three seeds on one test;
    rates tried at the full number of steps. The weight decay is one that back attention needs."""
    shape = dict(model=model, source_layer=0, dim=48, batch_size=64, dtype="float32")
    shape |= dict(train_items=None, validation_items=None, steps=steps, weight_decay=1.0)
    plain = Run("premise", "zero-shot", model=model, test_items=None)
    plan = [Planned(replace(plain, seed=seed)) for seed in SEEDS]
    for arm in arms:
        run = Run("premise", arm, test_items=None, **shape)
        trial = replace(run, test_items=0)
        plan += [Planned(replace(run, seed=seed), (trial,)) for seed in SEEDS]
    return plan
