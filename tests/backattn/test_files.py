"""A crash or a full disk leaves nothing half-written."""

import errno

import pytest

from backattn.files import atomic_file, atomic_folder


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("writer", [atomic_folder, atomic_file])
def test_a_disk_error_leaves_nothing_half_written(tmp_path, writer, code):
    with (
        pytest.raises(OSError, match="Nothing half-written is left"),
        writer(tmp_path / "model") as staging,
    ):
        (staging / "part" if staging.is_dir() else staging).write_bytes(b"x" * 100)
        raise OSError(code, "as the system says it")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_writing_keeps_the_old_file(tmp_path):
    file = tmp_path / "result.csv"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(file) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
