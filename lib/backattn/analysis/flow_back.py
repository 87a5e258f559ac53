"""Flow back: from the value neurons at the last position to what switched them on.

Two independent routes to one picture, by position and layer:

"parts"   (1) Each value neuron's importance (from `logit_flow`) enters per unit of its coefficient.
          (2) It is handed to the parts of the neuron's residual input in proportion to each part's
          inner product with the neuron's input weights w, norms frozen: an attention neuron with
          coefficient v = w·x gives part k the share w·x_k / v. A gated FFN neuron m = act(g)·u has
          two input rows; half goes by g_k / g and half by u_k / u. (3) From those parts it goes on
          to theirs, down to the embedding. The normalisers v, g, u may come near zero.

"linear"  Attention patterns, norm scales and gates act(g) are frozen. The model is then linear in
          its residual parts, and one backward pass from the answer's logit less the vocabulary's
          mean logit (before any soft cap) gives every neuron's flow; `attributions` has RelP's.
          Nothing is divided by anything, and the total is conserved exactly. The gradient of the
          log-probability itself would not do: it vanishes where the model is sure.

Both are one sweep from the top layer down with a covector per position, which says how much flow
each unit of a state, or of a neuron's coefficient, brings: flow = covector · state. What is not
handed to the embedding ends in biases, so that what enters equals what leaves.

Shapes: B prompts, T positions, D width, F neurons, H heads, d channels.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backattn.analysis.logit_flow import LogitFlow
from backattn.models.activations import Stream, capture
from backattn.models.decoder import Norm
from backattn.models.hooks import analysis
from backattn.models.lens import Lens
from backattn.models.tokens import Batch, encode
from backattn.runtime import progress

ROUTES = ("parts", "linear")

FLOOR = 1e-4  # neurons with a coefficient below this share of the sub-layer's largest are withheld


@dataclass
class FlowBack:
    """Result of `flow_back`.

    Attributes:
        frame: prompt, layer, kind (embedding, attention, ffn), with heads=True head (NA outside of
            attention), position (attention's source), token, flow (all that passes through this
            node), direct (what goes straight to the answer; the rest reaches it through later
            neurons). Flow passes many nodes: sums over layers are no shares.
        conservation: prompt, entering, leaving (of which in_biases), withheld, error (entering −
            leaving − withheld, absolute), scale (Σ|what entered|, which errors refer to).
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


@analysis
def flow_back(
    model,
    tokenizer,
    flow: LogitFlow,
    route: str = "parts",
    batch_size: int = 16,
    heads: bool = False,
) -> FlowBack:
    """Trace the answer's log-probability back to every layer and position.

    Route "parts" starts from the flow's neurons, so its level must be "neuron". The forward passes
    that the flow kept are used; without them its prompts run again, `batch_size` at a time. heads:
    a row for each head of attention.

    Raises ValueError for an unknown route, a flow without neurons, and another model or tokenizer
    than made the flow; UnsupportedModelError where a weight or norm that is read is not what the
    model computed with.

    Example:
        >>> from backattn import flow_back, logit_flow
        >>> flow = logit_flow(model, tokenizer, "France's capital is", "Paris")
        >>> flow_back(model, tokenizer, flow).check() < 1e-3
        True
    """
    return flow_backs(model, tokenizer, [(flow, route)], batch_size, heads)[0]


@analysis
def flow_backs(
    model,
    tokenizer,
    traced: Sequence[tuple[LogitFlow, str]],
    batch_size: int = 16,
    heads: bool = False,
) -> list[FlowBack]:
    """`flow_back` of several (flow, route): of one flow by both routes, or of flows that differ in
    the answers. Each forward pass, and what sweeps make again of its states, is made once for all.

    Raises what `flow_back` does, and ValueError where flows are of different prompts.

    Example:
        >>> from backattn import logit_flow
        >>> flow = logit_flow(model, tokenizer, "France's capital is", "Paris")
        >>> both = flow_backs(model, tokenizer, [(flow, "parts"), (flow, "linear")])
        >>> [back.route for back in both]
        ['parts', 'linear']
    """
    flows = [flow for flow, _ in traced]
    for flow, route in traced:
        if route not in ROUTES:
            raise ValueError(f"route={route!r} is unknown; choose one of {', '.join(ROUTES)}.")
        if route == "parts" and flow.level != "neuron":
            needs = 'Route "parts" starts from neurons: call logit_flow with level="neuron".'
            raise ValueError(needs)
        if flow.prompts != flows[0].prompts:
            raise ValueError("These flows are of different prompts: trace each by flow_back.")
    frames, totals = [[] for _ in traced], [[] for _ in traced]
    for start, stream in _streams(model, tokenizer, flows, batch_size):
        entering = [_entering(stream, start, *each) for each in traced]
        for k, (nodes, total) in enumerate(_together(stream, entering, heads)):
            frames[k].append(_frame(stream, nodes, start, tokenizer, heads))
            totals[k].append(pd.DataFrame({name: x.cpu().numpy() for name, x in total.items()}))
    return [
        _result(model, route, *found)
        for (_, route), *found in zip(traced, frames, totals, strict=True)
    ]


