"""Caches of the two passes."""

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


class UpperCache:
    """A cache as layers see it that run again: their keys and values are not the first pass's.

    Behind the first pass's layers lie, in the same cache, so that beams and copies take them along,
    one layer for each that runs again and one for the memory of each source layer. single: put new
    keys and values into the first pass's layers too, for a token without a first pass, so that all
    layers stay of one length.

    Raises ValueError for a cache of another kind than transformers' DynamicCache.
    """

    def __init__(self, cache: Cache, layers: int, sources: tuple[int, ...], again: range):
        self._cache, self._sources, self._offset, self.single = cache, sources, len(again), False
        while len(cache.layers) < layers and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        if len(cache.layers) > layers:
            return
        for layer in cache.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"Back attention cannot use a cache of {type(layer).__name__}; "
                    "leave the default, DynamicCache."
                )
        for layer in cache.layers[again.start : again.stop]:
            window = getattr(layer, "sliding_window", None)
            cache.layers.append(
                DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
            )
        cache.layers += [DynamicLayer() for _ in sources]

    def memory(self, source: int, past: int) -> DynamicLayer:
        """A source layer's memory of `past` earlier tokens; ValueError where it is not there."""
        layer = self._cache.layers[self._sources.index(source) - len(self._sources)]
        if layer.get_seq_length() != past:
            raise ValueError(
                "This cache was filled while the adapter was off, or by another model: "
                "start with a fresh one."
            )
        return layer

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs):
        if self.single:
            self._cache.update(keys, values, layer, *args, **kwargs)
        return self._cache.update(keys, values, layer + self._offset, *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._cache, name)
