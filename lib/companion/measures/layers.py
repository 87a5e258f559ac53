"""Values by layer: from tables to arrays and back."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from companion.report.intervals import mean_interval


def flow_grid(flow: pd.DataFrame, kind: str, group: str, column: str) -> np.ndarray:
    """One column of `stages.grouped_flow` at one kind of sub-layer and group: [prompts, layers]."""
    prompts, layers = np.sort(flow["prompt"].unique()), range(int(flow["layer"].max()) + 1)
    part = flow[(flow["kind"] == kind) & (flow["group"] == group)]
    wide = part.pivot_table(index="prompt", columns="layer", values=column, aggfunc="sum")
    return wide.reindex(index=prompts, columns=layers).fillna(0.0).to_numpy()


def by_layer(names: Sequence[str], column: str, **values: np.ndarray) -> pd.DataFrame:
    """Arrays [names, layers] as a table: `column` (the names), layer, and a column for each."""
    layers = range(next(iter(values.values())).shape[-1])
    index = pd.MultiIndex.from_product([names, layers], names=[column, "layer"])
    return pd.DataFrame({name: x.ravel() for name, x in values.items()}, index).reset_index()


def mean_by_layer(
    values: np.ndarray, clusters: Sequence, names: Sequence[str], column: str
) -> pd.DataFrame:
    """Means of [n, names, layers] with their intervals: `column`, layer, mean, low, high."""
    mean, low, high = mean_interval(values, clusters)
    return by_layer(names, column, mean=mean, low=low, high=high)
