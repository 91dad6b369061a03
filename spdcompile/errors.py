"""One family of errors; a message says where, what was found, what was needed, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_LABEL_WIDTH = len("needed")


class SpdCompileError(Exception):
    """Base of all errors that spdcompile raises on purpose.

    Args:
        summary: one sentence that says what went wrong.
        where: the node, layer, file or argument concerned.
        found: what was there.
        needed: what should have been there.
        fix: what the reader can do about it.

    A part that is None is left out of the message. Errors survive pickling, so that a rank can
    send one to its parent process.
    """

    on_every_rank = False
    """Whether all ranks raise it, so that one of them is enough to print it."""

    def __init__(
        self,
        summary: str,
        *,
        where: str | None = None,
        found: str | None = None,
        needed: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(summary)
        self.summary = summary
        self.where = where
        self.found = found
        self.needed = needed
        self.fix = fix

    def __str__(self) -> str:
        parts = {
            "where": self.where,
            "found": self.found,
            "needed": self.needed,
            "fix": self.fix,
        }
        lines = [_line(label, text) for label, text in parts.items() if text is not None]
        return "\n".join([self.summary, *lines])

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args` alone, which drops required keyword arguments.
        return _restore, (type(self), self.args, self.__dict__.copy())


def _line(label: str, text: str) -> str:
    prefix = f"  {label:<{_LABEL_WIDTH}} : "
    return prefix + text.replace("\n", "\n" + " " * len(prefix))


def _restore(
    cls: type[SpdCompileError], args: tuple[Any, ...], state: dict[str, Any]
) -> SpdCompileError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class UsageError(SpdCompileError, ValueError):
    """A mistake in what the user asked for: bad mask, tp out of range, no weights, wrong model."""


class CheckpointError(SpdCompileError, ValueError):
    """A checkpoint lacks a tensor, or has one that is extra, misshapen, cut short or not finite."""


class CaptureError(SpdCompileError):
    """The model could not be captured as one graph."""


class NoRuleError(SpdCompileError):
    """An operator met a placement that no row of its rule table covers."""


class InvariantError(SpdCompileError):
    """A program does not have a property that the next step relies on."""


class PlanError(SpdCompileError, ValueError):
    """A plan is malformed, or is not the plan of this model, tp or group of ranks."""


class ArtefactError(SpdCompileError, ValueError):
    """A saved artefact is malformed, damaged, or of another model."""


class SaveError(SpdCompileError):
    """A file could not be written; nothing of it is left, and what was there before still is."""


class RankError(SpdCompileError):
    """A rank failed, stalled or ended, or the ranks do not fit together: none can go on."""

    on_every_rank = True


class CollectiveCountError(SpdCompileError):
    """The emitted collectives are not those that the plan keeps."""


class PassError(SpdCompileError):
    """A pass failed; raise it `from` the cause.

    Args:
        summary: one sentence that says what went wrong.
        pass_name: the pass that failed.
        passes_before: the passes that had run before it, in order.
        found, needed, fix: as in SpdCompileError; `where` is made of the names.
    """

    def __init__(
        self,
        summary: str,
        *,
        pass_name: str,
        passes_before: Sequence[str] = (),
        found: str | None = None,
        needed: str | None = None,
        fix: str | None = None,
    ) -> None:
        before = ", ".join(passes_before) or "no other pass"
        where = f"pass {pass_name}, after {before}"
        super().__init__(summary, where=where, found=found, needed=needed, fix=fix)
        self.pass_name = pass_name
        self.passes_before = tuple(passes_before)


class RefusalError(SpdCompileError, ValueError):
    """A sync point was to be dropped that cannot be dropped.

    Args:
        summary: one sentence that says what went wrong.
        point: the name of the sync point, such as `model.layers.3.attn`.
        reason: why it cannot be dropped.
        needed, fix: as in SpdCompileError; `where` is the point and `found` the reason.
    """

    def __init__(
        self,
        summary: str,
        *,
        point: str,
        reason: str,
        needed: str | None = None,
        fix: str | None = None,
    ) -> None:
        where = f"sync point {point}"
        super().__init__(summary, where=where, found=reason, needed=needed, fix=fix)
        self.point = point
        self.reason = reason
