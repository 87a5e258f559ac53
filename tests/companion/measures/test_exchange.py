"""Another memory in small models."""

import pandas as pd
import pytest
import torch

from companion.measures.exchange import exchange_memory, exchanges, matched_donors
from companion.questions.datasets import load
from companion.runs.perform import with_adapter
from companion.runs.plans import composing_runs, found
from companion.runs.run import Run
from companion.runs.store import Store


@pytest.fixture
def compositions():
    frame = load("compositions")
    train = frame[(frame["split"] == "train") & (frame["kind"] == "ID/ID")]
    return frame[(frame["split"] == "test") & (frame["kind"] == "ID/ID")].head(40), train


def test_a_donor_has_the_same_relations_and_another_answer(compositions):
    test, train = compositions
    chosen = matched_donors(test, train)
    there = chosen >= 0
    donors = train.loc[chosen[there]]
    assert there.sum() > 30 and (donors["answer"].values != test.loc[there, "answer"].values).all()
    same = donors["prompt"].str.split(n=1).str[1].values
    assert (same == test.loc[there, "prompt"].str.split(n=1).str[1].values).all()
    assert (matched_donors(test, train.iloc[:0]) == -1).all()
    assert matched_donors(test.iloc[5:9], train).equals(chosen.iloc[5:9])  # whoever is asked beside


@pytest.mark.parametrize("arm", ["back attention", "loop", "same layer"])
def test_an_update_that_is_all_memory_gives_the_donors_answer(compositions, arm):
    """Memory of the donor, an update that drowns the own state: what is said is the donor's."""
    test, train = compositions
    chosen = matched_donors(test, train)
    test, donors = test[chosen >= 0], train.loc[chosen[chosen >= 0]]
    run = Run(
        "compositions", f"2 layers + {arm}", model="scratch", source_layer=0, dim=32, width=20
    )
    with with_adapter(run, "float32") as (model, tokenizer):
        untrained = exchange_memory(model, tokenizer, test, donors).set_index("memory")
        for kind in untrained.index.unique():  # nothing comes back yet: each memory says the same
            assert untrained.loc[kind, "right"].tolist() == untrained.loc["own", "right"].tolist()
        for name, p in model.updates.named_parameters():
            torch.nn.init.normal_(
                p, std=1e3 if name.endswith(("o_proj.weight", "up.weight")) else 1
            )
        asked = [
            pd.DataFrame({"prompt": x["prompt"], "answer": said(model, tokenizer, x)})
            for x in (test, donors)
        ]
        table = exchange_memory(model, tokenizer, *asked).groupby("memory").mean()
    assert table.loc["own", "right"] == 1
    assert table.loc["another's", "donors_answer"] > (0.5 if arm == "same layer" else 0.9)
    assert ("only r1" in table.index) == (arm != "loop")


def said(model, tokenizer, frame):
    ids = torch.tensor(tokenizer(frame["prompt"].tolist(), add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        return tokenizer.convert_ids_to_tokens(model(ids).logits[:, -1].argmax(-1).tolist())


def test_the_exchange_sees_flow_where_it_must_be():
    """Of the committed models: with another's memory back attention says the other's answer."""
    store = Store()
    runs = [one for one in found(composing_runs(), store) if one.seed == 0]
    runs = [one for one in runs if one.arm == "2 layers + back attention"]
    table = exchanges(runs, store).query("kind == 'ID/ID'").groupby("memory")
    right, donors = table["right"].mean(), table["donors_answer"].mean()
    assert right["own"] > 0.95 and right["only r1"] > 0.9
    assert right["another's"] < 0.05 and donors["another's"] > 0.95 and donors["own"] < 0.05
    assert table["question"].nunique().eq(200).all()
