"""Which rank is at fault, from what all ranks report of themselves. No process, no clock."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from spdcompile.errors import RankError

PATIENCE_S = 1800.0  # for a rank that loads or compiles, and for collectives of torch itself


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank says of itself, again and again.

    Args:
        beat: grows with every report.
        started: collectives started so far, by group.
        call: calls begun so far.
        runs: what the call runs; ranks that differ in it do not fit together. "" between calls.
        at: where in it the rank is, for readers.
        patient: it loads or compiles, which may take long.
        ended: why it ended; "" while it runs.
    """

    beat: int = 0
    started: Mapping[str, int] = field(default_factory=dict)
    call: int = 0
    runs: str = ""
    at: str = ""
    patient: bool = False
    ended: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Fault:
    """Why the ranks cannot go on.

    Args:
        ranks: those at fault; none if it is nobody's.
        cause: what is wrong with them: "stalled: ...".
        by: the rank that found out, and says so.
        hanging: those at fault cannot end by themselves.
    """

    ranks: tuple[int, ...]
    cause: str
    by: int
    hanging: bool = False

    def __str__(self) -> str:
        names = ", ".join(map(str, self.ranks))
        return f"Rank{'s' * (len(self.ranks) > 1)} {names} {self.cause}" if names else self.cause

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Fault:
        data = json.loads(text)
        return cls(tuple(data["ranks"]), data["cause"], data["by"], data["hanging"])


@dataclass(slots=True)
class Seen:
    """A rank as another sees it.

    Args:
        report: its latest.
        beat_at: when that came.
        moved_at: when it last started a collective or a call.
        behind_at: since when others have started collectives that it has not; None if it has all.
        gone: whether its process is known to have ended.
    """

    report: Report
    beat_at: float
    moved_at: float
    behind_at: float | None = None
    gone: bool = False

    def update(self, report: Report, now: float) -> None:
        """Takes a newer report."""
        if report.beat != self.report.beat:
            self.beat_at = now
        if _progress(report) != _progress(self.report):
            self.moved_at, self.behind_at = now, None
        self.report = report


def find_fault(
    seen: dict[int, Seen], timeout: float, now: float, by: int, *, broken: bool = False
) -> Fault | None:
    """The fault that the reports show, if any.

    A rank is judged only while others wait for it. Which collective a rank has not started tells
    who waits for whom: among ranks that wait for one another, the last one is to blame.

    Args:
        seen: every rank of the group, this one too.
        timeout: seconds that ranks may wait for one.
        by: this rank.
        broken: this rank's connection to another broke, so it waits whatever the reports say.
    """
    _mark_behind(seen, now)
    for rank, other in seen.items():
        ended, needed = other.report.ended, broken or other.behind_at is not None
        if ended and (needed or ended.startswith("failed")):
            return Fault((rank,), ended, by)
        if other.gone and not ended and needed:
            return Fault((rank,), f"was killed, or exited, {_place_of(other)}", by)
        limit = PATIENCE_S if other.report.patient else timeout
        if ended or other.gone or now - other.beat_at <= limit:
            continue
        if any(peer.report.runs and not peer.gone for r, peer in seen.items() if r != rank):
            silent = f"has not been heard of for {limit:g} s; it was {_place_of(other)}"
            return Fault((rank,), silent, by, hanging=True)
    late = [rank for rank, other in seen.items() if _is_late(other, timeout, now)]
    if late:
        least = min(_total(seen[rank]) for rank in late)
        last = tuple(rank for rank in late if _total(seen[rank]) == least)
        cause = f"stalled: the others have waited {timeout:g} s; it is {_place_of(seen[last[0]])}"
        return find_other_call(seen, by) or Fault(last, cause, by, hanging=True)
    if all(now - other.moved_at > timeout for other in seen.values()):
        return find_other_call(seen, by)
    return None


def error_of(fault: Fault, places: Mapping[int, str], rank: int, timeout: float) -> RankError:
    """What a user is told of a fault.

    Args:
        places: which process each rank is, for readers.
        rank: this one.
        timeout: seconds that ranks may wait for one.
    """
    where = [f"rank {rank}: {place}" for rank, place in places.items() if rank in fault.ranks]
    error = RankError(
        f"{fault}.",
        where="\n".join(where) or f"rank {rank}",
        needed=f"every rank makes the same calls, none more than {timeout:g} s after the others",
        fix="see what that rank printed; where it needs so long, set timeout= or SPD_TIMEOUT",
    )
    error.fault = fault
    return error


def _mark_behind(seen: Mapping[int, Seen], now: float) -> None:
    most: dict[str, int] = {}
    for other in seen.values():
        for group, count in other.report.started.items():
            most[group] = max(most.get(group, 0), count)
    for other in seen.values():
        is_behind = any(count < most[group] for group, count in other.report.started.items())
        if not is_behind:
            other.behind_at = None
        elif other.behind_at is None:
            other.behind_at = now


def _is_late(other: Seen, timeout: float, now: float) -> bool:
    limit = PATIENCE_S if other.report.patient else timeout
    return other.behind_at is not None and now - other.behind_at > limit


def find_other_call(seen: Mapping[int, Seen], by: int) -> Fault | None:
    """The fault of ranks that are in the same call, and run different things in it."""
    inside = {rank: other.report for rank, other in seen.items() if other.report.runs}
    if len({report.call for report in inside.values()}) != 1:
        return None
    if len({report.runs for report in inside.values()}) < 2:
        return None
    listing = "; ".join(f"rank {rank}: {report.runs}" for rank, report in inside.items())
    return Fault(tuple(inside), f"run different things: {listing}", by)


def _place_of(other: Seen) -> str:
    report = other.report
    return f"in call {report.call} {report.at}".rstrip() if report.runs else "between two calls"


def _total(other: Seen) -> int:
    return sum(other.report.started.values())


def _progress(report: Report) -> tuple[object, ...]:
    return dict(report.started), report.call, report.runs, report.patient
