"""Each rank watches the others, so that a fault ends all of them, with one message.

Two threads a rank: one tells the others through the store how far this rank is and reads how far
they are, one makes sure that the first gets answers and that torchrun still runs. What the reports
mean is in faults.py. torch's own timeouts blame whoever waited, so they are only the last resort.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from threading import Event, Lock, Thread

import torch.distributed as dist

from spdcompile.errors import RankError, SpdCompileError
from spdcompile.runtime._torch import on_compilation, started_collectives
from spdcompile.runtime.connections import in_a_line, is_broken_connection
from spdcompile.runtime.faults import Fault, Report, Seen, error_of, find_fault, find_other_call
from spdcompile.runtime.processes import Identity, end_with, torchrun_of
from spdcompile.runtime.transport import interrupt, steps

EVIDENCE_S = 3.0  # for finding out who broke a connection
LAST_WORDS_S = 3.0  # for a rank's main thread to end by itself once a fault is known


class Watch:
    """This rank's view of the ranks that it works with.

    Args:
        store: a store that all ranks share, and this watch alone uses; nothing else in it.
        rank: this rank, of all that torchrun started.
        timeout: seconds that ranks may wait for one before it counts as stalled.
    """

    def __init__(self, store: dist.Store, rank: int, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self._store, self._identity, self._parent = store, Identity.own(), torchrun_of()
        self._groups: list[dist.ProcessGroup] = []
        self._started: dict[str, int] = {}
        self._seen: dict[int, Seen] = {}
        self._who: dict[int, Identity] = {}
        self._call, self._runs, self._at, self._ended = 0, "", "", ""
        self._patient = self._beats = 0
        self._answered, self._said, self._lost = time.monotonic(), False, ""
        self._exchanging, self._saying, self._stop = Lock(), Lock(), Event()
        self._threads = [
            Thread(target=loop, name=f"spdcompile {loop.__name__}", daemon=True)
            for loop in (self._exchange_again_and_again, self._guard)
        ]

    def announce(self) -> None:
        """Lets the others know of this rank, and ties it to its torchrun."""
        if self._parent is not None:
            end_with(self._parent)
        self._store.set(f"who/{self.rank}", json.dumps(asdict(self._identity)))
        self._publish()

    def start(self) -> None:
        """Begins to watch; every rank has announced itself."""
        for thread in self._threads:
            thread.start()

    def follow(self, group: dist.ProcessGroup) -> None:
        """Watches the ranks of a group too."""
        if group in self._groups:
            return
        now = time.monotonic()
        with self._exchanging:
            for rank in dist.get_process_group_ranks(group):
                if rank not in self._seen:
                    self._who[rank] = Identity(**json.loads(self._store.get(f"who/{rank}")))
                    self._seen[rank] = Seen(Report(), now, now)
            self._groups.append(group)

    @contextmanager
    def call(self, runs: str) -> Iterator[None]:
        """Around something that all ranks of a group do together.

        Args:
            runs: what; ranks that differ in it are told so.

        Raises:
            RankError: a connection broke, with the rank that did it.
        """
        on_compilation(self._begin_slow, self._end_slow)
        outer = self._runs
        if not outer:
            self._call, self._runs = self._call + 1, runs
        try:
            yield
        except SpdCompileError:
            raise
        except Exception as error:
            if not is_broken_connection(error):
                raise
            raise self.explain(error) from error
        finally:
            self._runs, self._at = outer, self._at if outer else ""

    def at(self, place: str) -> None:
        """Says where in a call this rank is."""
        self._at = place

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Around what may take long on one rank only, such as loading."""
        self._begin_slow()
        try:
            yield
        finally:
            self._end_slow()

    def _begin_slow(self, _: object = None) -> None:
        self._patient += 1

    def _end_slow(self, _: object = None) -> None:
        self._patient -= 1
        if not self._patient:
            with suppress(Exception):  # at once: it might stall before the next report is due
                self._publish()

    def _publish(self) -> None:
        for group in self._groups:
            with suppress(RuntimeError):  # a group that was destroyed at the end of the program
                self._started[group.group_name] = started_collectives(group) + steps(group)
        self._beats += 1
        report = Report(
            beat=self._beats,
            started=dict(self._started),
            call=self._call,
            runs=self._runs,
            at=self._at,
            patient=self._patient > 0,
            ended=self._ended,
        )
        self._store.set(f"report/{self.rank}", report.to_json())

    @property
    def _beat(self) -> float:
        return min(max(self.timeout / 10, 0.1), 1.0)

    def _exchange_again_and_again(self) -> None:
        while not self._stop.wait(self._beat):
            try:
                fault = self._exchange() or self._found()
            except Exception as error:  # whatever a store raises once its server is gone
                if not self._stop.is_set():
                    self._lost = in_a_line(error)
                return
            if fault is not None:
                self._end(self._agreed(fault))

    def _exchange(self) -> Fault | None:
        """Reports, reads the others' reports; returns the fault that another rank found."""
        with self._exchanging:
            self._publish()
            ranks = list(self._seen)
            texts = self._store.multi_get([f"report/{rank}" for rank in ranks]) if ranks else []
            now = self._answered = time.monotonic()
            for rank, text in zip(ranks, texts, strict=True):
                self._seen[rank].update(Report.from_json(text), now)
                self._seen[rank].gone = self._who[rank].is_gone
            if self._store.check(["fault"]):
                return Fault.from_json(self._store.get("fault"))
        return None

    def _found(self, *, broken: bool = False) -> Fault | None:
        if (fault := self._torchrun_fault()) is not None:
            return fault
        now = time.monotonic()
        with self._exchanging:
            return find_fault(self._seen, self.timeout, now, self.rank, broken=broken)

    def _agreed(self, fault: Fault) -> Fault:
        """The fault that was found first, by whichever rank."""
        with suppress(Exception):
            return Fault.from_json(self._store.compare_set("fault", "", fault.to_json()))
        return fault

    def evidence(self) -> Fault | None:
        """Whose fault it is that a connection broke; None if nothing shows it."""
        began = time.monotonic()
        while time.monotonic() - began < EVIDENCE_S:
            try:
                fault = self._exchange() or self._found(broken=True) or self._other_call()
            except Exception:
                fault = self._torchrun_fault() or self._lost_fault()
            if fault is not None:
                return self._agreed(fault)
            time.sleep(0.1)
        silent = tuple(rank for rank, other in self._seen.items() if other.beat_at < began)
        return self._agreed(Fault(silent, "cannot be reached", self.rank)) if silent else None

    def explain(self, error: Exception) -> RankError:
        """The error to raise for a connection that broke."""
        broke = Fault((), f"A connection broke: {in_a_line(error)}", self.rank)
        return self.error(self.evidence() or self._agreed(broke))

    def _other_call(self) -> Fault | None:
        with self._exchanging:
            return find_other_call(self._seen, self.rank)

    def _torchrun_fault(self) -> Fault | None:
        if self._parent in (None, os.getppid()):
            return None
        cause = f"torchrun, process {self._parent} of {self._identity.host}, was killed"
        return Fault((), cause, self.rank)

    def _lost_fault(self) -> Fault:
        cause = (
            f"Rank {self.rank} has lost the store: torchrun, or rank 0, ended on the machine "
            f"that holds it, or that machine cannot be reached ({self._lost or 'no answer'})"
        )
        return Fault((), cause, self.rank)

    def _guard(self) -> None:
        """Notices what the exchange cannot: no torchrun, no store, no answer."""
        while not self._stop.wait(self._beat):
            waited = time.monotonic() - self._answered
            if (fault := self._torchrun_fault()) is not None:
                self._end(fault)
            elif self._runs and (self._lost or waited > self.timeout + 2 * self._beat):
                self._end(self._lost_fault())

    def error(self, fault: Fault) -> RankError:
        """The error of a fault."""
        places = {r: f"process {w.pid} of {w.host}" for r, w in self._who.items()}
        return error_of(fault, places, self.rank, self.timeout)

    def say(self, fault: Fault, error: BaseException | None = None) -> None:
        """Prints the message of a fault that this rank found first; once.

        Args:
            error: the message, if it is not the fault's own.
        """
        with self._saying, suppress(OSError):
            if fault.by == self.rank and not self._said:
                self._said = True
                # Another thread may have redirected sys.stderr for the moment.
                out = sys.__stderr__ or sys.stderr
                print(f"spdcompile: {error or self.error(fault)}", file=out, flush=True)

    def say_of_all(self, error: BaseException) -> None:
        """Prints an error that every rank raises, on one of them."""
        fault = getattr(error, "fault", None) or Fault((), "", self.rank)
        self.say(self._agreed(fault), error)

    def say_before_termination(self) -> None:
        """Says why this process is told to end, where a rank's end is the cause."""
        with suppress(Exception):
            if (fault := self._exchange() or self._found(broken=True)) is not None:
                self.say(self._agreed(fault))
            else:
                self._ended = "was told to end (SIGTERM)"
                self._exchange()

    def _end(self, fault: Fault) -> None:
        """Ends this process, and those at fault that cannot do it themselves."""
        self.say(fault)
        if self._ended or self.rank not in fault.ranks:  # else it can do nothing more
            if not fault.hanging:
                interrupt(self._groups)
            time.sleep(self._beat * 2 if fault.hanging else LAST_WORDS_S)
            for rank in fault.ranks:
                if rank in self._who and rank != self.rank:
                    self._who[rank].kill()
            interrupt(self._groups)
            time.sleep(LAST_WORDS_S if self._torchrun_fault() is None else 0)
        os._exit(1)

    def fail(self, error: BaseException) -> None:
        """Tells the others that an error ends this rank."""
        self._ended = f"failed: {in_a_line(error)}"
        with suppress(Exception):
            fault = Fault((self.rank,), self._ended, self.rank)
            agreed = self._agreed(fault)
            self._exchange()
            if agreed == fault:
                self.say(fault)

    def close(self) -> None:
        """Tells the others that this rank has ended, if they do not know yet, and stops."""
        self._stop.set()
        if not self._ended:
            self._ended = "exited while others wait for it"
        with suppress(Exception):
            self._exchange()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self._beat)
