"""Right or refused: on a changed model every analysis gives its numbers, or one error.

The changes are those that users make: adapters put in place, projections wrapped, quantised or
replaced, other norms and activations, hooks of their own. What is right is what the same function
in plain weights gives.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import PROMPTS
from torch import nn
from torch.nn.utils import parametrize
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from backattn import flow_back, load_model, logit_flow
from backattn.analysis.attributions import attribute
from backattn.analysis.back_patching import back_patch
from backattn.analysis.circuits import Circuit, pair_up
from backattn.analysis.knockouts import (
    CachedPrompts,
    Knockout,
    KnockoutProbe,
    blocked_log_probs,
    group_means,
)
from backattn.models.decoder import describe
from backattn.models.families import UnsupportedModelError
from backattn.models.lens import read_states
from backattn.models.next_token import next_log_probs
from backattn.models.tokens import _say, encode

TEXTS = [PROMPTS[0], PROMPTS[2]]
OTHERS = [PROMPTS[2], PROMPTS[0]]
PATHS = ("attention_out", "value", "ffn_out", "up", "gate")


def flow(level: str, norm: str, model, tokenizer, texts=TEXTS):
    return logit_flow(model, tokenizer, texts, [5, 9], level, norm, top_k=40)


def increases(*args) -> np.ndarray:
    """In the order of their size: of a screen it is no matter which of two equals comes first."""
    return np.sort(flow(*args).frame["increase"].to_numpy())


def traced(route: str, model, tokenizer) -> np.ndarray:
    whole = logit_flow(model, tokenizer, TEXTS, [5, 9], method="exact")
    return flow_back(model, tokenizer, whole, route).frame["flow"].to_numpy()


def knocked_out(model, tokenizer) -> np.ndarray:
    groups = [["x"] * length for length in encode(tokenizer, TEXTS).lengths.tolist()]
    means = group_means(model, tokenizer, TEXTS, groups)
    probe = KnockoutProbe(model, tokenizer, TEXTS, [5, 9], groups, means)
    return probe.log_probs([Knockout("ffn", (1,), ("x",)), Knockout("attention", (2,), ("x",))])


def kept(model, tokenizer) -> np.ndarray:
    """Some nodes, chosen at random, and exchanged one by one."""
    pairs, circuit = pair_up(tokenizer, TEXTS, OTHERS, [5, 9], [9, 5]), Circuit(model)
    keep = np.random.default_rng(0).random((6, len(circuit.nodes))) < 0.3
    return np.append(circuit.kept(pairs, keep), attribute(circuit, pairs, "exact"))


def attributed(method: str, model, tokenizer, units="nodes") -> np.ndarray:
    pairs = pair_up(tokenizer, TEXTS, OTHERS, [5, 9], [9, 5])
    return attribute(Circuit(model, units), pairs, method)


ANALYSES = {
    "kept": kept,
    **{x: partial(attributed, x) for x in ("gradient", "integrated", "both ends", "activation")},
    "half": partial(attributed, "half", units="neurons"),
    "layer": partial(increases, "layer", "final"),
    "head": partial(increases, "head", "own"),
    "neuron": partial(increases, "neuron", "final"),
    "parts": partial(traced, "parts"),
    "linear": partial(traced, "linear"),
    "lens": lambda *loaded: read_states(*loaded, TEXTS, [[0, 2]] * 2, [[5, 9]] * 2)[0],
    "patch": lambda *loaded: back_patch(*loaded, TEXTS[:1], [2], [[5, 9]]).log_probs.numpy(),
    "knock-out": knocked_out,
    "hidden": lambda *loaded: blocked_log_probs(CachedPrompts(*loaded, TEXTS), [[1]] * 2, [1, 2]),
    "next": lambda model, tokenizer: next_log_probs(model, encode(tokenizer, TEXTS, "left")),
}


def analyses(model, tokenizer, names=ANALYSES) -> dict[str, np.ndarray | None]:
    """Every public analysis as numbers, None where it is refused."""
    found = dict.fromkeys(names)
    for name in names:
        try:
            found[name] = np.asarray(ANALYSES[name](model, tokenizer))
        except UnsupportedModelError as error:
            assert "merge" in str(error) or "base model" in str(error), error
    return found


def refused(model, tokenizer, right: dict[str, np.ndarray]) -> set[str]:
    """The analyses that are refused; a wrong number of the others fails the test."""
    found = analyses(model, tokenizer, right)
    for name, values in found.items():
        if values is not None:
            np.testing.assert_allclose(values, right[name], atol=2e-4, rtol=1e-4, err_msg=name)
    return {name for name, values in found.items() if values is None}


@pytest.fixture(scope="module")
def plain(tiny):
    return analyses(*tiny)


def module_of(model, name: str, layer: int = 1) -> nn.Module:
    """A part of a layer by its name in the family's row; skips where the family has none."""
    module = describe(model).blocks[layer].get(name)
    return module if module is not None else pytest.skip("this family has none")


