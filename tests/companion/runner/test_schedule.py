"""Notebooks side by side: order, memory, failures, and the same products as one by one."""

import nbformat
import pytest
import yaml

from companion import paths
from companion.runner import schedule
from companion.runner.cli import main
from companion.runner.schedule import Job, _fits, side_by_side

WAIT = "import time\nbegan = time.time()\ntime.sleep(0.5)"


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("NOTEBOOKS", "BUILD", "FIGURES", "DATA"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    (tmp_path / "notebooks").mkdir()
    sizes = yaml.safe_dump({"smoke": {}, "paper": {}, "full": {}})
    (tmp_path / "notebooks/profiles.yml").write_text(sizes)
    return tmp_path


def write(place, name, *cells):
    """A notebook that notes when it began and ended in a file of its name."""
    build = str(place / "build/smoke")
    note = (
        f"import pathlib\nfolder = pathlib.Path({build!r})\nfolder.mkdir(exist_ok=True)\n"
        f"_ = (folder / '{name}.txt').write_text(f'{{began}} {{time.time()}}')"
    )
    code = map(nbformat.v4.new_code_cell, [WAIT, *cells, note])
    nbformat.write(nbformat.v4.new_notebook(cells=list(code)), place / f"notebooks/{name}.ipynb")


def times(place, name):
    return [float(x) for x in (place / f"build/smoke/{name}.txt").read_text().split()]


def test_they_overlap_and_the_first_and_the_ledger_run_alone(place, capsys):
    names, folder = ["00_start", "01_one", "02_two", "11_claims"], repr(str(place))
    for name in names:
        here, other = f"pathlib.Path({folder}) / '{name}'", f"pathlib.Path({folder}) / '02_two'"
        meet = f"import pathlib\n({here}).touch()"
        if name == "01_one":  # goes on when the other has begun
            soon = f"not ({other}).exists() and time.time() < began + 100"
            meet += f"\nwhile {soon}:\n    time.sleep(0.1)"
        write(place, name, meet)
    assert main(["--profile", "smoke", "--jobs", "2"]) == 0
    shown = capsys.readouterr().out
    start, one, two, last = (times(place, name) for name in names)
    assert start[1] < min(one[0], two[0]) and last[0] > max(one[1], two[1])
    assert one[1] < one[0] + 100  # the other began meanwhile
    took = [
        line.split("  took")[0]
        for line in shown.splitlines()
        if "  took" in line or " took" in line
    ]
    assert [line.split()[1] for line in took] == names  # the order of the report
    for name in names:  # each knows its own files, though others wrote at the same time
        stamp = (place / f"build/smoke/stamps/{name}.json").read_text()
        assert f"{name}.txt" in stamp
        assert not any(f"{other}.txt" in stamp for other in names if other != name)
    assert main(["--profile", "smoke", "--jobs", "2"]) == 0
    assert capsys.readouterr().out.count("skipped") == 4


def test_products_are_those_of_one_by_one(place):
    for name in ("01_one", "02_two"):
        write(place, name, "import random\nrandom.seed(1)\nrandom.random()")
    found = []
    for jobs in ("1", "2"):
        assert main(["--profile", "smoke", "--force", "--jobs", jobs]) == 0
        files = sorted((place / "build/smoke/notebooks").glob("*.ipynb"))
        found.append([path.read_bytes() for path in files])
    assert found[0] == found[1] and len(found[0]) == 2


def test_after_a_failure_nothing_new_begins(place, capsys):
    write(place, "01_bad", "1 / 0")
    write(place, "02_good", "time.sleep(2)")
    write(place, "03_later")
    assert main(["--profile", "smoke", "--jobs", "2"]) == 1
    shown = capsys.readouterr().out
    assert "ZeroDivisionError" in shown and "--from 01" in shown and "--jobs 2" in shown
    assert "03_later" not in shown
    assert (place / "build/smoke/02_good.txt").exists()  # what had begun was finished
    assert main(["--profile", "smoke", "--jobs", "2", "--keep-going"]) == 1
    assert "03_later" in capsys.readouterr().out


def test_each_outcome_goes_to_its_own_notebook(place, capsys, monkeypatch):
    """The longest begins first, fails, and what is listed before it never begins."""
    write(place, "01_short")
    write(place, "02_bad", "1 / 0")
    write(place, "03_long", "time.sleep(9)")
    seconds = {"01_short": 1, "02_bad": 100, "03_long": 90}
    took = {name: {"seconds": s, "peak_megabytes": 100} for name, s in seconds.items()}
    monkeypatch.setattr("companion.runner.committed.took", lambda profile: took)
    assert main(["--profile", "smoke", "--jobs", "2"]) == 1
    stamps = {path.stem for path in (place / "build/smoke/stamps").glob("*.json")}
    assert stamps == {"03_long"} and "FAILED: 02_bad" in capsys.readouterr().out


def job(number: str, megabytes: int | None = 1000) -> Job:
    path = paths.NOTEBOOKS / f"{number}_x.ipynb"
    return Job(path, path, "smoke", megabytes=megabytes)


def test_memory_decides_how_many_run():
    small, large, unknown = job("01"), job("02", 4000), job("03", None)
    assert _fits([large], [small], workers=2, free=4000) is None
    assert _fits([large], [], workers=2, free=1000) is large  # alone in any case
    assert _fits([large, small], [small], workers=2, free=4000) is small  # one that fits
    assert _fits([unknown], [small], workers=2, free=4000) is None
    assert _fits([small], [large], workers=1, free=99_999) is None
    assert _fits([job("11")], [small], workers=2, free=99_999) is None
    assert _fits([job("00"), small], [], workers=2, free=99_999).path.stem == "00_x"


def test_the_longest_begins_first(monkeypatch):
    order = []
    monkeypatch.setattr(schedule, "_run", lambda one: {})
    jobs = [job("01"), job("02"), job("03")]
    outcomes = list(side_by_side(jobs, 1, lambda one: order.append(one.path.stem)))
    assert order == ["01_x", "02_x", "03_x"] and [x[0] for x in outcomes] == jobs


def test_a_wrong_number_is_refused(place, capsys):
    write(place, "01_one")
    with pytest.raises(SystemExit):
        main(["--profile", "smoke", "--jobs", "0"])
    assert "at least 1" in capsys.readouterr().err
