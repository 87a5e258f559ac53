"""What logit flow reads in a batch, and the rows it makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from backattn.models.activations import Stream
from backattn.models.lens import Lens

KINDS = ("embedding", "attention", "attention_bias", "ffn", "ffn_bias", "rounding")

COLUMNS = {
    "prompt": np.int32,
    "layer": np.int16,
    "kind": np.int8,  # index into KINDS
    "head": np.int16,  # -1: does not apply
    "neuron": np.int32,
    "position": np.int32,
    "before": np.float64,
    "increase": np.float64,
}


@dataclass(frozen=True)
class Reading:
    """One batch of B prompts and how its states are read."""

    stream: Stream
    lens: Lens
    answer: Tensor  # [B] token ids
    frozen: (
        Tensor | None
    )  # [B, 1] the final norm's scale at the end, None: recomputed at each state
    first: int = 0  # index of the batch's first prompt among all

    def scale(self, b: int) -> Tensor | None:
        """The frozen scale of one prompt: [1]."""
        return None if self.frozen is None else self.frozen[b]


def rows(increase: Tensor, kind: str, head=-1, neuron=-1, **columns) -> dict[str, np.ndarray]:
    """Some components of one kind: all of COLUMNS, each broadcast against `increase` and flat."""
    columns |= {"increase": increase, "kind": KINDS.index(kind), "head": head, "neuron": neuron}

    def flat(x, dtype: type) -> np.ndarray:
        x = np.asarray(x.cpu() if isinstance(x, Tensor) else x, dtype=dtype)
        return np.broadcast_to(x, tuple(increase.shape)).reshape(-1)

    return {name: flat(columns[name], dtype) for name, dtype in COLUMNS.items()}


def frame(parts: Sequence[dict[str, np.ndarray]], tokens: Sequence[Sequence[str]]) -> pd.DataFrame:
    """All rows in the order of the residual sum. tokens: per prompt the text of each position."""

    def column(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    keys = ("position", "neuron", "head", "kind", "layer", "prompt")
    order = np.lexsort([column(name) for name in keys])
    joined = {name: column(name)[order] for name in COLUMNS}  # one at a time: they are long
    first = np.cumsum([0, *map(len, tokens[:-1])])  # each prompt's first token among all
    token = pd.Categorical([text for row in tokens for text in row])
    return pd.DataFrame(
        {
            "prompt": joined["prompt"],
            "layer": joined["layer"],
            "kind": pd.Categorical.from_codes(joined["kind"], KINDS),
            "head": pd.arrays.IntegerArray(joined["head"], joined["head"] < 0),
            "neuron": pd.arrays.IntegerArray(joined["neuron"], joined["neuron"] < 0),
            "position": joined["position"],
            "token": token[first[joined["prompt"]] + joined["position"]],
            "log_prob_before": joined["before"],
            "log_prob_after": joined["before"] + joined["increase"],
            "increase": joined["increase"],
        }
    )
