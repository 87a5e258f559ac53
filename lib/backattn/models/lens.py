"""The lens: final norm and unembedding, read in fp32.

A frozen scale, the final norm's in the full forward pass, makes the lens affine for every partial
state, so that contributions add (logit flow). A scale recomputed from the state itself gives the
logit lens. The two answer different questions and never share a plot.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backattn.models.activations import Stream, capture, prove
from backattn.models.decoder import Arch, Linear, Norm, describe
from backattn.models.hooks import analysis
from backattn.models.tokens import check_indices, encode
from backattn.runtime import progress


class Lens:
    """Reads states of one model as log-probabilities over its vocabulary.

    weight: [V, D] W_U; norm: the final norm; softcap: the cap on the logits or None; offset: [V]
    what the lens reads in an empty state, W_U β + bias.

    Example:
        >>> stream = capture(model, encode(tokenizer, ["France's capital is"]))
        >>> last = Lens(stream.arch).log_probs(stream.batch.at_last(stream.hidden[-1]))
        >>> torch.allclose(last, stream.logits.log_softmax(-1), atol=1e-5)
        True
    """

    def __init__(self, arch: Arch):
        read = Linear.of(arch.unembedding_module, "The unembedding", arch.width, 1)
        self.weight, self.offset, self.softcap = read.weight, read.bias, arch.softcap
        offset, device = arch.family.norm_offset, read.weight.device
        self.norm = Norm(arch.final_norm_module, arch.width, offset, device)
        if self.norm.bias.any():
            self.offset = self.weight @ self.norm.bias + self.offset

    def prove(self, stream: Stream, read: Tensor | None = None) -> None:
        """Raises UnsupportedModelError unless it reads the last states, or `read` gives them as
        logits [B, V], as the model read them."""
        said = stream.logits
        if read is None:
            read = self.cap(self.raw_logits(stream.batch.at_last(stream.hidden[-1])))
        spread = said - said.mean(-1, keepdim=True)
        prove(stream.arch, "final norm and unembedding", read - said, spread)

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


@analysis
def read_states(
    model,
    tokenizer,
    prompts: Sequence[str],
    positions: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    ranks: bool = False,
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits of some tokens in the state that enters every layer, by the logit lens.

    positions: per prompt P of them, counted from its first token; tokens: per prompt K token ids;
    ranks: also give each token's rank in the whole vocabulary (0 is the highest), which is slower.

    Returns (logits, ranks), each [n, P, L+1, K] or None; the last state leaves the model. Raises
    IndexError or TypeError for a position or token that is not there, UnsupportedModelError where
    the model does not read its last state so.

    Example:
        >>> read_states(model, tokenizer, ["France's capital is"], [[0, 4]], [[7, 8, 9]])[0].shape
        (1, 2, 5, 3)
    """
    lens, logits, places = Lens(describe(model)), [], []
    check_indices("Position", positions, encode(tokenizer, prompts).lengths.tolist())
    check_indices("Token id", tokens, [len(lens.weight)] * len(prompts))
    for start in progress(range(0, len(prompts), batch_size), "lens", unit="batch"):
        part = slice(start, start + batch_size)
        batch = encode(tokenizer, list(prompts[part]), device=model.device)
        where = torch.tensor(list(map(list, positions[part])), device=model.device)  # [B, P]
        where, row = where + batch.start[:, None], torch.arange(len(where), device=model.device)
        stream = capture(model, batch, detail=False)
        lens.prove(stream)
        states = stream.hidden[:, row[:, None], where]
        states = states.permute(1, 2, 0, 3).contiguous()  # [B, P, L+1, D]
        ids = torch.tensor(list(map(list, tokens[part])), device=model.device)  # [B, K]
        read = lens.norm.linear(states, lens.scale(states))
        raw = torch.einsum("bpld,bkd->bplk", read, lens.weight[ids])
        logits.append(lens.cap(raw + lens.offset[ids][:, None, None]).cpu())
        for some, chosen in zip(states, ids, strict=True) if ranks else ():  # one by one: wide
            whole = lens.raw_logits(some)  # [P, L+1, V]
            above = [(whole > whole[..., i, None]).sum(-1) for i in chosen]
            places.append(torch.stack(above, -1).cpu())
    return torch.cat(logits).numpy(), torch.stack(places).numpy() if ranks else None
