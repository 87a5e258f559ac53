"""The model's next token after each prompt, and caches of what stands before it."""

import copy

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from backattn.models.hooks import analysis
from backattn.models.tokens import Batch


@analysis
def next_log_probs(model, batch: Batch, share: bool = False, cache: Cache | None = None) -> Tensor:
    """Log-probabilities of the next token after each prompt, in fp32: [B, V].

    batch: padded on the left; share: the tokens with which all prompts begin (worked examples, say)
    run once, so that hooks see only the rest; cache: a `cache_prefix` of the batch, which grows,
    and whose columns are left out.

    Example:
        >>> batch = encode(tokenizer, ["France's capital is", "Spain"], side="left")
        >>> next_log_probs(model, batch).exp().sum(-1)
        tensor([1.0000, 1.0000])
    """
    inputs = batch.inputs
    if cache is not None:
        known = cache.get_seq_length()
        for name in ("input_ids", "position_ids"):
            inputs[name] = inputs[name][:, known:]
    # Padding between the shared beginning and the rest would shift a sliding window.
    elif share and (length := _common_start(batch.rows)) and in_window(model, batch):
        first = batch.input_ids.new_tensor([batch.rows[0][:length]])
        cache = model(input_ids=first, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(batch.input_ids))
        rest = batch.input_ids.shape[1] - length  # the last columns, where all prompts end
        column = torch.arange(rest, device=batch.input_ids.device)
        mask = (column >= rest - (batch.lengths - length)[:, None]).to(batch.attention_mask.dtype)
        whole = torch.cat([mask.new_ones(len(mask), length), mask], dim=1)
        inputs |= {
            "input_ids": batch.input_ids[:, -rest:],
            "attention_mask": whole,
            "position_ids": (mask.cumsum(-1) - 1 + length).clamp(min=0),
        }
    output = model(**inputs, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    return output.logits[:, -1].float().log_softmax(-1)


def _common_start(rows: list[list[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    same = [len(set(column)) == 1 for column in zip(*(row[:-1] for row in rows), strict=False)]
    return [*same, False].index(False)


def in_window(model, batch: Batch) -> bool:
    """Whether a cache holds all of a batch's prompts, since no sliding window is shorter."""
    window = getattr(model.config, "sliding_window", None)
    return not window or batch.input_ids.shape[1] < window


def cache_prefix(cache: Cache, length: int) -> Cache:
    """What a cache holds of the first `length` tokens; the cache itself stays as it is.

    Raises ValueError where it holds fewer, or has dropped what was before a sliding window.

    Example:
        >>> cache = model(**tokenizer("France is", return_tensors="pt")).past_key_values
        >>> cache_prefix(cache, 2).get_seq_length()
        2
    """
    sliding = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    window = min((layer.sliding_window for layer in sliding), default=None)
    if window is not None and cache.get_seq_length() >= window:
        raise ValueError(
            f"The texts in this cache are longer than the sliding window of {window} tokens, "
            "before which it keeps nothing: leave past_key_values out."
        )
    prefix = copy.copy(cache)
    # Copies of the layers are enough: a cache that grows replaces its tensors.
    prefix.layers = [copy.copy(layer) for layer in cache.layers]
    spare = prefix.get_seq_length() - length
    if spare < 0:
        raise ValueError(f"The cache holds {length + spare} tokens of each text, not {length}.")
    if spare:  # a negative number alone means the same in all versions of transformers 5
        prefix.crop(-spare)
    return prefix
