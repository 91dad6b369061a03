"""Measures entries in processes of their own, so that a crash or an endless loop is a row."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import torch

from tests.zoo.rows import Row

Measure = Callable[[str], Row]
_FORK = multiprocessing.get_context("fork")  # torch and transformers are imported once
_POLL_SECONDS = 0.5
_MAX_BYTES = 8 << 30  # a config that is not small must not take the machine with it


@dataclass(frozen=True, slots=True)
class _Running:
    entry: str
    process: ForkProcess
    began: float


def measure_all(
    entries: Sequence[str], measure: Measure, *, jobs: int, limit_s: float
) -> Iterator[Row]:
    """Yields the row of each entry as it comes.

    Args:
        jobs: processes at a time, of one thread each.
        limit_s: wall time that one entry may take.
    """
    waiting, running = list(entries), dict[Connection, _Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                receiver, child = _start(waiting.pop(0), measure)
                running[receiver] = child
            ready = wait(list(running), timeout=_POLL_SECONDS)
            for receiver, child in list(running.items()):
                row = _row_of(receiver, child, receiver in ready, limit_s)
                if row is not None:
                    del running[receiver]
                    receiver.close()
                    yield row
    finally:
        for child in running.values():
            child.process.kill()


def _start(entry: str, measure: Measure) -> tuple[Connection, _Running]:
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_run, args=(sender, entry, measure))
    process.start()
    sender.close()
    return receiver, _Running(entry, process, time.monotonic())


def _run(sender: Connection, entry: str, measure: Measure) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_BYTES, _MAX_BYTES))
    with open(os.devnull, "w") as nowhere:  # torch prints whole graphs when an export fails
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    try:
        row = measure(entry)
    except Exception as error:
        row = Row(entry, stage="crash", failure=f"{type(error).__name__}: {error}")
    sender.send(row)


def _row_of(receiver: Connection, child: _Running, ready: bool, limit_s: float) -> Row | None:
    """The row of a process that has ended or must end; None while it may go on."""
    seconds = time.monotonic() - child.began
    if ready:
        try:
            row = receiver.recv()
        except EOFError:
            child.process.join()
            text = f"the process ended with exit code {child.process.exitcode}"
            row = Row(child.entry, stage="crash", failure=text, seconds=seconds)
    elif seconds > limit_s:
        child.process.kill()
        text = f"not done after {limit_s:.0f} s"
        row = Row(child.entry, stage="time", failure=text, seconds=seconds)
    else:
        return None
    child.process.join()
    return row
