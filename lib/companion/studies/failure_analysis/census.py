"""The census of two-hop answers: what the model knows, and whom it names (claim C3).

Notation as in the paper: e1 -r1-> e2 -r2-> e3, so e2 is the bridge entity and e3 the answer. The shortcut is the
answer to "e1's r2".
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
from companion.report.intervals import mean_interval, wilson
from companion.report.verdicts import Claim, _weighed


def shuffled(frame: pd.DataFrame) -> pd.DataFrame:
    """The facts in a random order that a hash of their names decides.

    So a fact more or less, where a close call falls the other way on another machine, leaves the others in their order.
    """
    places = [place_of("|".join(names)) for names in frame[["pair", "e1", "r1", "r2"]].to_numpy()]
    return frame.iloc[np.argsort(places, kind="stable")].reset_index(drop=True)


def hops(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Ask both hops and the shortcut of facts with `candidates`, each step only where the one before was passed.

    Returns `frame` with: knows_first, known (both hops right) and kept (known, and the shortcut question is not
    answered with e3), the analysis set. A fact whose first tokens collide is not asked.

    Raises ValueError when no fact is left to ask at some step.
    """
    left, passed = ~frame["collides"].to_numpy(), {}
    for step, form, entity, wanted in (
        ("knows_first", "first", "e2", True),
        ("known", "second", "e3", True),
        ("kept", "shortcut_prompt", "e3", False),
    ):
        asked = frame[left]
        if asked.empty:
            raise ValueError(
                f"No fact is left to ask for {form!r}: ask more facts, or a model that knows more of them."
            )
        distinct = asked.drop_duplicates(form)
        said, _ = ask(
            model, tokenizer, distinct[form], distinct["pair"] + distinct["r1"] + distinct["r2"]
        )
        by_prompt = dict(zip(distinct[form], said, strict=True))
        right = [
            by_prompt[prompt] in ids
            for prompt, ids in zip(asked[form], asked[f"{entity}_ids"], strict=True)
        ]
        left = left.copy()
        left[left] = np.array(right) == wanted
        passed[step] = left
    return frame.assign(**passed)


def filter_table(asked: pd.DataFrame) -> pd.DataFrame:
    """How many facts are left after each step of the knowledge filter, by pair of relations and in all."""
    steps = {
        "asked": np.ones(len(asked), dtype=bool),
        "first tokens differ": ~asked["collides"],
        "first hop right": asked["knows_first"],
        "both hops right": asked["known"],
        "shortcut not right": asked["kept"],
    }
    counts = pd.DataFrame(
        {
            name: pd.Series(mask).groupby(asked["pair"].to_numpy()).sum()
            for name, mask in steps.items()
        }
    )
    counts.loc["all"] = counts.sum()
    return counts.rename_axis("pair").reset_index()


