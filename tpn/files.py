"""Write files that are complete or absent, refuse paths before any work, notice files that have changed, find the cache."""

import errno
import glob
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree

StrPath = str | os.PathLike[str]
"""The path of a file or folder."""

ABANDONED = 3600.0
"""Seconds after which an unfinished file belongs to a process that was killed."""


@contextmanager
def atomic_write(path: StrPath) -> Iterator[Path]:
    """Yield a path to write to; move the file to `path` when the block ends without an error.

    Readers see the old file or the new one, never a part. The parent folder is created if necessary. Other files written beside
    the yielded path move too, and `path` itself is moved last.

    Example:
        >>> with atomic_write("metrics.json") as unfinished:
        ...     unfinished.write_text("{}", encoding="utf-8")
    """
    path = Path(path)
    for left_over in path.parent.glob(f".incomplete-{glob.escape(path.name)}-*"):
        with suppress(OSError):  # its process has just finished, or is that of another user
            newest = max(file.stat().st_mtime for file in (left_over, *left_over.iterdir()))
            if time.time() - newest > ABANDONED:
                rmtree(left_over, ignore_errors=True)
    with _errors_about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".incomplete-{path.name}-")
    with temporary as folder:
        unfinished = Path(folder, path.name)
        unfinished.touch()
        mode = unfinished.stat().st_mode  # as the umask says; safetensors writes files that only their owner can read
        unfinished.unlink()
        yield unfinished
        files = sorted(Path(folder).iterdir(), key=lambda file: file == unfinished)
        for file in files:
            file.chmod(mode)
            with file.open("r+b") as written:  # Windows flushes only what may be written
                os.fsync(written.fileno())
        for file in files:
            os.replace(file, path.parent / file.name)


def refuse_url(path: StrPath) -> None:
    """Raise FileNotFoundError for a URL, in which `Path` joins the two slashes."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) and not os.path.exists(path):
        url = re.sub(":/+", "://", str(path), count=1)
        raise FileNotFoundError(f"{url} is a URL, and tpn reads files: download it first (for a stream, see tpn timeline --help)")


def require_writable(path: StrPath) -> None:
    """Raise OSError, before any work, if a file cannot be written: it is a folder, or its own folder is missing or read-only."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    with _errors_about(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def _errors_about(path: Path) -> Iterator[None]:
    """Let an error about a temporary file name the file that it is for."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def file_sha256(path: StrPath) -> str:
    """Return the SHA-256 of a file in hexadecimal; one core hashes about 1,500 MB/s with the processor's instructions for it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_intact(path: Path, record: Path, sha256: str | None = None, *, verify: bool = False) -> bool:
    """Return whether a file has its SHA-256; read it only if it was not verified before or has changed since.

    The comparison takes about 0.7 s per GB, once. `record` remembers it with the size and the time of the file's last change, so
    that later calls read nothing else until the file changes. Damage that leaves this time unchanged, such as that of a failing
    disk, is found with `verify` only. Where `record` cannot be written, the process remembers the comparison.

    Args:
        path: the file.
        record: the path of a small file with the result.
        sha256: in hexadecimal. Default: that in `record`; a file without a known one is intact.
        verify: compare again.
    """
    known = _read_record(record)
    facts = _facts(path, sha256 or known.get("sha256"))
    if facts["sha256"] is None or (facts == known and not verify):
        return True
    intact = file_sha256(path) == facts["sha256"]
    if facts != known or not intact:
        _write_record(record, facts if intact else {"sha256": facts["sha256"]})
    return intact


def remember_sha256(path: Path, record: Path, sha256: str) -> None:
    """Write `record` for `is_intact`: the file has this SHA-256 now."""
    _write_record(record, _facts(path, sha256))


_UNWRITTEN: dict[Path, dict[str, object]] = {}
"""Records whose folder is read-only."""


def _facts(path: Path, sha256: object) -> dict[str, object]:
    stat = path.stat()
    return {"sha256": sha256, "size": stat.st_size, "modified_ns": stat.st_mtime_ns}


def _read_record(record: Path) -> dict[str, object]:
    try:
        facts = _UNWRITTEN.get(record) or json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _write_record(record: Path, facts: dict[str, object]) -> None:
    try:
        with atomic_write(record) as unfinished:
            unfinished.write_text(json.dumps(facts), encoding="utf-8")
        _UNWRITTEN.pop(record, None)
    except OSError:
        _UNWRITTEN[record] = facts


def cache_folder(cache_dir: StrPath | None = None) -> Path | None:
    """Return the folder for downloads: `cache_dir` or $TPN_CACHE. None is that of the library that downloads."""
    folder = cache_dir or os.environ.get("TPN_CACHE")
    return Path(folder).expanduser() if folder else None
