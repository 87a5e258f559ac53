"""The lens: final norm and unembedding, read in fp32.

`frozen` uses the final norm's scale of the full forward pass for every partial state, so that the lens is
affine and contributions add (logit flow). `own` recomputes the scale from the state itself (logit lens).
The two answer different questions and never share a plot.
"""

import torch
from torch import Tensor

from .arch import Arch


class Lens:
    """Reads states of one model as log-probabilities over its vocabulary.

    weight: [V, D] W_U; norm: the final norm; softcap: the cap on the logits or None.
    """

    def __init__(self, arch: Arch):
        module = arch.unembedding_module
        self.weight = module.weight.detach().float()  # [V, D]
        bias = getattr(module, "bias", None)
        self.norm = arch.final_norm
        self.softcap = arch.softcap
        # What the lens reads in an empty state: W_U β + bias.  [V]
        self.offset = self.weight @ self.norm.bias if self.norm.bias.any() else self.weight.new_zeros(len(self.weight))
        if bias is not None:
            self.offset = self.offset + bias.detach().float()

    def scale(self, state: Tensor) -> Tensor:
        """Scale of the final norm at a state: [..., D] -> [..., 1]."""
        return self.norm.scale(state)

    def cap(self, raw: Tensor) -> Tensor:
        """Logits from uncapped logits."""
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def raw_logits(self, state: Tensor, scale: Tensor | None = None) -> Tensor:
        """Uncapped logits [..., V] of a state [..., D]; scale None recomputes it from the state."""
        scale = self.scale(state) if scale is None else scale
        return self.norm.linear(state, scale) @ self.weight.T + self.offset

    def log_probs(self, state: Tensor, scale: Tensor | None = None) -> Tensor:
        """log softmax over the vocabulary: [..., D] -> [..., V]."""
        return self.cap(self.raw_logits(state, scale)).log_softmax(-1)

    def directions(self, vectors: Tensor) -> Tensor:
        """What residual vectors [n, D] add to the uncapped logits at scale 1: [n, V]."""
        return self.norm.linear(vectors, vectors.new_ones(())) @ self.weight.T
