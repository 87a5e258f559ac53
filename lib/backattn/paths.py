"""Where the library writes: below `OUTPUT`, which is BACKATTN_OUTPUT or the repository."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path(os.environ.get("BACKATTN_OUTPUT") or ROOT).expanduser().resolve()
CACHE = OUTPUT / ".cache"
