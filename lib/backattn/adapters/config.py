"""Where back attention sits and how large it is."""

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class BackAttentionConfig:
    """Where back attention sits and how large it is.

    Attributes:
        source_layer: layer whose input gets the update; several layers each get a module of their
            own.
        dim: d′, the width of queries, keys and values over all heads; of 4 · width · dim weights.
        memory_layers: states that are read (t: the state entering layer t, L: the one before the
            final norm); None reads the lowest source layer's and all above it.
        norm: RMS norm without weights in front of the projections.
        softmax: "joint" over (layer, position), or "per-layer" over positions, their mean over
            layers.

    Raises ValueError for a size or an option that makes no sense.

    Example:
        >>> BackAttentionConfig(source_layer=(2, 1), dim=8).memory(layers=4)
        (1, 2, 3, 4)
        >>> BackAttentionConfig(source_layer=1, dim=8, memory_layers=(4, 3)).memory(layers=4)
        (3, 4)
    """

    source_layer: int | tuple[int, ...]
    dim: int = 64
    heads: int = 1
    memory_layers: tuple[int, ...] | None = None
    norm: bool = True
    softmax: str = "joint"

    def __post_init__(self):
        for name in ("source_layer", "memory_layers"):
            layers = getattr(self, name) or ()
            if not all(isinstance(t, int) for t in (layers if _several(layers) else [layers])):
                raise ValueError(f"{name} must be an integer or several, not {layers!r}.")
        sizes = self.dim, self.heads
        if not all(isinstance(n, int) and n > 0 for n in sizes) or self.dim % self.heads:
            needed = "dim and heads must be integers, and dim a positive multiple of heads"
            raise ValueError(f"{needed}, not {self.dim!r} and {self.heads!r}.")
        if self.softmax not in ("joint", "per-layer"):
            raise ValueError(f'Unknown softmax {self.softmax!r}; choose "joint" or "per-layer".')

    @property
    def sources(self) -> tuple[int, ...]:
        """The source layers, lowest first."""
        layers = self.source_layer
        return tuple(sorted(layers)) if _several(layers) else (layers,)

    def memory(self, layers: int) -> tuple[int, ...]:
        """The memory layers of a model with `layers` layers, lowest first. Raises ValueError for
        source or memory layers that it does not have."""
        sources, chosen = self.sources, self.memory_layers
        if not _each_once(sources, layers - 1):
            needed = f"must name layers of 0 … {layers - 1}, each once"
            raise ValueError(f"source_layer {self.source_layer} {needed}.")
        chosen = tuple(range(sources[0], layers + 1)) if chosen is None else tuple(sorted(chosen))
        if not _each_once(chosen, layers):
            needed = f"must name states of 0 … {layers}, each once"
            raise ValueError(f"memory_layers {self.memory_layers} {needed}.")
        return chosen

    @classmethod
    def from_dict(cls, options: dict) -> "BackAttentionConfig":
        """The config of such options, also after JSON made lists of tuples; others are ignored."""
        known = {f.name: options[f.name] for f in fields(cls) if f.name in options}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


def _several(layers: int | Sequence[int]) -> bool:
    return isinstance(layers, tuple | list)


def _each_once(layers: Sequence[int], last: int) -> bool:
    """Whether sorted layers are some of 0 … last, without repetition."""
    return bool(layers) and len(set(layers)) == len(layers) and 0 <= layers[0] <= layers[-1] <= last
