"""What each rank of test_faults.py runs, under torchrun: one fault, on rank 1.

Usage: fault_worker.py FAULT FOLDER. A rank writes its process id to FOLDER/pid-<rank>, and the time
when the fault begins to FOLDER/began.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import spdcompile
from spdcompile import CompiledModel, Plan
from tests.models import tiny, token_ids

RANK = int(os.environ["RANK"])
FAULTY = 1
SIZES = {"layers": 1, "hidden": 32, "heads": 4, "intermediate": 48}
FOREVER_S = 600
FOLDER = Path(sys.argv[2])


def compiled(seed: int = 0, drop: bool = False, transport: str = "auto") -> CompiledModel:
    """The model, on this rank."""
    model = tiny("llama", seed=seed, **SIZES)
    how = {"backend": "eager", "transport": transport}
    return spdcompile.compile(model, tp=2, spd_mask=[drop], **how)


def began() -> None:
    """Notes that the fault begins now."""
    (FOLDER / "began").write_text(str(time.time()))


def serve(fault: Callable[[], None], transport: str = "auto") -> None:
    """Three calls, the fault, and calls without an end."""
    model = compiled(transport=transport)
    for call in range(FOREVER_S * 1000):
        if call == 3 and RANK == FAULTY:
            began()
            fault()
        model(token_ids(length=8))
        time.sleep(0.01)


def raises() -> None:
    raise ValueError("no such token")


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def other_plan() -> None:
    began()
    compiled(drop=RANK == FAULTY)


def other_torch() -> None:
    if RANK == FAULTY:
        torch.__version__ = "2.0.0"
    began()
    compiled()


def other_weights() -> None:
    began()
    compiled(seed=RANK)


def other_call() -> None:
    first = compiled()
    second = first.with_mask([True])
    began()
    for _ in range(FOREVER_S):
        (second if RANK == FAULTY else first)(token_ids(length=8))


def killed_outside() -> None:
    """The others are in a collective of the program's own."""
    compiled()
    if RANK == FAULTY:
        began()
        is_killed()
    dist.barrier()


def killed_idle() -> None:
    """The others wait for nobody; torchrun ends them."""
    compiled()
    if RANK == FAULTY:
        time.sleep(1)  # for the others to be asleep
        began()
        is_killed()
    time.sleep(FOREVER_S)


def does_not_come() -> None:
    if RANK == FAULTY:
        began()
        time.sleep(FOREVER_S)
    compiled()


def compiles_long() -> None:
    """No fault: rank 1 needs longer than the timeout to load, and again to compile."""
    model = compiled()
    if RANK == FAULTY:
        with model.executor.ranks.watch.patience():
            time.sleep(2 * float(os.environ["SPD_TIMEOUT"]))
    model(token_ids(length=8))
    began()


def saves() -> None:
    """Rank 1 saves its plan where there is no room."""
    model = compiled()
    began()
    if RANK == FAULTY:
        measured = {"much": "x" * 2_000_000}
        Plan(tp=2, num_layers=1, measured=measured).save(FOLDER / "full" / "plan.json")
    for _ in range(FOREVER_S * 100):
        model(token_ids(length=8))


FAULTS: dict[str, Callable[[], None]] = {
    "raises": lambda: serve(raises),
    "killed": lambda: serve(is_killed),
    "killed at a socket": lambda: serve(is_killed, "sockets"),
    "stopped at a socket": lambda: serve(stops, "sockets"),
    "exits": lambda: serve(lambda: sys.exit(0)),
    "exits at once": lambda: serve(lambda: os._exit(0)),
    "stalls": lambda: serve(lambda: time.sleep(FOREVER_S)),
    "stopped": lambda: serve(stops),
    "torchrun killed": lambda: serve(lambda: None),
    "other plan": other_plan,
    "other torch": other_torch,
    "other weights": other_weights,
    "other call": other_call,
    "killed outside": killed_outside,
    "killed idle": killed_idle,
    "does not come": does_not_come,
    "compiles long": compiles_long,
    "full disk": saves,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    (FOLDER / f"pid-{RANK}").write_text(str(os.getpid()))
    FAULTS[sys.argv[1]]()
