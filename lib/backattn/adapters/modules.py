"""The modules that adapters put at a source layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backattn.adapters.config import BackAttentionConfig


def normed(x: Tensor) -> Tensor:
    """x over its root mean square, in fp32: [..., D].

    Example:
        >>> normed(torch.tensor([3.0, -3.0])).round(decimals=3)
        tensor([ 1., -1.])
    """
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


class Update(nn.Module):
    """What is added to h [B, T, D] at a source layer, in parts: query, of h; remember, where memory
    is read: keys and values [B, K, S, d] of its states [M, B, S, D]; mix, of both and of visible
    [B, T, S], the positions that a query may read; write, a vector of the residual stream."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def query(self, h: Tensor) -> Tensor:
        return h

    def mix(self, query: Tensor, keys, values, visible) -> Tensor:
        return query

    def write(self, mixed: Tensor) -> Tensor:
        return mixed

    def forward(self, h: Tensor, *memory) -> Tensor:
        return self.write(self.mix(self.query(h), *memory))


class BackAttention(Update):
    """Attention of h over the memory: softmax(N(h) W_q · N(memory) W_k / √d) N(memory) W_v W_o,
    where W_o starts at zero.

    Example:
        >>> update = BackAttention(32, BackAttentionConfig(source_layer=1, dim=8))
        >>> h, memory = torch.randn(1, 5, 32), torch.randn(3, 1, 5, 32)  # three memory layers
        >>> query, (keys, values) = update.query(h), update.remember(memory)
        >>> visible = torch.ones(1, 5, 5, dtype=torch.bool).tril()
        >>> update(h, keys, values, visible).abs().max().item()
        0.0
        >>> update.weights(query, keys, visible).sum((-2, -1)).round(decimals=4).unique().tolist()
        [1.0]
    """

    def __init__(self, width: int, config: BackAttentionConfig):
        super().__init__()
        self.config = config
        projections = (nn.Linear(width, config.dim, bias=False) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj = projections
        self.o_proj = nn.Linear(config.dim, width, bias=False)
        nn.init.zeros_(self.o_proj.weight)

    def extra_repr(self) -> str:
        return str(self.config)

    def _projected(self, project: nn.Linear, x: Tensor) -> Tensor:
        """N(x) W by heads: [..., H, d]."""
        x = normed(x) if self.config.norm else x.float()
        return project(x.to(project.weight.dtype)).unflatten(-1, (self.config.heads, -1))

    def query(self, h: Tensor) -> Tensor:
        """N(h) W_q: [B, H, T, d]."""
        return self._projected(self.q_proj, h).transpose(1, 2)

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """N(memory) W_k and N(memory) W_v of memory states [M, B, S, D]: [B, H·M, S, d] each."""
        return tuple(
            self._projected(project, memory).permute(1, 3, 0, 2, 4).flatten(1, 2)
            for project in (self.k_proj, self.v_proj)
        )

    def mix(self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """softmax(query · keys / √d) values: [B, T, H·d]. visible may also be [B, T, M, S], of
        single cells; a query that sees none gets zero. Of numbers: what is below 0 is not seen, and
        weights are multiplied by the others."""
        by_layer, layers = (self.config.heads, -1), keys.shape[1] // self.config.heads
        if visible.dim() == 4:
            weights = self.weights(query, keys, visible)
            if visible.is_floating_point():
                weights = weights * visible.clamp(min=0)[:, None].to(weights.dtype)
            mixed = torch.einsum("bhtms,bhmsd->bhtd", weights, values.unflatten(1, by_layer))
        elif self.config.softmax == "joint":
            keys, values = (x.unflatten(1, by_layer).flatten(2, 3) for x in (keys, values))
            seen = visible[:, None].repeat(1, 1, 1, layers)  # [B, 1, T, M·S]
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
        else:
            query = query.repeat_interleave(layers, dim=1)  # [B, H·M, T, d]
            mixed = F.scaled_dot_product_attention(query, keys, values, visible[:, None])
            mixed = mixed.unflatten(1, by_layer).mean(2)
        return mixed.transpose(1, 2).flatten(-2)

    def write(self, mixed: Tensor) -> Tensor:
        return self.o_proj(mixed)

    def weights(self, query: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        """Attention weights of every query over (memory layer, position): [B, H, T, M, S]. They sum
        to one; where no cell (per-layer: none of a layer) is visible, to zero."""
        keys = keys.unflatten(1, (self.config.heads, -1))  # [B, H, M, S, d]
        scores = torch.einsum("bhtd,bhmsd->bhtms", query, keys) / math.sqrt(keys.shape[-1])
        visible = visible >= 0 if visible.is_floating_point() else visible
        seen = (visible if visible.dim() == 4 else visible[:, :, None])[:, None]  # [B, 1, T, M, S]
        scores = scores.masked_fill(~seen, -math.inf)
        if self.config.softmax == "joint":
            weights = scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])
            return weights.masked_fill(~seen.flatten(-2).any(-1)[..., None, None], 0.0)
        return scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0) / scores.shape[-2]