def replaced(model, name: str, make) -> None:
    """Put make(module) in the place of a module of layer 1."""
    block, made = describe(model).blocks[1], make(module_of(model, name))
    parent, _, last = getattr(block.family, name).rpartition(".")
    setattr(block.module.get_submodule(parent), last, made)


class Adapted(nn.Module):
    """A projection with something done to what it puts out; its weight can still be read."""

    def __init__(self, change, inner: nn.Module):
        super().__init__()
        self.inner, self.change = inner, change

    weight = property(lambda self: self.inner.weight)
    bias = property(lambda self: self.inner.bias)

    def forward(self, x):
        return self.change(self.inner(x))


CHANGES = {
    "scaled": lambda y: y * 1.01,
    "shifted": lambda y: y + 0.01,
    "rounded": lambda y: (y * 16).round() / 16,
    "one position": lambda y: torch.cat([y[:, :-1], y[:, -1:] * 1.05], 1),
}


def test_a_plain_model_is_never_refused(tiny, plain):
    assert not [name for name, values in plain.items() if values is None]
    assert not refused(*tiny, plain)


@pytest.mark.parametrize("path", PATHS)
def test_what_the_weights_do_not_say_is_refused_wherever_they_are_read(tiny, path):
    """Wrapped and by a hook of the user's, after the model as it was has been analysed."""
    reads = {"parts", "linear"} | ({"neuron", "head"} if path.endswith("_out") else set())
    changes = CHANGES if tiny[0].config.model_type == "llama" else ["one position"]
    for name in changes:
        wrapped, hooked = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[0])
        replaced(wrapped, path, partial(Adapted, CHANGES[name]))
        module_of(hooked, path).register_forward_hook(lambda m, x, y, f=CHANGES[name]: f(y))
        for model in (wrapped, hooked):
            found = analyses(model, tiny[1], reads)
            assert all(values is None for values in found.values()), (name, found)


@pytest.mark.parametrize("path", PATHS)
def test_the_same_function_in_other_weights_is_right_where_it_is_not_refused(tiny, path):
    """By a wrapper; and by parametrize, whose weight is computed when it is read, so all right."""

    class Scaled(nn.Module):
        def forward(self, x):
            return x * 1.1

    wrapped, computed, equal = (copy.deepcopy(tiny[0]) for _ in range(3))
    replaced(wrapped, path, partial(Adapted, lambda y: y * 1.1))
    for name, parameter in list(module_of(equal, path).named_parameters()):
        parameter.data *= 1.1
        parametrize.register_parametrization(module_of(computed, path), name, Scaled())
    names = ["neuron", "parts", "lens", "patch"] if path == "up" else ["head", "linear"]
    right = analyses(equal, tiny[1], names)
    assert not refused(computed, tiny[1], right)
    assert refused(wrapped, tiny[1], right) <= {"head", "neuron", "parts", "linear"}


@pytest.mark.parametrize("name", ["attention_norm", "attention_post", "ffn_norm", "ffn_post"])
def test_another_norm_is_refused_where_it_is_read(tiny, name):
    model = copy.deepcopy(tiny[0])
    norm = module_of(model, name)

    class Other(type(norm)):
        def forward(self, x):
            return super().forward(x) * torch.linspace(0.95, 1.05, x.shape[-1])

    norm.__class__ = Other
    reads = ["parts", "linear"] + ["head", "neuron"] * name.endswith("post")
    assert not any(x is not None for x in analyses(model, tiny[1], reads).values())


