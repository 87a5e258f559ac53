"""One prompt seen from all sides, and the widgets that choose it (demo_logit_flow.ipynb)."""

import contextlib
import functools
import html
import warnings
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from backattn.adapters.back_attention import BackAttentionModel, get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from backattn.analysis.flow_back import flow_back
from backattn.analysis.logit_flow import logit_flow
from backattn.analysis.neuron_scores import sublayers
from backattn.models.activations import capture
from backattn.models.lens import Lens
from backattn.models.load import load_model
from backattn.models.next_token import next_log_probs
from backattn.models.packaged import EMBEDDED
from backattn.models.tokens import encode
from companion.report import figures
from companion.runs.perform import put_weights
from companion.runs.plans import adapter_runs, found
from companion.runs.store import Store

MOST_TOKENS = 48  # more rows cannot be read, and memory grows with their square
COLUMNS = ["layer", "kind", "head", "neuron", "position", "token", "increase", "promotes"]


@dataclass
class PromptReport:
    """What `inspect_prompt` found; flow and neurons are the plain model's."""

    answer: str
    predictions: pd.DataFrame  # the likeliest next tokens; probabilities plain, "back attention"
    flow: pd.DataFrame  # of `flow_back`, for the answer
    neurons: pd.DataFrame  # those that raise the answer most (nats), and the words they promote
    error: float  # how far the layer scores miss the model's own log-probability, nats
    reads: pd.DataFrame | None = (
        None  # [memory layers, tokens], by the adapter at the last position
    )


def inspect_prompt(
    model, tokenizer, prompt: str, answer: str = "", adapter: BackAttentionModel | None = None
) -> PromptReport:
    """Logit flow of a prompt in the plain model and, with back attention on it (`adapter`), what
    that reads and what it changes.

    answer: what flow is traced to, by its first token (UserWarning where it has several); "" takes
    the model's own. Raises ValueError for an empty prompt and one of more than MOST_TOKENS tokens.
    """
    batch = encode(tokenizer, [prompt], side="left", device=model.device)
    count = int(batch.lengths[0])
    if count > MOST_TOKENS:
        raise ValueError(
            f"The prompt has {count} tokens; at most {MOST_TOKENS} can be shown. Shorten it."
        )
    with contextlib.nullcontext() if adapter is None else adapter.disable_adapter():
        probabilities = {"plain": next_log_probs(model, batch)[0].exp()}
        flow = logit_flow(model, tokenizer, [prompt], [answer] if answer.strip() else None)
        back = flow_back(model, tokenizer, flow).frame
        neurons = flow.frame[flow.frame["neuron"].notna()].nlargest(8, "increase")
        neurons = neurons.assign(promotes=_promoted(model, tokenizer, prompt, neurons))
    reads = None
    if adapter is not None:
        with adapter.attention_maps() as maps:
            probabilities["back attention"] = next_log_probs(adapter, batch)[0].exp()
        weights = maps[adapter.sources[0]][0, :, -1].mean(0)[:, -count:]
        tokens = back.drop_duplicates("position").sort_values("position")["token"].astype(str)
        reads = pd.DataFrame(weights.float().cpu(), list(adapter.memory_layers), tokens.tolist())
    best = dict.fromkeys(t for p in probabilities.values() for t in p.topk(5).indices.tolist())
    predictions = pd.DataFrame({name: p[list(best)] for name, p in probabilities.items()})
    predictions.insert(0, "token", [tokenizer.decode([token]) for token in best])
    return PromptReport(flow.answers[0], predictions, back, neurons[COLUMNS], flow.check(), reads)


