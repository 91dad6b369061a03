"""Starts ranks under torchrun and sees that nothing of them is left."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
_SHM = Path("/dev/shm")


class Ended(NamedTuple):
    """How a launch ended: the exit status and output of torchrun, the time.time() of the end."""

    code: int
    output: str
    at: float

    @property
    def messages(self) -> list[str]:
        """What spdcompile said, with the first line alone."""
        lines = self.output.splitlines()
        return [line.split("spdcompile: ")[1] for line in lines if "spdcompile: " in line]


class Launch:
    """A torchrun, and all that descends from it.

    Args:
        command: the whole command line.
        environment: further variables.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._mark = f"SPD_TEST_LAUNCH={secrets.token_hex(8)}"
        name, value = self._mark.split("=")
        own = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", name: value}
        self._segments = set(_SHM.glob("*"))
        self.torchrun = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **own, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, limit: float) -> Ended:
        """Waits until torchrun and every process that descends from it are gone."""
        output, _ = self.torchrun.communicate(timeout=limit)
        deadline = time.time() + limit
        while self.processes() and time.time() < deadline:
            time.sleep(0.05)
        assert not self.processes(), "orphans"
        return Ended(self.torchrun.returncode, output, time.time())

    def processes(self) -> list[int]:
        """The living processes that descend from torchrun, by their environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                marked = self._mark.encode() in (folder / "environ").read_bytes().split(b"\0")
                if marked and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(folder.name))
        return found

    def segments(self) -> list[Path]:
        """New shared memory that no living process holds."""
        new = set(_SHM.glob("*")) - self._segments
        return [path for path in new if not any(_holders(path))]

    def kill(self) -> None:
        """Ends whatever is left."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        with suppress(subprocess.TimeoutExpired):
            self.torchrun.communicate(timeout=10)


@contextmanager
def launched(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[Launch]:
    """A launch, of which nothing is left afterwards."""
    launch = Launch(command, environment or {})
    try:
        yield launch
    finally:
        launch.kill()


def _holders(path: Path) -> Iterator[int]:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if str(path) in maps.read_text():
                yield int(maps.parent.name)
