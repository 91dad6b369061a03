"""Runs a module as ranks under torchrun on this machine, for measurements."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import current_thread, main_thread

from spdcompile.errors import SpdCompileError, UsageError
from spdcompile.machine import usable_cores

_STDERR = 2
_PATIENCE_S = 60.0  # torchrun kills ranks after 30 s of its own


class MeasuringError(SpdCompileError):
    """The processes that measure failed, or did not end in time."""


def check_cores(tp: int, *, fix: str) -> None:
    """Raises UsageError if ranks would have to share cores: that measures waiting, not adding.

    Args:
        fix: what the user can do instead.
    """
    cores = usable_cores()
    if tp > cores:
        raise UsageError(
            "Latencies cannot be measured on this machine.",
            where=f"tp={tp}",
            found=f"{cores} cores, for {tp} processes that wait for each other",
            needed=f"{tp} cores",
            fix=fix,
        )


def run_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    ranks: int,
    timeout: float,
    fix: str | None = None,
    progress: bool = False,
) -> None:
    """Runs a module in so many processes; all that they started ends with them.

    Args:
        module: its name, for `python -m`.
        timeout: seconds after which the processes are ended.
        fix: what the user can do if they fail.
        progress: pass what they print to stdout on to this process' stderr.

    Raises:
        MeasuringError: they failed, or did not end in time.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", module, *arguments]
    with subprocess.Popen(
        command,
        env={"OMP_NUM_THREADS": "1", **os.environ},
        stdout=_STDERR if progress else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            with _raising_on_termination():
                printed, said = process.communicate(timeout=timeout)
        except BaseException as error:
            _end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise MeasuringError(
                    "The measurement took too long.",
                    found=f"no result after {timeout:.0f} s",
                    fix=f"{fix}, or more time" if fix else "give it more time",
                ) from error
            raise
    if process.returncode:
        lines = [*(printed or "").strip().splitlines(), *said.strip().splitlines()]
        raise MeasuringError("The measurement failed.", found=_cause(lines), fix=fix)


@contextmanager
def _raising_on_termination() -> Iterator[None]:
    """SIGTERM raises SystemExit meanwhile, unless the program handles it itself."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    ours = current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(torchrun: subprocess.Popen[str]) -> None:
    """Ends torchrun by the signal at which it ends its ranks, which are no part of its session."""
    torchrun.terminate()
    try:
        torchrun.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        torchrun.kill()
        torchrun.communicate()


def _cause(lines: Sequence[str]) -> str:
    """What the first process that failed said last; torchrun's own summary comes behind it."""
    for start, line in enumerate(lines):
        if "Traceback (most recent call last)" in line:
            prefix = line.partition("Traceback")[0]  # torch's, such as [rank1]:
            own = (text.removeprefix(prefix) for text in lines[start + 1 :])
            return next((text for text in own if text and not text.startswith(" ")), line)
    return "\n".join(lines[-8:])