def _promoted(model, tokenizer, prompt: str, neurons: pd.DataFrame) -> list[str]:
    """The four words that each neuron raises most, with the sign that it has in this prompt."""
    stream, vectors = capture(model, encode(tokenizer, [prompt], device=model.device)), []
    parts = {(part.layer, part.kind): part for part in sublayers(stream)}
    for row in neurons.itertuples():
        part, place, neuron = parts[row.layer, row.kind], 0, int(row.neuron)
        if row.kind == "attention":
            place, neuron = int(row.position), int(row.head) * part.head_dim + neuron
        vectors.append(part.coefficient[0, place, neuron].sign() * part.vectors[neuron])
    likeliest = Lens(stream.arch).directions(torch.stack(vectors)).topk(4).indices.tolist()
    return [" ".join(tokenizer.decode([token]).strip() for token in row) for row in likeliest]


def report_figure(report: PromptReport) -> Figure:
    """Flow through attention and FFNs by layer and token and, with an adapter, what its last
    position reads."""
    panels = 2 + (report.reads is not None)
    size = figures.WIDTH, panels * (1.2 + 0.19 * report.flow["position"].nunique())
    figure, axes = plt.subplots(panels, 1, figsize=size, layout="constrained")
    for ax, kind in zip(axes, ("attention", "ffn"), strict=False):
        figures.flow_heatmap(report.flow, kind, ax=ax)
        ax.set_title(f"flow to {report.answer.strip()!r} through {kind}")
    if report.reads is not None:
        figures.heatmap(report.reads, "weight", diverging=False, upwards=True, ax=axes[-1])
        axes[-1].tick_params(axis="x", rotation=40)
        axes[-1].set(title="what back attention reads at the last position", ylabel="memory layer")
    return figure


@functools.cache
def load(name: str, device: str = "cpu") -> tuple:
    """(model, tokenizer, the model with back attention or None); this was trained on two-hop
    questions, where that is shipped (notebook 03, first seed)."""
    model, tokenizer = load_model(name, device=device)
    if name not in EMBEDDED:
        return model, tokenizer, None
    store = Store()
    runs = found(adapter_runs(model=name, arms=["back attention"]), store)
    run = next(run for run in runs if run.arm == "back attention" and run.seed == 0)
    with contextlib.suppress(FileNotFoundError):
        weights = store.weights(run)
        adapter = get_back_attention_model(model, BackAttentionConfig(run.source_layer, run.dim))
        put_weights(adapter, weights)
        return model, tokenizer, adapter.eval()
    return model, tokenizer, None


def look(name: str, prompt: str, answer: str = "", device: str = "cpu") -> tuple:
    """Words, and a report or None: bad input and a model that cannot be had are put into words."""
    try:
        model, tokenizer, adapter = load(name.strip(), device)
        with warnings.catch_warnings(record=True, action="always") as caught:
            report = inspect_prompt(model, tokenizer, prompt, answer, adapter)
    except (ValueError, OSError, RuntimeError) as error:
        return str(error), None
    says = [f"Flow to {report.answer.strip()!r} in {name}."]
    says += ["No trained back attention is shipped for it."] if adapter is None else []
    return " ".join([*says, *(str(w.message) for w in caught if w.category is UserWarning)]), report


def explorer(prompt: str = "", answer: str = "", device: str = "cpu"):
    """Widgets to choose a model, a prompt and an answer; a button shows what `look` finds."""
    import ipywidgets as widgets
    from IPython.display import HTML, display

    def show(model: str, prompt: str, answer: str) -> None:
        says, report = look(model, prompt, answer, device)
        display(HTML(html.escape(says, quote=False)))
        if report is not None:
            display(report.predictions.round(3), report.neurons.round(2))
            figure = report_figure(report)
            display(figure)
            plt.close(figure)

    return widgets.interactive(
        show,
        {"manual": True, "manual_name": "Show"},
        model=widgets.Combobox(value="smollm2", options=list(EMBEDDED), ensure_option=False),
        prompt=widgets.Textarea(value=prompt, rows=3, layout=widgets.Layout(width="95%")),
        answer=widgets.Text(value=answer, placeholder="the model's own"),
    )