def two_hops(model, tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """Ask the two-hop prompts.

    Returns `frame` with: outcome (open vocabulary, by the model's own first token), said (that token), three_way (the
    likeliest of e3, e2 and, where it exists and differs, the shortcut) and log_prob_e3, log_prob_e2.
    """
    wanted = [
        sorted(frozenset().union(*each))
        for each in zip(*(frame[name] for name in ID_COLUMNS), strict=True)
    ]
    said, logs = ask(
        model, tokenizer, frame["two_hop"], frame["pair"] + frame["r1"] + frame["r2"], wanted
    )
    rows = []
    for token, values, row in zip(said, logs, frame.itertuples(), strict=True):
        ids = _ids_of(row)
        best = {
            name: max(values[i] for i in ids[name])
            for name in ("e3", "e2", "shortcut")
            if ids[name]
        }
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


def generated(
    model, tokenizer, frame: pd.DataFrame, new_tokens: int = 8, batch_size: int = 32
) -> pd.DataFrame:
    """Let the model write on after each two-hop prompt, greedily, and see whom it names first.

    Returns `frame` with: written (up to the line's end) and named, the outcome whose name or alias
    stands first in it (the longest where two begin together), "other" when there is none.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    written: list[str] = []
    for start in progress(range(0, len(frame), batch_size), "writing", unit="batch"):
        batch = encode(
            tokenizer,
            frame["two_hop"].iloc[start : start + batch_size].tolist(),
            "left",
            input_device(model),
        )
        with torch.no_grad():
            tokens = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        written += tokenizer.batch_decode(
            tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True
        )
    written = [text.strip().split("\n")[0] for text in written]
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


def shares(labels: pd.Series, names: Sequence[str] = OUTCOMES) -> pd.DataFrame:
    """Share of each label with its Wilson interval: outcome, count, n, share, low, high.

    Raises ValueError for an empty set.
    """
    if labels.empty:
        raise ValueError(
            "The analysis set is empty: ask more facts, or a model that knows more of them."
        )
    rows = []
    for name in names:
        count = int((labels == name).sum())
        low, high = wilson(count, len(labels))
        rows.append(
            {
                "outcome": name,
                "count": count,
                "n": len(labels),
                "share": count / len(labels),
                "low": low,
                "high": high,
            }
        )
    return pd.DataFrame(rows)


def shares_by(
    frame: pd.DataFrame, by: str | Sequence[str], column: str = "outcome", least: int = 1
) -> pd.DataFrame:
    """`shares` for each value of the columns `by` that at least `least` rows have."""
    by = [by] if isinstance(by, str) else list(by)
    parts = [
        shares(part[column]).assign(**dict(zip(by, key, strict=True)))
        for key, part in frame.groupby(by, sort=False)
        if len(part) >= least
    ]
    return pd.concat(parts, ignore_index=True)[
        [*by, "outcome", "count", "n", "share", "low", "high"]
    ]


def bridge_lead(failures: pd.DataFrame, by: str) -> pd.DataFrame:
    """Among failures (rows not answered e3): the share that says e2, and how far it is ahead of the share that says e1.

    Returns per value of `by`: share, share_low, share_high, lead, lead_low, lead_high (95 %, over bridge entities), n.
    """
    rows = []
    for key, part in failures.groupby(by, sort=False):
        e2, e1 = ((part["outcome"] == name).to_numpy(dtype=float) for name in ("e2", "e1"))
        row = {by: key}
        for name, values in (("share", e2), ("lead", e2 - e1)):
            mean, low, high = mean_interval(values, part["e2"])
            row |= {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append({**row, "n": len(part)})
    return pd.DataFrame(rows)


def clear_cases(tokenizer, frame: pd.DataFrame) -> pd.DataFrame:
    """The prompts of `two_hops` and `generated` that are plainly right or wrong.

    Right: the next token is the first of e3's proper name. Wrong: it belongs to no name of e3, and what is written on
    does not name e3 first either.
    """
    first = {
        name: tokenizer.decode([continuation_ids(tokenizer, name)[0]])
        for name in frame["e3"].unique()
    }
    right = frame["said"] == frame["e3"].map(first)
    wrong = (frame["outcome"] != "e3") & (frame["named"] != "e3")
    return frame[right | wrong].reset_index(drop=True)


def failures_say_bridge(
    census: pd.DataFrame, leads: pd.DataFrame, three_way: pd.DataFrame, n: int
) -> Claim:
    """C3. census, three_way: wording, outcome, share, low, high over all kept prompts; leads: `census.bridge_lead` over
    the prompts not answered e3. The worked examples are one-hop facts, the answers open vocabulary.

    Four checks: in each of three wordings, more failures say e2 than echo e1, the other entity of the prompt; and in
    the paper's wording ("possessive") more than half of all failures say e2. Each with its whole interval.
    """
    by = leads.set_index("wording")
    passed = [*(by["lead_low"] > 0), by.loc["possessive", "share_low"] > 0.5]
    against = [*(by["lead_high"] < 0), by.loc["possessive", "share_high"] < 0.5]

    def percent(table: pd.DataFrame, wording: str, outcome: str) -> str:
        row = table.set_index(["wording", "outcome"]).loc[(wording, outcome)]
        return f"{outcome} {row['share']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"

    open_shares = ", ".join(
        percent(census, "possessive", outcome) for outcome in ("e3", "e2", "e1", "other")
    )
    others = "; ".join(f"{w}: {percent(census, w, 'e2')}" for w in by.index if w != "possessive")
    ahead = ", ".join(
        f"{w} {r['lead']:+.0%} [{r['lead_low']:.0%}, {r['lead_high']:.0%}]"
        for w, r in by.iterrows()
    )
    return Claim(
        id="C3",
        claim="two-hop failures answer the bridge entity e2",
        paper="of 568 cases 52.3 % e3, 42.4 % e2, 5.3 % the answer of e1's r2",
        ours=f"open vocabulary, e1's r1's r2: {open_shares}; {others}; "
        f"3-way: {percent(three_way, 'possessive', 'e2')}; e2 less e1 among failures: {ahead}; n = {n}",
        kind="tolerance",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="02_failure_analysis",
        figure="02_census",
    )


def conflict_not_ignorance(census: pd.DataFrame) -> Claim:
    """B2. census: wording, examples, outcome, share, low, high over prompts whose hops are known and whose shortcut is
    not answered with e3.

    Two checks, in the paper's wording behind one-hop examples, each with its whole interval: more than half of these
    prompts fail all the same; and more say e2 than name none of the entities.
    """
    mine = census[
        (census["wording"] == "possessive") & (census["examples"] == "one-hop")
    ].set_index("outcome")
    right, bridge, other = (mine.loc[name] for name in ("e3", "e2", "other"))
    told = ", ".join(
        f"{r.name} {r['share']:.0%} [{r['low']:.0%}, {r['high']:.0%}]"
        for r in (right, bridge, other)
    )
    return Claim(
        id="B2",
        claim="two-hop failures are conflict, not missing knowledge",
        paper="break condition",
        ours=f"both hops known, shortcut not: {told}; n = {int(right['n'])}",
        kind="tolerance",
        verdict=_weighed(
            [bool(right["high"] < 0.5), bool(bridge["low"] > other["high"])],
            [bool(right["low"] > 0.5), bool(bridge["high"] < other["low"])],
        ),
        notebook="02_failure_analysis",
        figure="02_census",
    )
