"""What a hosted notebook lacks is said, and installed where it is small."""

import subprocess
import sys

import pytest

from companion import notebook, paths


@pytest.fixture
def installed(monkeypatch):
    commands = []
    monkeypatch.setattr(notebook.subprocess, "run", lambda command, check: commands.append(command))
    return commands


def test_only_what_is_missing_is_installed_and_named(installed, monkeypatch, capsys):
    notebook.setup("some")
    assert not installed
    monkeypatch.setitem(notebook.LIGHT, "no_such_module", "no-such-package")
    notebook.setup("some")
    assert installed[0][-1] == "no-such-package" and "peft" not in installed[0]
    assert "Installing what is missing: no-such-package" in capsys.readouterr().out


def test_a_large_package_that_is_too_old_is_refused(installed, monkeypatch):
    monkeypatch.setitem(notebook.FLOORS, "transformers", "999")
    with pytest.raises(ImportError, match=r"%pip install -U 'transformers>=999'"):
        notebook.setup("some")
    assert not installed


def test_the_set_up_cell_needs_no_small_package_to_begin():
    """Else it would stop before it can install them."""
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in notebook.LIGHT)
    code = f"import sys; {hidden}from companion import notebook"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=paths.ROOT / "lib")


def test_floors_are_those_of_the_package():
    listed = (paths.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{name}>={least}"' in listed for name, least in notebook.FLOORS.items())
