"""Files that others have published: found or fetched, and checked."""

import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from backattn.files import atomic_file
from companion.paths import CACHE


@dataclass(frozen=True)
class Published:
    """A published file: its place in the folder BACKATTN_DATASETS, its public home, and its sha256.

    sha256: None where it is not known; then the first fetch writes it down beside the file.
    """

    path: str
    url: str
    sha256: str | None = None


def published(file: Published) -> Path:
    """Where the file lies: in the folder BACKATTN_DATASETS, or else fetched into the cache.

    Raises FileNotFoundError when it is not in that folder, OSError that says where to put it by
    hand when it cannot be fetched, and ValueError when its sha256 is another one.
    """
    folder = os.environ.get("BACKATTN_DATASETS")
    path = (Path(folder) if folder else CACHE / "datasets") / file.path
    note = path.with_suffix(".sha256")
    if not path.exists():
        if folder:
            raise FileNotFoundError(
                f"{path} is missing. Put it there, or unset BACKATTN_DATASETS to fetch {file.url}."
            )
        try:
            with urllib.request.urlopen(file.url, timeout=30) as answer:
                content = answer.read()
        except OSError as error:
            raise OSError(
                f"Cannot fetch {file.url} ({error}). Put the file into <folder>/{file.path} and "
                "set BACKATTN_DATASETS to that folder."
            ) from error
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
        if file.sha256 is None:
            with atomic_file(note) as temporary:
                temporary.write_text(hashlib.sha256(content).hexdigest())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    expected = file.sha256 or (note.read_text().strip() if note.exists() else found)
    if found != expected:
        raise ValueError(
            f"{path} has another sha256 than the published file. It was not used: delete it, and "
            "it is fetched again unless BACKATTN_DATASETS is set."
        )
    return path
