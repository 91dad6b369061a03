"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes a file under a temporary name beside it and renames it; on an error nothing is left.

    Args:
        path: where to; what is no regular file, such as a pipe, is written to directly.
        content: what; a text as UTF-8.

    Raises:
        OSError: the file cannot be written. What was there before is there still.
    """
    target, data = Path(path), content if isinstance(content, bytes) else content.encode()
    if target.exists() and not target.is_file():
        target.write_bytes(data)
        return
    target = target.resolve()  # a link keeps pointing to the file
    aside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a full disk may show only here
        aside.replace(target)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A directory whose files are moved into `directory` in the end, and are gone on an error.

    Raises:
        OSError: it cannot be made, or a file cannot be moved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=directory))
    try:
        yield aside
        for file in sorted(aside.iterdir()):
            file.replace(directory / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
