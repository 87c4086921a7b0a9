"""Files that are complete or absent."""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tpn.files import ABANDONED, atomic_write, require_writable


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as unfinished:
        unfinished.write_text("one")
        (unfinished.parent / "beside.txt").write_text("two")
        assert not path.exists()
    assert {file.name: file.read_text() for file in path.parent.iterdir()} == {"a.txt": "one", "beside.txt": "two"}


def test_errors_name_the_file_that_cannot_be_written(tmp_path):
    """Root may write everywhere, so if the tests run as root, this one switches to another user."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        path = os.path.join(folder, "a.txt")
        if user == 0:
            os.seteuid(65534)
        try:
            for write in (require_writable, lambda path: atomic_write(path).__enter__()):
                with pytest.raises(PermissionError) as error:
                    write(path)
                assert error.value.filename == path
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o755)
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        require_writable(tmp_path / "none" / "a.txt")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        require_writable(tmp_path)
    require_writable(tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_what_another_user_left_over_is_in_nobodys_way():
    """As above, this needs a second user."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        os.mkdir(os.path.join(folder, ".incomplete-a.txt-1"), 0o700 if user == 0 else 0)
        if user == 0:
            os.seteuid(65534)
        try:
            with atomic_write(os.path.join(folder, "a.txt")) as unfinished:
                unfinished.touch()
        finally:
            os.seteuid(user)
        assert os.path.exists(os.path.join(folder, "a.txt"))


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted():
        with atomic_write(path) as unfinished:
            unfinished.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a.txt") as unfinished:
            unfinished.touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_files_move_only_when_all_are_written(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("old")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    def write():
        with atomic_write(tmp_path / "a.txt") as unfinished:
            for name in ("a.txt", "b.txt"):
                (unfinished.parent / name).write_text("new")

    with pytest.raises(OSError, match="No space"):
        write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old", "b.txt": "old"}


def test_many_writers(tmp_path):
    def write(number):
        for _ in range(100):
            with atomic_write(tmp_path / "a.txt") as unfinished:
                unfinished.write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, range(4))) == [None] * 4
    assert (tmp_path / "a.txt").read_text() in "0123"


@pytest.mark.parametrize("name", ["a.txt", "a**b.txt", "a[id].txt"])
def test_leftovers_of_killed_processes_are_removed_later(tmp_path, name):
    young, old = tmp_path / f".incomplete-{name}-1", tmp_path / f".incomplete-{name}-2"
    for folder in (young, old):
        folder.mkdir()
    os.utime(old, (time.time() - 2 * ABANDONED,) * 2)
    with atomic_write(tmp_path / name) as unfinished:
        unfinished.touch()
    assert young.exists()
    assert not old.exists()
