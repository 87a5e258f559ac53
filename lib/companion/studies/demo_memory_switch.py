"""demo_memory_switch: questions, their flow, and what trained back attention answers when its
second pass reads another memory. `report.moving` makes a page of them that needs no kernel."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from backattn.analysis.flow_back import flow_back
from backattn.analysis.logit_flow import logit_flow
from backattn.models.tokens import continuation_ids
from companion.measures.memory import MemoryProbe, MemoryProbes, last_logits
from companion.questions.datasets import AGAIN
from companion.questions.prompts import TEMPLATES
from companion.report import figures
from companion.runs.as_asked import asked as questions_of
from companion.runs.as_asked import questions
from companion.runs.perform import load_trained
from companion.runs.plans import adapter_runs, found, lead_runs
from companion.runs.premise import premise_runs
from companion.runs.run import OWN, Run
from companion.runs.store import Store

MEMORIES = {  # what the second pass reads -> in a reader's words
    "own": "its own memory",
    "another": "another question's",
    "mean": "the mean of all others",
    "off": "nothing: adapter off",
}
SETS = {  # dataset -> in a reader's words
    "two-hop": "facts known by heart",
    AGAIN[0]: "facts given in the prompt",
    "premise": "invented facts, in a small model made for the paper's premise",
}
ENTITIES = ("e1", "e2", "e3")
KINDS = ("attention", "ffn")
LIKELIEST = 3  # answers that are shown, of each memory


def switched_runs(model: str = "smollm2") -> list[Run]:
    """Back attention on each of SETS, first seed: notebook 03's, 07's *in context*, 08's."""
    plan = adapter_runs(model, arms=["back attention"]) + lead_runs() + premise_runs("premise")
    runs = found([one for one in plan if one.trials and one.run.dataset in SETS], Store())
    return [run for run in runs if run.arm == "back attention" and run.seed == 0]


def memory_switch(
    runs: Sequence[Run], count: int = 25, asked: int = 60, device: str = "cpu"
) -> list[dict]:
    """What the page shows, a record per question: the first `count` of each run's first `asked`
    test questions (of invented ones: of all) whose e2 and e3 are different single tokens, so that
    an answer is a whole word.

    A record: set (of SETS), sink (whether the first token is an attention sink: it is in models of
    text; in an invented prompt it is e1), prompt, question (its end), second (the second hop
    alone), e1, e2, e3; tokens, second_tokens; words, of which right are accepted, and
    probabilities, of each word one with each of MEMORIES; flow and second_flow {kind: [T, L]},
    nats, of the plain model to e3; running {entity: log-probability of its first token after each
    sub-layer}; reads [T, M], what the last position reads of memory_layers. Donors and means are
    of the same questions.
    Raises ValueError where no question is fit to be shown.
    """
    records = []
    for run, probe in _probes(runs, asked, device):
        rows = _of_one_token(probe.tokenizer, probe.frame)[:count]
        if not len(rows):
            raise ValueError("No question has an e2 and an e3 of one token each: ask more.")
        say = TEMPLATES["possessive"].say if run.model not in OWN else _say_invented
        records += [
            {"set": run.dataset, "sink": run.model not in OWN, **record}
            for record in _records(probe, rows, say)
        ]
    return records


def _probes(runs: Sequence[Run], count: int, device: str) -> Iterator[tuple[Run, MemoryProbe]]:
    told = [run for run in runs if run.model not in OWN]
    yield from zip(told, MemoryProbes(told, Store(), count, device), strict=True)
    for run in runs:
        if run.model in OWN:  # "e3 r7 r12": few share their relations, so all are asked
            frame = questions_of(run, "test").rename(columns={"prompt": "two_hop", "group": "e2"})
            words = frame["two_hop"].str.split(expand=True).set_axis(["e1", "r1", "r2"], axis=1)
            about = {"e3": frame["answer"].str.strip(), "seed": run.seed, "pair": words["r1"]}
            frame = frame.drop(columns="r2").join(words).assign(**about, question=range(len(frame)))
            frame[["e2_aliases", "e3_aliases"]] = ""
            labels = [np.array(["e1", "r1", "last"])] * len(frame)
            with load_trained(run, Store(), device) as (wrapped, tokenizer):
                items = questions(run, tokenizer, "test")
                yield run, MemoryProbe(wrapped, tokenizer, items, frame, labels=labels)


def _say_invented(*words: str) -> str:
    return " ".join(words)


def _of_one_token(tokenizer, frame: pd.DataFrame) -> np.ndarray:
    """The rows whose e2 and e3 are one token each, and not the same."""
    words = [
        frame[name].map(lambda word: continuation_ids(tokenizer, word)) for name in ("e2", "e3")
    ]
    return np.flatnonzero(
        [len(one) == len(two) == 1 and one != two for one, two in zip(*words, strict=True)]
    )