@pytest.mark.parametrize("part", ["final_norm_module", "unembedding_module"])
def test_the_final_norm_and_the_unembedding_are_proved(tiny, part):
    model = copy.deepcopy(tiny[0])
    module = getattr(describe(model), part)
    module.register_forward_hook(lambda m, x, y: y * torch.linspace(0.9, 1.1, y.shape[-1]))
    found = analyses(model, tiny[1], ["layer", "head", "neuron", "lens", "parts", "linear"])
    assert all(values is None for values in found.values())


def test_a_layer_steered_by_a_hook_is_refused(llama):
    model = copy.deepcopy(llama[0])
    model.model.layers[1].register_forward_hook(lambda m, x, y: y + 0.1)
    names = ["layer", "head", "neuron", "parts", "linear", "kept", "both ends", "gradient"]
    assert all(values is None for values in analyses(model, llama[1], names).values())


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_quantised_projections_are_refused_where_they_are_read(llama, dtype):
    from torch.ao.quantization import quantize_dynamic

    model = quantize_dynamic(copy.deepcopy(llama[0]), {nn.Linear}, dtype=dtype)
    found = analyses(model, llama[1], ["layer", "head", "neuron", "lens"])
    assert all(values is None for values in found.values())


@pytest.mark.parametrize("before", [False, True], ids=["new", "analysed before"])
@pytest.mark.parametrize("targets", ["q_proj v_proj", "o_proj down_proj", "gate_proj", "lm_head"])
def test_lora_in_place_is_right_or_refused(targets, before):
    peft = pytest.importorskip("peft")

    def adapted():
        model, tokenizer = load_model("tiny-llama")
        kept = flow("neuron", "final", model, tokenizer) if before else None
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=targets.split())
        wrapped = peft.get_peft_model(model, config)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
        return model, tokenizer, wrapped, kept

    model, tokenizer, wrapped, kept = adapted()
    right = analyses(adapted()[2].merge_and_unload(), tokenizer)
    read = {"q_proj v_proj": {"parts", "linear"}, "gate_proj": {"parts", "linear"}}
    assert refused(model, tokenizer, right) >= read.get(targets, {"head", "neuron"})
    assert refused(wrapped, tokenizer, right) == set(right)
    if before:
        with pytest.raises(ValueError, match=r"merge|changed since"):
            flow_back(model, tokenizer, kept)
            kept.check()
    assert not refused(wrapped.merge_and_unload(), tokenizer, right)


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>", "<s> $A", "$A", "<s> <s> $A"])
@pytest.mark.parametrize("written", ["", "<s>"])
@pytest.mark.filterwarnings("ignore:The tokenizer puts")
def test_the_prompt_is_scored_as_given(llama, single, written):
    """No end-of-text after a prompt, and one beginning-of-text where prompt and tokenizer agree."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = llama[0], copy.deepcopy(llama[1])
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=special
    )
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=32, pad_id=0, pad_token="<pad>")
    tokenizer.padding_side = "left"
    scored = flow("layer", "final", model, tokenizer, [written + TEXTS[0], TEXTS[1]])
    text = llama[1](TEXTS[0], add_special_tokens=False)["input_ids"]
    head = single.split("$A")[0].count("<s>") or bool(written)
    logits = model(torch.tensor([[1] * head + text])).logits[0, -1].log_softmax(-1)
    assert scored.log_prob[0] == pytest.approx(logits[5].item(), abs=1e-5)


def test_what_is_left_out_of_a_prompt_is_said(llama):
    class Ends:
        pad_token_id, decode = 0, llama[1].decode

        def __call__(self, texts, add_special_tokens=True, **options):
            ids = llama[1](texts, add_special_tokens=False)["input_ids"]
            return {"input_ids": [row + [2] * add_special_tokens for row in ids]}

    _say.cache_clear()  # it is said once
    with pytest.warns(UserWarning, match="'</s>' behind a prompt"):
        encode(Ends(), TEXTS)


def test_an_eager_pass_that_differs_is_refused(tiny, monkeypatch):
    """Attention weights need eager attention; it must compute what the loaded kind computes."""
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def other(module, q, k, v, *args, **kwargs):
        kwargs.pop("softcap", None)
        out, weights = usual(module, q, k, v, *args, **kwargs)
        return out + 0.1, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "other", other)
    model.set_attn_implementation("other")
    read = ("head", "neuron", "parts", "both ends", "activation", "half")
    found = analyses(model, tokenizer, [*read, "layer"])
    assert [found.pop(name) is None for name in read] == [True] * len(read)
    assert model.config._attn_implementation == "other"
    logits = model(**encode(tokenizer, TEXTS[:1]).inputs).logits[0, -1].log_softmax(-1)
    said = flow("layer", "final", model, tokenizer).log_prob[0]
    assert said == pytest.approx(logits[5].item(), abs=1e-5)


def test_a_check_runs_the_model_as_it_is(llama):
    model = copy.deepcopy(llama[0])
    scored = flow("layer", "final", model, llama[1])
    assert scored.check() <= 1e-4
    model.model.layers[0].self_attn.q_proj.weight.data *= 1.5
    with pytest.raises(ValueError, match="changed since"):
        scored.check()


@pytest.mark.parametrize("position", [-1, -7, 40, 5.0, True, None])
def test_a_position_outside_its_prompt_is_an_error(llama, position):
    odd = pytest.raises((IndexError, TypeError), match="Position")
    with odd:
        read_states(*llama, TEXTS, [[0], [position]], [[5]] * 2)
    with odd:
        blocked_log_probs(CachedPrompts(*llama, TEXTS), [[0], [position]], range(4))
    with odd:
        back_patch(*llama, TEXTS, [1, position], [[5]] * 2)
    with odd:
        back_patch(*llama, TEXTS[:1], [1], [[5]], donors=[(TEXTS[1], position)])


def test_labels_layers_and_tokens_that_are_not_there_are_errors(llama):
    count = int(encode(llama[1], TEXTS[:1]).lengths)
    labels = [["x"] * count]
    means = group_means(*llama, TEXTS[:1], labels)
    for wrong in (count - 1, count + 1):
        with pytest.raises(IndexError, match="labels"):
            group_means(*llama, TEXTS[:1], [["x"] * wrong])
        with pytest.raises(IndexError, match="labels"):
            KnockoutProbe(*llama, TEXTS[:1], [5], [["x"] * wrong], means)
    with pytest.raises(IndexError, match="Answer"):
        KnockoutProbe(*llama, TEXTS[:1], [-1], labels, means)
    probe = KnockoutProbe(*llama, TEXTS[:1], [5], labels, means)
    with pytest.raises(IndexError, match="Layer"):
        probe.log_probs([Knockout("ffn", (-1,), ("x",))])
    with pytest.raises(IndexError, match="Layer"):
        blocked_log_probs(probe, [[0]], [4])
    with pytest.raises(IndexError, match="Token id"):
        read_states(*llama, TEXTS[:1], [[0]], [[-1]])


@pytest.mark.parametrize("wish", ["hidden_states", "attentions", "use_cache", "return_dict"])
def test_wishes_in_the_config_change_nothing(tiny, plain, wish):
    model = copy.deepcopy(tiny[0])
    if wish == "attentions":
        model.set_attn_implementation("eager")  # else transformers refuses the wish
    name = wish if wish in ("use_cache", "return_dict") else f"output_{wish}"
    setattr(model.config, name, wish != "return_dict")
    right = {name: plain[name] for name in ("head", "linear", "lens", "patch", "hidden", "next")}
    assert not refused(model, tiny[1], right)


@pytest.mark.parametrize("state", ["training", "inference", "autocast", "bfloat16 by default"])
def test_the_state_of_torch_and_of_the_model_changes_nothing(llama, state):
    right = analyses(*llama)
    model = copy.deepcopy(llama[0])
    model.model.layers[0].train(state == "training")
    if state == "inference":
        with torch.inference_mode():  # whose weights let no gradient through
            found = refused(*load_model("tiny-llama"), right)
        assert found == {"gradient", "integrated"}
    elif state == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert not refused(model, llama[1], right)
    elif state == "training":
        model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
        assert not refused(model, llama[1], right)
        assert model.model.layers[0].mlp.training and not model.model.layers[1].training
    else:
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert not refused(model, llama[1], right)
        finally:
            torch.set_default_dtype(torch.float32)


def test_threads_wait_for_each_other(llama):
    """Eight threads ask one model for everything at once."""
    right, names = analyses(*llama), list(ANALYSES) * 8
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: ANALYSES[name](*llama), names))
    for name, values in zip(names, found, strict=True):
        assert np.array_equal(np.asarray(values), right[name], equal_nan=True), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama[0].modules())
