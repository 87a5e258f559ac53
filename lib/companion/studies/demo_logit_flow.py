"""One prompt seen from all sides, and the widgets that choose it (demo_logit_flow.ipynb)."""

import contextlib
import functools
import html
import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from backattn.adapters.arms import make_arm
from backattn.adapters.back_attention import BackAttentionModel
from backattn.analysis.flow_back import flow_back
from backattn.analysis.logit_flow import logit_flow
from backattn.analysis.neuron_scores import sublayers
from backattn.files import atomic_file
from backattn.models.activations import capture
from backattn.models.lens import Lens
from backattn.models.load import load_model
from backattn.models.next_token import next_log_probs
from backattn.models.packaged import EMBEDDED
from backattn.models.tokens import encode
from backattn.training.evaluation import align_to_length
from companion import paths
from companion.report import figures
from companion.runs.perform import put_weights
from companion.runs.run import Run
from companion.runs.store import CHECKPOINTS, Store

MOST_TOKENS = 48  # more rows cannot be read, and memory grows with their square
COLUMNS = [
    "layer",
    "kind",
    "head",
    "neuron",
    "position",
    "token",
    "increase",
    "promotes",
    "answer_rank",
    "names_answer",
]
NAMES = 10  # a neuron names the answer when that is among so many words that it raises most
TRAINED = "two-hop, seed 0"  # the adapter that is shown first
EXAMPLES = (
    "Irkutsk's country's capital is",
    "Munich's country's capital is",
    "Kyoto's country's continent is",
    "Shanghai's country's language is",
)


