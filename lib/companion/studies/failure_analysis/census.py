"""The census of two-hop answers: what the model knows, and whom it names (claims C3, B2).

Notation as in the paper: e1 -r1-> e2 -r2-> e3, so e2 is the bridge entity and e3 the answer. The
shortcut is the answer to "e1's r2".
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from backattn.models.devices import input_device
from backattn.models.tokens import continuation_ids, encode
from backattn.runtime import progress
from companion.questions.asking import ID_COLUMNS, OUTCOMES, _ids_of, ask, outcome
from companion.questions.splits import place_of
from companion.report.intervals import summary, wilson
from companion.report.verdicts import claim, percent, with_interval

FILTER = (  # a step of the knowledge filter, its question, whose name must answer it, or must not
    ("knows_first", "first", "e2_ids", True),
    ("known", "second", "e3_ids", True),
    ("kept", "shortcut_prompt", "e3_ids", False),
)


def shuffled(frame: pd.DataFrame) -> pd.DataFrame:
    """The facts in a random order that a hash of their names decides.

    So a fact more or less, where a close call falls the other way on another machine, leaves the
    others in their order.
    """
    places = [place_of("|".join(names)) for names in frame[["pair", "e1", "r1", "r2"]].to_numpy()]
    return frame.iloc[np.argsort(places, kind="stable")].reset_index(drop=True)


def hops(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Ask both hops and the shortcut of facts with `candidates`, each step only where the one
    before was passed.

    Returns `frame` with: knows_first, known (both hops right) and kept (known, and the shortcut
    question is not answered with e3), the analysis set. A fact whose first tokens collide is not
    asked. Raises ValueError when no fact is left to ask at some step.
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
        left = left.copy()
        left[left] = np.array(right) == wanted
        frame = frame.assign(**{step: left})
    return frame


def filter_table(asked: pd.DataFrame) -> pd.DataFrame:
    """How many facts are left after each step of the knowledge filter, by pair of relations and in
    all."""
    steps = pd.DataFrame({"asked": True, "first tokens differ": ~asked["collides"]})
    labels = ("first hop right", "both hops right", "shortcut not right")
    for (step, *_), label in zip(FILTER, labels, strict=True):
        steps[label] = asked[step]
    counts = steps.groupby(asked["pair"]).sum()
    counts.loc["all"] = counts.sum()
    return counts.rename_axis("pair").reset_index()


def two_hops(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Ask the two-hop prompts.

    Returns `frame` with: outcome (open vocabulary, by the model's own first token), said (that
    token), three_way (the likeliest of e3, e2 and, where it exists and differs, the shortcut) and
    log_prob_e3, log_prob_e2.
    """
    sets = frame[list(ID_COLUMNS)].to_numpy()
    wanted = [sorted(frozenset().union(*each)) for each in sets]
    keys = frame["pair"] + frame["r1"] + frame["r2"]
    said, logs = ask(model, tokenizer, frame["two_hop"], keys, wanted)
    rows = []
    for token, values, ids in zip(said, logs, map(_ids_of, frame.itertuples()), strict=True):
        compared = [name for name in ("e3", "e2", "shortcut") if ids[name]]
        best = {name: max(values[i] for i in ids[name]) for name in compared}
        row = {"outcome": outcome(token, ids), "said": tokenizer.decode([token])}
        row |= {"three_way": max(best, key=best.get)}
        rows.append(row | {"log_prob_e3": best["e3"], "log_prob_e2": best["e2"]})
    return frame.assign(**pd.DataFrame(rows, index=frame.index))