def _entering(stream: Stream, start: int, flow: LogitFlow, route: str) -> Tensor | pd.DataFrame:
    """What enters a batch whose first prompt is number `start`, as `_flow` takes it."""
    stop = start + len(stream.batch.input_ids)
    if route == "linear":
        return torch.tensor(flow.answer_ids[start:stop], device=stream.hidden.device)
    inside = flow.frame["prompt"].between(start, stop - 1) & flow.frame["neuron"].notna()
    entering = flow.frame[inside]
    return entering.assign(prompt=entering["prompt"] - start)


def _result(model, route: str, frames: list, totals: list) -> FlowBack:
    frame = pd.concat(frames, ignore_index=True).astype({"kind": "category", "token": "category"})
    table = pd.concat(totals, ignore_index=True).rename_axis("prompt").reset_index()
    table["error"] = (table["entering"] - table["leaving"] - table["withheld"]).abs()
    columns = ["prompt", "entering", "leaving", "in_biases", "withheld", "error", "scale"]
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    return FlowBack(frame, table[columns], route, tolerance)


def _streams(
    model, tokenizer, flows: Sequence[LogitFlow], batch_size: int
) -> Iterator[tuple[int, Stream]]:
    """Per batch the index of its first prompt and its stream, kept by a flow or made again."""
    prompts = flows[0].prompts
    kept = next((flow.streams for flow in flows if flow.streams and model is flow.model), [])
    if kept:
        batch_size = len(kept[0].batch.input_ids)
    starts = range(0, len(prompts), batch_size)
    for start in progress(starts, "flow back", unit="batch") if len(starts) > 1 else starts:
        part = slice(start, start + batch_size)
        batch = encode(tokenizer, prompts[part], device=model.device)
        same = all(batch.rows == flow.input_ids[part] for flow in flows)
        if same:
            stream = kept[start // batch_size] if kept else capture(model, batch)
            said = stream.logits.log_softmax(-1).cpu().numpy()
            for flow in flows:  # batches of another size round otherwise
                miss = said[range(len(said)), flow.answer_ids[part]] - flow.log_prob[part]
                same = same and np.abs(miss).max() <= 10 * flow.tolerance
        if not same:
            raise ValueError(
                "This flow was made by another model or tokenizer: pass those given to logit_flow."
            )
        if not kept:  # else proved by logit_flow
            stream.prove_sums()
        yield start, stream


def _together(stream: Stream, entering: Sequence, heads: bool) -> list[tuple[dict, dict]]:
    """`_flow` of each of `entering`, in step, so that a layer's units are made again once."""
    again = functools.lru_cache(maxsize=1)(functools.partial(_made_again, stream))
    for found in zip(*(_flow(stream, each, heads, again) for each in entering), strict=True):
        last = found
    return list(last)


def _flow(
    stream: Stream, entering: Tensor | pd.DataFrame, heads: bool, again: Callable
) -> Iterator[tuple[dict, dict]]:
    """What enters is the logits of tokens [B] (route "linear") or neurons, rows of a logit flow
    (route "parts"). again: see `sweep`.

    Yields after each sub-layer, and at the end, what was found so far: (kind, layer) -> (flow,
    direct), each [B, T, heads or 1], and totals per prompt, each [B].
    """
    linear, start = isinstance(entering, Tensor), torch.zeros_like(stream.hidden[0])  # [B, T, D]
    names = ("entering", "in_biases", "withheld", "scale")
    totals = {name: start.new_zeros(len(start), dtype=torch.float64) for name in names}
    nodes, groups = {}, {}
    if linear:  # the answer's logit less the mean logit, the final norm's scale frozen
        lens = Lens(stream.arch)
        start = at_the_end(stream, lens.weight[entering] - lens.weight.mean(0))
        totals["entering"] = stream.batch.at_last(start * stream.hidden[-1]).sum(-1).double()
        totals["scale"] = totals["entering"].abs()
    else:
        groups = dict(list(entering.groupby(["kind", "layer"], observed=True)))

    def enter(kind: str, layer: int, units: Tensor) -> Tensor | None:
        if (kind, layer) not in groups:
            return None
        return _enter(stream.batch, kind, units, groups[kind, layer], totals)

    for part in sweep(stream, start, enter, half=not linear, again=again):
        direct = part.entering
        if linear:  # the covector that reads the answer reads this sub-layer's output
            direct = part.to_units(part.post.adjoint(start, part.scale))
        axes = tuple(range(3 if heads and part.kind == "attention" else 2, part.units.dim()))
        each = [(x * part.units).sum(axes) for x in (part.per_unit, direct)]
        nodes[part.kind, part.layer] = [x if x.dim() == 3 else x[..., None] for x in each]
        totals["in_biases"] += part.in_bias.sum(-1).double()
        yield nodes, totals
    ends = part.below, start
    nodes["embedding", 0] = [(x * stream.hidden[0]).sum(-1)[..., None] for x in ends]
    totals["leaving"] = nodes["embedding", 0][0].double().sum((1, 2)) + totals["in_biases"]
    yield nodes, totals


def at_the_end(stream: Stream, direction: Tensor) -> Tensor:
    """The covector on the last state [B, T, D] that reads a direction of logits, W_U's rows [B, D],
    at the last position, the final norm's scale frozen."""
    lens, last = Lens(stream.arch), stream.batch.at_last(stream.hidden[-1])  # [B, D]
    lens.prove(stream)
    covector = torch.zeros_like(stream.hidden[-1])
    rows = torch.arange(len(last), device=last.device)
    covector[rows, stream.batch.last] = lens.norm.adjoint(direction, lens.scale(last))
    return covector


@dataclass
class Part:
    """One sub-layer of a sweep. Units are neurons [B, T, F], or values at the source positions
    [B, T, H, d]."""

    kind: str
    layer: int
    units: Tensor
    per_unit: Tensor  # flow that each unit brings, for one of it
    entering: Tensor  # of which what enters here
    output: Tensor  # covector on what the sub-layer adds to the stream [B, T, D]
    raw: Tensor  # the same before the sandwich norm, if there is one [B, T, D]
    in_bias: Tensor  # flow that ends in biases [B, T]
    below: Tensor  # covector on the state under it [B, T, D]
    to_units: Callable[[Tensor], Tensor]
    post: Norm
    scale: Tensor


def _made_again(stream: Stream, layer: int) -> tuple[Tensor, tuple]:
    """A layer's values and neurons (m, g, u), made again of the states, its weights proved."""
    block = stream.arch.blocks[layer]
    values = block.values(stream.input("attention", layer))
    neurons = block.neurons(stream.input("ffn", layer))
    stream.prove_outputs(layer, values, neurons[0])
    stream.prove_inputs(layer, "ffn", *zip(block.ffn_in, neurons[1:], strict=True))
    stream.prove_inputs(layer, "attention", (block.value, values.flatten(2)))
    return values, neurons


def sweep(
    stream: Stream, covector: Tensor, enter: Callable, half: bool, again: Callable | None = None
) -> Iterator[Part]:
    """One pass from the top layer to the embedding, sub-layer by sub-layer.

    covector: on the last state [B, T, D]; enter: kind, layer, units -> flow per unit that enters
    there, or None; half: a gated neuron hands half on by its gate and half by its other input; else
    all by the other, and the gate is frozen; again: layer -> `_made_again`, where sweeps of one
    stream share it.
    """
    again = again or functools.partial(_made_again, stream)
    for layer in reversed(range(stream.layers)):
        block, above = stream.arch.blocks[layer], covector
        values, neurons = again(layer)
        for kind, sublayer, made in (("ffn", _ffn, neurons), ("attention", _attention, values)):
            units, out, to_units, to_input = sublayer(stream, layer, made, half)
            post, scale = block.norm(f"{kind}_post"), stream.scales[kind][layer]
            output = above if stream.arch.parallel else covector
            raw = post.adjoint(output, scale)
            entering = enter(kind, layer, units)
            entering = torch.zeros_like(units) if entering is None else entering
            per_unit = to_units(raw) + entering
            on_input, in_bias = to_input(per_unit)
            norm, state = block.norm(f"{kind}_norm"), stream.input(kind, layer)
            in_bias = in_bias + raw @ out.bias + on_input @ norm.bias  # [B, T]
            covector = covector + norm.adjoint(on_input, norm.scale(state))
            about = (units, per_unit, entering, output, raw, in_bias, covector)
            yield Part(kind, layer, *about, to_units, post, scale)


def _ffn(stream: Stream, layer: int, neurons: tuple, half: bool) -> tuple:
    """(its neurons m [B, T, F], its output weights, and two functions: from a covector on its
    output to one on m; from that to one on its normed input and what biases keep)."""
    block, (m, g, u) = stream.arch.blocks[layer], neurons
    down, (gate, up), act = block.ffn_out, block.ffn_in, block.get("activation")

    def to_input(per_unit: Tensor) -> tuple[Tensor, Tensor]:
        if gate is None:  # m = act(u): the gate is act(u) / u
            to_up = per_unit * _ratio(m, u)
        elif half:  # half by g, half by u
            each = per_unit * _ratio(act(g), g) / 2
            to_up, to_gate = each * g, each * u
            on_input = to_up @ up.weight + to_gate @ gate.weight
            return on_input, to_up @ up.bias + to_gate @ gate.bias
        else:  # act(g) is frozen
            to_up = per_unit * act(g)
        return to_up @ up.weight, to_up @ up.bias

    return m, down, lambda raw: raw @ down.weight, to_input


def _attention(stream: Stream, layer: int, values: Tensor, _) -> tuple:
    """The same of attention; its units are the values at the source positions [B, T, H, d]."""
    block = stream.arch.blocks[layer]
    out, value = block.attention_out, block.value

    def to_units(raw: Tensor) -> Tensor:
        heads = (raw @ out.weight).unflatten(-1, (block.heads, block.head_dim))  # at queries
        return torch.einsum("bhqk,bqhd->bkhd", stream.weights[layer], heads)

    def to_input(per_unit: Tensor) -> tuple[Tensor, Tensor]:
        grouped = per_unit.unflatten(2, (block.kv_heads, -1)).sum(3).flatten(2)  # [B, T, G·d]
        return grouped @ value.weight, grouped @ value.bias

    return block.per_head(values), out, to_units, to_input


def _ratio(activated: Tensor, x: Tensor) -> Tensor:
    """act(x) / x, and its limit 1/2 (SiLU and GELU) at x = 0."""
    near = x.abs() < 1e-6
    return torch.where(near, 0.5, activated / torch.where(near, 1.0, x))


def _enter(batch: Batch, kind: str, units: Tensor, rows: pd.DataFrame, totals: dict) -> Tensor:
    """Covector on a sub-layer's units: importances of neurons per unit of their coefficient."""

    def index(column: str) -> Tensor:
        return torch.tensor(rows[column].to_numpy(np.int64), device=units.device)

    b, neuron = index("prompt"), index("neuron")
    where = (b, batch.last[b], neuron)
    if kind == "attention":
        where = (b, index("position") + batch.start[b], index("head"), neuron)
    importance = torch.tensor(rows["increase"].to_numpy(), device=units.device)
    coefficient = units[where].double()
    largest = torch.zeros_like(totals["scale"])  # per prompt
    largest = largest.scatter_reduce(0, b, coefficient.abs(), "amax")
    usable = coefficient.abs() > FLOOR * largest[b]
    totals["entering"].index_add_(0, b, importance)
    totals["scale"].index_add_(0, b, importance.abs())
    totals["withheld"].index_add_(0, b, importance * ~usable)
    entering, per_unit = torch.zeros_like(units), importance[usable] / coefficient[usable]
    entering[tuple(i[usable] for i in where)] = per_unit.float()
    return entering


def _frame(stream: Stream, nodes: dict, first: int, tokenizer, heads: bool) -> pd.DataFrame:
    """Rows of `FlowBack.frame`; first: the index of the batch's first prompt."""
    batch, kinds, sums, names = stream.batch, ("attention", "ffn"), [], []
    real = batch.attention_mask.bool().cpu()
    prompt, place = (x.numpy() for x in real.nonzero(as_tuple=True))
    token = np.array([tokenizer.decode([i]) for row in batch.rows for i in row], dtype=object)
    for kind, layer in (
        ("embedding", 0),
        *((kind, k) for k in range(stream.layers) for kind in kinds),
    ):
        sums.append(torch.stack(nodes[kind, layer]).cpu()[:, real])  # [2, positions, heads or 1]
        split = heads and kind == "attention"
        names += [(kind, layer, head) for head in (range(sums[-1].shape[-1]) if split else [pd.NA])]
    flow, direct = torch.cat(sums, dim=-1).transpose(1, 2).flatten(1).numpy()  # [nodes · positions]
    frame = pd.DataFrame(
        {
            "prompt": np.tile(prompt + first, len(names)),
            "layer": np.repeat([layer for _, layer, _ in names], len(prompt)),
            "kind": np.repeat([kind for kind, *_ in names], len(prompt)),
            "position": np.tile(place - batch.start.cpu().numpy()[prompt], len(names)),
            "token": np.tile(token, len(names)),
            "flow": flow,
            "direct": direct,
        }
    )
    if heads:
        column = pd.array([head for *_, head in names], dtype="Int64")
        frame.insert(3, "head", column.repeat(len(prompt)))
    return frame
