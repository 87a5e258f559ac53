"""Flow back: from the value neurons at the last position to the positions and layers that switched them on.

Two independent routes to one picture:

"parts"   Each value neuron's importance I (from `logit_flow`) is handed to the parts of its residual input in
          proportion to each part's inner product with the neuron's input weights, norms frozen, and from those parts
          on to theirs, down to the embedding. An attention neuron with coefficient v = w·x gives part k the
          share w·x_k / v. A gated FFN neuron m = act(g)·u has two input rows; half its importance goes by g_k / g
          and half by u_k / u. The normalisers v, g, u may come near zero; `hand_back` shows what happens there.

"linear"  Attention patterns, norm scales and gates act(g) are frozen. The model is then linear in its residual
          parts, and one backward pass from the answer's logit less the vocabulary's mean logit (before any soft
          cap) gives every neuron's flow. Nothing is divided by anything, and the total is conserved exactly. The
          gradient of the log-probability itself would not do: it vanishes where the model is sure.

Both are one sweep from the top layer down with a covector per position; they differ in what enters and in how a
gate shares. What is not handed to the embedding ends in biases, so that what enters equals what leaves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backattn.analysis.logit_flow import LogitFlow
from backattn.models.activations import Stream, capture
from backattn.models.lens import Lens
from backattn.models.tokens import Batch, encode
from backattn.runtime import progress

ROUTES = ("parts", "linear")

FLOOR = 1e-4  # neurons whose coefficient is below this share of the sub-layer's largest are withheld, and counted


@dataclass
class FlowBack:
    """Result of `flow_back`.

    frame: prompt, layer, kind (embedding, attention, ffn), position (source position for attention), token,
        flow (all that passes through this node), direct (the part that goes straight to the answer; the rest
        reaches it through later neurons). Flow passes through many nodes: sums over layers are no shares.
    conservation: prompt, entering, leaving (of which in_biases), withheld, error = |entering − leaving − withheld|,
        scale (Σ|what entered|, against which errors are measured).
    """

    frame: pd.DataFrame
    conservation: pd.DataFrame
    route: str
    tolerance: float

    def check(self) -> float:
        """Largest conservation error relative to what enters.

        Raises ValueError with it when it exceeds the tolerance of the model's dtype, or when more than 1 % of what
        entered was withheld because neurons' coefficients vanish.
        """
        table = self.conservation
        error, withheld = (
            (table["error"] / table["scale"]).max(),
            (table["withheld"].abs() / table["scale"]).max(),
        )
        if not error <= self.tolerance:
            raise ValueError(
                f"Flow is not conserved: {error:.2e} of what entered is unaccounted for."
            )
        if not withheld <= 0.01:
            raise ValueError(
                f"{withheld:.1%} of the flow was withheld: those neurons' coefficients are near zero."
            )
        return float(error)


def flow_back(
    model, tokenizer, flow: LogitFlow, route: str = "parts", batch_size: int = 16
) -> FlowBack:
    """Trace the answer's log-probability back to every layer and position.

    Args:
        model, tokenizer: those that made `flow`.
        flow: result of `logit_flow`; route "parts" starts from its neurons, so it must be of level "neuron".
        route: "parts" or "linear", see the module's text.
        batch_size: prompts per pass.

    Returns a `FlowBack`. Raises ValueError for an unknown route or a flow without neurons.
    """
    if route not in ROUTES:
        raise ValueError(f"route={route!r} is unknown; choose one of {', '.join(ROUTES)}.")
    if route == "parts" and flow.level != "neuron":
        raise ValueError('Route "parts" starts from neurons: call logit_flow with level="neuron".')
    frames, balances = [], []
    for start, batch, stream in _batches(model, tokenizer, flow, batch_size):
        sweep = _Sweep(stream)
        if route == "parts":
            sweep.enter_neurons(_values_of(flow, start, len(batch.input_ids)))
        else:
            sweep.enter_logit(
                torch.tensor(
                    flow.answer_ids[start : start + len(batch.input_ids)], device=model.device
                )
            )
        sweep.run()
        tokens = [tokenizer.decode([i]) for i in batch.input_ids.flatten().tolist()]
        frames.append(sweep.frame(np.array(tokens, dtype=object), start))
        balances.append(sweep.balance(start))
    frame = pd.concat(frames, ignore_index=True)
    frame[["kind", "token"]] = frame[["kind", "token"]].astype("category")
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return FlowBack(frame, pd.concat(balances, ignore_index=True), route, tolerance)


def _batches(
    model, tokenizer, flow: LogitFlow, batch_size: int
) -> Iterator[tuple[int, Batch, Stream]]:
    starts = range(0, len(flow.prompts), batch_size)
    for start in progress(starts, "flow back", unit="batch") if len(starts) > 1 else starts:
        batch = encode(tokenizer, flow.prompts[start : start + batch_size], device=model.device)
        stream = capture(model, batch)
        answers = torch.tensor(flow.answer_ids[start : start + batch_size], device=model.device)
        found = stream.logits.log_softmax(-1).gather(1, answers[:, None])[:, 0].cpu().numpy()
        if not np.allclose(found, flow.log_prob[start : start + batch_size], atol=flow.tolerance):
            raise ValueError(
                "This flow was made by another model or tokenizer: pass the ones given to logit_flow."
            )
        yield start, batch, stream


def _values_of(flow: LogitFlow, start: int, count: int) -> pd.DataFrame:
    frame = flow.frame
    rows = frame[frame["prompt"].between(start, start + count - 1) & frame["neuron"].notna()]
    return rows.assign(prompt=rows["prompt"] - start)


class _Sweep:
    """One pass from the top layer to the embedding. B prompts, T positions, D width, F neurons, H heads, d channels."""

    def __init__(self, stream: Stream):
        self.stream, self.batch = stream, stream.batch
        hidden = stream.hidden  # [L+1, B, T, D]
        self.device = hidden.device
        self.covector = torch.zeros_like(hidden[0])  # on the residual stream, per position
        self.top = torch.zeros_like(hidden[0])  # the part of it that reads the answer directly
        self.neurons_in: dict[tuple[str, int], Tensor] = {}  # importance per unit of coefficient
        per_prompt = hidden.new_zeros(hidden.shape[1], dtype=torch.float64)
        self.entering, self.withheld, self.scale, self.bias_mass = (
            per_prompt.clone() for _ in range(4)
        )
        per_node = hidden[1:, ..., 0]  # [L, B, T]
        self.flow = {kind: torch.zeros_like(per_node) for kind in ("attention", "ffn")}
        self.direct = {kind: torch.zeros_like(per_node) for kind in ("attention", "ffn")}
        self.linear = False

    # -- what enters

    def enter_logit(self, answer: Tensor) -> None:
        """Start from the answer's logit less the mean logit, at the last position, the final norm's scale frozen."""
        self.linear = True
        lens, last = Lens(self.stream.arch), self.batch.at_last(self.stream.hidden[-1])  # [B, D]
        gradient = lens.norm.adjoint(lens.weight[answer] - lens.weight.mean(0), lens.scale(last))
        index = torch.arange(len(last), device=self.device)
        self.covector[index, self.batch.last] = gradient
        self.top = self.covector.clone()
        self.entering = (gradient * last).sum(-1).double()
        self.scale = self.entering.abs()

    def enter_neurons(self, rows: pd.DataFrame) -> None:
        """Start from the importances of value neurons, given per unit of their coefficient."""
        for (kind, layer), part in rows.groupby(["kind", "layer"], observed=True):
            b, neuron = self._index(part["prompt"]), self._index(part["neuron"])
            importance = torch.tensor(part["increase"].to_numpy(), device=self.device)
            if kind == "ffn":
                holder = self.stream.neurons[layer]  # [B, T, F]
                index = (b, self.batch.last[b], neuron)
            else:
                holder = self.stream.expanded_values(layer)  # [B, T, H, d]
                index = (
                    b,
                    self._index(part["position"]) + self.batch.start[b],
                    self._index(part["head"]),
                    neuron,
                )
            coefficient = holder[index].double()
            largest = torch.zeros_like(self.entering).scatter_reduce(
                0, b, coefficient.abs(), "amax"
            )  # per prompt
            usable = coefficient.abs() > FLOOR * largest[b]
            self.entering.index_add_(0, b, importance)
            self.scale.index_add_(0, b, importance.abs())
            self.withheld.index_add_(0, b, importance * ~usable)
            entering = torch.zeros_like(holder)
            index = tuple(i[usable] for i in index)
            entering[index] = (importance[usable] / coefficient[usable]).float()
            self.neurons_in[kind, layer] = entering

    def _index(self, column: pd.Series) -> Tensor:
        return torch.tensor(column.to_numpy(np.int64), device=self.device)

    # -- the sweep

    def run(self) -> None:
        for layer in reversed(range(self.stream.layers)):
            attention_side = self.covector
            below = self._ffn(layer)
            if self.stream.arch.parallel:
                self.covector = self.covector + below + self._attention(layer, attention_side)
            else:
                self.covector = self.covector + below
                self.covector = self.covector + self._attention(layer, self.covector)

    def _lose(self, mass: Tensor) -> None:
        """Count what ends in a bias: [B, T] -> per prompt."""
        self.bias_mass += mass.sum(-1).double()

    def _ffn(self, layer: int) -> Tensor:
        """Hand the FFN's flow to its input state: [B, T, D]."""
        stream, block = self.stream, self.stream.arch.blocks[layer]
        down, (gate, up) = block.ffn_out, block.ffn_in
        post, post_scale = block.norm("ffn_post"), stream.post_scale("ffn", layer)
        raw = post.adjoint(self.covector, post_scale)  # covector on the FFN's raw output
        self._lose(raw @ down.bias)
        per_unit = raw @ down.weight  # [B, T, F] flow per unit of coefficient
        straight = post.adjoint(self.top, post_scale) @ down.weight
        if ("ffn", layer) in self.neurons_in:
            per_unit = per_unit + self.neurons_in["ffn", layer]
            straight = straight + self.neurons_in["ffn", layer]
        m, g, u = stream.neurons[layer], stream.gates[layer], stream.ups[layer]
        self.flow["ffn"][layer] = (per_unit * m).sum(-1)
        self.direct["ffn"][layer] = (straight * m).sum(-1)
        if gate is None:  # m = act(u): the gate is act(u) / u
            to_up = per_unit * _gate_ratio(m, u)
            on_input = to_up @ up.weight
        elif self.linear:  # act(g) is frozen
            to_up = per_unit * block.activation(g)
            on_input = to_up @ up.weight
        else:  # half by g, half by u
            half = per_unit * _gate_ratio(block.activation(g), g) / 2
            to_up, to_gate = half * g, half * u
            on_input = to_up @ up.weight + to_gate @ gate.weight
            self._lose(to_gate @ gate.bias)
        self._lose(to_up @ up.bias)
        norm, state = block.norm("ffn_norm"), stream.ffn_input(layer)
        self._lose(on_input @ norm.bias)
        return norm.adjoint(on_input, norm.scale(state))

    def _attention(self, layer: int, covector: Tensor) -> Tensor:
        """Hand attention's flow to the states at its source positions: [B, T, D]."""
        stream, block = self.stream, self.stream.arch.blocks[layer]
        out, value = block.attention_out, block.value
        post, post_scale = block.norm("attention_post"), stream.post_scale("attention", layer)
        values = stream.expanded_values(layer)  # [B, T, H, d]

        def at_sources(residual: Tensor) -> tuple[Tensor, Tensor]:
            raw = post.adjoint(residual, post_scale)
            heads = (raw @ out.weight).unflatten(
                -1, (block.heads, block.head_dim)
            )  # [B, T, H, d] at the queries
            return torch.einsum("bhqk,bqhd->bkhd", stream.weights[layer], heads), raw @ out.bias

        per_unit, lost = at_sources(covector)
        self._lose(lost)
        straight = at_sources(self.top)[0] if self.linear else torch.zeros_like(values)
        if ("attention", layer) in self.neurons_in:
            per_unit = per_unit + self.neurons_in["attention", layer]
            straight = straight + self.neurons_in["attention", layer]
        self.flow["attention"][layer] = (per_unit * values).sum((-1, -2))
        self.direct["attention"][layer] = (straight * values).sum((-1, -2))
        grouped = per_unit.unflatten(2, (block.kv_heads, -1)).sum(3).flatten(2)  # [B, T, G*d]
        self._lose(grouped @ value.bias)
        on_input = grouped @ value.weight
        norm, state = block.norm("attention_norm"), stream.attention_input(layer)
        self._lose(on_input @ norm.bias)
        return norm.adjoint(on_input, norm.scale(state))

    # -- what comes out

    def frame(self, tokens: np.ndarray, first_prompt: int) -> pd.DataFrame:
        real = self.batch.attention_mask.bool().cpu()
        prompt, place = (x.numpy() for x in real.nonzero(as_tuple=True))
        position = place - self.batch.start.cpu().numpy()[prompt]
        token = tokens.reshape(real.shape)[prompt, place]

        def part(layer: int, kind: str, flow: Tensor, direct: Tensor) -> pd.DataFrame:
            return pd.DataFrame(
                {
                    "prompt": prompt + first_prompt,
                    "layer": layer,
                    "kind": kind,
                    "position": position,
                    "token": token,
                    "flow": flow.cpu()[real].numpy(),
                    "direct": direct.cpu()[real].numpy(),
                }
            )

        parts = [part(0, "embedding", self._embedding(self.covector), self._embedding(self.top))]
        for layer in range(self.stream.layers):
            parts += [
                part(layer, kind, self.flow[kind][layer], self.direct[kind][layer])
                for kind in self.flow
            ]
        return pd.concat(parts, ignore_index=True)

    def _embedding(self, covector: Tensor) -> Tensor:
        return (covector * self.stream.hidden[0]).sum(-1)  # [B, T]

    def balance(self, first_prompt: int) -> pd.DataFrame:
        leaving = self._embedding(self.covector).double().sum(-1) + self.bias_mass
        error = (self.entering - leaving - self.withheld).abs()
        columns = {
            "entering": self.entering,
            "leaving": leaving,
            "in_biases": self.bias_mass,
            "withheld": self.withheld,
            "error": error,
            "scale": self.scale,
        }
        table = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
        table.insert(0, "prompt", np.arange(len(table)) + first_prompt)
        return table


def _gate_ratio(activated: Tensor, x: Tensor) -> Tensor:
    """act(x) / x, and its limit 1/2 (SiLU and GELU) at x = 0."""
    near = x.abs() < 1e-6
    return torch.where(
        near, torch.full_like(x, 0.5), activated / torch.where(near, torch.ones_like(x), x)
    )
