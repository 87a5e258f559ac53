"""The census of two-hop answers: what the model knows, and whom it names (claims C3, B2).

Notation as in the paper: e1 -r1-> e2 -r2-> e3, so e2 is the bridge entity and e3 the answer. The
shortcut is the answer to "e1's r2".
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from backattn.models.devices import input_device
from backattn.models.tokens import continuation_ids, encode
from backattn.runtime import progress
from backattn.training.evaluation import AS_IT_IS
from companion.questions.asking import ENTITIES, ID_COLUMNS, OUTCOMES, ask, candidates, outcome
from companion.questions.datasets import TWO_HOP_KEYS
from companion.questions.facts import read_table
from companion.questions.prompts import two_hop_prompts
from companion.questions.splits import place_of
from companion.report.intervals import wilson
from companion.report.verdicts import Effect, claim, percent, with_interval

WORDS = re.compile(r"[^\W_]+")
FILTER = (  # a step of the knowledge filter, its question, whose name must answer it, or must not
    ("knows_first", "first", "e2_ids", True),
    ("known", "second", "e3_ids", True),
    ("kept", "shortcut_prompt", "e3_ids", False),
)


def shuffled(frame: pd.DataFrame) -> pd.DataFrame:
    """The facts in the order of a hash of their names, which one more or less does not change."""
    places = [place_of("|".join(names)) for names in frame[["pair", "e1", "r1", "r2"]].to_numpy()]
    return frame.iloc[np.argsort(places, kind="stable")].reset_index(drop=True)


def hops(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Ask both hops and the shortcut of facts with `candidates`, none where first tokens collide.

    Returns `frame` with the steps of FILTER, each asked only where the one before was passed:
    knows_first, known (both hops), kept (the analysis set). Raises ValueError when no fact is left.
    """
    left = ~frame["collides"]
    for step, form, names, wanted in FILTER:
        asked = frame[left]
        if asked.empty:
            raise ValueError(
                f"No fact is left to ask for {form!r}: ask more facts, or a model that knows more "
                "of them."
            )
        once = asked.drop_duplicates(form)
        said, _ = ask(model, tokenizer, once[form], once["pair"] + once["r1"] + once["r2"])
        tokens = asked[form].map(dict(zip(once[form], said, strict=True)))
        right = [token in ids for token, ids in zip(tokens, asked[names], strict=True)]
        left = frame.index.isin(asked.index[np.array(right) == wanted])
        frame = frame.assign(**{step: left})
    return frame


