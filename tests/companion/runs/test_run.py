from dataclasses import asdict, dataclass, replace

from companion.runs.run import Run


def test_keys_tell_runs_apart(tiny_run):
    changes = {"seed": 1, "arm": "bias", "learning_rate": 0.1, "steps": 7, "tested_in": "bfloat16"}
    others = [replace(tiny_run, **{name: value}) for name, value in changes.items()]
    assert len({run.key for run in [tiny_run, *others]}) == 6
    assert replace(tiny_run).key == tiny_run.key


def test_a_new_setting_at_its_default_leaves_keys_what_they_are(tiny_run):
    @dataclass(frozen=True)
    class Later(Run):
        more: int = 1

    assert Later(**asdict(tiny_run)).key == tiny_run.key != Later(**asdict(tiny_run), more=2).key
