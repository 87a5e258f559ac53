"""The committed notebooks as a static site, of what notebooks/_config.yml and _toc.yml say."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from backattn.files import atomic_folder
from companion import paths


def build(folder: Path) -> Path:
    """Write the site into `folder`; returns its index.html. Raises RuntimeError with Jupyter Book's
    own words when a page or a link fails."""
    program = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    files = ["--config", paths.NOTEBOOKS / "_config.yml", "--toc", paths.NOTEBOOKS / "_toc.yml"]
    with tempfile.TemporaryDirectory() as made, atomic_folder(folder) as staging:
        command = [*program, paths.NOTEBOOKS.parent, *files, "--path-output", made]
        command += ["-W", "--keep-going", "-q"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        html = Path(made) / "_build" / "html"
        if done.returncode or not (html / "index.html").exists():
            found = re.findall(r"^.*(?:WARNING|ERROR|Error).*$", done.stderr, re.MULTILINE)
            words = found or [done.stderr[-2000:]]
            raise RuntimeError("The site could not be built:\n" + "\n".join(words))
        shutil.copytree(html, staging, dirs_exist_ok=True)
        for page in paths.FIGURES.glob("*.html"):  # pages of their own, which Jupyter Book skips
            shutil.copy(page, staging / "figures")
    return folder / "index.html"
