"""What is committed stays readable: every result has the key of its run, and every checkpoint fits
its arm."""

import json
from dataclasses import fields

import pytest

from companion import paths
from companion.runs.perform import load_trained
from companion.runs.run import Run
from companion.runs.store import Store

LINES = [
    json.loads(line)
    for line in (paths.DATA / "runs.jsonl").read_text(encoding="utf-8").splitlines()
]
CHECKPOINTS = sorted((paths.DATA / "checkpoints").glob("*.safetensors"))


def run_of(line: dict) -> Run:
    names = {field.name for field in fields(Run)}
    return Run(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in line["run"].items() if k in names}
    )


def test_every_result_has_the_key_of_its_run():
    assert len(LINES) > 500
    assert [line["key"] for line in LINES] == [run_of(line).key for line in LINES]


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
def test_every_checkpoint_fits_its_arm(path):
    store, line = Store(), next(line for line in LINES if line["key"] == path.stem)
    with load_trained(run_of(line), store) as (model, _):
        assert all(p.isfinite().all() for p in model.parameters() if p.requires_grad)
