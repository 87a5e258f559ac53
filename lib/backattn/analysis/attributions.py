"""What each node of a circuit does for the answer: logit flow and its rivals, on one scale.

m is the logit of the right answer less that of the wrong one. All but the last two estimate how
far m rises by the node's value in place of its base: on a counterfactual prompt, its mean, or zero.

"exact"       m less m with this node alone exchanged: one pass per node, the ceiling.
"linear"      (value − base) · covector, where the covector is that of `flow_back`'s sweep with
              attention patterns, norm scales and gates held at the prompt's values.
"half"        the same, but a gated neuron hands half on by its gate (RelP; Jafari et al. 2025).
"both ends"   "linear" with what is held at the prompt's and at the base's values, averaged.
"gradient"    (value − base) · ∂m/∂value: attribution patching.
"integrated"  the same with the gradient's mean over inputs between both (MIB's NAP-IG, after the
              integrated gradients of Hanna et al. 2024).
"midpoint"    the same with the gradient at the one input half way between both.
"activation"  the size of what the node writes; "random".

captum's integrated gradients move one layer's values at a time, so that each layer would need
passes of its own; NAP-IG moves the embeddings, and reads all nodes in the same passes.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from backattn.analysis.circuits import Circuit, Pairs, Part, Values, exchange
from backattn.analysis.flow_back import at_the_end, sweep
from backattn.models.activations import Stream, capture
from backattn.models.families import UnsupportedModelError
from backattn.models.hooks import begin_at, evaluating, hooks
from backattn.models.lens import Lens
from backattn.models.tokens import Batch


def attribute(
    circuit: Circuit,
    pairs: Pairs,
    method: str,
    base: str = "counterfactual",
    steps: int = 5,
    seed: int = 0,
    batch_size: int = 20,
) -> np.ndarray:
    """What each node does for m, by prompt: [n, nodes] in the order of `circuit.nodes`.

    steps: of "integrated"; seed: of "random". Raises ValueError for an unknown method or base, no
    steps, and "both ends" without a counterfactual prompt; UnsupportedModelError where what is read
    is not what the model computes with.

    Example:
        >>> from backattn.analysis.circuits import pair_up
        >>> pairs = pair_up(tokenizer, ["France's capital is"], ["Spain's capital is"], [5], [6])
        >>> attribute(Circuit(model), pairs, "linear").shape
        (1, 20)
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
    if steps < 1:
        raise ValueError(f"steps={steps}: take at least one.")
    if method == "random":
        return np.random.default_rng(seed).random((len(pairs), len(circuit.nodes)))
    if method == "both ends" and base != "counterfactual":
        raise ValueError('"both ends" needs a second prompt: leave base="counterfactual".')
    found = np.empty((len(pairs), len(circuit.nodes)), dtype=np.float32)
    with evaluating(circuit.model):
        for part in circuit.parts(pairs, base, batch_size):
            score = METHODS[method](circuit, part, base, steps)
            found[part.rows] = score.detach().cpu().numpy()
    return found


@torch.no_grad()
def _exact(circuit: Circuit, part: Part, *_) -> Tensor:
    """Layers below the node's are not run again."""
    blocks, states = circuit.arch.blocks, []
    with hooks(*((block.module, "input", states.append) for block in blocks)):
        whole = circuit.metric(part)
    found, per_layer = [], len(circuit.places) // len(blocks)
    for place, (_, _, channels, count) in enumerate(circuit.places):
        layer = place // per_layer
        before: list = [lambda x: None] * place
        for node in range(count):
            keep = (torch.arange(count) != node).repeat_interleave(channels)
            with begin_at(blocks, layer, states[layer]):
                m = circuit.metric(part, [*before, exchange(keep, part.values[place])])
            found.append(whole - m)
    return torch.stack(found, dim=1)


def _gradients(circuit: Circuit, part: Part, towards: Tensor | None, share: float = 1.0) -> Values:
    """∂m/∂value at each place; with embeddings `share` of the way from `towards`."""
    if any(p.is_inference() for p in circuit.model.parameters()):
        raise UnsupportedModelError(
            "Weights that were made in torch.inference_mode let no gradient through: load the base "
            "model outside of it."
        )
    added: Values = []

    def change(x: Tensor) -> Tensor:
        added.append(torch.zeros_like(x, requires_grad=True))
        return x + added[-1]

    def move(x: Tensor) -> Tensor | None:
        return None if towards is None else torch.lerp(towards, x, share)

    with torch.enable_grad(), hooks((circuit.model.get_input_embeddings(), "output", move)):
        m = circuit.metric(part, [change] * len(circuit.places)).sum()
        return list(torch.autograd.grad(m, added))


