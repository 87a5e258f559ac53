"""Putting prompts to a model, and whom its answers name."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from backattn.models.devices import input_device
from backattn.models.next_token import next_log_probs
from backattn.models.tokens import continuation_ids, encode
from backattn.runtime import progress


def ask(
    model,
    tokenizer,
    prompts: pd.Series,
    keys: pd.Series,
    wanted: Sequence[Sequence[int]] | None = None,
    batch_size: int = 32,
) -> tuple[np.ndarray, list[dict[int, float]]]:
    """The model's next token after each prompt, and the log-probabilities of wanted ones.

    keys: prompts with equal keys begin alike (worked examples), which is then computed once.

    wanted: per prompt the tokens whose log-probabilities are returned.

    Returns (said [n], per prompt token -> log-probability). Raises ValueError when there are no prompts.
    """
    if not len(prompts):
        raise ValueError(
            "There is nothing to ask: the set is empty. Ask more facts, or a model that knows more."
        )
    said, logs = np.empty(len(prompts), dtype=int), [{} for _ in range(len(prompts))]
    texts, lengths = prompts.to_numpy(), prompts.str.len().to_numpy()
    groups = [
        rows[np.argsort(lengths[rows], kind="stable")]
        for rows in keys.groupby(keys.to_numpy()).indices.values()
    ]
    batches = [rows[i : i + batch_size] for rows in groups for i in range(0, len(rows), batch_size)]
    for rows in progress(batches, "asking", unit="batch"):
        batch = encode(tokenizer, texts[rows].tolist(), side="left", device=input_device(model))
        log_probs = next_log_probs(model, batch, share=True)
        said[rows] = log_probs.argmax(-1).cpu().numpy()
        for row, values in zip(rows, log_probs, strict=True):
            logs[row] = {token: values[token].item() for token in (wanted[row] if wanted else ())}
    return said, logs


def score(model, tokenizer, frame: pd.DataFrame, batch_size: int = 32) -> pd.DataFrame:
    """Ask the model every prompt.

    Returns `frame` with: answer_id (first token of " answer"), tokens (how many tokens the answer takes), log_prob of
    the first, said (the model's own next token, as text), correct (said is the answer's first token), shared
    (another answer of the frame begins with the same token, so the first token cannot tell them apart).
    """
    pieces = {answer: continuation_ids(tokenizer, answer) for answer in frame["answer"].unique()}
    ids = [pieces[answer][0] for answer in frame["answer"]]
    said, logs = ask(
        model, tokenizer, frame["prompt"], frame["relation"], [[i] for i in ids], batch_size
    )
    owners = frame.assign(answer_id=ids).groupby("answer_id")["answer"].nunique()
    return frame.assign(
        answer_id=ids,
        tokens=[len(pieces[answer]) for answer in frame["answer"]],
        log_prob=[own[i] for own, i in zip(logs, ids, strict=True)],
        said=[tokenizer.decode([i]) for i in said],
        correct=said == np.array(ids),
        shared=owners.loc[ids].to_numpy() > 1,
    )


def answerable(scored: pd.DataFrame, per_relation: int | None = None) -> pd.DataFrame:
    """The prompts fit for analysis: answered right, by an answer of one token that no other answer begins with.

    per_relation: at most this many of each relation. Raises ValueError when none is left.
    """
    fit = scored[scored["correct"] & ~scored["shared"] & (scored["tokens"] == 1)]
    if fit.empty:
        raise ValueError(
            "The model answers none of these prompts with a one-token answer: ask more or easier facts."
        )
    return (fit.groupby("relation").head(per_relation) if per_relation else fit).reset_index(
        drop=True
    )


OUTCOMES = ("e3", "e2", "shortcut", "e1", "other")

ENTITIES = OUTCOMES[:-1]

ID_COLUMNS = tuple(f"{entity}_ids" for entity in ENTITIES)  # columns made by `candidates`


def candidates(tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the first tokens of each outcome: e3_ids, e2_ids, shortcut_ids, e1_ids (frozensets).

    An alias that begins like another answer to the same relation is left out. `collides` says that a first token would
    not tell the outcomes apart: e2 or e3 itself begins like another answer to its relation, or two of e1, e2, e3 and
    a different shortcut begin alike.
    """
    frame, cache = frame.reset_index(drop=True), {}

    def first(word: str) -> int:
        if word not in cache:
            cache[word] = continuation_ids(tokenizer, word)[0]
        return cache[word]

    collides = np.zeros(len(frame), dtype=bool)
    sets = {entity: [frozenset()] * len(frame) for entity in ENTITIES}
    answers = {*frame["e2"], *frame["e3"]}  # an alias may be an entity of its own (neighbours)
    for entity, relation in (("e2", "r1"), ("e3", "r2")):
        for _, part in frame.groupby(relation):
            owners: dict[int, set[str]] = {}
            words = [
                [name, *filter(None, more.split("|"))]
                for name, more in zip(part[entity], part[f"{entity}_aliases"], strict=True)
            ]
            for own in words:
                for word in own:
                    owners.setdefault(first(word), set()).add(word if word in answers else own[0])
            for row, own in zip(part.index, words, strict=True):
                main = first(own[0])
                collides[row] |= len(owners[main]) > 1
                sets[entity][row] = frozenset(
                    t for t in map(first, own) if t == main or len(owners[t]) == 1
                )
    sets["e1"] = [frozenset([first(name)]) for name in frame["e1"]]
    other = (frame["shortcut"] != "") & (frame["shortcut"] != frame["e3"])
    sets["shortcut"] = [
        frozenset([first(n)]) if o else frozenset()
        for n, o in zip(frame["shortcut"], other, strict=True)
    ]
    for row, each in enumerate(zip(*sets.values(), strict=True)):
        collides[row] |= len(frozenset().union(*each)) < sum(map(len, each))
    return frame.assign(**{f"{entity}_ids": ids for entity, ids in sets.items()}, collides=collides)


def outcome(said: int, ids: dict[str, frozenset]) -> str:
    """Which outcome a first token belongs to."""
    return next((name for name in ENTITIES if said in ids[name]), "other")


def _ids_of(row) -> dict[str, frozenset]:
    return {name: getattr(row, f"{name}_ids") for name in ENTITIES}
