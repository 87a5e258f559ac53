"""Where the library writes: below `OUTPUT`. That is the repository or, where the package is
installed without it, the user's cache folder; else BACKATTN_OUTPUT, seen from there, wherever one
stands."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_CACHES = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
_HOME = ROOT if (ROOT / "pyproject.toml").exists() else _CACHES / "backattn"
OUTPUT = (_HOME / Path(os.environ.get("BACKATTN_OUTPUT") or _HOME).expanduser()).resolve()
CACHE = OUTPUT / ".cache"
