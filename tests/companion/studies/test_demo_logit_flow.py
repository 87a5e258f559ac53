"""The demo: what it shows is the models' own, and bad input is answered in words."""

import re

import pytest
import torch
from matplotlib import pyplot as plt

from backattn import BackAttentionConfig, get_back_attention_model, load_model
from backattn.models.next_token import next_log_probs
from backattn.models.tiny import tiny_names
from backattn.models.tokens import encode
from companion.studies import demo_logit_flow as demo

PROMPT = "France 's capital is"


@pytest.fixture
def adapted():
    model, tokenizer = load_model("tiny-llama")
    adapter = get_back_attention_model(model, BackAttentionConfig(1, 8))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in adapter.updates.parameters():
            weight.normal_(std=0.5)
    yield model, tokenizer, adapter
    adapter.unload()


def test_predictions_are_the_models_own(adapted):
    model, tokenizer, adapter = adapted
    seen = demo.inspect_prompt(model, tokenizer, PROMPT, "Paris", adapter)
    batch = encode(tokenizer, [PROMPT], side="left")
    changed = next_log_probs(adapter, batch)[0].exp()
    with adapter.disable_adapter():
        plain = next_log_probs(model, batch)[0].exp()
    best = [plain.max().item(), changed.max().item()]
    assert seen.predictions.drop(columns="token").max().tolist() == pytest.approx(best, rel=1e-5)
    assert not torch.allclose(plain, changed, atol=1e-4)
    assert seen.reads.shape == (4, int(batch.lengths[0]))
    assert seen.reads.to_numpy().sum() == pytest.approx(1, abs=1e-5)
    assert seen.error < 1e-4 and seen.answer.strip() == "Paris"


@pytest.mark.parametrize("name", tiny_names())
def test_every_family_is_shown_without_an_adapter(name):
    seen = demo.inspect_prompt(*load_model(name), PROMPT)
    assert seen.reads is None and list(seen.predictions) == ["token", "plain"]
    assert len(seen.neurons) == 8 and seen.neurons["increase"].is_monotonic_decreasing
    assert (seen.neurons["promotes"] != "").all()
    figure = demo.report_figure(seen)
    assert len([ax for ax in figure.axes if ax.get_title()]) == 2
    plt.close(figure)


@pytest.mark.parametrize(
    "prompt, answer, said",
    [
        ("", "", "no words"),
        (" ", "", "no words"),
        ("king " * 60, "", "at most 48"),
        (PROMPT, "Paris Rome", "Flow to .*scored on their first token"),
    ],
)
def test_bad_input_is_answered_in_words(adapted, monkeypatch, prompt, answer, said):
    monkeypatch.setattr(demo, "load", lambda *_: adapted)
    says, report = demo.look("tiny-llama", prompt, answer)
    assert re.search(said, says) and (report is not None) == says.startswith("Flow to")


def test_an_unknown_model_and_one_without_adapter(tmp_path):
    says, report = demo.look(str(tmp_path / "nothing"), PROMPT)
    assert says.startswith("Could not load") and report is None
    says, report = demo.look("tiny-gpt2", PROMPT)
    assert "No trained back attention is shipped" in says and report.reads is None


def test_the_button_shows_it_and_keeps_it(adapted, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *parts: shown.extend(parts))
    monkeypatch.setattr(demo, "load", lambda *_: adapted)
    monkeypatch.setattr(demo.paths, "BUILD", tmp_path)
    panel, _ = demo.explorer(PROMPT, panels=2).children
    panel.children[0].value = "<b>"  # another model is looked at even without the button
    panel.manual_button.click()
    says, predictions, neurons, _, kept, *again = shown
    assert says.data.endswith("in &lt;b&gt;.") and len(predictions) >= 5
    assert len(neurons) == 8 and len(again) == 5 and "explorer" in kept.data
    files = {path.name for path in (tmp_path / "explorer" / "1").iterdir()}
    assert files == {
        "figure.png",
        *(f"{x}.csv" for x in ("predictions", "flow", "neurons", "reads")),
    }


def test_another_prompts_memory_is_read(adapted):
    def column(memory_of):
        seen = demo.inspect_prompt(*adapted[:2], PROMPT, "Paris", adapted[2], memory_of)
        return seen.predictions["another memory"], seen.predictions["back attention"]

    own, expected = column(PROMPT)
    assert own.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    other, expected = column("Tokyo is in Japan , and Rome")
    assert abs(other - expected).max() > 1e-4
    with pytest.raises(ValueError, match="No back attention"):
        demo.inspect_prompt(*adapted[:2], PROMPT, memory_of="Rome")


def test_the_answers_rank_is_that_among_what_a_neuron_raises(adapted):
    model, tokenizer, _ = adapted
    neurons = demo.inspect_prompt(model, tokenizer, PROMPT, "Paris").neurons
    ffn = neurons[neurons["kind"] == "ffn"].iloc[0]
    layer, norm = model.model.layers[int(ffn["layer"])], model.model.norm.weight
    raised = model.lm_head.weight @ (layer.mlp.down_proj.weight[:, int(ffn["neuron"])] * norm)
    answer = tokenizer(" Paris", add_special_tokens=False)["input_ids"][0]
    ranks = [int((sign * raised >= sign * raised[answer]).sum()) for sign in (1, -1)]
    assert ffn["answer_rank"] in ranks
    first = tokenizer.decode(
        [int((raised * (1 if ranks[0] == ffn["answer_rank"] else -1)).argmax())]
    )
    assert ffn["promotes"].startswith(first.strip())


def test_adapters_that_are_shipped_can_be_chosen_and_share_their_model(smollm2, monkeypatch):
    monkeypatch.setattr(demo, "_base", lambda *_: smollm2)
    shipped = demo.shipped_adapters("smollm2")
    lines = [demo._store().shipped[path.stem]["run"] for path in demo.CHECKPOINTS.iterdir()]
    named = [x for x in lines if (x["model"], x["arm"]) == ("smollm2", "back attention")]
    assert demo.TRAINED in shipped and len(shipped) == len(named)  # no two of one name
    two = [demo.load.__wrapped__("smollm2", "cpu", name) for name in (demo.TRAINED, "1DC, seed 0")]
    (one, _, first), (other, _, second) = two
    assert one is other and first is not second and first.sources == second.sources
    said = [demo.inspect_prompt(*smollm2, PROMPT, "", x).predictions for x in (first, second)]
    assert said[0]["plain"].max() == said[1]["plain"].max()
    assert said[0]["back attention"].max() != said[1]["back attention"].max()
    assert [x.unload() for x in (first, second)] == [one, one]
    with pytest.raises(ValueError, match="choose of: 1DC, seed 0"):
        demo.load.__wrapped__("smollm2", "cpu", "two-hop, seed 99")


def test_a_neuron_that_names_the_answer_is_told_from_one_that_does_not(adapted):
    neurons = demo.inspect_prompt(*adapted[:2], PROMPT, "Paris").neurons
    assert (neurons["names_answer"] == (neurons["answer_rank"] <= demo.NAMES)).all()
