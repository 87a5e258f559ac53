"""Questions of arithmetic and which of their tokens stand for what."""

import pandas as pd
import pytest
import torch

from companion.runs.perform import with_adapter
from companion.runs.run import SCRATCH, Run
from companion.studies.other_reasoning_and_cost import sums
from companion.studies.other_reasoning_and_cost.sums import arithmetic_has_stages


def test_small_sums_have_one_digit_and_no_question_that_is_shown(smollm2):
    frame = sums.small_sums()
    assert 2 * 55 - 4 * sums.EXAMPLES <= len(frame) <= 2 * 55 - 2 * sums.EXAMPLES
    head = {prompt[:start] for prompt, start in frame[["prompt", "start"]].to_numpy()}
    assert len(head) == 1 and head.pop().count("=") == 2 * sums.EXAMPLES
    for row in frame.itertuples():
        question = row.prompt[row.start :]
        assert str(eval(question.rstrip(" ="))) == row.answer and row.operator in question
        a, b = row.pair.split(",")
        shown = row.prompt[: row.start]
        assert f"{a} {row.operator} {b} =" not in shown and f"{b} {row.operator} {a} =" not in shown
    tokens, (labels,) = (
        smollm2[1](frame["prompt"][5])["input_ids"],
        sums.sum_labels(smollm2[1], frame.loc[[5]]),
    )
    said = {
        name: [
            smollm2[1].decode([t]).strip()
            for t, own in zip(tokens, labels, strict=True)
            if own == name
        ]
        for name in set(labels)
    }
    assert (
        said["entity"] == frame["pair"][5].split(",")
        or said["entity"] == frame["pair"][5].split(",")[::-1]
    )
    assert said["relation"] == [frame["operator"][5]] and said["last"] == [""]


def test_long_sums_are_continued_digit_by_digit():
    run = Run("2-digit", "2 layers", 0, 1e-3, 2, SCRATCH, 0, 8, 16, 64, 8, 8, "float32", width=40)
    with with_adapter(run, "float32") as (model, tokenizer):
        frames = [sums.long_sums(run, tokenizer, digit) for digit in (2, 3)]
        for tens, ones in zip(*(frame.to_dict("records") for frame in frames), strict=True):
            assert (
                ones["prompt"] == tens["prompt"] + tens["answer"] and len(tens["prompt"]) == 6 + 2
            )
            a, b = (int(x) for x in ones["prompt"].split("=")[0].split(ones["operator"]))
            assert int(ones["prompt"].split("=")[1] + ones["answer"]) == (
                a + b if ones["operator"] == "+" else a - b
            )
        labels = sums.sum_labels(tokenizer, frames[1])[0]
        assert labels.tolist() == ["entity"] * 2 + ["relation"] + ["entity"] * 2 + [
            "context"
        ] * 3 + ["last"]
        right = sums.answered_right(model, tokenizer, frames[1])
        for prompt, answer, own in zip(
            frames[1]["prompt"], frames[1]["answer"], right, strict=True
        ):
            ids = torch.tensor([tokenizer.convert_tokens_to_ids(list(prompt))])
            with torch.no_grad():
                token = int(model(ids).logits[0, -1].argmax())
            assert own == (token == tokenizer.convert_tokens_to_ids(answer))
        said = frames[1].assign(answer=tokenizer.decode([token]))
        assert sums.answered_right(model, tokenizer, said)[-1]


def steps(*ends) -> pd.DataFrame:
    names = [("A", "B"), ("B", "C"), ("C", "D")]
    rows = [
        {"earlier": a, "later": b, "gap": 0.0, "low": e[0], "high": e[1], "step": True}
        for (a, b), e in zip(names, ends, strict=True)
    ]
    return pd.DataFrame(rows)


def knockouts(*needed, behind=False):
    high = -0.1 if behind else 0.5
    return pd.DataFrame(
        {"stage": list("ABCD"), "needed": needed, "difference_high": high, "n": 8, "draws": 9}
    )


@pytest.mark.parametrize(
    "ends, needed, behind, verdict",
    [
        (((1, 2), (1, 2), (1, 2)), (True, True, True, True), False, "reproduced"),
        (((1, 2), (1, 2), (1, 2)), (True, True, False, True), False, "partly"),
        (((1, 2), (-2, -1), (1, 2)), (False, False, False, False), False, "partly"),
        (
            ((0.1, 0.3), (0.1, 0.3), (0.1, 0.3)),
            (False, False, False, False),
            False,
            "not at this scale",
        ),
        (((-1, 2), (-2, -1), (-2, -1)), (False, False, False, False), True, "not at this scale"),
        (((-2, -1), (-2, -1), (-2, -1)), (False, False, False, False), False, "not at this scale"),
        (((-2, -1), (-2, -1), (-2, -1)), (False, False, False, False), True, "contradicted"),
    ],
)
def test_q2_follows_its_rule(ends, needed, behind, verdict):
    claim = arithmetic_has_stages({"one": (steps(*ends), 9)}, knockouts(*needed, behind=behind))
    assert (
        claim["verdict"] == verdict
        and "n = 9" in claim["ours"]
        and "9 random sets" in claim["ours"]
    )


def test_q2_wants_four_stages():
    with pytest.raises(ValueError, match="stages A to D"):
        arithmetic_has_stages(
            {"one": (steps((1, 2), (1, 2), (1, 2)), 9)}, knockouts(*[True] * 4).head(3)
        )
