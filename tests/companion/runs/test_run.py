from dataclasses import asdict, dataclass, replace

from companion.runs.run import Run


def test_keys_tell_runs_apart_and_defaults_do_not_count(tiny_run):
    @dataclass(frozen=True)
    class Later(Run):
        more: int = 1

    changes = {"seed": 1, "arm": "bias", "learning_rate": 0.1, "steps": 7, "tested_in": "bfloat16"}
    changes |= {"memory_layers": (3, 4)}
    others = [replace(tiny_run, **{name: value}) for name, value in changes.items()]
    assert len({run.key for run in [tiny_run, *others]}) == 7
    assert Later(**asdict(tiny_run)).key == tiny_run.key != Later(**asdict(tiny_run), more=2).key
