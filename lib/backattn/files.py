"""Writing files so that a crash leaves nothing half-written."""

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty staging folder that becomes `folder` on success and vanishes on failure.

    Raises OSError with a plain message when the disk is full or the place is not writable.
    """
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield staging
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staging, folder)
    except OSError as error:
        raise _disk_error(error, folder) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` on success and vanishes on failure."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_process(path: Path) -> Iterator[None]:
    """Hold the right to write `path` while the block runs; another process that asks for it waits, and says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"Another process writes {path}; waiting for it.", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise _disk_error(error, path) from error
    try:
        yield
    finally:
        lock.release()


def _disk_error(error: OSError, path: Path) -> OSError:
    advice = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "your disk quota is used up: free some space",
        errno.EACCES: "the folder is not writable: change its permissions",
        errno.EPERM: "the folder is not writable: change its permissions",
        errno.EROFS: "the file system is read-only",
    }.get(error.errno)
    if advice is None:
        return error
    return OSError(
        error.errno,
        f"Cannot write {path}: {advice}, or set BACKATTN_OUTPUT to another folder. Nothing half-written is left.",
    )
