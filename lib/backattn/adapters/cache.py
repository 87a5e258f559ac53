"""Caches of the two passes."""

from torch import Tensor
from transformers.cache_utils import Cache


class _SecondPass:
    """A cache as the second pass sees it: its keys and values lie in layers of their own behind the first pass's."""

    def __init__(self, cache: Cache, offset: int):
        self._cache, self._offset = cache, offset

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        return self._cache.update(keys, values, layer + self._offset, *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._cache, name)


class _OnlyPass(_SecondPass):
    """A cache as the only pass of a new token sees it: earlier tokens' second pass; their first pass's layers get the
    new keys and values too, so that all layers stay of one length."""

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        self._cache.update(keys, values, layer, *args, **kwargs)
        return super().update(keys, values, layer, *args, **kwargs)


def _cache_in(settings: tuple[tuple, dict]) -> Cache | None:
    """The cache among a layer's arguments."""
    args, kwargs = settings
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
