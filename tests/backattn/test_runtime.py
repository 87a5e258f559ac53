"""What is said to people while something runs, and memory that is given back."""

import platform

import numpy as np
import psutil
import pytest

from backattn import runtime


def test_a_line_for_people_stays_out_of_executed_notebooks(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(runtime.PROGRESS_FILE, raising=False)
    runtime.say("waiting")
    assert capsys.readouterr().err == "waiting\n"
    monkeypatch.setenv(runtime.PROGRESS_FILE, str(tmp_path / "progress"))
    runtime.say("waiting")
    assert (tmp_path / "progress").read_text() == "waiting\n" and capsys.readouterr().err == ""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do it themselves")
def test_freed_memory_goes_back_to_the_system():
    process = psutil.Process()
    pieces = [np.ones(8_000) for _ in range(4_000)]  # 64 kB each, so kept in the heap
    held = pieces[::8]  # between the others, so that the heap does not shrink by itself
    del pieces
    before = process.memory_info().rss
    runtime.release_memory()
    assert before - process.memory_info().rss > 100 * 2**20
    assert all(piece[0] == 1 for piece in held)
