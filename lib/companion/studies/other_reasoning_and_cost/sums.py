"""09: does arithmetic run through the stages of single-hop recall? (question Q2)

What stands for what: the operands take the entity's place, the operator the relation's. So stage A
is flow through FFNs at the operands, B through attention that reads them, C through FFNs at the
operator and the last position, D through attention that reads these, and straight to the answer
from FFNs at the last position (`companion.measures.stages`).
"""

import numpy as np
import pandas as pd

from companion.questions.asking import ask
from companion.questions.prompts import label_tokens, span
from companion.report.verdicts import claim
from companion.runs.as_asked import asked, questions
from companion.runs.run import Run

EXAMPLES = 2  # of each operator, in front of every question


def small_sums() -> pd.DataFrame:
    """All sums and differences of two digits with one digit as result, "5 + 2 = ".

    Behind worked examples of both; the form and the examples are our choice. The examples are the
    same for all, and neither they nor their sums the other way round are asked. In random order.

    Returns: prompt, answer (a digit), operator ("+" or "-"), pair (both digits, which is what is
    resampled), start (where in the prompt the question begins).
    """
    rows = [
        (f"{a} {operator} {b} = ", str(result), operator, f"{min(a, b)},{max(a, b)}")
        for a in range(10)
        for b in range(10)
        for operator, result in (("+", a + b), ("-", a - b))
        if 0 <= result < 10
    ]
    frame = pd.DataFrame(rows, columns=["question", "answer", "operator", "pair"])
    shown = frame.groupby("operator").sample(EXAMPLES, random_state=0)
    shown = shown.sample(frac=1, random_state=0)
    head = "".join(f"{row.question}{row.answer}. " for row in shown.itertuples())
    kinds = frame["operator"] + frame["pair"]
    rest = frame[~kinds.isin(kinds[shown.index])].sample(frac=1, random_state=0)
    rest = rest.reset_index(drop=True)
    return rest.assign(prompt=head + rest.pop("question"), start=len(head))


def long_sums(run: Run, tokenizer, digit: int) -> pd.DataFrame:
    """The test questions of a run from scratch, "07+83=009", to be continued by one digit ("0").

    digit: its place in the answer, 0 (the sign or the thousands) to 3 (the ones). Returns the
    columns of `small_sums`.
    """
    items, pairs = questions(run, tokenizer, "test"), asked(run, "test")["group"]
    texts, digits = (
        ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in part]
        for part in (items.prompts, items.answers)
    )
    rows = {
        "prompt": [text + answer[:digit] for text, answer in zip(texts, digits, strict=True)],
        "answer": [answer[digit] for answer in digits],
        "operator": ["+" if "+" in text else "-" for text in texts],
    }
    return pd.DataFrame({**rows, "pair": pairs.to_numpy(), "start": 0})


def answered_right(model, tokenizer, frame: pd.DataFrame) -> np.ndarray:
    """Whether the model's next token is the answer: [n] bool."""
    tokens, _ = ask(model, tokenizer, frame["prompt"], frame["start"])
    said = np.array([tokenizer.decode([token]) for token in tokens])
    return said == frame["answer"].to_numpy()


def sum_labels(tokenizer, frame: pd.DataFrame) -> list[np.ndarray]:
    """The group of every token, in the words of `measures.stages`: "entity" (operands), "relation"
    (operator), "last" or "context" (worked examples, "=", digits of the answer)."""
    spans: dict[str, list[tuple[int, int]]] = {"first": [], "relation": [], "second": []}
    for prompt, start, operator in frame[["prompt", "start", "operator"]].to_numpy():
        place, equals = prompt.index(operator, start + 1), prompt.index("=", start)
        spans["first"].append(span(prompt, prompt[start:place].strip(), start))
        spans["relation"].append((place, place + 1))
        spans["second"].append(span(prompt, prompt[place + 1 : equals].strip(), place + 1))
    labels = label_tokens(tokenizer, frame["prompt"].tolist(), spans)
    return [np.where(np.isin(row, ("first", "second")), "entity", row) for row in labels]


def arithmetic_has_stages(
    models: dict[str, tuple[pd.DataFrame, int]], knockouts: pd.DataFrame
) -> dict:
    """Q2. models: name -> (`stages.order_table` of `sum_labels`, n); knockouts:
    `stages.knockout_table` of the first model, of stages A to D, layer 0 left out.

    Three checks per model: each of A→B, B→C, C→D is surely more than half a layer (against: less
    than minus half). Less only compares shares of flow within a layer, which is what a model of two
    layers has much of. Four of the first model: each stage's own layers are `needed` (against: they
    surely cost less than others). Raises ValueError for other stages.
    """
    stages = list(knockouts["stage"])
    if stages != list("ABCD"):
        raise ValueError(f"Knock-outs of stages A to D are needed, one row each, not of {stages}.")
    passed, against = list(knockouts["needed"]), list(knockouts["difference_high"] < 0)
    gaps = []
    for name, (order, n) in models.items():
        steps = order[order["step"]]
        passed += list(steps["low"] > 0.5)
        against += list(steps["high"] < -0.5)
        each = (
            f"{r.earlier}→{r.later} {r.gap:+.1f} [{r.low:.1f}, {r.high:.1f}]"
            for r in steps.itertuples()
        )
        gaps.append(f"{name}: {', '.join(each)}, n = {n}")
    needed = ", ".join(knockouts.loc[knockouts["needed"], "stage"]) or "none"
    first = knockouts.iloc[0]
    ours = (
        f"layers between stages: {'; '.join(gaps)}; in {next(iter(models))} own layers needed more "
        f"than every random set: {needed}, n = {first['n']}, {first['draws']} random sets"
    )
    return claim("Q2", ours, passed, against)
