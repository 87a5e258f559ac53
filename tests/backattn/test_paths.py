"""Installed without its repository, the library writes into the user's cache folder."""

import os
import shutil
import subprocess
import sys

import pytest

from backattn import paths

PROGRAM = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path = [sys.argv[1], *(p for p in sys.path if p != sys.argv[2])]
import backattn
from backattn import load_model, logit_flow
from backattn.paths import OUTPUT
flow = logit_flow(*load_model("tiny-llama"), ["France's capital is"])
print(backattn.__file__, OUTPUT, flow.check() < 1e-4, sep="\\n")
"""


@pytest.mark.parametrize("wished", [None, "elsewhere", "/elsewhere"])
def test_it_works_outside_of_the_repository(tmp_path, wished):
    site = tmp_path / "env/lib/site-packages"
    shutil.copytree(paths.ROOT / "lib/backattn", site / "backattn")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "caches"), "BACKATTN_OUTPUT": ""}
    environment.pop("PYTHONPATH", None)
    home = expected = tmp_path / "caches/backattn"
    if wished:
        expected = tmp_path / wished[1:] if wished[0] == "/" else home / wished
        environment["BACKATTN_OUTPUT"] = str(expected) if wished[0] == "/" else wished
    command = [sys.executable, "-c", PROGRAM, str(site), str(paths.ROOT / "lib")]
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **how)
    assert done.stdout.splitlines() == [
        *(str(site / "backattn/__init__.py"), str(expected), "True")
    ], done.stderr
