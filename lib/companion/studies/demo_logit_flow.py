"""One prompt seen from all sides, and the widgets that choose it (demo_logit_flow.ipynb)."""

import contextlib
import html
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from backattn.adapters.back_attention import BackAttentionModel, get_back_attention_model
from backattn.adapters.config import BackAttentionConfig
from backattn.analysis.flow_back import flow_back
from backattn.analysis.logit_flow import logit_flow
from backattn.models.activations import capture
from backattn.models.decoder import describe
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


@dataclass
class PromptReport:
    """What `see` found. Probabilities are of the next token after the prompt.

    predictions: token, plain and, with an adapter, "back attention": the likeliest tokens of
    either. flow: of `flow_back`, for the answer, in the plain model. neurons: the plain model's
    that raise the answer most: layer, kind, head, neuron, position, token, increase (nats),
    promotes. reads: [memory layers, tokens], what the adapter reads at the last position, or None.
    error: how far the layer scores miss the model's own log-probability, nats.
    """

    answer: str
    tokens: list[str]
    predictions: pd.DataFrame
    flow: pd.DataFrame
    neurons: pd.DataFrame
    error: float
    reads: np.ndarray | None = None
    layers: tuple[int, ...] = ()


def inspect_prompt(
    model,
    tokenizer,
    prompt: str,
    answer: str = "",
    adapter: BackAttentionModel | None = None,
    top: int = 8,
) -> PromptReport:
    """Logit flow of a prompt in the plain model and, with back attention on it, what that reads and
    what it changes.

    Args:
        answer: what flow is traced to, by its first token; "" takes the model's own.
        adapter: `model` with back attention, or None.

    Raises ValueError for an empty prompt and one of more than MOST_TOKENS tokens; warns of an
    answer of several.
    """
    batch = encode(tokenizer, [prompt], side="left", device=model.device)
    count = int(batch.lengths[0])
    if count > MOST_TOKENS:
        raise ValueError(
            f"The prompt has {count} tokens; at most {MOST_TOKENS} can be shown. Shorten it."
        )
    reads, layers, probabilities = None, (), {}
    if adapter is not None:
        source = adapter.back_attention_config.sources[0]
        with adapter.attention_maps() as maps:
            probabilities["back attention"] = next_log_probs(adapter, batch)[0].exp()
        reads = maps[source][0, :, -1].mean(0)[:, -count:].float().cpu().numpy()
        layers = adapter.memory_layers
    with adapter.disable_adapter() if adapter else contextlib.nullcontext():
        probabilities = {"plain": next_log_probs(model, batch)[0].exp(), **probabilities}
        flow = logit_flow(model, tokenizer, [prompt], [answer] if answer.strip() else None)
        error = flow.check()
        back = flow_back(model, tokenizer, flow)
        neurons = flow.frame[flow.frame["neuron"].notna()].nlargest(top, "increase")
        neurons = neurons.assign(promotes=_promoted(model, tokenizer, prompt, neurons))
    best = dict.fromkeys(t for p in probabilities.values() for t in p.topk(5).indices.tolist())
    predictions = pd.DataFrame({name: p[list(best)] for name, p in probabilities.items()})
    predictions.insert(0, "token", [tokenizer.decode([token]) for token in best])
    tokens = back.frame.drop_duplicates("position").sort_values("position")["token"].astype(str)
    columns = ["layer", "kind", "head", "neuron", "position", "token", "increase", "promotes"]
    found = flow.answers[0], tokens.tolist(), predictions, back.frame, neurons[columns], error
    return PromptReport(*found, reads, tuple(layers))


def _promoted(model, tokenizer, prompt: str, neurons: pd.DataFrame, count: int = 4) -> list[str]:
    """The words whose logits each neuron raises most, with the sign that it has in this prompt."""
    stream = capture(model, encode(tokenizer, [prompt], device=model.device))
    lens, vectors = Lens(describe(model)), []
    for row in neurons.itertuples():
        block, last = stream.arch.blocks[row.layer], stream.hidden.shape[2] - 1
        if row.kind == "ffn":
            sign = stream.neurons[row.layer][0, last, int(row.neuron)].sign()
            vector, post = sign * block.ffn_out.weight[:, int(row.neuron)], block.norm("ffn_post")
        else:
            value = stream.expanded_values(row.layer)[
                0, int(row.position), int(row.head), int(row.neuron)
            ]
            column = int(row.head) * block.head_dim + int(row.neuron)
            vector, post = (
                value.sign() * block.attention_out.weight[:, column],
                block.norm("attention_post"),
            )
        vectors.append(post.linear(vector, vector.new_ones(())))
    likeliest = lens.directions(torch.stack(vectors)).topk(count).indices.tolist()
    return [" ".join(tokenizer.decode([token]).strip() for token in row) for row in likeliest]


