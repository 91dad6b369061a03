"""Measures how fast weights are read from large pages and from small ones, by all ranks at once.

    torchrun --standalone --nproc-per-node 2 examples/measure_pages.py [--rows 1]

What is timed is a product with a weight larger than caches, by default of one row, as a next token
needs it: the package's own and torch's. Rounds take the four in turn.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabulate import tabulate

from spdcompile.runtime import pages
from spdcompile.runtime.cpu_operators import linear_on_cpu

WIDTH = 1024
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=64, help="of a weight")
    parser.add_argument("--rows", type=int, default=1, help="of the other operand")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dtype = getattr(torch, args.dtype)
    x = torch.randn(args.rows, WIDTH, dtype=dtype)
    small = torch.randn(args.mb * 10**6 // WIDTH // dtype.itemsize, WIDTH).to(dtype)
    weights = {"small pages": small, "large pages": pages.settled(small)}
    products = {"our product": linear_on_cpu(), "torch's": F.linear}
    times: dict[tuple[str, str], list[float]] = {(p, w): [] for p in products for w in weights}
    for _ in range(args.rounds):
        for product, weight in times:
            dist.barrier()
            began = time.perf_counter()
            products[product](x, weights[weight])
            times[product, weight].append(time.perf_counter() - began)
    slowest = {key: torch.tensor(taken, dtype=torch.float64) for key, taken in times.items()}
    for taken in slowest.values():  # the first rank to begin has the memory to itself for a while
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        rows = [
            (*key, *(f"{small.nbytes / taken.quantile(q) / 1e9:.1f}" for q in (0.1, 0.5)))
            for key, taken in slowest.items()
        ]
        headers = (
            f"{args.mb} MB, {args.dtype}, {args.rows} rows",
            "memory",
            "GB/s a rank: p10",
            "median",
        )
        print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True))
        setting = SETTING.read_text().strip() if SETTING.exists() else "unknown"
        print(
            f"\n{dist.get_world_size()} ranks at once, one thread each, until the last is done; "
            f"large pages are set to {setting!r}; {platform.machine()}, {os.cpu_count()} cores, "
            f"torch {torch.__version__}, {date.today()}"
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
