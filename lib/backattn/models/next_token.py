"""The model's next token after each prompt, and caches of what stands before it."""

import copy

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from backattn.models.tokens import Batch


def next_log_probs(model, batch: Batch, share: bool = False, cache: Cache | None = None) -> Tensor:
    """Log-probabilities of the next token after each prompt, in fp32: [B, V]. The batch must be padded on the left.

    share: run the tokens with which all prompts begin (worked examples, say) once instead of once per prompt. The
    layers then see only the rest of each prompt, so hooks that count positions need share=False.
    cache: a `beginning` of the batch, which grows; its columns are then left out, and share says nothing.
    """
    if cache is not None:
        known = cache.get_seq_length()
        with torch.no_grad():
            output = model(
                input_ids=batch.input_ids[:, known:],
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids[:, known:],
                past_key_values=cache,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float().log_softmax(-1)
    common = _common_start(batch) if share else 0
    window = getattr(model.config, "sliding_window", None)
    if (
        window and batch.input_ids.shape[1] > window
    ):  # padding between the shared start and the rest would shift the window
        common = 0
    with torch.no_grad():
        if common:
            first = batch.input_ids[:1, batch.start[0] : batch.start[0] + common]
            cache = model(input_ids=first, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(len(batch.input_ids))
        rest = (
            int(batch.lengths.max()) - common
        )  # the batch is padded on the left: cut its columns, keep row ends
        ids, mask = batch.input_ids[:, -rest:], batch.attention_mask[:, -rest:].clone()
        for row, length in enumerate((batch.lengths - common).tolist()):
            mask[row, : rest - length] = 0
        output = model(
            input_ids=ids,
            attention_mask=torch.cat([mask.new_ones(len(mask), common), mask], dim=1),
            position_ids=(mask.cumsum(-1) - 1 + common).clamp(min=0),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
    return output.logits[:, -1].float().log_softmax(-1)


def in_window(model, batch: Batch) -> bool:
    """Whether a cache holds all of a batch's prompts, since no sliding window is shorter."""
    window = getattr(model.config, "sliding_window", None)
    return window is None or batch.input_ids.shape[1] < window


def whole_cache(model, batch: Batch) -> Cache | None:
    """Keys and values of whole prompts, of which `beginning` takes a part; None where a sliding window is shorter."""
    if not in_window(model, batch):
        return None
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }
    with torch.no_grad():
        return model(**given, use_cache=True, logits_to_keep=1).past_key_values


def cache_prefix(cache: Cache, length: int) -> Cache:
    """What a cache holds of the first `length` tokens; the cache itself stays as it is.

    Raises ValueError where it holds fewer, or has dropped what was before a sliding window.
    """
    windows = [
        layer.sliding_window
        for layer in cache.layers
        if isinstance(layer, DynamicSlidingWindowLayer)
    ]
    if windows and cache.get_seq_length() >= min(windows):
        raise ValueError(
            f"The texts in this cache are longer than the sliding window of {min(windows)} tokens, before which it "
            "keeps nothing: leave past_key_values out."
        )
    own = copy.copy(cache)
    own.layers = [
        copy.copy(layer) for layer in cache.layers
    ]  # their tensors are replaced when they grow, not changed
    spare = own.get_seq_length() - length
    if spare < 0:
        raise ValueError(f"The cache holds {length + spare} tokens of each text, not {length}.")
    if spare:
        own.crop(
            -spare
        )  # nothing but a negative number means the same in all versions of transformers 5
    return own


def _common_start(batch: Batch) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    shortest = int(batch.lengths.min())
    starts = torch.stack(
        [
            row[begin : begin + shortest]
            for row, begin in zip(batch.input_ids, batch.start, strict=True)
        ]
    )
    same = (starts == starts[:1]).all(0).int().cumprod(0)
    return min(int(same.sum()), shortest - 1)
