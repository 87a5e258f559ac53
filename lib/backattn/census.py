"""Why two-hop questions fail: who answers what, the conflict of e2 and e3, and what mends it (claims C3 to C6).

Notation as in the paper: e1 -r1-> e2 -r2-> e3, so e2 is the bridge entity and e3 the answer. The shortcut is the
answer to "e1's r2".
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats

from .arch import describe
from .lens import read_states
from .logit_flow import continuation_ids
from .residual import capture, encode, next_log_probs
from .runtime import progress

OUTCOMES = ("e3", "e2", "shortcut", "e1", "other")
ENTITIES = OUTCOMES[:-1]


# ---------------------------------------------------------------- asking


def first_tokens(tokenizer, name: str, aliases: str = "") -> frozenset[int]:
    """First tokens by which a name, or one of its aliases ("|" between), can begin; empty for an empty name."""
    words = [word for word in (name, *aliases.split("|")) if word]
    return frozenset(continuation_ids(tokenizer, word)[0] for word in words)


def candidates(tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the first tokens of each outcome: e3_ids, e2_ids, shortcut_ids, e1_ids (frozensets).

    `collides` says that a first token would not tell the outcomes apart: e1, e2, e3 and a different shortcut share one,
    or another answer to the same relation begins like e2 or like e3.
    """
    rest = ["e3_aliases", "e2_aliases", "", ""]
    cache: dict[tuple[str, str], frozenset] = {}

    def ids(name: str, aliases: str) -> frozenset:
        if (name, aliases) not in cache:
            cache[name, aliases] = first_tokens(tokenizer, name, aliases)
        return cache[name, aliases]

    frame = frame.copy()
    for entity, column in zip(ENTITIES, rest, strict=True):
        aliases = frame[column] if column else [""] * len(frame)
        frame[f"{entity}_ids"] = [ids(name, alias) for name, alias in zip(frame[entity], aliases, strict=True)]
    same = frame["shortcut"] == frame["e3"]
    frame.loc[same, "shortcut_ids"] = frame.loc[same, "shortcut_ids"].map(lambda _: frozenset())
    within = [
        len(set().union(*sets)) < sum(map(len, sets))
        for sets in zip(*(frame[f"{entity}_ids"] for entity in ENTITIES), strict=True)
    ]
    between = np.zeros(len(frame), dtype=bool)
    for entity, relation in (("e2", "r1"), ("e3", "r2")):
        for _, part in frame.groupby(relation):
            owners: dict[int, set[str]] = {}
            for name, tokens in zip(part[entity], part[f"{entity}_ids"], strict=True):
                for token in tokens:
                    owners.setdefault(token, set()).add(name)
            shared = [any(len(owners[token]) > 1 for token in tokens) for tokens in part[f"{entity}_ids"]]
            between[part.index] |= shared
    return frame.assign(collides=np.array(within) | between)


def ask(model, tokenizer, prompts: pd.Series, keys: pd.Series, batch_size: int = 32) -> tuple[np.ndarray, list]:
    """The model's next token and all log-probabilities after each prompt.

    keys: prompts with equal keys begin alike (worked examples), which is then computed once.

    Returns (said [n], log-probabilities in half precision, n of [V]). Raises ValueError when there are no prompts.
    """
    if not len(prompts):
        raise ValueError("There is nothing to ask: the set is empty. Ask more facts, or a model that knows more.")
    said, logs = np.empty(len(prompts), dtype=int), [None] * len(prompts)
    texts, lengths = prompts.to_numpy(), prompts.str.len().to_numpy()
    groups = [rows[np.argsort(lengths[rows], kind="stable")] for rows in keys.groupby(keys.to_numpy()).indices.values()]
    batches = [rows[i : i + batch_size] for rows in groups for i in range(0, len(rows), batch_size)]
    for rows in progress(batches, "asking", unit="batch"):
        batch = encode(tokenizer, texts[rows].tolist(), side="left", device=model.device)
        log_probs = next_log_probs(model, batch, share=True)
        said[rows] = log_probs.argmax(-1).cpu().numpy()
        for row, values in zip(rows, log_probs.half().cpu(), strict=True):
            logs[row] = values
    return said, logs


def outcome(said: int, ids: dict[str, frozenset]) -> str:
    """Which outcome a first token belongs to."""
    return next((name for name in ENTITIES if said in ids[name]), "other")


def _ids_of(row) -> dict[str, frozenset]:
    return {name: getattr(row, f"{name}_ids") for name in ENTITIES}


