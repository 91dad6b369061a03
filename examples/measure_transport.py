"""Measures what an all-reduce takes through shared memory, sockets and gloo, in turn.

    torchrun --standalone --nproc-per-node 2 examples/measure_transport.py

Rounds alternate, so that all meet the same load of the machine. Beside them stands a copy within
one process, from memory to memory: how fast the machine streams.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from datetime import date

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor

from spdcompile.runtime.faults import PATIENCE_S
from spdcompile.runtime.shared_memory import SHARED_MEMORY
from spdcompile.runtime.sockets import SOCKETS

SIZES = {"2 KB": 2**11, "8 KB": 2**13, "32 KB": 2**15, "128 KB": 2**17, "1 MB": 2**20}
SIZES |= {"8 MB": 2**23, "64 MB": 2**26}
SECONDS = 1.5  # for each size
MOST_BYTES = 2**18  # in a row
DIRECT = (SHARED_MEMORY, SOCKETS)
GLOO, COPY = "gloo", "copy"
WAYS = (*(kind.name for kind in DIRECT), GLOO)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    for kind in DIRECT:
        if why := kind.why_not(group, PATIENCE_S):
            raise SystemExit(f"no {kind.name}: {why}")
    rows = [_row(name, size, group) for name, size in SIZES.items()]
    if dist.get_rank() == 0:
        headers = ["float32", *(f"{way}{which}" for way in WAYS for which in (": p10", ": mean"))]
        headers += [f"{way}, GB/s" for way in (SHARED_MEMORY.name, SOCKETS.name, COPY)]
        print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True))
        print(
            f"\nmicroseconds of an all-reduce over {dist.get_world_size()} ranks; GB/s: bytes of "
            f"the tensor by p10; {platform.machine()}, {os.cpu_count()} cores, torch "
            f"{torch.__version__}, {date.today()}"
        )
    dist.barrier()
    dist.destroy_process_group()


def _row(name: str, num_bytes: int, group: dist.ProcessGroup) -> list[str]:
    part, repeats = torch.ones(num_bytes // 4), max(1, MOST_BYTES // num_bytes)
    ways = _ways(part, group)
    times: dict[str, list[float]] = {way: [] for way in ways}
    began, going = time.perf_counter(), torch.ones(1)
    while going:
        for way, run in ways.items():
            dist.barrier(group)
            times[way].append(_timed(run, repeats))
        going.fill_(time.perf_counter() - began < SECONDS)
        dist.broadcast(going, src=0)
    tenth = {way: _quantile(values, 0.1) for way, values in times.items()}
    cells = [f"{1e6 * x:.0f}" for way in WAYS for x in (tenth[way], _mean(times[way]))]
    ways = (SHARED_MEMORY.name, SOCKETS.name, COPY)
    rates = [f"{num_bytes / tenth[way] / 1e9:.1f}" for way in ways]
    return [name, *cells, *rates]


def _ways(part: Tensor, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    functional, name = torch.ops._c10d_functional, group.group_name
    other = torch.empty_like(part)

    def through_gloo() -> Tensor:
        return functional.wait_tensor(functional.all_reduce(part, "sum", name))

    return {
        SHARED_MEMORY.name: lambda: torch.ops.spd_shared_memory.all_reduce(part, name),
        SOCKETS.name: lambda: torch.ops.spd_sockets.all_reduce(part, name),
        GLOO: through_gloo,
        COPY: lambda: other.copy_(part),
    }


def _timed(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one of so many in a row: ranks that have just left a barrier are not together."""
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


if __name__ == "__main__":
    main()
