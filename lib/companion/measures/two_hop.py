"""What several studies measure of two-hop prompts: what can be read at places, donors, contrasts.

A place is the last token of e1's, r1's or r2's words in the two-hop prompt, or the last position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from backattn.models.lens import read_states
from backattn.models.tokens import continuation_ids
from companion.questions.prompts import label_tokens, last_token_positions
from companion.questions.splits import place_of

PLACES = ("e1", "r1", "r2", "last")
READABLE = 10  # an entity can be read where its first token is among this many


def place_labels(tokenizer, frame: pd.DataFrame) -> list[np.ndarray]:
    """What each token of the two-hop prompt is for: "e1", "r1", "r2", "last" or "context"."""
    spans = {name: frame[f"{name}_span"] for name in ("e1", "r1", "r2")}
    return label_tokens(tokenizer, frame["two_hop"], spans)


def first_token_pairs(tokenizer, frame: pd.DataFrame) -> list[tuple[int, int]]:
    """First tokens of (e3, e2) by their proper names."""
    first = {name: continuation_ids(tokenizer, name)[0] for name in {*frame["e3"], *frame["e2"]}}
    return [(first[e3], first[e2]) for e3, e2 in zip(frame["e3"], frame["e2"], strict=True)]


@dataclass
class Reading:
    """What can be read in the states of two-hop prompts, all [n, places, L+1].

    difference: logit of e3 less that of e2. readable: of e3, e2, "e3 shuffled" (another prompt's)
    and "e2 shuffled", whether the first token is among the READABLE highest. wins: of e3 and e2,
    whether its logit is above the shuffled one's (½ where both are the same token).
    """

    places: tuple[str, ...]
    difference: np.ndarray
    readable: dict[str, np.ndarray]
    wins: dict[str, np.ndarray]


def read_conflict(model, tokenizer, frame: pd.DataFrame, seed=0, places=PLACES) -> Reading:
    """Read each prompt's e3 and e2, and its donor's, in the states that enter each layer."""
    ids = np.array(first_token_pairs(tokenizer, frame))
    tokens = np.concatenate([ids, ids[donors(frame, seed)]], axis=1)
    where = last_token_positions(place_labels(tokenizer, frame), places)
    prompts = frame["two_hop"].tolist()
    logits, ranks = read_states(model, tokenizer, prompts, where, tokens.tolist(), ranks=True)
    names = ("e3", "e2", "e3 shuffled", "e2 shuffled")
    readable = {name: ranks[..., k] < READABLE for k, name in enumerate(names)}
    wins = {}
    for k, name in enumerate(("e3", "e2")):
        same = tokens[:, k] == tokens[:, k + 2]  # continents: another prompt's e3 may be the same
        above = logits[..., k] > logits[..., k + 2]
        wins[name] = np.where(same[:, None, None], 0.5, above)
    return Reading(tuple(places), logits[..., 0] - logits[..., 1], readable, wins)


def donors(frame: pd.DataFrame, seed: int = 0, relations: str = "same") -> np.ndarray:
    """Per prompt the row of another one whose e2 and e3 are neither right answers nor its e2, drawn
    by a hash of both facts, so that a prompt more or less leaves the others' donors what they are.

    relations: "same" draws among prompts with the same relations, else of the same pair, else all;
    "any" among all. Raises ValueError when there is none, or for another value of `relations`.
    """
    if relations not in ("same", "any"):
        raise ValueError(f'Unknown relations {relations!r}; choose "same" or "any".')
    same = (frame["pair"] + "|" + frame["r1"] + "|" + frame["r2"]).to_numpy()
    pair, e2, e3 = (frame[name].to_numpy() for name in ("pair", "e2", "e3"))
    fact, chosen = same + "|" + frame["e1"].to_numpy(), np.empty(len(frame), dtype=int)
    for row, aliases in enumerate(frame["e2_aliases"] + "|" + frame["e3_aliases"]):
        answers = [e2[row], e3[row], *aliases.split("|")]
        other = ~np.isin(e2, answers) & ~np.isin(e3, answers)
        if not other.any():
            raise ValueError(
                f"No other prompt is about other entities than {e2[row]!r} and {e3[row]!r}: "
                "ask more facts."
            )
        fits = [other & (same == same[row]), other & (pair == pair[row]), other]
        fits = fits if relations == "same" else [other]
        fit = np.flatnonzero(next(fit for fit in fits if fit.any()))
        chosen[row] = min(fit, key=lambda place: place_of(f"{seed}|{fact[row]}|{fact[place]}"))
    return chosen


def contrast(
    values: np.ndarray, right: Sequence, strata: Sequence, clusters: Sequence, permutations=2000
) -> dict[str, np.ndarray]:
    """Right against wrong cases within strata (pairs of relations), at every point of [n, ...].

    Prompts of one cluster (bridge entity) and stratum count as one, with the share that is right.
    difference: right less wrong, by regression on that share with an intercept per stratum; p: by
    permutation within strata, corrected for all points by the largest |difference / its spread|,
    which is its standard deviation over the permutations.
    Raises ValueError when no stratum has both right and wrong cases.
    """
    shape, flat = values.shape[1:], values.reshape(len(values), -1).astype(float)
    frame = pd.DataFrame(flat).assign(right=np.asarray(right, dtype=float))
    units = frame.groupby([np.asarray(strata), np.asarray(clusters)]).mean()
    stratum = units.index.codes[0]
    share, flat = units.pop("right").to_numpy(), units.to_numpy()
    centred = share - (np.bincount(stratum, weights=share) / np.bincount(stratum))[stratum]
    total = (centred**2).sum()
    if total < 1e-12:
        raise ValueError("No pair of relations has both right and wrong cases: ask more facts.")
    draw = np.random.default_rng(0)
    orders = (np.lexsort((draw.random(len(share)), stratum)) for _ in range(permutations))
    null = np.array([centred[order] @ flat / total for order in orders])
    difference = centred @ flat / total
    spread = np.maximum(null.std(0), 1e-12)
    largest = np.abs(null / spread).max(1)
    p = (1 + (largest[:, None] >= np.abs(difference / spread)).sum(0)) / (permutations + 1)
    found = {"difference": difference, "p": p, "spread": spread}
    return {name: values.reshape(shape) for name, values in found.items()}
