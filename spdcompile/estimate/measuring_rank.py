"""One rank of `measure_machine`, started by torchrun."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from spdcompile.estimate.measuring_host import FEW_ROWS, beside_products, random_model
from spdcompile.estimate.measuring_links import timed, trials_of
from spdcompile.estimate.timing import seconds_together
from spdcompile.runtime import pages
from spdcompile.runtime.cpu_operators import linear_on_cpu, widening_pays
from spdcompile.runtime.distributed import DistributedExecutor

_ROWS = (1, 4, 8, 32, 128, 512)
_WIDTHS = (256, 512, 1024, 2048)
_SETS = tuple(2**exponent for exponent in (20, 22, 23, 24, 25, 27))
_STREAMS = tuple(2**exponent for exponent in (14, 17, 20, 22, 23, 24, 25, 27))
_FUSED = (64, 128, 512, 2048)
_TOKENS = (32, 128, 512)
_SWEEPS = 3
_LINK_ROUNDS = 40


def main(argv: Sequence[str]) -> None:
    """Measures everything.

    Args:
        argv: the file for the result, and dtypes separated by commas.
    """
    result, dtypes = argv
    group = _group()
    trials = trials_of(group)
    links = timed(trials, dist.get_world_size(group), _LINK_ROUNDS)
    rows = next(iter(links.values()))
    meeting = _Meeting(next(iter(trials.values()))[0].run, rows[0].seconds)
    device: dict[str, Any] = {
        "flops": {},
        "products": {},
        "attention": {},
        "fused": list(_fused()),
        "streams": [[size, _stream(size)] for size in _STREAMS],
        "kernel_s": _small_kernel(),
    }
    device["bytes_per_s"] = device["streams"][-1][1]
    for name in dtypes.split(","):
        rates = list(_products(getattr(torch, name), meeting))
        device["products"][name] = rates
        device["attention"][name] = list(_attention(getattr(torch, name)))
        device["flops"][name] = max(rate[-1] for rate in rates)
    for name, rates in device["products"].items():
        found = beside_products(name, device, rows)
        # Of the first dtype: it is Python's.
        device.setdefault("host", [each.host for each in found])
        token, prompt = (each.slowness for each in found)
        for rate in rates:
            rate[-1] /= token if rate[0] <= FEW_ROWS else prompt
        device["flops"][name] = max(rate[-1] for rate in rates)
    if dist.get_rank() == 0:
        table = {
            name: [[row.kind.value, row.ranks, row.num_bytes, row.seconds] for row in rows]
            for name, rows in links.items()
        }
        Path(result).write_text(json.dumps({"device": device, "links": table}), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _group() -> dist.ProcessGroup:
    """The ranks that torchrun started."""
    executor = random_model(2, 64).executor
    assert isinstance(executor, DistributedExecutor), "torchrun started this"
    return executor.ranks.group


# ---- the device


@dataclass(frozen=True, slots=True)
class _Meeting:
    """The fastest small collective, at which ranks wait for each other.

    Args:
        seconds: of it alone.
    """

    run: Callable[[], object]
    seconds: float


def _products(dtype: torch.dtype, meeting: _Meeting) -> Iterator[list[float]]:
    """[rows, bytes of a matrix, bytes of all, operations per second] of products by matrices.

    The median of several sweeps: what else a machine does lasts longer than one such measurement.
    """
    rates: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for _ in range(_SWEEPS):
        for place, rate in _sweep(dtype, meeting):
            rates[place].append(rate)
    for place, found in rates.items():
        yield [*place, statistics.median(found)]


def _sweep(dtype: torch.dtype, meeting: _Meeting) -> Iterator[tuple[tuple[int, int, int], float]]:
    """Rows, bytes of a matrix and of all; operations per second.

    Ranks meet after every second one, as in a program: what they wait there for the slowest counts,
    the collective itself does not.
    """
    widens = dtype is torch.bfloat16 and widening_pays(dist.group.WORLD)
    multiply = linear_on_cpu(widens=widens)
    for width in _WIDTHS:
        matrix = width * width * dtype.itemsize
        for size in _SETS:
            if size < matrix:
                continue
            matrices = [
                pages.settled(torch.randn(width, width, dtype=dtype)) for _ in range(size // matrix)
            ]
            for rows in _ROWS:
                vectors = torch.randn(rows, width, dtype=dtype)
                with_meetings = seconds_together(
                    partial(_in_turn, multiply, vectors, matrices, meeting)
                )
                meetings = len(matrices) // 2 * meeting.seconds
                seconds = max(with_meetings - meetings, with_meetings / 2)
                yield (rows, matrix, size), 2 * rows * width**2 * len(matrices) / seconds


def _in_turn(
    multiply: Callable[[Tensor, Tensor], Tensor],
    vectors: Tensor,
    matrices: Sequence[Tensor],
    meeting: _Meeting,
) -> None:
    for number, matrix in enumerate(matrices):
        multiply(vectors, matrix)
        if number % 2:
            meeting.run()


def _attention(dtype: torch.dtype) -> Iterator[list[float]]:
    """[queries of a head, operations per second] of causal attention to as many keys."""
    heads, width = 8, 64
    for tokens in _TOKENS:
        q, k, v = torch.randn(3, 1, heads, tokens, width, dtype=dtype)
        call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        yield [tokens, 4 * heads * tokens**2 * width / seconds_together(call)]


def _fused() -> Iterator[list[float]]:
    """[bytes, bytes per second] of what lies between a block's products, as Inductor compiles it.

    Norm, rotary embedding of half the width and gated activation, in the shares that blocks have.
    """

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, 64)).transpose(0, 1)
        return x * cos + torch.cat([-x[..., 32:], x[..., :32]], -1) * sin

    compiled = [torch.compile(each, dynamic=True) for each in (norm, gated, rotated)]

    def seconds_of(tokens: int, width: int) -> tuple[float, int]:
        x, gate, half = (torch.randn(tokens, size) for size in (width, width, width // 2))
        angles = torch.randn(tokens, 64)
        inputs = (x, torch.ones(width)), (gate, x), (half, angles, angles)

        def calls() -> None:
            for function, given in zip(compiled, inputs, strict=True):
                function(*given)

        moved = 2 * x.nbytes + 3 * x.nbytes + 2 * (half.nbytes + angles.nbytes)
        return seconds_together(calls), moved // 3

    alone, _ = seconds_of(2, 128)  # what the calls take, from outside a program
    for tokens in _FUSED:
        seconds, moved = seconds_of(tokens, 1024)
        yield [moved, 3 * moved / max(seconds - alone, 1e-2 * seconds)]


def _stream(num_bytes: int) -> float:
    """Bytes per second of a sum of two vectors; so many are read and written."""
    left, right, out = torch.zeros(3, num_bytes // 12)
    repeats = max(1, 2**20 // num_bytes)
    seconds = seconds_together(lambda: [torch.add(left, right, out=out) for _ in range(repeats)])
    return repeats * num_bytes / seconds


def _small_kernel() -> float:
    """Seconds of an operator that has next to nothing to do."""
    vector, matrix = torch.ones(1, 16), torch.ones(16, 16)
    return seconds_together(lambda: [F.linear(vector, matrix) for _ in range(100)]) / 100


if __name__ == "__main__":
    main(sys.argv[1:])
