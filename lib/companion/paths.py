"""Where everything of the companion lives; what is written goes below `OUTPUT`."""

from pathlib import Path

from backattn.paths import CACHE as CACHE
from backattn.paths import OUTPUT as OUTPUT
from backattn.paths import ROOT

DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
BUILD = OUTPUT / "build"


def run_folder(profile: str) -> Path:
    """Folder of one profile's products (executed notebooks, figures, tables, stamps)."""
    return BUILD / profile
