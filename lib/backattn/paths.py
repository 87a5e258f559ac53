"""Where the library writes: below `OUTPUT`, which is BACKATTN_OUTPUT (seen from the repository,
wherever one stands) or the repository."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = (ROOT / Path(os.environ.get("BACKATTN_OUTPUT") or ROOT).expanduser()).resolve()
CACHE = OUTPUT / ".cache"