def _weighted(circuit: Circuit, part: Part, covectors: Values) -> Tensor:
    own = circuit.values(part.pairs.clean, part.start, part.cache)
    less = zip(own, part.values, covectors, strict=True)
    return circuit.per_node([(x.float() - base.float()) * c.float() for x, base, c in less])


def _gradient(circuit: Circuit, part: Part, *_) -> Tensor:
    return _weighted(circuit, part, _gradients(circuit, part, None))


def _integrated(circuit: Circuit, part: Part, base: str, steps: int) -> Tensor:
    return _between(circuit, part, base, [(k + 1) / steps for k in range(steps)])


def _midpoint(circuit: Circuit, part: Part, base: str, _) -> Tensor:
    return _between(circuit, part, base, [0.5])


def _between(circuit: Circuit, part: Part, base: str, shares: list[float]) -> Tensor:
    """The gradient's mean over inputs between the base's embeddings (zeros without a second prompt)
    and the prompt's."""
    with torch.no_grad():
        towards = circuit.model.get_input_embeddings()(part.pairs.other.input_ids[:, part.start :])
    towards = towards if base == "counterfactual" else torch.zeros_like(towards)
    each = [_gradients(circuit, part, towards, share) for share in shares]
    mean = [sum(gradients) / len(shares) for gradients in zip(*each, strict=True)]
    return _weighted(circuit, part, mean)


def _covectors(circuit: Circuit, part: Part, batch: Batch, half: bool) -> Values:
    """What a unit of each place brings to m, held at a batch's values: [B, T, channels] each."""
    stream: Stream = capture(circuit.model, batch)
    stream.prove_sums()
    weight = Lens(stream.arch).weight
    start = at_the_end(stream, weight[part.pairs.right] - weight[part.pairs.wrong])
    found = []
    for sub in sweep(stream, start, lambda *_: None, half):
        if circuit.units == "nodes":
            out = stream.arch.blocks[sub.layer].attention_out
            found.append(sub.output if sub.kind == "ffn" else sub.raw @ out.weight)
        elif sub.kind == "ffn":
            found.append(sub.per_unit)
    return [x[:, part.start :] for x in reversed(found)]


def _linear(circuit: Circuit, part: Part, *_) -> Tensor:
    return _weighted(circuit, part, _covectors(circuit, part, part.pairs.clean, half=False))


def _half(circuit: Circuit, part: Part, *_) -> Tensor:
    return _weighted(circuit, part, _covectors(circuit, part, part.pairs.clean, half=True))


def _both_ends(circuit: Circuit, part: Part, *_) -> Tensor:
    batches = part.pairs.clean, part.pairs.other
    ends = [_covectors(circuit, part, batch, half=False) for batch in batches]
    return _weighted(circuit, part, [(x + y) / 2 for x, y in zip(*ends, strict=True)])


@torch.no_grad()
def _activation(circuit: Circuit, part: Part, *_) -> Tensor:
    """Σ over positions of the length of what a node writes."""
    stream = capture(circuit.model, part.pairs.clean)
    real, sizes = part.pairs.clean.attention_mask[..., None], []  # [B, T, 1]
    for layer, block in enumerate(stream.arch.blocks):
        stream.prove_outputs(layer, stream.values[layer], stream.neurons[layer])
        posts = [(block.norm(f"{k}_post"), stream.scales[k][layer]) for k in ("attention", "ffn")]
        (after, scale), (after_ffn, scale_ffn) = posts  # the sandwich norms, if there are any
        if circuit.units == "neurons":
            one = after_ffn.linear(block.ffn_out.weight.T, scale_ffn.new_ones(())).norm(
                dim=-1
            )  # [F]
            sizes.append((stream.neurons[layer].abs() * scale_ffn * real).sum(1) * one)
            continue
        values = block.per_head(stream.values[layer])
        z = torch.einsum("bhqk,bkhd->bqhd", stream.weights[layer], values)
        out = block.attention_out.weight.unflatten(1, (block.heads, -1))  # a head writes W_O z
        heads = after.linear(torch.einsum("bqhd,whd->bqhw", z, out), scale[..., None])
        sizes.append((heads.norm(dim=-1) * real).sum(1))
        sizes.append((stream.ffn[layer].norm(dim=-1, keepdim=True) * real).sum(1))
    return torch.cat(sizes, dim=1)


