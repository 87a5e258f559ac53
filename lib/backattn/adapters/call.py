"""What one call of a two-pass model is asked for, and what it leaves for its second half."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backattn.adapters.cache import UpperCache


@dataclass(frozen=True)
class Request:
    """What is asked of the next calls of the decoder beside their output."""

    first_pass: Tensor | None = None  # states that stand for the first pass, see `forward`
    states: dict[int, Tensor] | None = None  # to be filled by a first pass, and nothing else
    cells: Tensor | None = None  # these two: see `BackAttentionModel.edited`
    memory: Tensor | None = None
    maps: dict[int, Tensor] | None = None  # see `BackAttentionModel.attention_maps`

    def check(self, h: Tensor, past: int, cached: bool) -> None:
        """Raises ValueError where what is edited does not fit h [B, T, D]."""
        batch, time, _ = h.shape
        if self.memory is not None and self.memory.shape[1:] != h.shape:
            raise ValueError(
                f"memory is {list(self.memory.shape[1:])} per layer; this pass has {list(h.shape)}."
            )
        if self.memory is not None and cached:
            raise ValueError(
                "No other memory can be read where there is a cache: pass use_cache=False."
            )
        if self.cells is None:
            return
        texts, queries, _, positions = self.cells.shape
        if texts not in (1, batch) or queries not in (1, time) or positions != past + time:
            raise ValueError(
                f"cells are for {texts} texts, {queries} queries and {positions} positions; this "
                f"pass has {batch} texts, {time} queries and {past + time} positions."
            )


@dataclass
class Pass:
    """One call of the decoder: what its first pass leaves for what follows; then it is gone."""

    request: Request
    first: int  # layers that run in the first pass; those above hand on what they get
    then: Callable[["Pass"], Tensor] | None = None  # what follows, before the final norm
    past: int = 0  # tokens in the cache before this call
    mask: Tensor | None = None  # [B, past + T]
    again: bool = False  # what follows has begun
    cache: UpperCache | None = None
    states: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, T, D]
    arguments: dict[int, tuple[tuple, dict]] = field(default_factory=dict)  # layer -> its others

    def visible(self, h: Tensor) -> Tensor:
        """Which positions each query may read, itself always, so that padding gives no NaN.

        Returns [B, T, past + T]. Raises ValueError where the mask is of another length.
        """
        total = self.past + h.shape[1]
        rows = torch.arange(self.past, total, device=h.device)[:, None]
        columns = torch.arange(total, device=h.device)
        visible = (columns <= rows).expand(len(h), -1, -1)
        if self.mask is None:
            return visible
        if self.mask.shape[1] != total:
            raise ValueError(
                f"The attention mask covers {self.mask.shape[1]} tokens; there are {total}."
            )
        return (visible & self.mask.bool().to(h.device)[:, None]) | (columns == rows)