def _records(probe: MemoryProbe, rows: np.ndarray, say: Callable[..., str]) -> Iterator[dict]:
    weights, *_ = probe.read()
    memories = (None, probe.exchanged(), probe.averaged())
    logits = [probe.logits(memory=memory) for memory in memories]
    frame, tokenizer = probe.frame.loc[rows].reset_index(drop=True), probe.tokenizer
    first = {
        name: [continuation_ids(tokenizer, word)[0] for word in frame[name]] for name in ENTITIES
    }
    with probe.wrapped.disable_adapter():
        logits.append(last_logits(probe.wrapped, probe.items))
        model, prompts = probe.wrapped.base_model, frame["two_hop"].tolist()
        seconds = [say(x.e2, x.r2) for x in frame.itertuples()]
        flows = {
            name: logit_flow(model, tokenizer, prompts, ids, "layer") for name, ids in first.items()
        }
        flow = _grids(flow_back(model, tokenizer, flows["e3"], "linear").frame)
        alone = logit_flow(model, tokenizer, seconds, first["e3"], "layer")
        second = _grids(flow_back(model, tokenizer, alone, "linear").frame)
    for place, row in enumerate(rows):
        yield {
            "prompt": prompts[place],
            "question": say(frame["e1"][place], frame["r1"][place], frame["r2"][place]),
            "second": seconds[place],
            **{name: frame[name][place] for name in ENTITIES},
            "tokens": flow[place]["tokens"],
            "second_tokens": second[place]["tokens"],
            **_answers(
                tokenizer,
                (first["e3"][place], first["e2"][place]),
                probe.items.accepted[row],
                [x[row] for x in logits],
            ),
            "flow": {kind: flow[place][kind] for kind in KINDS},
            "second_flow": {kind: second[place][kind] for kind in KINDS},
            "running": {
                name: x.layers.loc[x.layers["prompt"] == place, "log_prob_after"].round(2).tolist()
                for name, x in flows.items()
            },
            "memory_layers": list(probe.memory_layers),
            "reads": weights[row][-1].T.round(3).tolist(),
        }


def _grids(frame: pd.DataFrame) -> list[dict]:
    """Of each prompt of `FlowBack.frame` its tokens, and by kind the flow, [T, L]."""
    found = []
    for _, part in frame.groupby("prompt"):
        tokens = part.drop_duplicates("position").sort_values("position")["token"].astype(str)
        wide = part.pivot_table("flow", "position", ["kind", "layer"], observed=True).round(2)
        grids = {kind: wide[kind].to_numpy().tolist() for kind in KINDS}
        found.append({"tokens": tokens.tolist(), **grids})
    return found


def _answers(tokenizer, named: Sequence[int], accepted: frozenset, logits: list[Tensor]) -> dict:
    """words, right and probabilities: of e3, e2, and the LIKELIEST with any memory."""
    by_memory = [row.float().softmax(-1) for row in logits]
    likeliest = [x for p in by_memory for x in p.topk(LIKELIEST).indices.tolist()]
    tokens = list(dict.fromkeys([*named, *likeliest]))
    return {
        "words": [tokenizer.decode([token]) for token in tokens],
        "right": [token in accepted for token in tokens],
        "probabilities": [[round(p[token].item(), 4) for p in by_memory] for token in tokens],
    }


def switch_table(records: Sequence[dict]) -> pd.DataFrame:
    """set, number, question, e3, memory (of MEMORIES), says, names (e3 for an accepted answer, e2,
    e1 or other), probability (of what it says), changed (from what it says with its own memory)."""
    rows = []
    for number, record in enumerate(records, 1):
        p = np.array(record["probabilities"])  # [words, memories]
        own = p[:, 0].argmax()
        for place, memory in enumerate(MEMORIES):
            said = p[:, place].argmax()
            about = {name: record[name] for name in ("set", "question", "e3")} | {"number": number}
            about |= {"memory": memory, "says": record["words"][said].strip()}
            about |= {"names": _named(record, said), "probability": p[said, place]}
            rows.append(about | {"changed": said != own})
    return pd.DataFrame(rows)


def _named(record: dict, said: int) -> str:
    """Whom a word names, by its place in `words`."""
    if record["right"][said]:
        return "e3"
    word = record["words"][said].strip()
    return next((name for name in ("e2", "e1") if word == record[name]), "other")


def switch_figure(table: pd.DataFrame) -> Figure:
    """Whom each question's answer names, by what the second pass reads; a panel for each set."""
    sets = list(table.groupby("set", sort=False))
    figure, axes = plt.subplots(
        len(sets), 1, figsize=(figures.WIDTH, 1.7 * len(sets)), layout="constrained", squeeze=False
    )
    for ax, (name, part) in zip(axes[:, 0], sets, strict=True):
        place = part["number"] - part["number"].min() + 1
        for who, look in figures.OUTCOMES.items():
            if who not in set(table["names"]):
                continue
            mine = part["names"] == who
            row = part.loc[mine, "memory"].map(list(MEMORIES).index)
            style = {"color": look.colour, "marker": "s", "ls": "", "ms": 9, "label": who}
            ax.plot(place[mine], row, **style)
        ax.set(title=SETS[name], xlabel="question", ylim=(3.6, -0.6))
        ax.set_yticks(range(len(MEMORIES)), MEMORIES.values())
    axes[0, 0].legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.15))
    return figure
