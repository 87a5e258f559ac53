"""Does arithmetic run through the stages of single-hop recall? (question Q2)

What stands for what: the operands take the entity's place, the operator the relation's. So stage A is flow through FFNs
at the operands, B through attention that reads them, C through FFNs at the operator and the last position, D through
attention that reads these, and straight to the answer from FFNs at the last position (`backattn.stages`).
"""

import numpy as np
import pandas as pd

from . import experiments, tasks
from .experiments import Run

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
    shown = frame.groupby("operator").sample(EXAMPLES, random_state=0).sample(frac=1, random_state=0)
    head = "".join(f"{question}{answer}. " for question, answer in shown[["question", "answer"]].to_numpy())
    kinds = frame["operator"] + frame["pair"]
    left = frame[~kinds.isin(kinds[shown.index])].sample(frac=1, random_state=0).reset_index(drop=True)
    return left.assign(prompt=head + left.pop("question"), start=len(head))


def long_sums(run: Run, tokenizer, digit: int) -> pd.DataFrame:
    """The test questions of a run from scratch, "07+83=009", to be continued by one digit of the answer ("0090").

    digit: its place, 0 (the sign or the thousands) to 3 (the ones). Returns the columns of `small_sums`.
    """
    items = experiments.questions(run, tokenizer, "test")
    rows = []
    for prompt, answer, pair in zip(items.prompts, items.answers, experiments.asked(run, "test")["group"], strict=True):
        text, digits = ("".join(tokenizer.convert_ids_to_tokens(part)) for part in (prompt, answer))
        operator = "+" if "+" in text else "-"
        rows.append({"prompt": text + digits[:digit], "answer": digits[digit], "operator": operator, "pair": pair})
    return pd.DataFrame(rows).assign(start=0)


def answered(model, tokenizer, frame: pd.DataFrame) -> np.ndarray:
    """Whether the model's next token is the answer: [n] bool."""
    said, _ = tasks.ask(model, tokenizer, frame["prompt"], frame["start"])
    return np.array([tokenizer.decode([token]) for token in said]) == frame["answer"].to_numpy()


def groups(tokenizer, frame: pd.DataFrame) -> list[np.ndarray]:
    """The group of every token, in the words of `stages`: "entity" (operands), "relation" (operator), "last" or
    "context" (worked examples, "=", digits of the answer)."""
    spans: dict[str, list[tuple[int, int]]] = {"first": [], "relation": [], "second": []}
    for prompt, start, operator in frame[["prompt", "start", "operator"]].to_numpy():
        place, equals = prompt.index(operator, start + 1), prompt.index("=", start)
        spans["first"].append(tasks.span(prompt, prompt[start:place].strip(), start))
        spans["relation"].append((place, place + 1))
        spans["second"].append(tasks.span(prompt, prompt[place + 1 : equals].strip(), place + 1))
    labels = tasks.label_tokens(tokenizer, frame["prompt"].tolist(), spans)
    return [np.where(np.isin(row, ("first", "second")), "entity", row) for row in labels]
