"""The demo's explorer: what it shows is the models' own, and bad input is answered in words."""

import pytest
import torch
from matplotlib import pyplot as plt

from backattn import BackAttentionConfig, get_back_attention_model, load_model
from backattn.models.next_token import next_log_probs
from backattn.models.tiny import tiny_names
from backattn.models.tokens import encode
from companion.studies import demo_logit_flow

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
    seen, batch = (
        demo_logit_flow.inspect_prompt(*adapted[:2], PROMPT, "Paris", adapter),
        encode(tokenizer, [PROMPT], side="left"),
    )
    with adapter.disable_adapter():
        plain = next_log_probs(model, batch)[0].exp()
    changed = next_log_probs(adapter, batch)[0].exp()
    for name, own in (("plain", plain), ("back attention", changed)):
        assert seen.predictions[name].max() == pytest.approx(own.max().item(), rel=1e-5)
    assert not torch.allclose(plain, changed, atol=1e-4)
    assert seen.reads.shape == (
        len(seen.layers),
        len(seen.tokens),
    ) and seen.reads.sum() == pytest.approx(1, abs=1e-5)
    assert seen.error < 1e-4 and seen.answer.strip() == "Paris"


@pytest.mark.parametrize("name", tiny_names())
def test_every_family_is_shown_without_an_adapter(name):
    seen = demo_logit_flow.inspect_prompt(*load_model(name), PROMPT)
    assert (
        seen.reads is None
        and list(seen.predictions.columns) == ["token", "plain"]
        and len(seen.neurons) == 8
    )
    assert (
        seen.neurons["increase"].is_monotonic_decreasing and (seen.neurons["promotes"] != "").all()
    )
    figure = demo_logit_flow.report_figure(seen)
    assert len([ax for ax in figure.axes if ax.get_title()]) == 2
    plt.close(figure)


@pytest.mark.parametrize(
    "prompt, said", [("", "no words"), (" ", "no words"), ("king " * 60, "at most 48")]
)
def test_bad_input_is_answered_in_words(adapted, prompt, said):
    models = demo_logit_flow.Models()
    models.kept["tiny-llama"] = adapted
    panel = demo_logit_flow.Explorer(models, ["tiny-llama"], prompt)
    panel.button.click()
    assert (
        said in panel.message.value
        and panel.message.value.startswith("<b>")
        and not panel.button.disabled
    )
    panel.prompt.value, panel.answer.value = PROMPT, "Paris Rome"
    panel.button.click()
    assert (
        panel.message.value.startswith("Flow to")
        and "scored on their first token" in panel.message.value
    )


def test_an_unknown_model_and_one_without_adapter(tmp_path):
    models = demo_logit_flow.Models()
    panel = demo_logit_flow.Explorer(models, [str(tmp_path / "nothing <b>")], PROMPT)
    panel.button.click()
    assert "Could not load" in panel.message.value and "nothing &lt;b&gt;" in panel.message.value
    panel.model.value = "tiny-gpt2"
    panel.button.click()
    assert (
        "No trained back attention is shipped" in panel.message.value and "tiny-gpt2" in models.kept
    )
