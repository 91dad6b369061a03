"""What each rank of test_direct.py runs: the operators alone, without a process group.

Usage: direct_worker.py NAMESPACE RANK RANKS GROUP ... with four groups: the descriptor of a
segment, or, separated by commas, those of connections to all ranks, -1 for this one. Prints "ok",
or fails.
"""

from __future__ import annotations

import random
import sys
from threading import Timer
from typing import Any

import torch
from torch import Tensor

from spdcompile.runtime.direct import operators

PIECE = 96 * 1024  # of a segment; with four ranks, pieces are summed in shares
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 7, 2048, 4097, 40_000, 300_001)


def _drawn(seed: int, rank: int, size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    drawn = 10 * torch.randn(size, generator=generator)
    return (drawn if dtype.is_floating_point else drawn.abs()).to(dtype)


def _expected_sum(parts: list[Tensor]) -> Tensor:
    """In the order of the ranks, in float32 at least, rounded once."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def check_exchanges(ops: Any, rank: int, ranks: int) -> None:
    """Every dtype and size, and many exchanges in a row of whatever comes."""
    drawing = random.Random(0)
    cases = [(dtype, size, True) for dtype in DTYPES for size in SIZES]
    cases += [(dtype, 300, False) for dtype in (*DTYPES, torch.int64, torch.uint8)]
    if ops is torch.ops.spd_sockets:
        cases.append((torch.float32, 2_100_001, True))  # more than they send at a time
    for _ in range(300):
        size = int(10 ** drawing.uniform(0, 5))
        cases.append((drawing.choice(DTYPES), size, drawing.random() < 0.7))
    for seed, (dtype, size, summed) in enumerate(cases):
        parts = [_drawn(seed, other, size, dtype) for other in range(ranks)]
        if summed:
            found = ops.all_reduce(parts[rank], "main")
            assert torch.equal(found, _expected_sum(parts)), (dtype, size)
        else:
            found = ops.all_gather(parts[rank], "main", ranks)
            assert torch.equal(found, torch.cat(parts)), (dtype, size)


def check_shapes(ops: Any, rank: int, ranks: int) -> None:
    """Any strides, any number of dimensions, nothing at all."""
    parts = [_drawn(1, other, 24, torch.float32).view(2, 3, 4).mT for other in range(ranks)]
    assert torch.equal(ops.all_reduce(parts[rank], "main"), _expected_sum(parts))
    assert torch.equal(ops.all_gather(parts[rank], "main", ranks), torch.cat(parts))
    assert ops.all_reduce(torch.empty(0, 3), "main").shape == (0, 3)
    number = torch.tensor(2.0)
    assert ops.all_reduce(number, "main") == 2.0 * ranks


def check_mistakes(ops: Any, rank: int) -> None:
    """Ranks that exchange different tensors, or come too late, get errors."""
    _raises("sums of Long", lambda: ops.all_reduce(torch.ones(3, dtype=torch.int64), "main"))
    _raises("for the group nobody", lambda: ops.all_reduce(torch.ones(3), "nobody"))
    _raises("different tensors", lambda: ops.all_reduce(torch.ones(3 + (rank == 1)), "different"))
    if rank:
        _raises("timed out", lambda: ops.all_reduce(torch.ones(3), "late"))
        Timer(0.2, ops.interrupt, ["interrupted"]).start()
        _raises("lost its connection", lambda: ops.all_reduce(torch.ones(3), "interrupted"))
    again = lambda: ops.all_reduce(torch.ones(3), "different")  # noqa: E731
    if ops is torch.ops.spd_sockets:
        _raises("lost a connection", again)  # what is left of the mistake may be on its way
    ops.all_reduce(torch.ones(1), "main")  # a rank that ends breaks its connections


def _raises(words: str, act: object) -> None:
    try:
        act()
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no error: {words}")


def main(namespace: str, rank: int, ranks: int, groups: list[str]) -> None:
    torch.set_num_threads(1)
    ops = operators(namespace)
    timeouts = {"main": 60, "different": 60, "late": 1, "interrupted": 60}
    for (name, timeout), group in zip(timeouts.items(), groups, strict=True):
        files = [int(file) for file in group.split(",")]
        if namespace == "spd_sockets":
            ops.open_mesh(name, files, rank, timeout)
        else:
            ops.open_segment(name, files[0], rank, ranks, PIECE, timeout)
    check_exchanges(ops, rank, ranks)
    check_shapes(ops, rank, ranks)
    check_mistakes(ops, rank)
    print("ok")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
