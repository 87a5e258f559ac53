"""Where back attention sits and how large it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BackAttentionConfig:
    """Where back attention sits and how large it is.

    source_layer: layer whose input gets the update; several layers each get a module of their own.
    dim: d′, the width of queries, keys and values over all heads; a module has 4 · width · dim weights.
    memory_layers: states that are read (t: the state entering layer t, L: the one before the final norm); None reads
        the lowest source layer's and all above it.
    norm: RMS norm without weights in front of the projections.
    softmax: "joint" over (layer, position) pairs, or "per-layer" over positions, then the mean over layers.

    Raises ValueError for a size or an option that makes no sense.
    """

    source_layer: int | tuple[int, ...]
    dim: int = 64
    heads: int = 1
    memory_layers: tuple[int, ...] | None = None
    norm: bool = True
    softmax: str = "joint"

    def __post_init__(self):
        layers = (
            [self.source_layer]
            if not isinstance(self.source_layer, tuple | list)
            else self.source_layer
        )
        for name, value in (("source_layer", layers), ("memory_layers", self.memory_layers or ())):
            if not all(isinstance(layer, int) for layer in value):
                raise ValueError(
                    f"{name} must be an integer or several, not {getattr(self, name)!r}."
                )
        if not (isinstance(self.dim, int) and isinstance(self.heads, int)):
            raise ValueError(
                f"dim and heads must be integers, not {self.dim!r} and {self.heads!r}."
            )
        if self.dim < 1 or self.heads < 1 or self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must be a positive multiple of heads {self.heads}.")
        if self.softmax not in ("joint", "per-layer"):
            raise ValueError(f'Unknown softmax {self.softmax!r}; choose "joint" or "per-layer".')

    @property
    def sources(self) -> tuple[int, ...]:
        """The source layers, lowest first."""
        layers = (self.source_layer,) if isinstance(self.source_layer, int) else self.source_layer
        return tuple(sorted(layers))

    def memory(self, layers: int) -> tuple[int, ...]:
        """The memory layers of a model with `layers` layers; raises ValueError for a layer that it does not have."""
        sources = self.sources
        if (
            not sources
            or len(set(sources)) < len(sources)
            or not 0 <= sources[0] <= sources[-1] < layers
        ):
            raise ValueError(
                f"source_layer {self.source_layer} must name layers of 0 … {layers - 1}, each once."
            )
        chosen = self.memory_layers
        chosen = tuple(range(sources[0], layers + 1)) if chosen is None else tuple(sorted(chosen))
        if (
            not chosen
            or len(set(chosen)) < len(chosen)
            or not 0 <= chosen[0] <= chosen[-1] <= layers
        ):
            raise ValueError(
                f"memory_layers {self.memory_layers} must name states of 0 … {layers}, each once."
            )
        return chosen
