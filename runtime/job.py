"""This process among those of the launch: its store, its watch, its groups."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from spdcompile.errors import RankError, UsageError
from spdcompile.runtime._torch import default_store, set_timeout
from spdcompile.runtime.connections import is_broken_connection
from spdcompile.runtime.faults import PATIENCE_S
from spdcompile.runtime.processes import before_termination
from spdcompile.runtime.watch import Watch

TIMEOUT_S = 120.0
VARIABLE = "SPD_TIMEOUT"
_RESULTS_TIMEOUT = timedelta(days=1)  # replicas may have more or less to do
_LAST_RESORT = timedelta(seconds=PATIENCE_S)

_current: Job | None = None


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that a model is split over, and the replicas beside them.

    Args:
        group: the tensor-parallel ranks of this replica.
        across: the ranks that hold the same shards, one of each replica.
        watch: notices when one of the group is at fault.
    """

    group: dist.ProcessGroup
    across: dist.ProcessGroup
    watch: Watch

    @property
    def replica(self) -> int:
        """Which replica this rank belongs to."""
        return dist.get_rank(self.across)

    @property
    def num_replicas(self) -> int:
        return dist.get_world_size(self.across)

    def joined(self, results: list[Any], count: int) -> list[Any]:
        """The results of all replicas, each of which had every n-th of `count` requests."""
        if self.num_replicas == 1:
            return results
        shares: list[list[Any]] = [[] for _ in range(self.num_replicas)]
        dist.all_gather_object(shares, results, group=self.across)
        return [shares[index % len(shares)][index // len(shares)] for index in range(count)]


class Job:
    """All processes that a launcher started, as this one sees them."""

    def __init__(self, device: torch.device, timeout: float) -> None:
        self._ranks: dict[int, Ranks] = {}
        self._device, self._limit = device, timedelta(seconds=timeout)
        self._shared: dist.Store | None = None
        if dist.is_initialized():
            store, self._rank, self._size = default_store(), dist.get_rank(), dist.get_world_size()
        else:
            self._shared, self._rank, self._size = _rendezvous(self._limit)
            store = self._shared.clone()
        self._own = dist.PrefixStore("spdcompile", store)
        self.watch = Watch(self._own, self._rank, timeout)
        self.world: dist.ProcessGroup | None = None

    def start(self) -> None:
        """Waits for the other processes, and makes the default group if there is none.

        Raises:
            RankError: not all have come.
        """
        self.watch.announce()
        _await_everyone(self._own, self._size, self._limit)
        if self._shared is not None:
            dist.init_process_group(
                "nccl" if self._device.type == "cuda" else "gloo",
                store=self._shared,
                rank=self._rank,
                world_size=self._size,
                timeout=_LAST_RESORT,
            )
        self.world = dist.group.WORLD
        self.watch.start()
        atexit.register(self.watch.close)

    def ranks(self, tp: int, device: torch.device) -> Ranks:
        """The groups of a model that is split over `tp` ranks; made once for each tp."""
        if tp not in self._ranks:
            shape = (self._size // tp, tp)
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "tp"))
            ranks = Ranks(mesh.get_group("tp"), mesh.get_group("dp"), self.watch)
            if ranks.group is not self.world:  # whose timeout may be the program's own
                set_timeout(ranks.group, _LAST_RESORT)
            if ranks.num_replicas > 1:
                set_timeout(ranks.across, _RESULTS_TIMEOUT)
            self.watch.follow(ranks.group)
            self._ranks[tp] = ranks
        return self._ranks[tp]


def join(device: torch.device, timeout: float) -> Job:
    """This process' place in the launch; made from torchrun's environment when first asked for.

    Args:
        timeout: seconds that ranks may wait for one, from now on.

    Raises:
        RankError: not all processes have come.
    """
    global _current  # noqa: PLW0603  (as torch's default group: one a process)
    if _current is None or _current.world is None or _current.world is not dist.group.WORLD:
        _current = Job(device, timeout)
        if sys.excepthook is not _hook:
            _hook.before, sys.excepthook = sys.excepthook, _hook
            before_termination(lambda: _current and _current.watch.say_before_termination())
        _current.start()
    _current.watch.timeout = timeout
    return _current


def chosen_timeout(timeout: float | None, environ: Mapping[str, str] = os.environ) -> float:
    """Seconds that ranks may wait for one: SPD_TIMEOUT, else the argument, else 120.

    Raises:
        UsageError: not a number above zero.
    """
    text = environ.get(VARIABLE)
    found: object = text if text is not None else timeout
    if found is None:
        return TIMEOUT_S
    with suppress(TypeError, ValueError):
        if 0 < (seconds := float(found)) < float("inf") and not isinstance(found, bool):
            return seconds
    raise UsageError(
        "The timeout is no number of seconds.",
        where=f"environment variable {VARIABLE}" if text is not None else "timeout",
        found=repr(found),
        needed="a number above 0",
    )


def _rendezvous(limit: timedelta) -> tuple[dist.Store, int, int]:
    try:
        return next(iter(dist.rendezvous("env://", timeout=limit)))
    except (dist.DistError, RuntimeError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(
            "The store of the launch cannot be reached.",
            where=address,
            found=str(error).splitlines()[0],
            needed="torchrun, or rank 0, to answer there",
            fix="start all ranks within the timeout; check MASTER_ADDR, MASTER_PORT and firewalls",
        ) from error


def _await_everyone(store: dist.Store, size: int, limit: timedelta) -> None:
    names = [f"who/{rank}" for rank in range(size)]
    try:
        store.wait(names, limit)
    except (dist.DistError, RuntimeError) as error:
        missing = [rank for rank, name in enumerate(names) if not store.check([name])]
        listing = ", ".join(map(str, missing))
        raise RankError(
            f"Rank{'s' * (len(missing) > 1)} {listing} did not come.",
            where="compile",
            found=f"{size - len(missing)} of {size} ranks after {limit.total_seconds():g} s",
            needed="every rank calls compile, none more than the timeout after the others",
            fix="see what that rank printed; set timeout= or SPD_TIMEOUT if it needs so long",
        ) from error


class _Hook:
    """sys.excepthook: an error that all ranks raise is printed by one, as a message."""

    before: Callable[..., Any] = sys.__excepthook__

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if _current is None:
            self.before(kind, error, trace)
            return
        watch = _current.watch
        if isinstance(error, Exception) and is_broken_connection(error):
            # From a collective of the program's own; or it has nothing to do with ranks.
            fault = watch.evidence()
            error = error if fault is None else watch.error(fault)
        if getattr(error, "on_every_rank", False):
            watch.say_of_all(error)
        else:
            self.before(kind, error, trace)
            watch.fail(error)


_hook = _Hook()
