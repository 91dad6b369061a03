"""The processes of a job on one machine: who they are, whether they live, and their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_DEAD_STATES = "ZX"


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, so that no other is taken for it.

    Args:
        host: name of its machine, for readers.
        place: machine and namespace in which `pid` counts.
        pid: its number there.
        born: when it started, since numbers are used again.
    """

    host: str
    place: str
    pid: int
    born: str

    @classmethod
    def own(cls) -> Identity:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _place(), pid, _born(pid) or "")

    @property
    def is_local(self) -> bool:
        """Whether this process could see and end it."""
        return bool(self.born) and self.place == _place()

    @property
    def is_gone(self) -> bool:
        """Whether it has surely ended; False for a process of another machine."""
        return self.is_local and _born(self.pid) != self.born

    def kill(self) -> None:
        """Ends it if it is of this machine and still lives."""
        if self.is_local and not self.is_gone:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: then nobody is local
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a living process started, in ticks; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in _DEAD_STATES else fields[18]


def torchrun_of(environ: Mapping[str, str] = os.environ) -> int | None:
    """The process id of the torchrun that started this rank; None if something else did."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in environ else None


def end_with(parent: int, *, speak: bool) -> None:
    """Has the kernel end this process when its parent does.

    Args:
        speak: only wake it from a stop, so that it can say what happened before it ends itself.
    """
    sent = signal.SIGCONT if speak else signal.SIGKILL
    with suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(sent))
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
