"""Another memory in small models from scratch, whose questions "e3 r7 r12" are all of one length:
does the answer become the one that the other memory's bridge has?"""

from collections.abc import Sequence

import pandas as pd
import torch

from backattn.adapters.modules import BackAttention, normed
from backattn.adapters.two_pass import TwoPassModel
from backattn.models.devices import input_device
from backattn.runtime import progress
from companion.questions.datasets import load
from companion.questions.splits import place_of
from companion.runs.as_asked import asked
from companion.runs.perform import load_trained
from companion.runs.run import Run
from companion.runs.store import Store

R1 = 1  # r1's position in a question


def matched_donors(questions: pd.DataFrame, pool: pd.DataFrame) -> pd.Series:
    """Per question the index of one of `pool` with the same two relations and another answer, drawn
    by a hash of both prompts; -1 where there is none. Both: prompt ("e3 r7 r12"), answer."""

    def relations(frame: pd.DataFrame) -> pd.Series:
        return frame["prompt"].str.split(n=1).str[1]

    by_relations, chosen = dict(list(pool.groupby(relations(pool)))), []
    for prompt, answer, pair in zip(
        questions["prompt"], questions["answer"], relations(questions), strict=True
    ):
        alike = by_relations.get(pair, pool.iloc[:0])
        alike = alike.loc[alike["answer"] != answer, "prompt"]
        order = alike.map(lambda other, prompt=prompt: place_of(f"{prompt}|{other}"))
        chosen.append(order.idxmin() if len(order) else -1)
    return pd.Series(chosen, index=questions.index, dtype=int)


@torch.no_grad()
def exchange_memory(
    wrapped: TwoPassModel, tokenizer, questions: pd.DataFrame, donors: pd.DataFrame
) -> pd.DataFrame:
    """Questions asked with several memories: question (row number), memory, right, donors_answer
    (the answer became the donor's; both 0.0 or 1.0). questions and donors, row by row: prompt,
    answer.

    memory: "own"; "another's", the states that the first pass makes of the donor; "mean", of all
    questions; where the update attends "only r1", r1's cells alone; and "the other itself", the
    donor asked with its own memory (right of its own answer), which bounds what it can give.
    """

    device = input_device(wrapped)

    def ids(texts: pd.Series) -> torch.Tensor:
        rows = tokenizer(texts.tolist(), add_special_tokens=False)["input_ids"]
        return torch.tensor(rows, device=device)

    own, other = ids(questions["prompt"]), ids(donors["prompt"])
    answers, donated = ids(questions["answer"])[:, 0], ids(donors["answer"])[:, 0]
    inputs = {"attention_mask": torch.ones_like(own)}
    inputs |= {"position_ids": torch.arange(own.shape[1], device=device).expand_as(own)}
    among = [wrapped.needed.index(layer) for layer in wrapped.memory_layers]
    attends = all(isinstance(update, BackAttention) for update in wrapped.updates.values())
    mean = wrapped.first_pass_states(own, **inputs)[among]
    if not attends or wrapped.back_attention_config.norm:  # what is read is normed
        mean = normed(mean)
    mean = mean.mean(1, keepdim=True)
    memories = {
        "own": {},
        "another's": {"memory": wrapped.first_pass_states(other, **inputs)[among]},
        "mean": {"memory": mean.expand(-1, len(own), -1, -1)},
    }
    if attends:
        cells = torch.zeros(1, 1, len(among), own.shape[1], dtype=torch.bool, device=device)
        cells[..., R1] = True
        memories["only r1"] = {"cells": cells}
    parts = []
    for memory, edit in {**memories, "the other itself": {}}.items():
        asked_for, answer = (own, answers) if memory in memories else (other, donated)
        with wrapped.edited(**edit):
            said = wrapped(asked_for, **inputs, use_cache=False).logits[:, -1].argmax(-1)
        table = {"question": range(len(own)), "memory": memory}
        table |= {"right": (said == answer).cpu().numpy() * 1.0}
        parts.append(
            pd.DataFrame({**table, "donors_answer": (said == donated).cpu().numpy() * 1.0})
        )
    return pd.concat(parts, ignore_index=True)


def exchanges(
    runs: Sequence[Run], store: Store, device: str = "cpu", donors_from: str = "train"
) -> pd.DataFrame:
    """`exchange_memory` of the tests of runs on "compositions" or "premise" with kept weights, by
    kind of question: model, arm, seed, kind, question (row of the test), e2, memory, right,
    donors_answer. Donors are two-hop questions of a split whose facts both were composed; questions
    without one are left out."""
    parts = []
    for run in progress(list(runs), "exchanging", unit="run"):
        whole, test = load(run.dataset), asked(run, "test").reset_index(drop=True)
        composed = (whole["split"] == donors_from) & whole["kind"].isin(["ID/ID", "two-hop"])
        pool = whole[composed].reset_index(drop=True)
        chosen = matched_donors(test, pool)
        test = test[chosen >= 0]
        with load_trained(run, store, device) as (wrapped, tokenizer):
            made = exchange_memory(wrapped, tokenizer, test, pool.loc[chosen[chosen >= 0]])
        about = test[["kind", "group"]].rename(columns={"group": "e2"})
        about = about.assign(model=run.model, arm=run.arm, seed=run.seed).iloc[made["question"]]
        made["question"] = about.index
        parts.append(pd.concat([about.reset_index(drop=True), made], axis=1))
    return pd.concat(parts, ignore_index=True)
