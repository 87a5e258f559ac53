"""Facts, prompts and what each token of a prompt is for.

A single-hop prompt is "X's r is": the entity stands before the relation, as in the paper's examples, so that the
relation and last positions can read the entity but not the other way round. Two worked examples stand in front,
because a small model does not answer the bare form.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .logit_flow import continuation_ids
from .paths import DATA
from .residual import encode, next_log_probs
from .runtime import progress

TEMPLATE = "{subject}'s {relation} is"
GROUPS = ("entity", "relation", "last", "context")


def facts(path: Path = DATA / "facts.csv") -> pd.DataFrame:
    """The single-hop facts: relation, subject, answer, geoname_id, population.

    Raises ValueError naming the missing or repeated column.
    """
    return read_table(path, ["relation", "subject", "answer"])


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV that must have `columns`, once each, without empty cells in them.

    Raises ValueError naming the file and the missing column, repeated column or first empty row, and
    FileNotFoundError with the path.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; it comes with the repository (git checkout -- data).")
    header = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0].tolist()
    repeated = sorted({name for name in header if header.count(name) > 1})
    missing = [name for name in columns if name not in header]
    if repeated or missing:
        problem = f"repeats column {repeated[0]!r}" if repeated else f"lacks column {missing[0]!r}"
        raise ValueError(f"{path.name} {problem}; it has {', '.join(map(str, header))}.")
    frame = pd.read_csv(path, keep_default_na=False)
    for name in columns:
        empty = frame.index[frame[name].astype(str).str.strip() == ""]
        if len(empty):
            raise ValueError(f"{path.name} has an empty {name!r} in row {empty[0] + 2}.")
    return frame


def single_hop(frame: pd.DataFrame, shots: int = 2, per_relation: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Write the prompts of a frame of facts.

    Args:
        frame: relation, subject, answer (see `facts`), largest first within each relation.
        shots: worked examples in front, the same for all prompts of a relation, with different answers, drawn from
            its 40 largest subjects. Facts with one of their answers are not asked: it would stand in the prompt.
        per_relation: at most this many prompts per relation, the largest subjects first; None keeps all.
        seed: of the draw of the examples.

    Returns the facts with: prompt, entity and relation_span, the last two as (begin, end) characters of the prompt.
    """
    draw, rows = np.random.default_rng(seed), []
    for relation, part in frame.groupby("relation", sort=True):
        shown = part.head(40).iloc[draw.permutation(min(40, len(part)))].drop_duplicates("answer").head(shots)
        if len(shown) < shots:
            raise ValueError(f"{relation!r} has only {len(shown)} different answers to show: ask for fewer shots.")
        examples = [f"{_statement(row.subject, relation)} {row.answer}. " for row in shown.itertuples()]
        asked = part[~part["answer"].isin(shown["answer"])]
        asked = asked.head(per_relation) if per_relation else asked
        for row in asked.to_dict("records"):
            head = "".join(examples)
            prompt = head + _statement(row["subject"], relation)
            spans = {
                "entity": span(prompt, row["subject"], len(head)),
                "relation_span": span(prompt, relation, len(head) + len(row["subject"])),
            }
            rows.append({**row, "prompt": prompt, **spans})
    return pd.DataFrame(rows)


def _statement(subject: str, relation: str) -> str:
    return TEMPLATE.format(subject=subject, relation=relation)


def span(prompt: str, words: str, start: int = 0) -> tuple[int, int]:
    """Where `words` stand in a prompt, from character `start` on; raises ValueError when they do not."""
    begin = prompt.find(words, start)
    if not words or begin < 0:
        raise ValueError(f"{words!r} does not occur in the prompt {prompt!r}.")
    return begin, begin + len(words)


def position_groups(tokenizer, frame: pd.DataFrame) -> list[np.ndarray]:
    """The group of every token of every prompt: "entity", "relation", "last" or "context" (all else).

    Args:
        tokenizer: a fast tokenizer (it must give character offsets).
        frame: prompt, entity, relation_span as made by `single_hop`.
    """
    groups = []
    for prompt, entity, relation in zip(frame["prompt"], frame["entity"], frame["relation_span"], strict=True):
        offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        labels = np.array(["context"] * len(offsets), dtype=object)
        for name, (begin, end) in (("entity", entity), ("relation", relation)):
            labels[[a < end and b > begin for a, b in offsets]] = name
        labels[-1] = "last"
        groups.append(labels)
    return groups


def score(model, tokenizer, frame: pd.DataFrame, batch_size: int = 32) -> pd.DataFrame:
    """Ask the model every prompt.

    Returns `frame` with: answer_id (first token of " answer"), tokens (how many tokens the answer takes), log_prob of
    the first, said (the model's own next token, as text), correct (said is the answer's first token), shared
    (another answer of the frame begins with the same token, so the first token cannot tell them apart).
    """
    pieces = {answer: continuation_ids(tokenizer, answer) for answer in frame["answer"].unique()}
    ids = [pieces[answer][0] for answer in frame["answer"]]
    order = np.argsort([len(p) for p in frame["prompt"]], kind="stable")  # similar lengths together: little padding
    log_probs, said = np.empty(len(frame)), np.empty(len(frame), dtype=int)
    for start in progress(range(0, len(frame), batch_size), "asking", unit="batch"):
        rows = order[start : start + batch_size]
        batch = encode(tokenizer, frame["prompt"].iloc[rows].tolist(), side="left", device=model.device)
        logs = next_log_probs(model, batch)  # [B, V]
        log_probs[rows] = logs[range(len(rows)), [ids[r] for r in rows]].cpu().numpy()
        said[rows] = logs.argmax(-1).cpu().numpy()
    owners = frame.assign(answer_id=ids).groupby("answer_id")["answer"].nunique()
    return frame.assign(
        answer_id=ids,
        tokens=[len(pieces[answer]) for answer in frame["answer"]],
        log_prob=log_probs,
        said=[tokenizer.decode([i]) for i in said],
        correct=said == np.array(ids),
        shared=owners.loc[ids].to_numpy() > 1,
    )


def known(scored: pd.DataFrame, per_relation: int | None = None) -> pd.DataFrame:
    """The prompts fit for analysis: answered right, by an answer of one token that no other answer begins with.

    per_relation: at most this many of each relation. Raises ValueError when none is left.
    """
    fit = scored[scored["correct"] & ~scored["shared"] & (scored["tokens"] == 1)]
    if fit.empty:
        raise ValueError("The model answers none of these prompts with a one-token answer: ask more or easier facts.")
    return (fit.groupby("relation").head(per_relation) if per_relation else fit).reset_index(drop=True)
