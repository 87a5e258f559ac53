"""Facts, prompts and what each token of a prompt is for.

A single-hop prompt is "X's r is": the entity stands before the relation, as in the paper's examples, so that the
relation and last positions can read the entity but not the other way round. Two worked examples stand in front,
because a small model does not answer the bare form.
"""

import ast
import hashlib
import os
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .arch import input_device
from .logit_flow import continuation_ids
from .paths import CACHE, DATA
from .residual import encode, next_log_probs
from .runtime import atomic_file, progress

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
    return label_tokens(tokenizer, frame["prompt"], {"entity": frame["entity"], "relation": frame["relation_span"]})


def label_tokens(tokenizer, prompts: Sequence[str], spans: dict[str, Sequence[tuple[int, int]]]) -> list[np.ndarray]:
    """A label for every token of every prompt: the name of the span it lies in, "last", or "context" (all else).

    spans: name -> (begin, end) characters, one per prompt. Raises ValueError when a span holds no token but the last.
    """
    groups = []
    for row, prompt in enumerate(prompts):
        offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        labels = np.array(["context"] * len(offsets), dtype=object)
        for name, places in spans.items():
            begin, end = list(places)[row]
            labels[[a < end and b > begin for a, b in offsets]] = name
        labels[-1] = "last"
        for name in spans:
            if name not in labels:
                raise ValueError(f"No token of {prompt!r} belongs to {name!r} alone.")
        groups.append(labels)
    return groups