def report_figure(report: PromptReport) -> Figure:
    """Flow through attention and FFNs by layer and token and, with an adapter, what its last
    position reads."""
    panels = 2 + (report.reads is not None)
    size = figures.WIDTH, panels * (1.2 + 0.19 * len(report.tokens))
    figure, axes = plt.subplots(panels, 1, figsize=size, layout="constrained")
    for ax, kind in zip(axes, ("attention", "ffn"), strict=False):
        figures.flow_heatmap(report.flow, kind, ax=ax)
        ax.set_title(f"flow to {report.answer.strip()!r} through {kind}")
    if report.reads is not None:
        grid = pd.DataFrame(report.reads, index=list(report.layers))
        figures.heatmap(grid, "weight", diverging=False, upwards=True, ax=axes[-1])
        axes[-1].set_xticks(np.arange(len(report.tokens)) + 0.5, report.tokens, rotation=40)
        axes[-1].set(title="what back attention reads at the last position", ylabel="memory layer")
    return figure


class Models:
    """Models by name, loaded when first wanted; with back attention trained on two-hop questions
    where that is shipped (notebook 03, first seed)."""

    def __init__(self, store: Store | None = None, device: str = "cpu"):
        self.store, self.device, self.kept = store or Store(), device, {}

    def get(self, name: str) -> tuple:
        """(model, tokenizer, the model with back attention or None)."""
        if name not in self.kept:
            model, tokenizer = load_model(name, device=self.device)
            self.kept[name] = model, tokenizer, self._adapter(name, model)
        return self.kept[name]

    def _adapter(self, name: str, model) -> BackAttentionModel | None:
        if name not in EMBEDDED:
            return None
        runs = found(adapter_runs(model=name, arms=["back attention"]), self.store)
        run = next(run for run in runs if run.arm == "back attention" and run.seed == 0)
        try:
            weights = self.store.weights(run)
        except FileNotFoundError:
            return None
        config = BackAttentionConfig(run.source_layer, run.dim)
        adapter = get_back_attention_model(model, config)
        put_weights(adapter, weights)
        return adapter.eval()


class Explorer:
    """Widgets to choose a model, a prompt and an answer; `box` shows them.

    A wrong input is answered in words.
    """

    def __init__(
        self,
        models: Models,
        names: Sequence[str] = tuple(EMBEDDED),
        prompt: str = "",
        answer: str = "",
    ):
        import ipywidgets as widgets

        wide, row = widgets.Layout(width="95%"), widgets.Layout(flex_flow="row wrap")
        free = {"options": list(names), "ensure_option": False}
        self.models = models
        self.model = widgets.Combobox(value=names[0], description="model", **free)
        self.prompt = widgets.Textarea(value=prompt, description="prompt", rows=3, layout=wide)
        self.answer = widgets.Text(
            value=answer, description="answer", placeholder="the model's own"
        )
        self.back = widgets.Checkbox(value=True, description="back attention")
        self.button = widgets.Button(description="Show", button_style="primary")
        self.message, self.out = widgets.HTML(), widgets.Output()
        self.button.on_click(self.show)
        choices = widgets.HBox([self.model, self.answer, self.back, self.button], layout=row)
        self.box = widgets.VBox([self.prompt, choices, self.message, self.out])

    def show(self, *_) -> None:
        """Look at what is chosen."""
        self.button.disabled, self.message.value = True, "Working …"
        self.out.clear_output()
        try:
            self._show()
        except (
            ValueError,
            OSError,
            RuntimeError,
        ) as error:  # bad input, a model that cannot be had
            self.message.value = f"<b>{html.escape(str(error))}</b>"
        finally:
            self.button.disabled = False

    def _show(self) -> None:
        from IPython.display import display

        model, tokenizer, adapter = self.models.get(self.model.value.strip())
        prompt, answer = self.prompt.value, self.answer.value
        with warnings.catch_warnings(record=True, action="always") as caught:
            chosen = adapter if self.back.value else None
            report = inspect_prompt(model, tokenizer, prompt, answer, chosen)
        notes = [str(w.message) for w in caught if w.category is UserWarning]
        if self.back.value and adapter is None:
            notes.insert(0, "No trained back attention is shipped for it.")
        says = f"Flow to {report.answer.strip()!r} in {self.model.value}."
        self.message.value = html.escape(" ".join([says, *notes]), quote=False)
        with self.out:
            display(report.predictions.round(3), report.neurons.round(2))
            figure = report_figure(report)
            display(figure)
            plt.close(figure)
