"""The directories in which kernels are kept and compiled: the user's own, and nobody else's."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from spdcompile.files import write_whole
from spdcompile.log import Component, get_logger
from spdcompile.runtime._torch import default_kernel_directory

_LOG = get_logger(Component.RUNTIME)
VARIABLE, INDUCTOR_VARIABLE = "SPD_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"
MANIFEST = "kept.json"
_UNUSED_S = 60 * 24 * 3600.0
_WHILE_WRITTEN = (".lock", ".tmp")


class WorkDirectory:
    """The directory that Inductor uses in this process.

    Args:
        root: the user's own; the directory is made in it, and removed at exit.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.kept = root, make_private(root / "kept")
        work = make_private(root / "work")
        with locked(work):
            _remove_left(work)
            self.path = Path(tempfile.mkdtemp(dir=work))
            self._lock = _lock_of(self.path).open("w")  # held as long as this process lives
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.compiled = False
        self._known: set[str] = set()
        self._owner = os.getpid()
        atexit.register(self.remove)

    def note(self, _: object) -> None:
        """Something is compiled."""
        self.compiled = True

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Has Inductor use it, and what it used before again afterwards."""
        before = os.environ.get(INDUCTOR_VARIABLE)
        os.environ[INDUCTOR_VARIABLE] = str(self.path)
        try:
            yield
        finally:
            if before is None:
                del os.environ[INDUCTOR_VARIABLE]
            else:
                os.environ[INDUCTOR_VARIABLE] = before

    def add(self, name: str, content: bytes) -> None:
        """Writes a file that was kept."""
        target = self.path / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, content)
        self._known.add(name)

    def new_files(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the files that are new since this was asked last."""
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            whole = path.is_file() and not path.name.endswith(_WHILE_WRITTEN)
            if whole and name not in self._known:
                self._known.add(name)
                yield name, path.read_bytes()

    def remove(self) -> None:
        """Removes it; not in a process that was forked from this one."""
        if os.getpid() == self._owner:
            shutil.rmtree(self.path, ignore_errors=True)
            _lock_of(self.path).unlink(missing_ok=True)
            self._lock.close()


_work: WorkDirectory | None = None


def work_directory(environ: Mapping[str, str] = os.environ) -> WorkDirectory | None:
    """The directory of this process, made when first asked for.

    Returns: None, so that Inductor does as it is told otherwise, where the user names a directory
        for it, or where there is none that is the user's alone.
    """
    global _work  # noqa: PLW0603  (Inductor has one a process)
    chosen = environ.get(INDUCTOR_VARIABLE)
    if chosen is not None and chosen != default_kernel_directory():
        return None
    root = root_directory(environ)
    if _work is None or _work.root != root:
        try:
            _work = WorkDirectory(make_private(root))
        except OSError as error:
            _tell_once(f"Compiled kernels are not kept: {error}")
            return None
        _remove_unused(_work.kept)
    return _work


def work_in_use() -> WorkDirectory | None:
    """The directory that Inductor uses now, if it is this process' own."""
    in_use = _work is not None and os.environ.get(INDUCTOR_VARIABLE) == str(_work.path)
    return _work if in_use else None


def root_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where kernels are kept: SPD_CACHE_DIR, else spdcompile in the user's cache directory."""
    return _root(environ.get(VARIABLE), environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))


@cache  # asked for at every call of a program
def _root(own: str | None, caches: str | None, _: str | None) -> Path:
    if own:
        return Path(own).absolute()
    return Path(caches or Path.home() / ".cache") / "spdcompile"


def make_private(directory: Path) -> Path:
    """Makes a directory that nobody else may write to.

    Raises:
        OSError: somebody else may, or it cannot be made.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or others:
        raise PermissionError(f"{directory} is no directory that this user alone may write to")
    return directory


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Alone of all processes that ask for this directory."""
    with _lock_of(directory).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")


@cache
def _tell_once(message: str) -> None:
    _LOG.warning("%s", message)


def _remove_left(work: Path) -> None:
    """Removes what processes that were killed left."""
    for lock in work.glob("*.lock"):
        with suppress(OSError), lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its process lives
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)


def _remove_unused(kept: Path) -> None:
    """Removes what has not been used for long."""
    for manifest in kept.glob(f"*/{MANIFEST}"):
        with suppress(OSError):
            if time.time() - manifest.stat().st_mtime > _UNUSED_S:
                with locked(manifest.parent):
                    shutil.rmtree(manifest.parent, ignore_errors=True)