@dataclass
class PromptReport:
    """What `inspect_prompt` found; flow and neurons are the plain model's."""

    answer: str
    predictions: pd.DataFrame  # likeliest next tokens: plain, "back attention", "another memory"
    flow: pd.DataFrame  # of `flow_back`, for the answer
    neurons: pd.DataFrame  # those that raise the answer most (nats), and what each promotes
    error: float  # how far the layer scores miss the model's own log-probability, nats
    reads: pd.DataFrame | None = None  # [memory layers, tokens], by the adapter, last position

    def save(self, folder: Path) -> Path:
        """The figure as PNG and every frame as CSV into `folder`; returns it."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("predictions", "flow", "neurons", "reads"):
            frame = getattr(self, name)
            if frame is not None:
                with atomic_file(folder / f"{name}.csv") as temporary:
                    frame.to_csv(temporary, index=name == "reads")
        figure = report_figure(self)
        with atomic_file(folder / "figure.png") as temporary:
            figure.savefig(temporary)
        plt.close(figure)
        return folder


def inspect_prompt(
    model,
    tokenizer,
    prompt: str,
    answer: str = "",
    adapter: BackAttentionModel | None = None,
    memory_of: str = "",
) -> PromptReport:
    """Logit flow of a prompt in the plain model and, with back attention on it (`adapter`), what
    that reads and what it changes.

    answer: what flow is traced to, by its first token (UserWarning where it has several); "" takes
    the model's own. memory_of: another prompt, whose memory is read as well, in place of its own.
    Raises ValueError for an empty prompt, one of more than MOST_TOKENS tokens, and another's memory
    where no adapter reads one.
    """
    if memory_of.strip() and adapter is None:
        raise ValueError("No back attention is here to read another prompt's memory: leave it out.")
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
        neurons = neurons.assign(**_promoted(model, tokenizer, prompt, neurons, flow.answer_ids[0]))
    reads = None
    if adapter is not None:
        with adapter.attention_maps() as maps:
            probabilities["back attention"] = next_log_probs(adapter, batch)[0].exp()
        if memory_of.strip():
            with adapter.edited(memory=_memory(adapter, tokenizer, memory_of, count)):
                probabilities["another memory"] = next_log_probs(adapter, batch)[0].exp()
        weights = maps[adapter.sources[0]][0, :, -1].mean(0)[:, -count:]
        tokens = back.drop_duplicates("position").sort_values("position")["token"].astype(str)
        reads = pd.DataFrame(weights.float().cpu(), list(adapter.memory_layers), tokens.tolist())
    best = dict.fromkeys(t for p in probabilities.values() for t in p.topk(5).indices.tolist())
    predictions = pd.DataFrame({name: p[list(best)] for name, p in probabilities.items()})
    predictions.insert(0, "token", [tokenizer.decode([token]) for token in best])
    return PromptReport(flow.answers[0], predictions, back, neurons[COLUMNS], flow.check(), reads)


def _memory(adapter: BackAttentionModel, tokenizer, prompt: str, length: int) -> Tensor:
    """What back attention would read of a prompt, for one of `length` tokens: [M, 1, T, D]."""
    other = encode(tokenizer, [prompt], side="left", device=adapter.base_model.device)
    states = adapter.first_pass_states(other.input_ids, other.attention_mask, other.position_ids)
    among = [adapter.needed.index(layer) for layer in adapter.memory_layers]
    return align_to_length(states[among, 0], length)[:, None]


def _promoted(model, tokenizer, prompt: str, neurons: pd.DataFrame, answer: int) -> dict:
    """With the sign that each neuron has in this prompt: promotes, the four words that it raises
    most, answer_rank, how many words it raises at least as much as the answer, and names_answer,
    whether these are at most NAMES: else it is no word that it stands for."""
    stream, vectors = capture(model, encode(tokenizer, [prompt], device=model.device)), []
    parts = {(part.layer, part.kind): part for part in sublayers(stream)}
    for row in neurons.itertuples():
        part, place, neuron = parts[row.layer, row.kind], 0, int(row.neuron)
        if row.kind == "attention":
            place, neuron = int(row.position), int(row.head) * part.head_dim + neuron
        vectors.append(part.coefficient[0, place, neuron].sign() * part.vectors[neuron])
    raised = Lens(stream.arch).directions(torch.stack(vectors))  # [neurons, V]
    words = [
        " ".join(tokenizer.decode([token]).strip() for token in row)
        for row in raised.topk(4).indices.tolist()
    ]
    ranks = (raised >= raised[:, [answer]]).sum(1).tolist()
    names = [rank <= NAMES for rank in ranks]
    return {"promotes": words, "answer_rank": ranks, "names_answer": names}


def report_figure(report: PromptReport) -> Figure:
    """Flow through attention and FFNs by layer and token and, with an adapter, what its last
    position reads. Colours end at the largest flow outside of the first token, the sink."""
    panels = 2 + (report.reads is not None)
    size = figures.WIDTH, panels * (1.2 + 0.19 * report.flow["position"].nunique())
    figure, axes = plt.subplots(panels, 1, figsize=size, layout="constrained")
    for ax, kind in zip(axes, ("attention", "ffn"), strict=False):
        beside = report.flow[(report.flow["kind"] == kind) & (report.flow["position"] > 0)]
        figures.flow_heatmap(report.flow, kind, top=beside["flow"].abs().max() or None, ax=ax)
        ax.set_title(f"flow to {report.answer.strip()!r} through {kind}")
    if report.reads is not None:
        figures.heatmap(report.reads, "weight", diverging=False, upwards=True, ax=axes[-1])
        axes[-1].tick_params(axis="x", rotation=40)
        axes[-1].set(title="what back attention reads at the last position", ylabel="memory layer")
    return figure


def shipped_adapters(name: str) -> dict[str, Run]:
    """Back attention that comes with this repository for a model: "dataset, seed" -> its run."""
    found = {}
    for path in sorted(CHECKPOINTS.glob("*.safetensors")):
        line = _store().shipped.get(path.stem, {"run": {}})
        about = {k: tuple(v) if isinstance(v, list) else v for k, v in line["run"].items()}
        if (about.get("model"), about.get("arm")) == (name, "back attention"):
            found[f"{about['dataset']}, seed {about['seed']}"] = Run(**about)
    return dict(sorted(found.items()))


@functools.cache
def _store() -> Store:
    return Store()


@functools.cache
def _base(name: str, device: str) -> tuple:
    return load_model(name, device=device)


@functools.cache
def load(name: str, device: str = "cpu", adapter: str = "") -> tuple:
    """(model, tokenizer, the model with back attention or None). adapter: one of
    `shipped_adapters`, a folder or a Hugging Face id; "" takes TRAINED, where it is shipped. What
    is loaded before shares the base model."""
    (model, tokenizer), shipped = _base(name, device), shipped_adapters(name)
    run = shipped.get(adapter or TRAINED)
    if run is None and not adapter:
        return model, tokenizer, None
    if run is None and "," in adapter and not Path(adapter).is_dir():
        known = "; ".join(shipped) or "none"
        raise ValueError(f"No adapter {adapter!r} comes with {name}; choose of: {known}.")
    if run is None:
        return model, tokenizer, BackAttentionModel.from_pretrained(model, adapter).eval()
    weights = _store().weights(run)
    wrapped = make_arm(run.arm, model, run.source_layer, run.dim, run.memory_layers)
    put_weights(wrapped, weights)
    return model, tokenizer, wrapped.eval()


def look(
    name: str,
    prompt: str,
    answer: str = "",
    device: str = "cpu",
    memory_of: str = "",
    adapter: str = "",
) -> tuple:
    """Words, and a report or None: bad input, a model and an adapter that cannot be had are put
    into words."""
    try:
        model, tokenizer, wrapped = load(name.strip(), device, adapter.strip())
        with warnings.catch_warnings(record=True, action="always") as caught:
            report = inspect_prompt(model, tokenizer, prompt, answer, wrapped, memory_of)
    except (ValueError, OSError, RuntimeError) as error:
        return str(error), None
    says = [f"Flow to {report.answer.strip()!r} in {name}."]
    says += ["No trained back attention is shipped for it."] if wrapped is None else []
    return " ".join([*says, *(str(w.message) for w in caught if w.category is UserWarning)]), report


def explorer(
    prompt: str = "", answer: str = "", device: str = "cpu", memory_of: str = "", panels: int = 1
):
    """Widgets to choose a model, an adapter, a prompt, an answer and whose memory is read; a button
    shows what `look` finds, and saves it in build/explorer. panels: several beside each other, to
    compare models or adapters."""
    import ipywidgets as widgets

    parts = [_panel(prompt, answer, device, memory_of, k) for k in range(1, panels + 1)]
    layout = widgets.Layout(flex_flow="row wrap")
    return parts[0] if panels == 1 else widgets.Box(parts, layout=layout)


def _panel(prompt: str, answer: str, device: str, memory_of: str, number: int):
    import ipywidgets as widgets
    from IPython.display import HTML, display

    def show(model: str, adapter: str, prompt: str, answer: str, memory_of: str) -> None:
        says, report = look(model, prompt, answer, device, memory_of, adapter)
        display(HTML(html.escape(says, quote=False)))
        if report is not None:
            display(report.predictions.round(3), report.neurons.round(2))
            figure = report_figure(report)
            display(figure)
            plt.close(figure)
            kept = report.save(paths.BUILD / "explorer" / str(number))
            display(HTML(html.escape(f"Saved in {kept}", quote=False)))

    wide = widgets.Layout(width="95%")
    shipped = dict.fromkeys(label for model in EMBEDDED for label in shipped_adapters(model))
    return widgets.interactive(
        show,
        {"manual": True, "manual_name": "Show"},
        model=widgets.Combobox(value="smollm2", options=list(EMBEDDED), ensure_option=False),
        adapter=widgets.Combobox(options=list(shipped), ensure_option=False, placeholder=TRAINED),
        prompt=widgets.Combobox(
            value=prompt, options=list(EXAMPLES), ensure_option=False, layout=wide
        ),
        answer=widgets.Text(value=answer, placeholder="the model's own"),
        memory_of=widgets.Textarea(
            value=memory_of, description="memory of", rows=2, layout=wide, placeholder="its own"
        ),
    )
