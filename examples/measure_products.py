"""Measures products of few and of many rows with weights larger than caches, by all ranks at once.

    torchrun --standalone --nproc-per-node 2 examples/measure_products.py [--dtype bfloat16]

Rounds take in turn, for each number of rows: the package's own product, in bfloat16 also with the
weight widened to float32 on the way, and torch's. Weights lie in large pages.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from datetime import date

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from spdcompile.runtime import pages
from spdcompile.runtime.cpu_operators import linear_on_cpu, widening_pays

WIDTH, WEIGHTS = 1024, 16
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dtype = getattr(torch, args.dtype)
    weights = [pages.settled(torch.randn(WIDTH, WIDTH).to(dtype)) for _ in range(WEIGHTS)]
    chosen = widening_pays() if dtype is torch.bfloat16 else False
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": linear_on_cpu()}
    if dtype is torch.bfloat16:
        ways["ours, widened"] = linear_on_cpu(widens=True)
    ways["torch's"] = F.linear
    rows = [(rows, *measured(rows, weights, ways, args.rounds)) for rows in ROWS]
    if dist.get_rank() == 0:
        headers = (f"rows, {args.dtype}", *(f"{way}: p10 ms" for way in ways))
        print(tabulate(rows, headers, tablefmt="pipe", floatfmt=".2f"))
        wide = f", many rows in bfloat16 are widened here: {'yes' if chosen else 'no'}"
        print(
            f"\n{WEIGHTS} weights of [{WIDTH}, {WIDTH}], {dist.get_world_size()} ranks at once, "
            f"one thread each, until the last is done{wide if dtype is torch.bfloat16 else ''}; "
            f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"{date.today()}"
        )
    dist.barrier()
    dist.destroy_process_group()


def measured(
    rows: int,
    weights: list[Tensor],
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]],
    rounds: int,
) -> list[float]:
    """The tenth percentile of each way, in milliseconds."""
    x = torch.randn(rows, WIDTH).to(weights[0].dtype)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, product in ways.items():
            dist.barrier()
            began = time.perf_counter()
            for weight in weights:
                product(x, weight)
            if number >= 2:
                times[name].append(time.perf_counter() - began)
    found = []
    for taken in times.values():
        slowest = torch.tensor(taken, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # the first to begin has memory to itself
        found.append(1e3 * float(slowest.quantile(0.1)))
    return found


if __name__ == "__main__":
    main()
