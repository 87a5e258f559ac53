"""Putting prompts to a model, and whom its answers name."""

import functools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from backattn.models.devices import input_device
from backattn.models.next_token import next_log_probs
from backattn.models.tokens import continuation_ids, encode
from backattn.runtime import progress

OUTCOMES = ("e3", "e2", "shortcut", "e1", "other")
ENTITIES = OUTCOMES[:-1]
ID_COLUMNS = tuple(f"{entity}_ids" for entity in ENTITIES)  # columns made by `candidates`


def ask(
    model,
    tokenizer,
    prompts: Sequence[str],
    keys: Sequence[str],
    wanted: Sequence[Sequence[int]] | None = None,
    batch_size: int = 32,
) -> tuple[np.ndarray, list[dict[int, float]]]:
    """The model's next token after each prompt, [n], and per prompt wanted tokens ->
    log-probability. Raises ValueError when there are no prompts, or one without a key.

    keys: prompts with equal keys begin alike (worked examples), which is then computed once.
    """
    if not len(prompts):
        raise ValueError(
            "There is nothing to ask: the set is empty. Ask more facts, or a model that knows more."
        )
    prompts, keys = (pd.Series(list(x), dtype=object) for x in (prompts, keys))
    if len(prompts) != len(keys):
        raise ValueError(f"There are {len(prompts)} prompts and {len(keys)} keys: give one each.")
    if keys.isna().any():
        raise ValueError("A prompt has no key: name what its worked examples are of.")
    said, logs = np.empty(len(prompts), dtype=int), [{} for _ in range(len(prompts))]
    by_length = np.argsort(prompts.str.len(), kind="stable")
    batches = [
        rows.to_numpy()[i : i + batch_size]
        for _, rows in pd.Series(by_length).groupby(keys.to_numpy()[by_length])
        for i in range(0, len(rows), batch_size)
    ]
    for rows in progress(batches, "asking", unit="batch"):
        texts = prompts.iloc[rows].tolist()
        batch = encode(tokenizer, texts, side="left", device=input_device(model))
        log_probs = next_log_probs(model, batch, share=True)
        said[rows] = log_probs.argmax(-1).cpu().numpy()
        for row, values in zip(rows, log_probs, strict=True):
            logs[row] = {token: values[token].item() for token in (wanted[row] if wanted else ())}
    return said, logs


def score(model, tokenizer, frame: pd.DataFrame, batch_size: int = 32) -> pd.DataFrame:
    """Ask the model every prompt: `frame` with answer_id (first token of " answer"), tokens (how
    many the answer takes), log_prob of the first, said (the model's next token, as text), correct
    (said is the answer's first token), shared (another answer begins with the same token)."""
    pieces = frame["answer"].map(
        functools.cache(lambda answer: continuation_ids(tokenizer, answer))
    )
    ids = pieces.str[0].tolist()
    said, logs = ask(
        model, tokenizer, frame["prompt"], frame["relation"], [[i] for i in ids], batch_size
    )
    frame = frame.assign(answer_id=ids)
    return frame.assign(
        tokens=pieces.map(len),
        log_prob=[log_probs[i] for log_probs, i in zip(logs, ids, strict=True)],
        said=[tokenizer.decode([i]) for i in said],
        correct=said == np.array(ids),
        shared=frame.groupby("answer_id")["answer"].transform("nunique") > 1,
    )


def answerable(scored: pd.DataFrame, per_relation: int | None = None) -> pd.DataFrame:
    """The prompts fit for analysis: answered right, by an answer of one token that no other answer
    begins with; at most `per_relation` of each relation. Raises ValueError when none is left."""
    fit = scored[scored["correct"] & ~scored["shared"] & (scored["tokens"] == 1)]
    if fit.empty:
        raise ValueError(
            "The model answers none of these prompts with a one-token answer: ask more or easier "
            "facts."
        )
    fit = fit.groupby("relation").head(per_relation) if per_relation else fit
    return fit.reset_index(drop=True)


def candidates(tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the first tokens of each outcome (frozensets), in ID_COLUMNS, but of aliases
    that begin like another answer to the same relation. `collides` says that a first token would
    not tell the outcomes apart: e2 or e3 itself begins like another answer to its relation, or two
    of e1, e2, e3 and a different shortcut begin alike."""
    frame = frame.reset_index(drop=True)
    first = functools.cache(lambda word: continuation_ids(tokenizer, word)[0])
    known = {*frame["e2"], *frame["e3"]}  # an alias may be an entity of its own (neighbours)
    shortcut = frame["shortcut"].where(frame["shortcut"] != frame["e3"], "")
    ids = {
        "e1": [frozenset([first(name)]) for name in frame["e1"]],
        "shortcut": [frozenset([first(name)] if name else []) for name in shortcut],
    }
    collides = np.zeros(len(frame), dtype=bool)
    for entity, relation in (("e2", "r1"), ("e3", "r2")):
        names = frame[[entity, relation]].set_axis(["name", "relation"], axis=1)
        names["word"] = (names["name"] + "|" + frame[f"{entity}_aliases"]).str.split("|")
        names = names.explode("word").query("word != ''")
        names["token"] = names["word"].map(first)
        names["answer"] = names["word"].where(names["word"].isin(known), names["name"])
        alike = names.groupby(["relation", "token"])["answer"].transform("nunique") > 1
        main = names["token"] == names["name"].map(first)
        collides |= (main & alike).groupby(level=0).any().to_numpy()
        ids[entity] = names[main | ~alike].groupby(level=0)["token"].agg(frozenset).tolist()
    sets = zip(*ids.values(), strict=True)
    alike = [len(frozenset().union(*tokens)) < sum(map(len, tokens)) for tokens in sets]
    columns = {f"{entity}_ids": ids[entity] for entity in ENTITIES}
    return frame.assign(**columns, collides=collides | np.array(alike))


def outcome(said: int, ids: dict[str, frozenset]) -> str:
    """Which outcome a first token belongs to."""
    return next((name for name in ENTITIES if said in ids[name]), "other")
