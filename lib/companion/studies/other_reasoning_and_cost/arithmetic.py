"""Does arithmetic run through the stages of single-hop recall? (question Q2)

What stands for what: the operands take the entity's place, the operator the relation's. So stage A is flow through FFNs
at the operands, B through attention that reads them, C through FFNs at the operator and the last position, D through
attention that reads these, and straight to the answer from FFNs at the last position (`backattn.stages`).
"""

import numpy as np
import pandas as pd

from companion.questions.asking import ask
from companion.questions.prompts import label_tokens, span
from companion.report.verdicts import Claim, _weighed
from companion.runs.as_asked import asked, questions
from companion.runs.run import Run

EXAMPLES = 2  # of each operator, in front of every question


def small_sums() -> pd.DataFrame:
    """All sums and differences of two digits with one digit as result, "5 + 2 = ", behind worked examples of both.

    The form and the examples are our choice. The worked examples are the same for all, and neither they nor their sums
    the other way round are asked. In random order.

    Returns: prompt, answer (a digit), operator ("+" or "-"), pair (both digits, which is what is resampled), start
    (where in the prompt the question begins).
    """
    rows = []
    for a in range(10):
        for b in range(10):
            for operator, result in (("+", a + b), ("-", a - b)):
                if 0 <= result < 10:
                    pair = f"{min(a, b)},{max(a, b)}"
                    rows.append((f"{a} {operator} {b} = ", str(result), operator, pair))
    frame = pd.DataFrame(rows, columns=["question", "answer", "operator", "pair"])
    shown = (
        frame.groupby("operator").sample(EXAMPLES, random_state=0).sample(frac=1, random_state=0)
    )
    head = "".join(
        f"{question}{answer}. " for question, answer in shown[["question", "answer"]].to_numpy()
    )
    kinds = frame["operator"] + frame["pair"]
    left = (
        frame[~kinds.isin(kinds[shown.index])].sample(frac=1, random_state=0).reset_index(drop=True)
    )
    return left.assign(prompt=head + left.pop("question"), start=len(head))


def long_sums(run: Run, tokenizer, digit: int) -> pd.DataFrame:
    """The test questions of a run from scratch, "07+83=009", to be continued by one digit of the answer ("0090").

    digit: its place, 0 (the sign or the thousands) to 3 (the ones). Returns the columns of `small_sums`.
    """
    items = questions(run, tokenizer, "test")
    rows = []
    for prompt, answer, pair in zip(
        items.prompts, items.answers, asked(run, "test")["group"], strict=True
    ):
        text, digits = ("".join(tokenizer.convert_ids_to_tokens(part)) for part in (prompt, answer))
        operator = "+" if "+" in text else "-"
        rows.append(
            {
                "prompt": text + digits[:digit],
                "answer": digits[digit],
                "operator": operator,
                "pair": pair,
            }
        )
    return pd.DataFrame(rows).assign(start=0)


def answered_right(model, tokenizer, frame: pd.DataFrame) -> np.ndarray:
    """Whether the model's next token is the answer: [n] bool."""
    said, _ = ask(model, tokenizer, frame["prompt"], frame["start"])
    return np.array([tokenizer.decode([token]) for token in said]) == frame["answer"].to_numpy()


def sum_labels(tokenizer, frame: pd.DataFrame) -> list[np.ndarray]:
    """The group of every token, in the words of `stages`: "entity" (operands), "relation" (operator), "last" or
    "context" (worked examples, "=", digits of the answer)."""
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
) -> Claim:
    """Q2. models: name -> (`stages.order_table` of `arithmetic`'s groups, n); knockouts: `stages.knockout_table` of the
    first model, of stages A to D, layer 0 left out.

    Three checks per model: each of A→B, B→C, C→D is surely more than half a layer (against: less than minus half). Less
    only compares shares of flow within a layer, which is what a model of two layers has much of. Four of the first
    model: each stage's own layers are `needed` (against: they surely cost less than others). Raises ValueError for
    other stages.
    """
    if list(knockouts["stage"]) != list("ABCD"):
        raise ValueError(
            f"Knock-outs of stages A to D are needed, one row each, not of {list(knockouts['stage'])}."
        )
    passed, against, told = list(knockouts["needed"]), list(knockouts["difference_high"] < 0), []
    for name, (order, n) in models.items():
        steps = order[order["step"]]
        passed += list(steps["low"] > 0.5)
        against += list(steps["high"] < -0.5)
        gaps = ", ".join(
            f"{r.earlier}→{r.later} {r.gap:+.1f} [{r.low:.1f}, {r.high:.1f}]"
            for r in steps.itertuples()
        )
        told.append(f"{name}: {gaps}, n = {n}")
    needed = ", ".join(knockouts.loc[knockouts["needed"], "stage"]) or "none"
    return Claim(
        id="Q2",
        claim="arithmetic runs through the stages of recall, operands for the entity and operator for the relation",
        paper="open question",
        ours=f"layers between stages: {'; '.join(told)}; in {next(iter(models))} own layers needed more than every "
        f"random set: {needed}, n = {int(knockouts['n'].iloc[0])}, {int(knockouts['draws'].iloc[0])} random sets",
        kind="tolerance",
        verdict=_weighed(list(map(bool, passed)), list(map(bool, against))),
        notebook="08_beyond_facts_and_cost",
        figure="08_stages",
    )
