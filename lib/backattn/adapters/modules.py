"""The modules that adapters put at a source layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backattn.adapters.config import BackAttentionConfig


def normed(x: Tensor) -> Tensor:
    """x over its root mean square, in fp32: [..., D]."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


class BackAttention(nn.Module):
    """The module of one source layer. W_o starts at zero, so that an untrained module changes nothing, to the bit."""

    def __init__(self, width: int, config: BackAttentionConfig):
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(width, config.dim, bias=False)
        self.k_proj = nn.Linear(width, config.dim, bias=False)
        self.v_proj = nn.Linear(width, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, width, bias=False)
        nn.init.zeros_(self.o_proj.weight)

    def _read(self, x: Tensor) -> Tensor:
        return normed(x) if self.config.norm else x.float()

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.heads, -1))

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of memory states [M, B, S, D]: [B, H·M, S, d] each, the layout of a cache."""
        memory = self._read(memory)

        def project(linear: nn.Linear) -> Tensor:
            return (
                self._heads(linear(memory)).permute(1, 3, 0, 2, 4).flatten(1, 2)
            )  # [B, H·M, S, d]

        return project(self.k_proj), project(self.v_proj)

    def _query(self, h: Tensor) -> Tensor:
        return self._heads(self.q_proj(self._read(h))).transpose(1, 2)  # [B, H, T, d]

    def forward(self, h: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """The update of h [B, T, D] from keys and values of `remember` and visible [B, T, S]: [B, T, D], fp32.

        visible may also be [B, T, M, S], of single cells; a query that sees none gets zero.
        """
        query, heads = self._query(h), self.config.heads
        layers, seen = keys.shape[1] // heads, visible[:, None]  # [B, 1, T, S]
        if visible.dim() == 4:
            weights, values = self.weights(h, keys, visible), values.unflatten(1, (heads, layers))
            mixed = torch.einsum("bhtms,bhmsd->bhtd", weights, values)
            return self.o_proj(mixed.transpose(1, 2).flatten(-2))
        if self.config.softmax == "joint":
            keys, values = (
                x.unflatten(1, (heads, layers)).flatten(2, 3) for x in (keys, values)
            )  # [B, H, M·S, d]
            mixed = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=seen.repeat(1, 1, 1, layers)
            )
        else:
            query = query.repeat_interleave(layers, dim=1)  # [B, H·M, T, d]
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
            mixed = mixed.unflatten(1, (heads, layers)).mean(2)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def weights(self, h: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        """Attention weights of every query over (memory layer, position): [B, H, T, M, S].

        They sum to one; to zero where no cell is visible (per-layer: a layer of which no cell is visible counts zero).
        """
        heads = self.config.heads
        keys = keys.unflatten(1, (heads, keys.shape[1] // heads))  # [B, H, M, S, d]
        scores = torch.einsum("bhtd,bhmsd->bhtms", self._query(h), keys) / math.sqrt(keys.shape[-1])
        seen = (
            visible[:, None] if visible.dim() == 4 else visible[:, None, :, None]
        )  # [B, 1, T, M or 1, S]
        scores = scores.masked_fill(~seen, -math.inf)
        if self.config.softmax == "joint":
            weights = scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])
            return weights.masked_fill(~seen.flatten(-2).any(-1)[..., None, None], 0.0)
        return scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0) / scores.shape[-2]


class ResidualLoRA(nn.Module):
    """h + N(h) A B, with A: [D, r], B: [r, D] and N an RMS norm without weights."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(
        self, h: Tensor, keys: Tensor | None, values: Tensor | None, visible: Tensor | None
    ) -> Tensor:
        return self.up(self.down(normed(h)))


class LoopLoRA(ResidualLoRA):
    """h + N(h_L) A B: the upper layers run as a weight-tied loop of two turns, whose second begins with h_s and a
    low-rank image of what the first ended with, position by position."""

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """What comes back of the final states [1, B, S, D]: [B, 1, S, r], as keys and as values."""
        low = self.down(normed(memory[0]))[:, None]
        return low, low

    def forward(self, h: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
        return self.up(values[:, 0, -h.shape[1] :])


class Return(nn.Module):
    """h + g N(h_L), with g one number: the final state itself comes back, position by position."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """What comes back of the final states [1, B, S, D]: [B, 1, S, D], as keys and as values."""
        whole = normed(memory[0])[:, None]
        return whole, whole

    def forward(self, h: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
        return self.gain * values[:, 0, -h.shape[1] :]


class Bias(nn.Module):
    """h + b."""

    def __init__(self, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(
        self, h: Tensor, keys: Tensor | None, values: Tensor | None, visible: Tensor | None
    ) -> Tensor:
        return self.bias + torch.zeros_like(h, dtype=self.bias.dtype)
