"""Write files that are complete or absent."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree

ABANDONED = 3600.0
"""Seconds after which an unfinished file belongs to a process that was killed."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to; move the file to `path` when the block ends without an error.

    Readers see the old file or the new one, never a part. The parent folder is created if necessary. Other files written beside
    the yielded path move too, and `path` itself is moved last.

    Example:
        >>> with atomic_write("metrics.json") as unfinished:
        ...     unfinished.write_text("{}", encoding="utf-8")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(f".incomplete-{path.name}-*"):
        with suppress(FileNotFoundError):  # its process has just finished
            newest = max(file.stat().st_mtime for file in (left_over, *left_over.iterdir()))
            if time.time() - newest > ABANDONED:
                rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".incomplete-{path.name}-") as folder:
        unfinished = Path(folder, path.name)
        unfinished.touch()
        mode = unfinished.stat().st_mode  # as the umask says; safetensors writes files that only their owner can read
        unfinished.unlink()
        yield unfinished
        files = sorted(Path(folder).iterdir(), key=lambda file: file == unfinished)
        for file in files:
            file.chmod(mode)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        for file in files:
            os.replace(file, path.parent / file.name)
