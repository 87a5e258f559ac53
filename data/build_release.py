"""Makes build/release/: the trained back-attention adapters of the first seed, each a folder with
a card and a zip to attach to a release, and SHA256SUMS. Half a minute; 4 GB for Gemma 3.

.venv/bin/python data/build_release.py
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from backattn import runtime
from backattn.adapters.saving import card
from backattn.models.packaged import EMBEDDED
from companion import paths
from companion.runs.perform import load_trained
from companion.runs.run import Run
from companion.runs.store import CHECKPOINTS, Store, answers_right

CARD = """
Back attention at layer {layer} with d′ = {dim}, trained for {steps} steps on the dataset
*{dataset}* of the [companion]({home}) to arXiv 2502.10835; the base model is frozen. It answers
{right} of {n} test questions.

It was made to test a claim, not to be used. On two-hop questions controls of the same size that
cannot read back gain about as much, and ordinary English becomes less likely: its perplexity is
{perplexity:.0f} with the adapter. The comparison: notebooks 03 and 07.

Licence: MIT for the adapter; for the base model its own.
"""


def released(store: Store) -> Iterator[tuple[Run, dict]]:
    """The runs whose adapters are published, and their results."""
    for line in store.shipped.values():
        run = Run(**line["run"])
        shipped = (CHECKPOINTS / f"{line['key']}.safetensors").exists()
        if shipped and run.arm == "back attention" and run.model in EMBEDDED and run.seed == 0:
            yield run, line


def publish(run: Run, result: dict, store: Store, folder: Path, home: str) -> Path:
    """Write one adapter into `folder`; returns its zip."""
    name = f"{run.model}-{re.sub(r'[^a-z0-9]+', '-', run.dataset.lower())}"
    with load_trained(run, store) as (wrapped, _):
        wrapped.save_pretrained(folder / name)
    right, about = answers_right(result), dict(dim=run.dim, steps=run.steps, dataset=run.dataset)
    about |= dict(layer=run.source_layer, right=right.sum(), n=len(right), home=home)
    text = card(run.model, name) + CARD.format(perplexity=result["perplexity"], **about)
    (folder / name / "README.md").write_text(text, encoding="utf-8")
    return Path(shutil.make_archive(str(folder / name), "zip", folder, name))


def main() -> None:
    runtime.use_threads()
    folder, store = paths.BUILD / "release", Store()
    folder.mkdir(parents=True, exist_ok=True)
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    home = citation["repository-code"]
    zips = [publish(*one, store, folder, home) for one in released(store)]
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in zips]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    print(f"{len(zips)} adapters in {folder}")


if __name__ == "__main__":
    main()