def generated(
    model, tokenizer, frame: pd.DataFrame, new_tokens: int = 8, batch_size: int = 32
) -> pd.DataFrame:
    """Let the model write on after each two-hop prompt, greedily, and see whom it names first.

    Returns `frame` with: written (up to the line's end) and named, the outcome whose name or alias
    stands first in it (the longest where two begin together), "other" when there is none.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    prompts, written = frame["two_hop"].tolist(), []
    for start in progress(range(0, len(frame), batch_size), "writing", unit="batch"):
        part = prompts[start : start + batch_size]
        batch = encode(tokenizer, part, "left", input_device(model))
        with torch.no_grad():
            tokens = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        new = tokens[:, batch.input_ids.shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        written += [text.strip().split("\n")[0] for text in texts]
    named = [_named(text, row) for text, row in zip(written, frame.itertuples(), strict=True)]
    return frame.assign(written=written, named=named)


def _named(text: str, row) -> str:
    names = {"e3": [row.e3, *row.e3_aliases.split("|")], "e2": [row.e2, *row.e2_aliases.split("|")]}
    names |= {"shortcut": [row.shortcut] if row.shortcut != row.e3 else [], "e1": [row.e1]}
    found, padded = [], f" {_plain(text)} "
    for name, words in names.items():
        for sought in (f" {_plain(word)} " for word in words if word):
            if sought in padded:
                found.append((padded.index(sought), -len(sought), name))
    return min(found)[2] if found else "other"


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def shares(
    frame: pd.DataFrame, by: Sequence[str] = (), column: str = "outcome", least: int = 1
) -> pd.DataFrame:
    """Share of each outcome among the rows with equal values in the columns `by`, of which there
    must be at least `least`, with its Wilson interval.

    column: the one that holds the outcomes. Returns: *by, outcome, count, n, share, low, high.
    Raises ValueError for an empty set.
    """
    if frame.empty:
        raise ValueError(
            "The analysis set is empty: ask more facts, or a model that knows more of them."
        )
    rows = []
    for key, part in frame.groupby(list(by), sort=False) if by else [((), frame)]:
        for name in OUTCOMES if len(part) >= least else ():
            count, n = int((part[column] == name).sum()), len(part)
            row = {**dict(zip(by, key, strict=True)), "outcome": name, "count": count, "n": n}
            low, high = wilson(count, n)
            rows.append({**row, "share": count / n, "low": low, "high": high})
    return pd.DataFrame(rows)


def bridge_lead(failures: pd.DataFrame, by: str) -> pd.DataFrame:
    """Among failures (rows not answered e3): the share that says e2, and how far it is ahead of the
    share that says e1.

    Returns: by, share, share_low, share_high, lead, lead_low, lead_high (95 %, over bridge
    entities), n.
    """
    says = {name: (failures["outcome"] == name).astype(float) for name in ("e2", "e1")}
    failures, tables = failures.assign(share=says["e2"], lead=says["e2"] - says["e1"]), []
    for name in ("share", "lead"):
        columns = {"mean": name, "low": f"{name}_low", "high": f"{name}_high"}
        tables.append(summary(failures, name, by).rename(columns=columns))
    return tables[0].drop(columns="n").merge(tables[1], on=by)


def clear_cases(tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """The prompts of `two_hops` and `generated` that are plainly right or wrong.

    Right: the next token is the first of e3's proper name. Wrong: it belongs to no name of e3, and
    what is written on does not name e3 first either.
    """
    names = frame["e3"].unique()
    first = {name: tokenizer.decode([continuation_ids(tokenizer, name)[0]]) for name in names}
    right = frame["said"] == frame["e3"].map(first)
    wrong = (frame["outcome"] != "e3") & (frame["named"] != "e3")
    return frame[right | wrong].reset_index(drop=True)


def failures_say_bridge(
    census: pd.DataFrame, leads: pd.DataFrame, three_way: pd.DataFrame, n: int
) -> dict[str, str]:
    """C3. census, three_way: `shares` by wording over all kept prompts; leads: `bridge_lead` over
    the prompts not answered e3. The worked examples are one-hop facts, the answers open vocabulary.

    Four checks: in each of three wordings, more failures say e2 than echo e1, the other entity of
    the prompt; and in the paper's wording ("possessive") more than half of all failures say e2.
    Each with its whole interval.
    """
    by, paper = leads.set_index("wording"), leads.set_index("wording").loc["possessive"]
    census, three_way = (x.set_index(["wording", "outcome"]) for x in (census, three_way))

    def says(name: str, table: pd.DataFrame = census, wording: str = "possessive") -> str:
        return f"{name} {percent(table.loc[(wording, name)])}"

    own_words = ", ".join(map(says, ("e3", "e2", "e1", "other")))
    others = "; ".join(f"{w}: {says('e2', wording=w)}" for w in by.index if w != "possessive")
    ends = by[["lead", "lead_low", "lead_high"]].set_axis(["lead", "low", "high"], axis=1)
    ahead = ", ".join(f"{w} {with_interval(r, 'lead', '+.0%', '.0%')}" for w, r in ends.iterrows())
    ours = (
        f"open vocabulary, e1's r1's r2: {own_words}; {others}; 3-way: {says('e2', three_way)}; "
        f"e2 less e1 among failures: {ahead}; n = {n}"
    )
    passed = [*(by["lead_low"] > 0), paper["share_low"] > 0.5]
    return claim("C3", ours, passed, [*(by["lead_high"] < 0), paper["share_high"] < 0.5])


def conflict_not_ignorance(census: pd.DataFrame) -> dict[str, str]:
    """B2. census: `shares` by wording and examples over prompts whose hops are known and whose
    shortcut is not answered with e3.

    Two checks, in the paper's wording behind one-hop examples, each with its whole interval: more
    than half of these prompts fail all the same; and more say e2 than name none of the entities.
    """
    paper = (census["wording"] == "possessive") & (census["examples"] == "one-hop")
    by = census[paper].set_index("outcome")
    right, bridge, other = (by.loc[name] for name in ("e3", "e2", "other"))
    found = ", ".join(f"{row.name} {percent(row)}" for row in (right, bridge, other))
    ours = f"both hops known, shortcut not: {found}; n = {int(right['n'])}"
    passed = [right["high"] < 0.5, bridge["low"] > other["high"]]
    return claim("B2", ours, passed, [right["low"] > 0.5, bridge["high"] < other["low"]])
