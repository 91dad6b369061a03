"""Collectives of a rank that is alone: instead of exchanging, they wait as long as that would take.

A program names its delays, and `set_delays` says how long they are, so that one compiled program
serves all links. On CUDA a wait is a kernel that spins for so many clock cycles: the stream waits
and the host does not. A CUDA graph keeps the cycles that were set when it was captured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, fx

from spdcompile.runtime._torch import spin_cycles

Seconds = Callable[[int], float]
"""Bytes of a collective's result -> what it takes."""


@dataclass
class Delays:
    """What collectives of one name take.

    Args:
        waited: how many collectives have run, and how long they were to wait in all.
    """

    all_reduce: Seconds
    all_gather: Seconds
    count: int = 0
    waited: float = 0.0

    def take(self, seconds: float) -> float:
        """Counts one collective; returns what it was given."""
        self.count += 1
        self.waited += seconds
        return seconds


_delays: dict[str, Delays] = {}
_LIBRARY = torch.library.Library("spd_delays", "DEF")
_LIBRARY.define("all_reduce(Tensor partial, str delays) -> Tensor")
_LIBRARY.define("all_gather(Tensor shard, str delays, int ranks) -> Tensor")
ALL_REDUCE = torch.ops.spd_delays.all_reduce.default
ALL_GATHER = torch.ops.spd_delays.all_gather.default


def set_delays(name: str, all_reduce: Seconds, all_gather: Seconds) -> Delays:
    """Says what collectives of a name take from now on.

    Returns: what counts them.
    """
    _delays[name] = Delays(all_reduce, all_gather)
    return _delays[name]


@dataclass(frozen=True, slots=True)
class OfDelays:
    """Writes waits into a graph.

    Args:
        name: what `set_delays` knows them by.
        ranks: number of ranks that there would be.
    """

    name: str
    ranks: int

    def all_reduce(self, graph: fx.Graph, partial: fx.Node) -> fx.Node:
        return graph.call_function(ALL_REDUCE, (partial, self.name))

    def all_gather(self, graph: fx.Graph, shard: fx.Node) -> fx.Node:
        return graph.call_function(ALL_GATHER, (shard, self.name, self.ranks))

    def is_sum(self, node: fx.Node) -> bool:
        return node.target is ALL_REDUCE


def _all_reduce(partial: Tensor, name: str) -> Tensor:
    """A copy of the partial sum, after as long as its sum would take."""
    began, delays = time.perf_counter(), _delays[name]
    result = partial.clone(memory_format=torch.contiguous_format)
    _wait(began, delays.take(delays.all_reduce(result.nbytes)), result.device)
    return result


def _all_gather(shard: Tensor, name: str, ranks: int) -> Tensor:
    """[n, ...] -> [ranks * n, ...], this rank's shard over and over."""
    began, delays = time.perf_counter(), _delays[name]
    result = torch.cat([shard] * ranks)
    _wait(began, delays.take(delays.all_gather(result.nbytes)), result.device)
    return result


_LIBRARY.impl("all_reduce", _all_reduce, "CompositeExplicitAutograd")
_LIBRARY.impl("all_gather", _all_gather, "CompositeExplicitAutograd")


@torch.library.register_fake("spd_delays::all_reduce")
def _sum_fake(partial: Tensor, delays: str) -> Tensor:
    return torch.empty_like(partial, memory_format=torch.contiguous_format)


@torch.library.register_fake("spd_delays::all_gather")
def _joined_fake(shard: Tensor, delays: str, ranks: int) -> Tensor:
    return shard.new_empty((shard.shape[0] * ranks, *shard.shape[1:]))


def _wait(began: float, seconds: float, device: torch.device) -> None:
    """Until so long after `began`; on CUDA the stream waits, and what it copied comes on top."""
    if device.type == "cuda":
        if seconds > 0:
            spin_cycles(round(seconds * cycles_per_s(device)))
        return
    # A sleep ends late by more than a small collective takes.
    while time.perf_counter() - began < seconds:
        pass


@cache
def cycles_per_s(device: torch.device) -> float:
    """Clock cycles per second of a CUDA device that has work, from a wait of some milliseconds."""
    cycles = 20_000_000
    spin_cycles(cycles)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    spin_cycles(cycles)
    end.record()
    torch.cuda.synchronize(device)
    return 1e3 * cycles / begin.elapsed_time(end)
