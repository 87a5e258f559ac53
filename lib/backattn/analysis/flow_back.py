"""Flow back: from the value neurons at the last position to what switched them on.

Two independent routes to one picture, by position and layer:

"parts"   (1) Each value neuron's importance I (from `logit_flow`) enters per unit of its
          coefficient. (2) It is handed to the parts of the neuron's residual input in proportion to
          each part's inner product with the neuron's input weights w, norms frozen: an attention
          neuron with coefficient v = w·x gives part k the share w·x_k / v. A gated FFN neuron
          m = act(g)·u has two input rows; half its importance goes by g_k / g and half by u_k / u.
          (3) From those parts it goes on to theirs, down to the embedding. The normalisers v, g, u
          may come near zero.

"linear"  Attention patterns, norm scales and gates act(g) are frozen. The model is then linear in
          its residual parts, and one backward pass from the answer's logit less the vocabulary's
          mean logit (before any soft cap) gives every neuron's flow, as RelP and AttnLRP do.
          Nothing is divided by anything, and the total is conserved exactly. The gradient of the
          log-probability itself would not do: it vanishes where the model is sure.

Both are one sweep from the top layer down with a covector per position; they differ in what enters
and in how a gate shares. What is not handed to the embedding ends in biases, so that what enters
equals what leaves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backattn.analysis.logit_flow import LogitFlow
from backattn.models.activations import Stream, capture
from backattn.models.decoder import Norm
from backattn.models.lens import Lens
from backattn.models.tokens import encode
from backattn.runtime import progress

ROUTES = ("parts", "linear")

FLOOR = 1e-4  # neurons with a coefficient below this share of the sub-layer's largest are withheld


@dataclass
class FlowBack:
    """Result of `flow_back`.

    frame: prompt, layer, kind (embedding, attention, ffn), position (source position for
        attention), token, flow (all that passes through this node), direct (the part that goes
        straight to the answer; the rest reaches it through later neurons). Flow passes through
        many nodes: sums over layers are no shares.
    conservation: prompt, entering, leaving (of which in_biases), withheld,
        error = |entering − leaving − withheld|, scale (Σ|what entered|, which errors refer to).
    """

    frame: pd.DataFrame
    conservation: pd.DataFrame
    route: str
    tolerance: float

    def check(self) -> float:
        """Largest conservation error relative to what enters.

        Raises ValueError where it exceeds the tolerance of the model's dtype, or where more than
        1 % of what entered was withheld because neurons' coefficients vanish.
        """
        table = self.conservation
        error = (table["error"] / table["scale"]).max()
        withheld = (table["withheld"].abs() / table["scale"]).max()
        if not error <= self.tolerance:
            raise ValueError(f"Flow is not conserved: {error:.2e} of what entered is missing.")
        if not withheld <= 0.01:
            raise ValueError(
                f"{withheld:.1%} of the flow was withheld: those neurons' coefficients are near 0."
            )
        return float(error)


def flow_back(
    model, tokenizer, flow: LogitFlow, route: str = "parts", batch_size: int = 16
) -> FlowBack:
    """Trace the answer's log-probability back to every layer and position.

    Args:
        model, tokenizer: those that made `flow`.
        flow: result of `logit_flow`; route "parts" starts from its neurons, so its level must be
            "neuron". The forward passes that it kept are used; without them its prompts run again.
        route: "parts" or "linear", see the module's text.
        batch_size: prompts per pass, where they run again.

    Returns a `FlowBack`. Raises ValueError for an unknown route, a flow without neurons, and
    another model or tokenizer than made the flow.

    Example:
        >>> from backattn import flow_back, load_model, logit_flow
        >>> model, tokenizer = load_model("tiny-llama")
        >>> flow = logit_flow(model, tokenizer, "France's capital is", "Paris")
        >>> back = flow_back(model, tokenizer, flow)
        >>> back.check() < 1e-3
        True
        >>> list(back.frame["kind"].cat.categories)
        ['attention', 'embedding', 'ffn']
    """
    if route not in ROUTES:
        raise ValueError(f"route={route!r} is unknown; choose one of {', '.join(ROUTES)}.")
    if route == "parts" and flow.level != "neuron":
        raise ValueError('Route "parts" starts from neurons: call logit_flow with level="neuron".')
    frames, balances = [], []
    for start, stream in _streams(model, tokenizer, flow, batch_size):
        sweep = _Sweep(stream, linear=route == "linear")
        prompts = slice(start, start + len(stream.batch.input_ids))
        if route == "linear":
            sweep.enter_logit(torch.tensor(flow.answer_ids[prompts], device=model.device))
        else:
            inside = flow.frame["prompt"].between(prompts.start, prompts.stop - 1)
            neurons = flow.frame[inside & flow.frame["neuron"].notna()]
            sweep.enter_neurons(neurons.assign(prompt=neurons["prompt"] - start))
        sweep.run()
        tokens = [tokenizer.decode([i]) for i in stream.batch.input_ids.flatten().tolist()]
        frames.append(sweep.frame(np.array(tokens, dtype=object), start))
        balances.append(sweep.balance(start))
    frame = pd.concat(frames, ignore_index=True)
    frame[["kind", "token"]] = frame[["kind", "token"]].astype("category")
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return FlowBack(frame, pd.concat(balances, ignore_index=True), route, tolerance)


def _streams(model, tokenizer, flow: LogitFlow, batch_size: int) -> Iterator[tuple[int, Stream]]:
    """Per batch the index of its first prompt and its stream, kept or made again."""
    kept = flow.streams.made_by(model)
    size = len(kept[0].batch.input_ids) if kept else batch_size
    starts = range(0, len(flow.prompts), size)
    for start in progress(starts, "flow back", unit="batch") if len(starts) > 1 else starts:
        part = slice(start, start + size)
        batch = encode(tokenizer, flow.prompts[part], device=model.device)
        if kept:
            stream = kept[start // size]
            same = torch.equal(batch.input_ids, stream.batch.input_ids)
        else:
            stream = capture(model, batch)
            answers = torch.tensor(flow.answer_ids[part], device=model.device)
            found = stream.logits.log_softmax(-1).gather(1, answers[:, None])[:, 0].cpu().numpy()
            same = np.allclose(found, flow.log_prob[part], atol=flow.tolerance)
        if not same:
            raise ValueError(
                "This flow was made by another model or tokenizer: pass those given to logit_flow."
            )
        yield start, stream


class _Sweep:
    """One pass from the top layer to the embedding.

    B prompts, T positions, D width, F neurons, H heads, d channels. A covector says how much flow
    each unit of a state, or of a neuron's coefficient, brings: flow = covector · state.
    """

    def __init__(self, stream: Stream, linear: bool):
        self.stream, self.batch, self.linear = stream, stream.batch, linear
        self.covector = torch.zeros_like(stream.hidden[0])  # [B, T, D] on the residual stream
        self.top = self.covector  # the part of it that reads the answer directly
        self.neurons_in: dict[tuple[str, int], Tensor] = {}  # importance per unit of coefficient
        self.nodes: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # flow and direct, [B, T]
        zero = self.covector.new_zeros(4, len(self.covector), dtype=torch.float64)
        self.entering, self.withheld, self.scale, self.in_biases = zero  # [B] each

    # -- what enters

    def enter_logit(self, answer: Tensor) -> None:
        """Start from the answer's logit less the mean logit, the final norm's scale frozen."""
        lens, last = Lens(self.stream.arch), self.batch.at_last(self.stream.hidden[-1])  # [B, D]
        gradient = lens.norm.adjoint(lens.weight[answer] - lens.weight.mean(0), lens.scale(last))
        self.covector[torch.arange(len(last), device=last.device), self.batch.last] = gradient
        self.top = self.covector.clone()
        self.entering = (gradient * last).sum(-1).double()
        self.scale = self.entering.abs()

    def enter_neurons(self, rows: pd.DataFrame) -> None:
        """Start from the importances of value neurons, given per unit of their coefficient."""
        device = self.covector.device

        def index(column: pd.Series) -> Tensor:
            return torch.tensor(column.to_numpy(np.int64), device=device)

        for (kind, layer), part in rows.groupby(["kind", "layer"], observed=True):
            b, neuron = index(part["prompt"]), index(part["neuron"])
            importance = torch.tensor(part["increase"].to_numpy(), device=device)
            if kind == "ffn":
                holder = self.stream.neurons[layer]  # [B, T, F]
                where = (b, self.batch.last[b], neuron)
            else:
                holder = self.stream.expanded_values(layer)  # [B, T, H, d]
                position = index(part["position"]) + self.batch.start[b]
                where = (b, position, index(part["head"]), neuron)
            coefficient = holder[where].double()
            largest = torch.zeros_like(self.entering)  # per prompt
            largest = largest.scatter_reduce(0, b, coefficient.abs(), "amax")
            usable = coefficient.abs() > FLOOR * largest[b]
            self.entering.index_add_(0, b, importance)
            self.scale.index_add_(0, b, importance.abs())
            self.withheld.index_add_(0, b, importance * ~usable)
            entering = torch.zeros_like(holder)
            per_unit = (importance[usable] / coefficient[usable]).float()
            entering[tuple(i[usable] for i in where)] = per_unit
            self.neurons_in[kind, layer] = entering

    # -- the sweep

    def run(self) -> None:
        for layer in reversed(range(self.stream.layers)):
            above = self.covector
            below_ffn = above + self._ffn(layer, above)
            read = above if self.stream.arch.parallel else below_ffn
            self.covector = below_ffn + self._attention(layer, read)
        embedding = self.stream.hidden[0]
        flows = ((covector * embedding).sum(-1) for covector in (self.covector, self.top))
        self.nodes["embedding", 0] = tuple(flows)

    def _to_neurons(self, kind: str, layer: int, units: Tensor, above: Tensor, hand_down) -> Tensor:
        """Covector on a sub-layer's coefficients `units`, whose flow is noted: [B, T, ...].

        hand_down: from a covector on the residual stream, such as `above`, to (that on the
        coefficients, what ends in the output's bias [B, T]).
        """
        entering = self.neurons_in.get((kind, layer), torch.zeros_like(units))
        direct = hand_down(self.top)[0] if self.linear else entering
        covector, lost = hand_down(above)
        self._lose(lost)
        covector = covector + entering
        axes = tuple(range(2, units.dim()))
        self.nodes[kind, layer] = (covector * units).sum(axes), (direct * units).sum(axes)
        return covector

    def _ffn(self, layer: int, covector: Tensor) -> Tensor:
        """Hand the FFN's flow to its input state: [B, T, D]."""
        stream, block = self.stream, self.stream.arch.blocks[layer]
        down, (gate, up) = block.ffn_out, block.ffn_in
        post, post_scale = block.norm("ffn_post"), stream.post_scale("ffn", layer)

        def hand_down(residual: Tensor) -> tuple[Tensor, Tensor]:
            raw = post.adjoint(residual, post_scale)  # on the FFN's raw output
            return raw @ down.weight, raw @ down.bias  # [B, T, F]

        m, g, u = stream.neurons[layer], stream.gates[layer], stream.ups[layer]
        per_unit = self._to_neurons("ffn", layer, m, covector, hand_down)
        if gate is None:  # m = act(u): the gate is act(u) / u
            to_up = per_unit * _ratio(m, u)
            on_input = to_up @ up.weight
        elif self.linear:  # act(g) is frozen
            to_up = per_unit * block.activation(g)
            on_input = to_up @ up.weight
        else:  # half by g, half by u
            half = per_unit * _ratio(block.activation(g), g) / 2
            to_up, to_gate = half * g, half * u
            on_input = to_up @ up.weight + to_gate @ gate.weight
            self._lose(to_gate @ gate.bias)
        self._lose(to_up @ up.bias)
        return self._through_norm(block.norm("ffn_norm"), stream.ffn_input(layer), on_input)

    def _attention(self, layer: int, covector: Tensor) -> Tensor:
        """Hand attention's flow to the states at its source positions: [B, T, D]."""
        stream, block = self.stream, self.stream.arch.blocks[layer]
        out, value = block.attention_out, block.value
        post, post_scale = block.norm("attention_post"), stream.post_scale("attention", layer)

        def hand_down(residual: Tensor) -> tuple[Tensor, Tensor]:
            raw = post.adjoint(residual, post_scale)
            heads = (raw @ out.weight).unflatten(-1, (block.heads, block.head_dim))  # at queries
            at_sources = torch.einsum("bhqk,bqhd->bkhd", stream.weights[layer], heads)
            return at_sources, raw @ out.bias

        values = stream.expanded_values(layer)  # [B, T, H, d]
        per_unit = self._to_neurons("attention", layer, values, covector, hand_down)
        grouped = per_unit.unflatten(2, (block.kv_heads, -1)).sum(3).flatten(2)  # [B, T, G·d]
        self._lose(grouped @ value.bias)
        norm, state = block.norm("attention_norm"), stream.attention_input(layer)
        return self._through_norm(norm, state, grouped @ value.weight)

    def _through_norm(self, norm: Norm, state: Tensor, covector: Tensor) -> Tensor:
        self._lose(covector @ norm.bias)
        return norm.adjoint(covector, norm.scale(state))

    def _lose(self, mass: Tensor) -> None:
        """Count what ends in a bias: [B, T] -> per prompt."""
        self.in_biases += mass.sum(-1).double()

    # -- what comes out

    def frame(self, tokens: np.ndarray, first_prompt: int) -> pd.DataFrame:
        """Rows of `FlowBack.frame`. tokens: text of each token of the batch, [B·T]."""
        real = self.batch.attention_mask.bool().cpu()
        prompt, place = (x.numpy() for x in real.nonzero(as_tuple=True))
        layers = range(self.stream.layers)
        names = [("embedding", 0), *((kind, k) for k in layers for kind in ("attention", "ffn"))]
        nodes = torch.stack([torch.stack(self.nodes[name]) for name in names]).cpu()
        flow, direct = nodes.transpose(0, 1)[..., real].flatten(1).numpy()  # [nodes · positions]
        position = place - self.batch.start.cpu().numpy()[prompt]
        return pd.DataFrame(
            {
                "prompt": np.tile(prompt + first_prompt, len(names)),
                "layer": np.repeat([layer for _, layer in names], len(prompt)),
                "kind": np.repeat([kind for kind, _ in names], len(prompt)),
                "position": np.tile(position, len(names)),
                "token": np.tile(tokens.reshape(real.shape)[prompt, place], len(names)),
                "flow": flow,
                "direct": direct,
            }
        )

    def balance(self, first_prompt: int) -> pd.DataFrame:
        """Rows of `FlowBack.conservation`."""
        entering, withheld = self.entering, self.withheld
        leaving = self.nodes["embedding", 0][0].double().sum(-1) + self.in_biases
        error = (entering - leaving - withheld).abs()
        columns = [entering, leaving, self.in_biases, withheld, error, self.scale]
        names = ["entering", "leaving", "in_biases", "withheld", "error", "scale"]
        table = pd.DataFrame(torch.stack(columns, dim=1).cpu().numpy(), columns=names)
        table.insert(0, "prompt", np.arange(len(table)) + first_prompt)
        return table


def _ratio(activated: Tensor, x: Tensor) -> Tensor:
    """act(x) / x, and its limit 1/2 (SiLU and GELU) at x = 0."""
    near = x.abs() < 1e-6
    return torch.where(near, 0.5, activated / torch.where(near, 1.0, x))
