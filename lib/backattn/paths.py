"""Where everything lives.

Read-only inputs are found next to the library's own file, so the working directory never matters.
Everything that is written goes below `OUTPUT`, which is the repository unless the environment
variable `BACKATTN_OUTPUT` names another folder.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"

OUTPUT = Path(os.environ.get("BACKATTN_OUTPUT") or ROOT).expanduser().resolve()
BUILD = OUTPUT / "build"
CACHE = OUTPUT / ".cache"


def run_folder(profile: str) -> Path:
    """Folder of one profile's products (executed notebooks, figures, tables, stamps)."""
    return BUILD / profile