METHODS: dict[str, Callable | None] = {
    "exact": _exact,
    "linear": _linear,
    "half": _half,
    "both ends": _both_ends,
    "gradient": _gradient,
    "integrated": _integrated,
    "midpoint": _midpoint,
    "activation": _activation,
    "random": None,
}


def from_flow(circuit: Circuit, frame: pd.DataFrame, column: str = "flow") -> np.ndarray:
    """The frame of `logit_flow` or of `flow_back(..., heads=True)` as scores: sums over positions
    by prompt, [n, nodes]; 0 for a node without rows. column: "flow", or "increase" of a logit flow.
    Raises ValueError for rows of no node, and where none is of a node.

    Example:
        >>> from backattn import logit_flow
        >>> flow = logit_flow(model, tokenizer, "France's capital is", "Paris", level="head")
        >>> from_flow(Circuit(model), flow.frame, "increase").shape
        (1, 20)
    """
    names = ["layer", "kind", "head", "neuron"]
    index = circuit.nodes.assign(node=range(len(circuit.nodes))).astype({"kind": str})
    prompts, frame = frame["prompt"].unique(), frame.assign(kind=frame["kind"].astype(str))
    frame = frame[frame["kind"].isin(index["kind"])]
    if circuit.units == "neurons":
        frame = frame.dropna(subset="neuron")
    if frame.empty:
        raise ValueError("This flow has no rows of nodes: see level and heads.")
    for name in ("head", "neuron"):
        index[name] = index[name].fillna(-1).astype(int)
        held = frame[name] if name in frame else pd.Series(pd.NA, frame.index, dtype="Int64")
        frame[name] = held.fillna(-1).astype(int)
    sums = frame.groupby(["prompt", *names])[column].sum().reset_index()
    joined = sums.merge(index, on=names, how="left")
    if joined["node"].isna().any():
        raise ValueError(
            "This flow has parts that are no nodes of this circuit: ask for heads "
            '(level="head", heads=True), or for neurons where its units are neurons.'
        )
    scores = np.zeros((len(prompts), len(circuit.nodes)), dtype=np.float32)
    row = np.searchsorted(np.sort(prompts), joined["prompt"])
    scores[row, joined["node"].astype(int)] = joined[column]
    return scores


def stability(scores: np.ndarray, first: int, samples: int = 100, seed: int = 0) -> np.ndarray:
    """How much of the `first` nodes stays when prompts are drawn again: the Jaccard overlap of the
    top by the mean over a bootstrap sample with that over all, [samples]. scores: [n, nodes].

    Example:
        >>> stability(np.eye(4)[:, ::-1] + np.arange(4), first=1, samples=3)
        array([1., 1., 1.])
    """
    draw = np.random.default_rng(seed)

    def top(rows: np.ndarray) -> set[int]:
        return set(np.argsort(-scores[rows].mean(0), kind="stable")[:first].tolist())

    whole, found = top(np.arange(len(scores))), []
    for _ in range(samples):
        one = top(draw.integers(len(scores), size=len(scores)))
        found.append(len(one & whole) / len(one | whole))
    return np.array(found)


def as_graph(circuit: Circuit, score: np.ndarray, size: float) -> dict:
    """A circuit in the JSON form of MIB's leaderboard (EAP-IG's `Graph.from_json`): cfg; nodes by
    name, "a3.h1" (head 1 of layer 3) or "m3" (FFN), each with its score and whether it is among the
    highest `size` per cent; no edges. Raises ValueError for neurons, which it names otherwise.

    Example:
        >>> graph = as_graph(Circuit(model), np.arange(20.0), size=5)
        >>> graph["nodes"]["m3"], len(graph["nodes"])
        ({'in_graph': True, 'score': 19.0}, 22)
    """
    if circuit.units != "nodes":
        raise ValueError('Only heads and FFNs have names there: use Circuit(model, units="nodes").')
    arch, first = circuit.arch, np.argsort(-np.asarray(score), kind="stable")
    kept = set(first[: round(size / 100 * len(first))].tolist())
    nodes: dict[str, dict] = {"input": {"in_graph": True}, "logits": {"in_graph": True}}
    for index, (node, value) in enumerate(zip(circuit.nodes.itertuples(), score, strict=True)):
        name = f"m{node.layer}" if node.kind == "ffn" else f"a{node.layer}.h{node.head}"
        nodes[name] = {"in_graph": index in kept, "score": float(value)}
    cfg = {"n_layers": len(arch.blocks), "n_heads": arch.blocks[0].heads, "d_model": arch.width}
    return {"cfg": {**cfg, "parallel_attn_mlp": arch.parallel}, "nodes": nodes, "edges": {}}
