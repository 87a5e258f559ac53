"""Right or refused: on a changed model every analysis gives its numbers, or one error.

The changes are those that users make: adapters put in place, projections wrapped, quantised or
replaced, other norms and activations, hooks of their own. What is right is what the same function
in plain weights gives.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from backattn import flow_back, load_model, logit_flow
from backattn.analysis.knockouts import CachedPrompts, blocked_log_probs
from backattn.analysis.neuron_scores import sublayers
from backattn.models.activations import capture
from backattn.models.decoder import describe
from backattn.models.families import UnsupportedModelError
from backattn.models.lens import read_states
from backattn.models.tiny import tiny_names
from backattn.models.tokens import encode

PROMPTS = ["France's capital is", "Mozart's mother is"]
PATHS = ("attention_out", "value", "ffn_out", "up", "gate")
NORMS = ("attention_norm", "attention_post", "ffn_norm", "ffn_post")


def analyses(model, tokenizer) -> dict[str, np.ndarray]:
    """Every public analysis of backattn as numbers."""
    found = {}
    for level, norm, method in (
        ("layer", "final", "screen"),
        ("head", "own", "screen"),
        ("neuron", "final", "exact"),
        ("neuron", "final", "screen"),
    ):
        flow = logit_flow(
            model, tokenizer, PROMPTS, ["Paris", "Anna"], level, norm, method, top_k=40
        )
        # In the order of their size: of a screen it is no matter which of two equals comes first.
        found[f"{level} {method}"] = np.sort(flow.frame["increase"].to_numpy())
        if method == "exact":
            found["log_prob"] = flow.log_prob
            for route in ("parts", "linear"):
                found[route] = flow_back(model, tokenizer, flow, route).frame["flow"].to_numpy()
    found["lens"] = read_states(model, tokenizer, PROMPTS, [[0, 2]] * 2, [[5, 9]] * 2)[0]
    parts = list(sublayers(capture(model, encode(tokenizer, PROMPTS))))
    found["parts"] = np.concatenate([(x.coefficient.sum(1) @ x.vectors).numpy() for x in parts])
    return found


def equal_or_refused(model, tokenizer, right: dict[str, np.ndarray] | None) -> str:
    """What became of the analyses: "right" or "refused"; a wrong number fails the test."""
    try:
        found = analyses(model, tokenizer)
    except UnsupportedModelError as error:
        assert "backattn" in str(error) or "merge" in str(error), error
        return "refused"
    assert right is not None, "numbers of a model that differs from its family's row"
    for name, values in right.items():
        np.testing.assert_allclose(found[name], values, atol=1e-4, rtol=1e-4, err_msg=name)
    return "right"


def linear_paths(model) -> list[str]:
    """The paths, inside a block, of all projections whose weights an analysis may read."""
    family = describe(model).family
    return list(dict.fromkeys(p for name in PATHS if (p := getattr(family, name)) is not None))


def replace(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


class Adapted(nn.Module):
    """A projection with something added to what it puts out; its weight can still be read."""

    def __init__(self, inner: nn.Module, change):
        super().__init__()
        self.inner, self.change = inner, change

    @property
    def weight(self):
        return self.inner.weight

    @property
    def bias(self):
        return self.inner.bias

    def forward(self, x):
        return self.change(x, self.inner(x))


CHANGES = {
    "scaled": lambda x, y: y * 1.01,
    "shifted": lambda x, y: y + 0.01,
    "rounded": lambda x, y: (y * 16).round() / 16,
    "one position": lambda x, y: torch.cat([y[:, :-1], y[:, -1:] * 1.05], 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", PATHS)
def test_a_wrapped_projection_is_refused(tiny, path, change):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    path = getattr(describe(model).family, path)
    if path is None:
        pytest.skip("no such projection in this family")
    analyses(model, tokenizer)  # a proof of the plain model says nothing of the changed one
    block = describe(model).blocks[1].module
    replace(block, path, Adapted(block.get_submodule(path), CHANGES[change]))
    assert equal_or_refused(model, tokenizer, None) == "refused"


@pytest.mark.parametrize("change", CHANGES)
def test_a_users_hook_on_a_projection_is_refused(tiny, change):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    for path in linear_paths(model):
        module = describe(model).blocks[2].module.get_submodule(path)
        handle = module.register_forward_hook(lambda m, args, y: CHANGES[change](args[0], y))
        assert equal_or_refused(model, tokenizer, None) == "refused", path
        handle.remove()


@pytest.mark.parametrize("path", PATHS)
def test_a_parametrized_weight_is_read_as_it_is_used(tiny, path):
    """LoRA by torch.nn.utils.parametrize, weight norm: `weight` is computed when it is read."""

    class Low(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.delta = 0.1 * torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])

        def forward(self, weight):
            return weight + self.delta

    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    path = getattr(describe(model).family, path)
    if path is None:
        pytest.skip("no such projection in this family")
    plain, (changed, twin) = (
        copy.deepcopy(model),
        (describe(m).blocks[1].module.get_submodule(path) for m in (model, model)),
    )
    low = Low(twin.weight)
    with torch.no_grad():
        describe(plain).blocks[1].module.get_submodule(path).weight.add_(low.delta)
    parametrize.register_parametrization(changed, "weight", low)
    right = analyses(plain, tokenizer)
    assert equal_or_refused(model, tokenizer, right) in ("right", "refused")


@pytest.mark.parametrize("name", NORMS)
def test_another_norm_is_refused(tiny, name):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    block = describe(model).blocks[1]
    if (norm := block.get(name)) is None:
        pytest.skip("no such norm in this family")

    class Other(type(norm)):
        def forward(self, x):
            return super().forward(x) * 1.02

    norm.__class__ = Other
    assert equal_or_refused(model, tokenizer, None) == "refused"


def test_the_final_norm_and_the_unembedding_are_proved(tiny):
    for part in ("final_norm_module", "unembedding_module"):
        model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
        module = getattr(describe(model), part)
        module.register_forward_hook(lambda m, args, y: y * torch.linspace(0.9, 1.1, y.shape[-1]))
        assert equal_or_refused(model, tokenizer, None) == "refused", part


def test_another_activation_is_refused(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    module = describe(model).blocks[3].get("activation")
    if isinstance(module, nn.Module):
        module.register_forward_hook(lambda m, args, y: y + 0.05)
        assert equal_or_refused(model, tokenizer, None) == "refused"


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_quantised_projections_are_refused(llama, dtype):
    from torch.ao.quantization import quantize_dynamic

    model = quantize_dynamic(copy.deepcopy(llama[0]), {nn.Linear}, dtype=dtype)
    assert equal_or_refused(model, llama[1], None) == "refused"


TARGETS = (["q_proj", "v_proj"], ["o_proj", "down_proj"], ["gate_proj"], ["k_proj"], ["lm_head"])


@pytest.mark.parametrize("before", [False, True], ids=["new", "analysed before"])
@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
def test_lora_in_place_is_right_or_refused(targets, before):
    from peft import LoraConfig, get_peft_model

    def adapted():
        model, tokenizer = load_model("tiny-llama")
        if before:
            analyses(model, tokenizer)
        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
        return model, tokenizer, wrapped

    model, tokenizer, wrapped = adapted()
    right = analyses(adapted()[2].merge_and_unload(), tokenizer)
    equal_or_refused(model, tokenizer, right)
    equal_or_refused(wrapped, tokenizer, right)
    assert equal_or_refused(wrapped.merge_and_unload(), tokenizer, right) == "right"


@pytest.mark.parametrize("name", tiny_names())
def test_a_plain_model_of_every_family_is_right(name):
    model, tokenizer = load_model(name)
    assert equal_or_refused(model, tokenizer, analyses(model, tokenizer)) == "right"


# -- kind C: the measured pass is the user's


def with_template(tokenizer, single: str):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>", "<s> $A", "$A", "<s> <s> $A"])
@pytest.mark.parametrize("written", ["", "<s>"])
def test_the_prompt_is_scored_as_given(llama, single, written):
    """No end-of-text after a prompt, and one beginning-of-text where prompt and tokenizer agree."""
    model, tokenizer = llama[0], with_template(llama[1], single)
    flow = logit_flow(model, tokenizer, [written + PROMPTS[0]], ["Paris"], level="layer")
    text = tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"]
    head = single.split("$A")[0].count("<s>") or bool(written)
    logits = model(torch.tensor([[1] * head + text])).logits[0, -1].log_softmax(-1)
    assert flow.log_prob[0] == pytest.approx(logits[flow.answer_ids[0]].item(), abs=1e-5)


def test_truncation_and_padding_of_the_tokenizer_are_not_taken_over(llama):
    model, tokenizer = llama[0], copy.deepcopy(llama[1])
    right = logit_flow(model, tokenizer, PROMPTS, ["Paris", "Anna"], level="layer").log_prob
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=32, pad_id=0, pad_token="<pad>")
    tokenizer.padding_side = "left"
    again = logit_flow(model, tokenizer, PROMPTS, ["Paris", "Anna"], level="layer").log_prob
    np.testing.assert_allclose(again, right, atol=1e-5)


def test_an_eager_pass_that_differs_is_refused(tiny, monkeypatch):
    """Attention weights need eager attention; it must compute what the loaded kind computes."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def other(module, q, k, v, *args, **kwargs):
        out, weights = plain(module, q, k, v, *args, **kwargs)
        return out * 0.9, weights

    ALL_ATTENTION_FUNCTIONS.register("other", other)
    try:
        model.set_attn_implementation("other")
        for level in ("head", "neuron"):
            with pytest.raises(UnsupportedModelError, match="attention"):
                logit_flow(model, tokenizer, PROMPTS, level=level)
        flow = logit_flow(model, tokenizer, PROMPTS, level="layer")
        untouched = model(**encode(tokenizer, PROMPTS[:1]).inputs).logits[0, -1].log_softmax(-1)
        assert flow.log_prob[0] == pytest.approx(untouched[flow.answer_ids[0]].item(), abs=1e-5)
    finally:
        ALL_ATTENTION_FUNCTIONS.pop("other", None)


# -- kind G: positions and wishes


@pytest.mark.parametrize("position", [-1, -7, 40, 5.0, True, None])
def test_a_position_outside_its_prompt_is_an_error(llama, position):
    model, tokenizer = llama
    with pytest.raises((IndexError, TypeError), match="[Pp]osition"):
        read_states(model, tokenizer, PROMPTS, [[0], [position]], [[5]] * 2)
    with pytest.raises((IndexError, TypeError), match="[Pp]osition"):
        blocked_log_probs(CachedPrompts(model, tokenizer, PROMPTS), [[0], [position]], range(4))


@pytest.mark.parametrize("wish", ["output_hidden_states", "output_attentions", "use_cache"])
def test_wishes_in_the_config_change_nothing(tiny, wish):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    right = analyses(model, tokenizer)
    setattr(model.config, wish, True)
    if wish == "output_attentions":
        model.set_attn_implementation("eager")
    assert equal_or_refused(model, tokenizer, right) == "right"
