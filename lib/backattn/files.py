"""Writing files so that a crash leaves nothing half-written."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import get_ident

from filelock import FileLock, Timeout

from backattn.runtime import say

_FULL = "the disk is full or your quota is used up: free some space"
_CLOSED = "the folder is not writable: change its permissions"
_ADVICE = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EACCES: _CLOSED, errno.EPERM: _CLOSED}
_ADVICE[errno.EROFS] = "the file system is read-only"


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Make the parent of `path`; say plainly that the disk is full or the place not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        raise OSError(
            error.errno,
            f"Cannot write {path}: {_ADVICE[error.errno]}, or set BACKATTN_OUTPUT to another "
            "folder. Nothing half-written is left.",
        ) from error


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty staging folder that becomes `folder` on success and vanishes on failure.

    Raises OSError with a plain message when the disk is full or the place is not writable.
    """
    with _disk_errors(folder):
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield staging
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` that replaces it on success and vanishes on failure."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}-{get_ident()}{path.suffix}")
    with _disk_errors(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_process(path: Path) -> Iterator[None]:
    """Hold the right to write `path`; another process that asks for it waits, and says so."""
    with _disk_errors(path):
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            say(f"Another process writes {path}; waiting for it.")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