def two_hops(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Ask the two-hop prompts: `frame` with outcome (open vocabulary, by the model's own next
    token), said (that token) and three_way (the likeliest of e3, e2 and, where it exists and
    differs, the shortcut)."""
    sets = [dict(zip(ENTITIES, row, strict=True)) for row in frame[list(ID_COLUMNS)].to_numpy()]
    wanted = [sorted(frozenset().union(*ids.values())) for ids in sets]
    keys, rows = frame["pair"] + frame["r1"] + frame["r2"], []
    answers = zip(*ask(model, tokenizer, frame["two_hop"], keys, wanted), sets, strict=True)
    for token, logs, ids in answers:
        best = {x: max(logs[i] for i in ids[x]) for x in ("e3", "e2", "shortcut") if ids[x]}
        row = {"outcome": outcome(token, ids), "said": tokenizer.decode([token])}
        rows.append({**row, "three_way": max(best, key=best.get)})
    return frame.assign(**pd.DataFrame(rows, index=frame.index))


def generated(model, tokenizer, frame: pd.DataFrame, new_tokens: int = 8) -> pd.DataFrame:
    """Let the model write on after each two-hop prompt, greedily, to the line's end: `frame` with
    `named`, the outcome whose name or alias stands first (the longest where two begin together)."""
    options = {"max_new_tokens": new_tokens, "do_sample": False, **AS_IT_IS}
    options["pad_token_id"], written = tokenizer.pad_token_id or 0, []
    for start in progress(range(0, len(frame), 32), "writing", unit="batch"):
        prompts = frame["two_hop"].tolist()[start : start + 32]
        batch = encode(tokenizer, prompts, "left", input_device(model))
        tokens = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
        new = tokens[:, batch.input_ids.shape[1] :]
        written += tokenizer.batch_decode(new, skip_special_tokens=True)
    texts = [text.strip().split("\n")[0] for text in written]
    return frame.assign(named=list(map(_named, texts, frame.itertuples())))


def _named(text: str, row) -> str:
    names = {"e3": [row.e3, *row.e3_aliases.split("|")], "e2": [row.e2, *row.e2_aliases.split("|")]}
    names |= {"shortcut": [row.shortcut] if row.shortcut != row.e3 else [], "e1": [row.e1]}
    sought = [(name, _words(word)) for name, words in names.items() for word in words if word]
    said = _words(text)
    found = [(said.index(words), -len(words), name) for name, words in sought if words in said]
    return min(found)[2] if found else "other"


def _words(text: str) -> str:
    return f" {' '.join(WORDS.findall(text.lower()))} "


def analysed(
    model, tokenizer, facts: pd.DataFrame, per_pair: int, seed: int, known: Path | None = None
) -> pd.DataFrame:
    """The facts of the analysis set, asked in the paper's wording behind one-hop examples: columns
    of `candidates`, `two_hops` and `generated`. known: a list of what this model knows, as
    data/two_hop_known.csv, which spares asking the hops. Raises ValueError when no fact is left."""
    asked = candidates(tokenizer, two_hop_prompts(facts, per_pair=per_pair, seed=seed))
    if known is None:
        asked = hops(model, tokenizer, asked)
        kept = asked[asked["kept"]]
    else:
        listed = read_table(known, [*TWO_HOP_KEYS, "shortcut_right"])
        listed = listed.loc[listed["shortcut_right"] == "False", TWO_HOP_KEYS]
        kept = asked[~asked["collides"]].merge(listed, on=TWO_HOP_KEYS)
    if kept.empty:
        raise ValueError("No fact is left: ask more facts, or a model that knows more of them.")
    return generated(model, tokenizer, two_hops(model, tokenizer, shuffled(kept)))


def plain_cases(tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of `generated` that are plainly right (the next token begins e3) or wrong (it begins
    no name of e3, and no name of e3 is written first)."""
    first = {name: continuation_ids(tokenizer, name)[0] for name in frame["e3"].unique()}
    right = frame["said"] == frame["e3"].map(first).map(tokenizer.decode)
    wrong = (frame["outcome"] != "e3") & (frame["named"] != "e3")
    return frame[right | wrong].reset_index(drop=True)


def shares(frame: pd.DataFrame, by: Sequence[str] = (), column: str = "outcome") -> pd.DataFrame:
    """Share of each outcome in `column` among the rows with equal values in the columns `by`: *by,
    outcome, count, n, share, low, high (Wilson). Raises ValueError for an empty set."""
    if frame.empty:
        raise ValueError(
            "The analysis set is empty: ask more facts, or a model that knows more of them."
        )
    rows = []
    for key, part in frame.groupby(list(by), sort=False) if by else [((), frame)]:
        for name in OUTCOMES:
            count, n = int((part[column] == name).sum()), len(part)
            row = {**dict(zip(by, key, strict=True)), "outcome": name, "count": count, "n": n}
            low, high = wilson(count, n)
            rows.append({**row, "share": count / n, "low": low, "high": high})
    return pd.DataFrame(rows)


def failures_say_bridge(
    census: pd.DataFrame,
    leads: pd.DataFrame,
    three_way: pd.DataFrame,
    by_type: pd.DataFrame,
    n: int,
) -> dict[str, str]:
    """C3. census, three_way: `shares` by wording, behind one-hop examples; leads: by wording, the
    share of failures (not e3) that says e2, and its lead over that which says e1, with intervals;
    by_type: in the paper's wording, that share (mean, low, high, n) by types of e2 and e3.

    Five checks, each with its whole interval: in each of three wordings more failures say e2 than
    echo e1, the other entity of the prompt; in the paper's, more than half of them say e2, and more
    than half of those where e2 and e3 are of one type, as in the paper's example. The paper's
    comparison scores three answers only: how far e2 is above half of what is not e3. The strictest
    control is the first check, in the paper's wording.
    """
    by, keys = leads.set_index("wording"), ["wording", "outcome"]
    texts, compared = (t.set_index(keys).apply(percent, axis=1) for t in (census, three_way))
    found = ", ".join(f"{x} {texts['possessive', x]}" for x in ("e3", "e2", "e1", "other"))
    others = "; ".join(f"{w}: e2 {texts[w, 'e2']}" for w in by.index if w != "possessive")
    ends = by.rename(columns={"lead_low": "low", "lead_high": "high"})[["lead", "low", "high"]]
    ahead = ", ".join(f"{w} {with_interval(r, 'lead', '+.0%', '.0%')}" for w, r in ends.iterrows())
    alike = by_type.set_index("types").loc["same type"]
    ours = (
        f"open vocabulary, e1's r1's r2: {found}; {others}; 3-way: e2 "
        f"{compared['possessive', 'e2']}; e2 less e1 among failures: {ahead}; "
        f"of failures with e2 and e3 of one type e2 {percent(alike, 'mean')} "
        f"of {alike['n']:.0f}; n = {n}"
    )
    paper = by.loc["possessive"]
    checks = {f"e2 before e1, {wording}": row["low"] > 0 for wording, row in ends.iterrows()}
    checks |= {"half say e2": paper["share_low"] > 0.5, "half of one type": alike["low"] > 0.5}
    counts = three_way[three_way["wording"] == "possessive"].set_index("outcome")["count"]
    bridge, failed = counts["e2"], counts["e2"] + counts["shortcut"]
    row = dict(zip(("low", "high"), wilson(bridge, failed), strict=True))
    row["difference"] = bridge / failed if failed else float("nan")
    among = Effect.of("of three answers, e2 among failures, above half", row, less=0.5)
    echo = Effect.of("e2 less e1 among failures, open vocabulary", ends.loc["possessive"], "lead")
    return claim("C3", ours, checks, among, echo)


def ignorance_not_conflict(census: pd.DataFrame) -> dict[str, str]:
    """B2, that failures are missing knowledge, not conflict. census: `shares` by wording and
    examples over prompts whose hops are known.

    Two checks, in the paper's wording behind one-hop examples, each with its whole interval: more
    than half of these prompts are right (the comparison: with knowledge they do not fail); and
    fewer say e2 than name none of the entities (the strictest control: they are no conflict).
    """
    by = census.query("wording == 'possessive' and examples == 'one-hop'").set_index("outcome")
    right, bridge, other = (by.loc[name] for name in ("e3", "e2", "other"))
    found = ", ".join(f"{row.name} {percent(row)}" for row in (right, bridge, other))
    ours = f"both hops known, shortcut not: {found}; n = {int(right['n'])}"
    known = Effect.of("right where both hops are known, above half", right, "share", less=0.5)
    ends = {"difference": other["share"] - bridge["share"]}
    ends |= {"low": other["low"] - bridge["high"], "high": other["high"] - bridge["low"]}
    checks = {"knowing is enough": known.low > 0, "few say e2": ends["low"] > 0}
    return claim("B2", ours, checks, known, Effect.of("no entity less e2", ends))