def hops(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Ask both hops and the shortcut of prompts with `candidates`.

    Returns `frame` with: knows_first, knows_second, shortcut_right (the shortcut question is answered with e3), known
    (both hops right) and kept (known, shortcut not right, no collision): the analysis set.
    """
    right = {}
    for form, entity in (("first", "e2"), ("second", "e3"), ("shortcut_prompt", "e3")):
        distinct = frame.drop_duplicates(form)
        said, _ = ask(model, tokenizer, distinct[form], distinct["pair"] + distinct["r1"] + distinct["r2"])
        by_prompt = dict(zip(distinct[form], said, strict=True))
        right[form] = [
            by_prompt[prompt] in ids for prompt, ids in zip(frame[form], frame[f"{entity}_ids"], strict=True)
        ]
    frame = frame.assign(
        knows_first=right["first"], knows_second=right["second"], shortcut_right=right["shortcut_prompt"]
    )
    known = frame["knows_first"] & frame["knows_second"] & ~frame["collides"]
    return frame.assign(known=known, kept=known & ~frame["shortcut_right"])


def filter_table(asked: pd.DataFrame) -> pd.DataFrame:
    """How many facts are left after each step of the knowledge filter, by pair of relations and in all."""
    steps = {
        "asked": np.ones(len(asked), dtype=bool),
        "first tokens differ": ~asked["collides"],
        "first hop right": ~asked["collides"] & asked["knows_first"],
        "both hops right": asked["known"],
        "shortcut not right": asked["kept"],
    }
    counts = pd.DataFrame(
        {name: pd.Series(mask).groupby(asked["pair"].to_numpy()).sum() for name, mask in steps.items()}
    )
    counts.loc["all"] = counts.sum()
    return counts.rename_axis("pair").reset_index()


def two_hops(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Ask the two-hop prompts.

    Returns `frame` with: outcome (open vocabulary, by the model's own first token), said (that token), three_way (the
    likeliest of e3, e2 and, where it exists and differs, the shortcut) and log_prob_e3, log_prob_e2.
    """
    said, logs = ask(model, tokenizer, frame["two_hop"], frame["pair"] + frame["r1"] + frame["r2"])
    rows = []
    for token, values, row in zip(said, logs, frame.itertuples(), strict=True):
        ids = _ids_of(row)
        best = {name: max(values[i].item() for i in ids[name]) for name in ("e3", "e2", "shortcut") if ids[name]}
        rows.append(
            {
                "outcome": outcome(token, ids),
                "said": tokenizer.decode([token]),
                "three_way": max(best, key=best.get),
                "log_prob_e3": best["e3"],
                "log_prob_e2": best["e2"],
            }
        )
    return frame.assign(**pd.DataFrame(rows, index=frame.index))


def generated(model, tokenizer, frame: pd.DataFrame, new_tokens: int = 8, batch_size: int = 32) -> pd.DataFrame:
    """Let the model write on after each two-hop prompt, greedily, and see whom it names first.

    Returns `frame` with: written (up to the first full stop or line end) and named, the outcome whose name or alias stands
    first in it (the longest where two begin together), "other" when there is none.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    written: list[str] = []
    for start in progress(range(0, len(frame), batch_size), "writing", unit="batch"):
        batch = encode(tokenizer, frame["two_hop"].iloc[start : start + batch_size].tolist(), "left", model.device)
        with torch.no_grad():
            tokens = model.generate(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        written += tokenizer.batch_decode(tokens[:, batch.ids.shape[1] :], skip_special_tokens=True)
    written = [text.strip().split("\n")[0].split(". ")[0] for text in written]
    named = [_named(text, row) for text, row in zip(written, frame.itertuples(), strict=True)]
    return frame.assign(written=written, named=named)


def _named(text: str, row) -> str:
    names = {"e3": (row.e3, *row.e3_aliases.split("|")), "e2": (row.e2, *row.e2_aliases.split("|"))}
    names |= {"shortcut": (row.shortcut,) if row.shortcut != row.e3 else (), "e1": (row.e1,)}
    found = []
    for outcome_name, words in names.items():
        for word in filter(None, words):
            padded, sought = f" {_plain(text)} ", f" {_plain(word)} "
            if sought in padded:
                found.append((padded.index(sought), -len(sought), outcome_name))
    return min(found)[2] if found else "other"


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


# ---------------------------------------------------------------- counting


def wilson(count: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    interval = stats.binomtest(int(count), int(total)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def shares(labels: pd.Series, names: Sequence[str] = OUTCOMES) -> pd.DataFrame:
    """Share of each label with its Wilson interval: outcome, count, n, share, low, high.

    Raises ValueError for an empty set.
    """
    if labels.empty:
        raise ValueError("The analysis set is empty: ask more facts, or a model that knows more of them.")
    rows = []
    for name in names:
        count = int((labels == name).sum())
        low, high = wilson(count, len(labels))
        rows.append(
            {"outcome": name, "count": count, "n": len(labels), "share": count / len(labels), "low": low, "high": high}
        )
    return pd.DataFrame(rows)


def shares_by(frame: pd.DataFrame, by: str | Sequence[str], column: str = "outcome", least: int = 1) -> pd.DataFrame:
    """`shares` for each value of the columns `by` that at least `least` rows have."""
    by = [by] if isinstance(by, str) else list(by)
    parts = [
        shares(part[column]).assign(**dict(zip(by, key, strict=True)))
        for key, part in frame.groupby(by, sort=False)
        if len(part) >= least
    ]
    return pd.concat(parts, ignore_index=True)[[*by, "outcome", "count", "n", "share", "low", "high"]]
