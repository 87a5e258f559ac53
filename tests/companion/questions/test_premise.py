"""The invented world of the paper's premise."""

from companion.questions.datasets import load
from companion.questions.premise import ENTITIES, ROLES, WORDS, world


def test_every_composition_follows_its_two_facts():
    frame = world()
    facts = frame[frame["kind"] == "fact"].set_index("prompt")["answer"].str.strip()
    assert len(facts) == ENTITIES * 10 and facts.index.is_unique
    assert set(" ".join([*frame["prompt"], *frame["answer"]]).split()) <= {*WORDS}
    two_hop = frame[frame["kind"] == "two-hop"]
    words = two_hop["prompt"].str.split(expand=True)
    bridges = facts[words[0] + " " + words[1]].to_numpy()
    assert (bridges == two_hop["group"].to_numpy()).all()
    assert (facts[bridges + " " + words[2]].to_numpy() == two_hop["answer"].str.strip()).all()
    assert frame.groupby("group")["role"].nunique().eq(1).all()
    assert frame.drop_duplicates("group")["role"].value_counts().to_dict() == ROLES


def test_adapters_are_asked_what_no_frozen_model_was_shown():
    frame, every = load("premise"), world().set_index("prompt")
    asked = every.loc[frame["prompt"]]
    assert not asked["shown"].any() and set(asked["kind"]) == {"two-hop"}
    assert frame["split"].value_counts()["test"] == 1000
    by_split = (frame["group"] + " " + frame["r2"]).groupby(frame["split"]).agg(set)
    assert by_split["train"].isdisjoint(by_split["test"] | by_split["validation"])
    bridges = frame.groupby("split")["group"].agg(set)
    assert bridges["test"] <= bridges["train"]
    base = set(every.loc[every["role"] == "base", "group"])
    assert base.isdisjoint(frame["group"])
