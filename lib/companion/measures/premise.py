"""What the small frozen models of the premise know, and where it can be read."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from backattn.models.decoder import describe
from backattn.models.devices import input_device
from backattn.models.lens import read_states
from backattn.training.batches import collate, first_tokens
from backattn.training.evaluation import answer_logits, by_length

AHEAD, EQUAL, HALF = 0.05, 0.02, 0.5  # see E6
CONTROLS = ("shuffled memory", "same layer")


@torch.no_grad()
def answers_of(model, tokenizer, questions: pd.DataFrame) -> pd.DataFrame:
    """`questions` (rows of `world`) with said ("e3", "e2" or "other"): what the model's likeliest
    token is. Of a fact "e3" is its end; e2 is of two-hop questions only."""
    items, said = first_tokens(tokenizer, questions), np.empty(len(questions), dtype=int)
    for rows in by_length(items, 512):
        batch = collate(items, rows, input_device(model))
        said[rows] = answer_logits(model, batch)[:, -1].argmax(-1).cpu()
    bridge = tokenizer.convert_tokens_to_ids(questions["group"].tolist())
    named = np.where(said == np.array(bridge), "e2", "other")
    return questions.assign(said=np.where(said == np.ravel(items.answers), "e3", named))


def readable(model, tokenizer, questions: pd.DataFrame) -> pd.DataFrame:
    """Where the logit lens reads an entity first of all words: layer (that the state enters), name
    ("e2" or "e3"), at ("r1" or "r2"), share of the two-hop `questions`."""
    ids = [
        tokenizer.convert_tokens_to_ids(questions[name].str.strip().tolist())
        for name in ("group", "answer")
    ]
    places, wanted = [[1, 2]] * len(questions), list(zip(*ids, strict=True))
    _, ranks = read_states(
        model, tokenizer, questions["prompt"].tolist(), places, wanted, ranks=True, batch_size=256
    )
    first = (ranks == 0).mean(0)  # [position, layer, name]
    return pd.DataFrame(
        [
            {"layer": layer, "name": name, "at": at, "share": first[place, layer, which]}
            for place, at in enumerate(("r1", "r2"))
            for which, name in enumerate(("e2", "e3"))
            for layer in range(first.shape[1])
        ]
    )


@torch.no_grad()
def put_back(model, tokenizer, questions: pd.DataFrame) -> pd.DataFrame:
    """Can e3 be recalled low? Two-hop questions run with the state of e2 in r1's place, as it
    enters a layer in "e1 e2 r2": layer, share right."""
    device, arch = input_device(model), describe(model)
    ids = torch.tensor(tokenizer(questions["prompt"].tolist())["input_ids"], device=device)
    answers = tokenizer.convert_tokens_to_ids(questions["answer"].str.strip().tolist())
    bridge = torch.tensor(tokenizer.convert_tokens_to_ids(questions["group"].tolist()))
    told = torch.stack([ids[:, 0], bridge.to(device), ids[:, 2]], dim=1)
    rows, states = [], model(told, output_hidden_states=True).hidden_states
    for layer, block in enumerate(arch.blocks):

        def put(module, args, layer=layer):
            return torch.cat([args[0][:, :1], states[layer][:, 1:2], args[0][:, 2:]], 1), *args[1:]

        hook = block.module.register_forward_pre_hook(put)
        try:
            said = model(ids).logits[:, -1].argmax(-1).cpu().numpy()
        finally:
            hook.remove()
        rows.append({"layer": layer, "share": float((said == np.array(answers)).mean())})
    return pd.DataFrame(rows)


def standing(row: Mapping[str, float]) -> str:
    """Where back attention stands to another arm by the interval of the difference: low, high."""
    if row["low"] > -EQUAL and row["high"] < EQUAL:
        return "equal"
    if row["low"] > 0:
        return "ahead by more than 5 points" if row["low"] > AHEAD else "ahead"
    return "behind" if row["high"] < 0 else "undecided"


def decisions(differences: pd.DataFrame, donors_low: Mapping[str, float]) -> pd.DataFrame:
    """What E6 of PREREGISTRATION.md says: a row per model with its standing to the two controls
    that count, the exchange's word and the decision. differences: back attention less each other
    arm (model, other, low, high); donors_low: by model the lower end of the share of answers that
    become the other question's. *Refuted* is a matter of all models."""
    rows = []
    for model, part in differences.groupby("model", sort=False):
        stands = part.set_index("other").loc[list(CONTROLS)].apply(standing, axis=1)
        most = donors_low[model] > HALF
        works = most and (stands == "ahead by more than 5 points").all()
        exchange = "more than half" if most else "not surely half"
        rows.append({"model": model, **stands, "the other's answer": exchange, "works": works})
    table = pd.DataFrame(rows)
    refuted = (table[list(CONTROLS)] == "equal").all(axis=None)
    says = {True: "the mechanism works", False: "refuted" if refuted else "not shown to work"}
    return table.assign(decision=table.pop("works").map(says))
