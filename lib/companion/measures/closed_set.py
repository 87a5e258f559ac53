"""What kind of word, or which word? A gain in log p(e3) in two parts.

With C the first tokens of all answers to the question's second relation, log p(e3) = log p(C) +
log p(e3 | C): the type part and the choice part. Closed-set accuracy: the likeliest token of C is
an accepted one.
"""

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor

from backattn.models.tokens import continuation_ids
from backattn.training.batches import Items
from companion.questions.asking import ask
from companion.questions.prompts import TEMPLATES

VALUES = ("log_prob", "type", "choice", "right", "closed")


def first_tokens_of(tokenizer, facts: pd.DataFrame, name: str, relation: str) -> dict[str, dict]:
    """relation -> the first token of each of its answers -> the answer, of several the first one.
    facts: the columns `name`, `relation` and f"{name}_aliases" ("a|b")."""
    tokens: dict[str, dict] = {}
    for answer, aliases, label in (
        facts[[name, f"{name}_aliases", relation]].drop_duplicates().to_numpy()
    ):
        for word in filter(None, [answer, *aliases.split("|")]):
            first = continuation_ids(tokenizer, word)[0]
            tokens.setdefault(label, {}).setdefault(first, answer)
    return tokens


def answer_sets(tokenizer, facts: pd.DataFrame, frame: pd.DataFrame, items: Items) -> tuple:
    """What `in_parts` takes besides the logits, of the questions `items` made from `frame` (r2)."""
    sets = first_tokens_of(tokenizer, facts, "e3", "r2")
    return [sets[r2] for r2 in frame["r2"]], [a[0] for a in items.answers], items.accepted


def in_parts(
    logits: Tensor, sets: Sequence[Iterable[int]], own: Sequence[int], accepted: Sequence[frozenset]
) -> pd.DataFrame:
    """VALUES of each question. logits [n, V]; sets: C; own: e3's first token; accepted: which are
    right; all per question. Raises ValueError where C lacks e3: the parts would mean nothing."""
    log_probs, rows = logits.float().log_softmax(-1), []
    for row, choices, token, right in zip(log_probs, sets, own, accepted, strict=True):
        if token not in choices:
            raise ValueError(f"Token {token} of the answer begins none of the answers in `facts`.")
        choices = torch.tensor(sorted(choices))
        among, one = row[choices], row[token].item()
        total = among.logsumexp(0).item()
        said, best = int(row.argmax()), int(choices[among.argmax()])
        rows.append((one, total, one - total, float(said in right), float(best in right)))
    return pd.DataFrame(rows, columns=list(VALUES))


def asked_by_hops(model, tokenizer, frame: pd.DataFrame, facts: pd.DataFrame) -> list[str]:
    """The second question of each in `frame` (e1, r1, r2), "name's r2 is", about the model's own
    answer to the first, "e1's r1 is": the likeliest of all names that answer r1 in `facts`."""
    say, names = TEMPLATES["possessive"].say, first_tokens_of(tokenizer, facts, "e2", "r1")
    first = pd.Series([say(e1, r1) for e1, r1 in frame[["e1", "r1"]].to_numpy()])
    wanted = [list(names[r1]) for r1 in frame["r1"]]
    _, logs = ask(model, tokenizer, first, frame["r1"].reset_index(drop=True), wanted)
    said = [names[r1][max(log, key=log.get)] for r1, log in zip(frame["r1"], logs, strict=True)]
    return [say(e2, r2) for e2, r2 in zip(said, frame["r2"], strict=True)]
