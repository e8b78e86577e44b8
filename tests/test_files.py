"""Files appear whole, and have reached the disk before they take the place of others."""

import errno
import os
import stat
from pathlib import Path

import pytest

from hf_dynsparse.files import flush, flush_tree, write_atomically


@pytest.fixture
def calls(monkeypatch):
    """What is flushed and renamed, in order."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor):
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watch_replace(source, target):
        seen.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    return seen


def test_a_file_is_flushed_before_it_takes_its_place(tmp_path, calls):
    file = tmp_path / "new" / "a.txt"
    write_atomically(file, "ä\n")
    assert file.read_bytes() == "ä\n".encode()
    (first, unfinished), *rest = calls
    assert (first, Path(unfinished).parent) == ("fsync", file.parent)
    assert rest == [("replace", str(file)), ("fsync", str(file.parent))]
    write_atomically(file, b"\x00")
    assert file.read_bytes() == b"\x00"
    assert os.listdir(file.parent) == ["a.txt"]


def test_others_may_read_what_they_could_read_before(tmp_path):
    write_atomically(tmp_path / "ours", "")
    Path(tmp_path, "plain").write_text("")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_what_fails_leaves_the_old_file(tmp_path, monkeypatch, function):
    file = tmp_path / "a.txt"
    write_atomically(file, "old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert file.read_text() == "old"


def test_everything_in_a_folder_is_flushed_and_then_the_folder(tmp_path, calls):
    for name in ("a", "sub/b", "sub/c"):
        Path(tmp_path, name).parent.mkdir(exist_ok=True)
        Path(tmp_path, name).touch()
    flush_tree(tmp_path)
    order = [path for _, path in calls]
    assert sorted(order) == sorted(str(tmp_path / name) for name in ("", "a", "sub", "sub/b", "sub/c"))
    assert order.index(str(tmp_path / "sub")) > max(order.index(str(tmp_path / "sub" / name)) for name in "bc")
    assert order[-1] == str(tmp_path)


def test_a_system_that_cannot_flush_folders(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refuse)
    flush(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        flush(tmp_path / "file")
