"""Cost and agreement of every attribution of notebook 10, in one run on SmolLM2 (IOI prompts).

    .venv/bin/python benchmarks/attribution.py           # some four minutes on one thread
    .venv/bin/python benchmarks/attribution.py --prompts 4

Printed are seconds a prompt, how many times cheaper than exact patching, and Pearson's r with it.
Then the head level of logit flow against a plain reference, a softmax over the whole
vocabulary for each head at each source position: a ratio, and the largest difference in nats. Exit
status 1 when a goal is missed.
"""

import argparse
import sys
import time

import numpy as np
import pandas as pd
import torch

from backattn import load_model, logit_flow, runtime
from backattn.analysis.circuits import Circuit
from backattn.analysis.neuron_scores import Reading, sublayers
from backattn.models.activations import capture
from backattn.models.tokens import encode
from companion.questions.contrasts import TASKS, pairs_of
from companion.studies.attribution_benchmark import ENTRANTS

FASTER, EXACT = 5.0, 1e-5  # goals of the head level: times the reference's speed, nats


def reference(model, tokenizer, prompts, answers, dtype=torch.float32) -> np.ndarray:
    """Importances of heads, layer by layer, prompt by prompt, [sources, heads] each, flat."""
    reading, found = Reading(capture(model, encode(tokenizer, prompts)), "final", answers), []
    lens = reading.lens
    weight, offset = lens.weight.to(dtype), lens.offset.to(dtype)

    def read(states: torch.Tensor, b: int) -> torch.Tensor:
        logits = lens.norm.linear(states, reading.scale(b)).to(dtype) @ weight.T + offset
        return logits.log_softmax(-1)[..., answers[b]].double()

    for sub in sublayers(reading.stream):
        if sub.kind == "ffn":
            continue
        c, vectors = (x.unflatten(-1, (-1, sub.head_dim)) for x in (sub.coefficient, sub.vectors.T))
        for b, real in enumerate(reading.stream.batch.attention_mask.bool()):
            parts = torch.einsum("thd,whd->thw", c[b, real], vectors)  # [sources, H, D]
            after = torch.cat([read(x, b) for x in sub.base[b] + parts])
            found.append((after - read(sub.base[b], b)).numpy())
    return np.concatenate(found)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--many", type=int, default=64, help="prompts of the head level")
    options = p.parse_args()
    count = options.prompts
    runtime.use_threads()
    model, tokenizer = load_model("smollm2")
    frame = TASKS["indirect object"]().head(count)
    for name in ("right", "wrong"):
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in frame[name]]
        frame[f"{name}_id"] = ids
    circuit, rows, scores = Circuit(model), [], {}
    circuit.kept(pairs_of(tokenizer, frame.head(2)), np.ones(len(circuit.nodes), dtype=bool))
    for entrant in ENTRANTS.values():
        if "nodes" in entrant.units:
            begin = time.perf_counter()
            scores[entrant.name] = entrant.scores(circuit, tokenizer, frame).mean(0)
            rows.append((entrant.name, (time.perf_counter() - begin) / count))
    table = pd.DataFrame(rows, columns=["entrant", "seconds a prompt"])
    exact = float(table.loc[table["entrant"] == "exact", "seconds a prompt"].iloc[0])
    table["times cheaper than exact"] = exact / table["seconds a prompt"].clip(lower=1e-6)
    table["Pearson"] = [np.corrcoef(scores[x], scores["exact"])[0, 1] for x in table["entrant"]]
    print(table.round(3).to_string(index=False))

    many = TASKS["indirect object"]()["prompt"].head(options.many).tolist()
    answers, few = (frame["right_id"].tolist() * options.many)[: options.many], 1
    begin = time.perf_counter()
    heads = logit_flow(model, tokenizer, many, answers, level="head").frame
    took = (time.perf_counter() - begin) / len(many)
    begin = time.perf_counter()
    reference(model, tokenizer, many[:few], answers[:few])
    ratio = (time.perf_counter() - begin) / few / took
    found = heads[(heads["kind"] == "attention") & (heads["prompt"] == 0)]
    found = found.sort_values(["layer", "position", "head"])["increase"].to_numpy()
    exactly = reference(model, tokenizer, many[:1], answers[:1], torch.float64)
    error = float(np.abs(found - exactly).max())
    print(f"heads, {len(many)} prompts: {took:.2f} s each")
    print(f"heads: {ratio:.1f} times as fast as the reference (goal {FASTER})")
    print(f"heads: largest difference from float64 {error:.1e} nats (goal {EXACT})")
    return int(ratio < FASTER or error > EXACT)


if __name__ == "__main__":
    sys.exit(main())
