"""Where commands write what they found: a file, or stdout."""

from __future__ import annotations

from pathlib import Path

from spdcompile.errors import UsageError
from spdcompile.files import write_whole

STDOUT = "-"


def check_target(option: str, target: str | None) -> None:
    """Raises UsageError if nothing can be written there: before the work, and not after it."""
    if target and not Path(target).parent.is_dir():
        raise _unwritable(option, target, f"{Path(target).parent} is not a directory")


def write_output(option: str, target: str, text: str) -> None:
    """Writes a text, whole or not at all.

    Args:
        option: the option that named the target, for messages.
        target: a path, or - for stdout.
        text: without the last line's end.

    Raises:
        UsageError: it cannot be written.
    """
    if target == STDOUT:
        print(text)
        return
    try:
        write_whole(target, f"{text}\n")
    except OSError as error:
        raise _unwritable(option, target, str(error)) from error


def _unwritable(option: str, target: str, found: str) -> UsageError:
    return UsageError(
        "The report cannot be written.",
        where=f"{option} {target}",
        found=found,
        needed="a file in a directory that exists and can be written, or - for stdout",
    )
