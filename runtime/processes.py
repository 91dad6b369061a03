"""The processes of a job on one machine: who they are, whether they live, and their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread, Timer, current_thread, main_thread

_PR_SET_PDEATHSIG = 1
_DEAD_STATES = "ZX"
_LAST_ACT_S = 2.0


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, so that no other is taken for it.

    Args:
        host: name of its machine, for readers.
        place: machine and namespaces in which `pid` counts; another network is another machine.
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
        return "/".join([boot, *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net"))])
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


def before_termination(act: Callable[[], object]) -> None:
    """Has SIGTERM end this process only after `act`, which may take a moment.

    torchrun sends it to all others as soon as one rank is gone, before they can say which. A
    program that handles SIGTERM itself is left to do so; so are processes forked from this one.
    """
    own = os.getpid()

    def last(status: int) -> None:
        act()
        os._exit(status)

    def end(number: int, _: object) -> None:
        status = 128 + number
        if os.getpid() != own:
            os._exit(status)
        # Threads, since the main one may hold what `act` needs.
        for thread in (Thread(target=last, args=[status]), Timer(_LAST_ACT_S, os._exit, [status])):
            thread.daemon = True
            thread.start()

    if current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)


def end_with(parent: int, environ: Mapping[str, str] = os.environ) -> None:
    """Has the kernel end this process when its parent does.

    The first rank of a machine is only woken, from a stop too, so that it can say what happened
    before it ends itself.
    """
    signal_at_end(
        parent, signal.SIGCONT if environ.get("LOCAL_RANK", "0") == "0" else signal.SIGKILL
    )


def signal_at_end(parent: int, sent: signal.Signals) -> None:
    """Has the kernel send this process a signal when its parent ends, even while it is stopped."""
    with suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(sent))
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