class ShuffledMemory(BackAttention):
    """Back attention that reads the memory of the row before it in the batch, in training and
    after: as many weights and operations, and nothing to be learnt of its own question. Rows that
    stand together may be alike in length and kind. A row alone reads zeros."""

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        alone = memory.shape[1] == 1
        return super().remember(torch.zeros_like(memory) if alone else memory.roll(1, dims=1))


class PreviousToken(BackAttention):
    """Back attention that reads the position before its own alone (T2MLR, 2026, without its gate):
    deep states one token late. Where nothing stands before, nothing is added.

    Example:
        >>> update = PreviousToken(32, BackAttentionConfig(source_layer=1, dim=8))
        >>> _ = nn.init.normal_(update.o_proj.weight)
        >>> h, memory = torch.randn(1, 5, 32), torch.randn(3, 1, 5, 32)
        >>> visible = torch.ones(1, 5, 5, dtype=torch.bool).tril()
        >>> added = update(h, *update.remember(memory), visible)
        >>> (added.abs().amax(-1) > 0).tolist()
        [[False, True, True, True, True]]
    """

    def mix(self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        length, whole = query.shape[2], visible.shape[-1]
        offset = whole - length - 1  # queries are of the last positions
        before = visible.new_ones(length, whole, dtype=torch.bool).tril(offset).triu(offset)
        cells = visible if visible.dim() == 4 else visible[:, :, None]
        if cells.is_floating_point():
            return super().mix(query, keys, values, cells.masked_fill(~before[:, None], -1.0))
        return super().mix(query, keys, values, cells & before[:, None])


class ResidualLoRA(Update):
    """h + N(h) A B, with A: [D, r], B: [r, D] and N an RMS norm without weights."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def query(self, h: Tensor) -> Tensor:
        return self.down(normed(h).to(self.down.weight.dtype))

    def write(self, mixed: Tensor) -> Tensor:
        return self.up(mixed)


class LoopLoRA(ResidualLoRA):
    """h + N(h_L) A B: a weight-tied loop of two turns over the upper layers, the second of which
    begins with h_s and a low-rank image of what the first ended with, position by position."""

    query = Update.query

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        return (ResidualLoRA.query(self, memory[0])[:, None],) * 2  # [B, 1, S, r]

    def mix(self, query: Tensor, keys, values: Tensor, visible) -> Tensor:
        return values[:, 0, -query.shape[1] :]


class Return(Update):
    """h + g N(h_L), with g one number: the final state itself comes back, position by position."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        return (normed(memory[0])[:, None],) * 2  # [B, 1, S, D]

    mix = LoopLoRA.mix

    def write(self, mixed: Tensor) -> Tensor:
        return self.gain * mixed


class Bias(Update):
    """h + b."""

    def __init__(self, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def write(self, mixed: Tensor) -> Tensor:
        return self.bias.expand_as(mixed)
