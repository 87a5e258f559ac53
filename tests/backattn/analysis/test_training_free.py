"""A second turn without training, against one written out."""

import pytest
import torch

from backattn import load_model
from backattn.analysis.training_free import damped_loop, realign
from backattn.models.families import UnsupportedModelError
from backattn.models.hooks import hooks
from backattn.models.tokens import encode

PROMPTS = ["France's capital is", "the mother of Spain's king is"]
FAMILIES = ["tiny-llama", "tiny-gpt2", "tiny-gemma2", "tiny-gpt-neox"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_damped_loop_is_the_block_run_once_more(name):
    model, tokenizer = load_model(name)
    ids, layers = tokenizer(PROMPTS[0], return_tensors="pt").input_ids, _layers(model, name)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        with hooks((layers[3], "input", seen.append)):
            model(ids, use_cache=False)
            with damped_loop(model, 1, 2, 0.5):
                model(ids, use_cache=False)
        x, looped = seen
        enter = (layers[1], "input", lambda _: x)  # so that F(x) leaves layer 2
        with hooks(enter, (layers[2], "output", seen.append)):
            model(ids, use_cache=False)
    assert torch.allclose(looped, x + 0.5 * (seen[2] - x), atol=1e-5)
    assert not torch.allclose(looped, x, atol=1e-3)


def _layers(model, name: str):
    names = {"tiny-gpt2": "transformer.h", "tiny-gpt-neox": "gpt_neox.layers"}
    return model.get_submodule(names.get(name, "model.layers"))


def test_a_loop_refuses_what_it_cannot_do():
    model, tokenizer = load_model("tiny-llama")
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with damped_loop(model, 1, 2, 0.5), pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, max_new_tokens=2, do_sample=False)
    with pytest.raises(ValueError, match="not from 2 to 1"), damped_loop(model, 2, 1, 0.5):
        pass
    with pytest.raises(IndexError), damped_loop(model, 1, 9, 0.5):
        pass


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_realigned_is_the_embedding_of_what_is_read(name, mean):
    model, tokenizer = load_model(name)
    said = realign(model, tokenizer, PROMPTS, [2, 3], source=3, targets=[0, 2], mean=mean)
    embed = model.get_input_embeddings().weight
    layers = _layers(model, name)
    for row, (prompt, place) in enumerate(zip(PROMPTS, [2, 3], strict=True)):
        batch = encode(tokenizer, [prompt])
        with torch.no_grad():
            seen = []
            with hooks((layers[3], "input", seen.append)):  # h_3 as the final layers would end it
                model(**batch.inputs, use_cache=False)
            skip = [(layer, "output", lambda _, seen=seen: seen[0]) for layer in layers[3:]]
            with hooks(*skip):
                read = model(**batch.inputs, use_cache=False).logits[0, place].softmax(-1)
            vector = read @ embed if mean else embed[read.argmax()]
            for k, target in enumerate([0, 2]):

                def put(x, vector=vector, place=place):
                    x = x.clone()
                    x[0, place] = vector * x[0, place].norm() / vector.norm()
                    return x

                with hooks((layers[target], "input", put)):
                    logits = model(**batch.inputs, use_cache=False).logits[0, -1]
                assert said[k, row] == logits.argmax()


def test_realign_refuses_places_that_are_not_there():
    model, tokenizer = load_model("tiny-llama")
    with pytest.raises(IndexError, match="Position"):
        realign(model, tokenizer, PROMPTS[:1], [40], source=3, targets=[0])
    with pytest.raises(IndexError, match="Layer"):
        realign(model, tokenizer, PROMPTS[:1], [2], source=3, targets=[7])


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-gpt-neox"])
def test_a_loop_refuses_a_cache_however_it_is_handed_over(name):
    model, tokenizer = load_model(name)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    with damped_loop(model, 1, 2, 0.5), pytest.raises(ValueError, match="use_cache=False"):
        model(ids[:, -1:], past_key_values=cache, use_cache=False)


def test_layers_that_share_a_module_are_refused():
    model, tokenizer = load_model("tiny-llama")
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[0], layers[1], layers[0], layers[1]])
    with pytest.raises(UnsupportedModelError, match="share a module"), damped_loop(model, 0, 1, 1):
        pass
    where = {"positions": [1, 1], "source": 2, "targets": [0]}
    with pytest.raises(UnsupportedModelError, match="share a module"):
        realign(model, tokenizer, PROMPTS, **where)