def ends(labels: Sequence[np.ndarray], places: Sequence[str]) -> list[list[int]]:
    """The last token of each place in every prompt: [n][places]; raises ValueError when a prompt has none of one."""
    for row in labels:
        missing = [place for place in places if place not in row]
        if missing:
            raise ValueError(f"A prompt has no token in the group {missing[0]!r}.")
    return [[int(np.flatnonzero(row == place)[-1]) for place in places] for row in labels]


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
        raise ValueError("There is nothing to ask: the set is empty. Ask more facts, or a model that knows more.")
    said, logs = np.empty(len(prompts), dtype=int), [{} for _ in range(len(prompts))]
    texts, lengths = prompts.to_numpy(), prompts.str.len().to_numpy()
    groups = [rows[np.argsort(lengths[rows], kind="stable")] for rows in keys.groupby(keys.to_numpy()).indices.values()]
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
    said, logs = ask(model, tokenizer, frame["prompt"], frame["relation"], [[i] for i in ids], batch_size)
    owners = frame.assign(answer_id=ids).groupby("answer_id")["answer"].nunique()
    return frame.assign(
        answer_id=ids,
        tokens=[len(pieces[answer]) for answer in frame["answer"]],
        log_prob=[own[i] for own, i in zip(logs, ids, strict=True)],
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


# ---------------------------------------------------------------- two hops

TWO_HOP_COLUMNS = ("pair", "e1", "r1", "e2", "r2", "e3", "type2", "type3", "split")
TWO_HOP_URL = "https://raw.githubusercontent.com/edenbiran/HoppingTooLate/main/datasets/two_hop.csv"


@dataclass(frozen=True)
class Template:
    """How a question is worded: `phrase` names one hop, `sentence` asks for it. Phrases nest.

    Raises ValueError naming the slot that is missing.
    """

    phrase: str
    sentence: str

    def __post_init__(self):
        for text, slots in ((self.phrase, ("entity", "relation")), (self.sentence, ("phrase",))):
            for slot in slots:
                if text.count(f"{{{slot}}}") != 1:
                    raise ValueError(f"The template {text!r} must have the slot {{{slot}}} once.")

    def say(self, entity: str, *relations: str) -> str:
        """The question for relations followed in this order; a relation that holds {} is a phrase of its own."""
        for relation in relations:
            own = "{}" in relation
            entity = relation.format(entity) if own else self.phrase.format(entity=entity, relation=relation)
        text = self.sentence.format(phrase=entity)
        return text[0].upper() + text[1:]


TEMPLATES = {
    "possessive": Template("{entity}'s {relation}", "{phrase} is"),
    "of": Template("the {relation} of {entity}", "{phrase} is"),
    "question": Template("the {relation} of {entity}", "Question: What is {phrase}? Answer:"),
}


def two_hop_facts(path: Path = DATA / "two_hop.csv") -> pd.DataFrame:
    """The two-hop facts: pair, e1, r1, e2, r2, e3, shortcut, type1–3, e2_aliases, e3_aliases ("|" between), split.

    Raises ValueError naming the missing or repeated column, or the row with an empty cell.
    """
    frame = read_table(path, TWO_HOP_COLUMNS)
    return frame.assign(**{name: "" for name in ("shortcut", "e2_aliases", "e3_aliases") if name not in frame})


def published_two_hop(folder: Path | None = None, sha256: str | None = None) -> pd.DataFrame:
    """The TwoHop facts of Biran et al. (2024) in the columns of `two_hop_facts`; r1 and r2 are phrases with {}.

    Args:
        folder: where twohop/two_hop.csv lies; None takes the folder named by BACKATTN_DATASETS, else the file is
            fetched from its public home into the cache.
        sha256: the file must have it. None: a fetched file's is written beside it, and must stay the same.

    Raises OSError when it cannot be fetched, ValueError for another checksum, a missing column or an empty cell.
    """
    named = folder or os.environ.get("BACKATTN_DATASETS")
    path = (Path(named) if named else CACHE / "datasets") / "twohop" / "two_hop.csv"
    if not path.exists() and not named:
        fetch(TWO_HOP_URL, path)
        with atomic_file(path.with_suffix(".sha256")) as temporary:
            temporary.write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    note = path.with_suffix(".sha256")
    expected = sha256 or (note.read_text().strip() if note.exists() else None)
    if path.exists() and expected and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise ValueError(f"{path} is not the file it was (sha256 differs): delete it and it is fetched again.")
    labels = {"e1_label": "e1", "e2_label": "e2", "e3_label": "e3", "r1_template": "r1", "r2_template": "r2"}
    columns = [*labels, "e2_type", "e3_type", "r1_type", "r2_type", "e2_aliases", "e3_aliases"]
    frame = read_table(path, columns).rename(columns={**labels, "e2_type": "type2", "e3_type": "type3"})
    for row, phrases in enumerate(zip(frame["r1"], frame["r2"], strict=True)):
        for phrase in phrases:
            if phrase.count("{}") != 1:
                raise ValueError(f"{path.name}, row {row + 2}: the template {phrase!r} must have the slot {{}} once.")
    frame["pair"] = frame["type2"] + "-" + frame.pop("r1_type") + "-" + frame.pop("r2_type")
    for name in ("e2_aliases", "e3_aliases"):
        frame[name] = ["|".join(word for word in ast.literal_eval(cell) if len(word) > 1) for cell in frame[name]]
    return frame.assign(shortcut="", split="test")


def fetch(url: str, path: Path) -> None:
    """Fetch a small file; raises OSError that says where to put it by hand."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            content = answer.read()
    except OSError as error:
        raise OSError(
            f"Cannot fetch {url} ({error}). Put the file into <folder>/{path.parent.name}/{path.name} and set "
            "BACKATTN_DATASETS to that folder."
        ) from error
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def two_hop_prompts(
    frame: pd.DataFrame,
    template: Template | str = "possessive",
    examples: str = "one-hop",
    per_pair: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Write the four prompts of every two-hop fact.

    Two worked examples stand in front, the same for all facts with the same two relations. The first hop is asked
    after two first hops, the second hop and the shortcut after two second hops. Facts one of
    whose names or aliases stands in the examples are not asked: their answer would stand in the prompt.

    Args:
        frame: see `two_hop_facts`.
        template: a `Template` or the name of one of TEMPLATES.
        examples: what stands before the two-hop question: "one-hop" (one first hop and one second hop), "two-hop" (two
            two-hop questions with their answers) or "none".
        per_pair: at most this many facts of each pair of relations, in the frame's order.
        seed: of the draw of the examples.

    Returns the facts with: first, second, shortcut_prompt, two_hop (the prompts), head (the examples before two_hop)
    and the spans e1_span, r1_span, r2_span in two_hop as (begin, end) characters.

    Raises ValueError for an unknown template or kind of examples, and when an entity is not in its prompt.
    """
    if isinstance(template, str) and template not in TEMPLATES:
        raise ValueError(f"Unknown template {template!r}; choose one of {', '.join(TEMPLATES)} or pass a Template.")
    if examples not in ("one-hop", "two-hop", "none"):
        raise ValueError(f'Unknown examples {examples!r}; choose "one-hop", "two-hop" or "none".')
    say = (TEMPLATES[template] if isinstance(template, str) else template).say
    draw, rows = np.random.default_rng(seed), []
    for _, part in frame.groupby(["pair", "r1", "r2"], sort=True):
        pool = part.head(40).iloc[draw.permutation(min(40, len(part)))]
        shown = pool.drop_duplicates("e3").drop_duplicates("e2").head(2).to_dict("records")
        if len(shown) < 2:
            continue
        a, b = shown
        firsts, seconds, both = (
            "".join(f"{say(x[start], *(x[r] for r in hops))} {x[end]}. " for x in shown)
            for start, hops, end in (("e1", ["r1"], "e2"), ("e2", ["r2"], "e3"), ("e1", ["r1", "r2"], "e3"))
        )
        one = f"{say(a['e1'], a['r1'])} {a['e2']}. {say(b['e2'], b['r2'])} {b['e3']}. "
        head = {"one-hop": one, "two-hop": both, "none": ""}[examples]
        for index, row in zip(part.index, part.to_dict("records"), strict=True):
            names = {row["e1"], row["e2"], row["e3"], *row["e2_aliases"].split("|"), *row["e3_aliases"].split("|")} - {
                ""
            }
            if any(re.search(rf"\b{re.escape(name)}\b", firsts + seconds + both) for name in names):
                continue
            prompt = head + say(row["e1"], row["r1"], row["r2"])
            try:
                spans = two_hop_spans(prompt, row["e1"], row["r1"], row["r2"], len(head))
            except ValueError as error:
                raise ValueError(f"Fact {index} ({row['pair']}, {row['e1']}): {error}") from error
            rows.append(
                {
                    **row,
                    "order": index,
                    "first": firsts + say(row["e1"], row["r1"]),
                    "second": seconds + say(row["e2"], row["r2"]),
                    "shortcut_prompt": seconds + say(row["e1"], row["r2"]),
                    "two_hop": prompt,
                    "head": head,
                    **spans,
                }
            )
    written = pd.DataFrame(rows)
    if written.empty:
        raise ValueError("No pair of relations has two facts to show and one to ask: give more facts.")
    written = written.sort_values("order", kind="stable").drop(columns="order")
    return (written.groupby("pair").head(per_pair) if per_pair else written).reset_index(drop=True)


def two_hop_spans(prompt: str, e1: str, r1: str, r2: str, start: int = 0) -> dict[str, tuple[int, int]]:
    """Where e1 and both relations stand in a two-hop question that begins at character `start` of a prompt.

    Returns e1_span, r1_span, r2_span as (begin, end) characters. Raises ValueError when one is not there.
    """
    entity = span(prompt, e1, start)
    # Outside the entity's own name the relations' words stand in the order of the wording.
    places = {
        f"{name}_span": _relation_span(prompt, r, entity, start, name == "r2")
        for name, r in zip(("r1", "r2"), (r1, r2), strict=True)
    }
    return {"e1_span": entity, **places}


def _relation_span(prompt: str, relation: str, entity: tuple[int, int], start: int, outer: bool) -> tuple[int, int]:
    """Where a relation's words stand: after the entity if the wording puts them there, else before it."""
    words = relation.replace("{}", "").strip()
    places = [m.span() for m in re.finditer(re.escape(words), prompt, re.IGNORECASE)]  # it may begin the sentence
    after = [place for place in places if place[0] >= entity[1]]
    before = [place for place in places if start <= place[0] and place[1] <= entity[0]]
    found = after or before
    if not found:
        raise ValueError(f"{words!r} does not occur in the prompt {prompt!r}.")
    farthest = found[-1] if after else found[0]  # the outer relation stands farther from the entity
    nearest = found[0] if after else found[-1]
    return farthest if outer else nearest
