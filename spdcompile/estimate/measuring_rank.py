"""One rank of `measure_machine`, started by torchrun."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import spdcompile
from spdcompile.compiled import CompiledModel
from spdcompile.estimate.devices import Device
from spdcompile.estimate.latency import latency_of
from spdcompile.estimate.links import Link, Timed, fitted
from spdcompile.estimate.machines import Machines
from spdcompile.estimate.measuring_links import timed, trials_of, typical
from spdcompile.estimate.work import Step, work_of
from spdcompile.runtime import pages
from spdcompile.runtime.cpu_operators import linear_on_cpu
from spdcompile.runtime.distributed import DistributedExecutor
from spdcompile.runtime.launch import launched_world_size

_ROWS = (1, 4, 8, 32, 128, 512)
_WIDTHS = (256, 512, 1024, 2048)
_SETS = tuple(2**exponent for exponent in (20, 22, 23, 24, 25, 27))
_STREAMS = tuple(2**exponent for exponent in (14, 17, 20, 22, 23, 24, 25, 27))
_FUSED = (64, 128, 512, 2048)
_TOKENS = (32, 128, 512)
_LINK_ROUNDS = 40
_CONTEXT = 31  # tokens before those that are timed
_STEPS = 5  # in a row, so that what ranks wait for each other at a barrier counts little
_TINY, _USUAL = 64, 768  # hidden sizes
_FEW_ROWS = 4  # of products that take as long as reading the matrix
_SECONDS, _MOST_ROUNDS, _FEWEST_ROUNDS = 0.15, 40, 5


def main(argv: Sequence[str]) -> None:
    """Measures everything.

    Args:
        argv: the file for the result, and dtypes separated by commas.
    """
    result, dtypes = argv
    shallow, deep = (_model(layers, _TINY) for layers in (2, 6))
    executor = shallow.executor
    assert isinstance(executor, DistributedExecutor), "torchrun started this"
    group = executor.ranks.group
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
    device["block_s"], device["step_s"] = _host(shallow, deep, device, rows)
    for name, rates in device["products"].items():
        slowness = _slowness_of_products(_model(3, _USUAL, name), device, rows)
        for rate in rates:
            if rate[0] <= _FEW_ROWS:
                rate[-1] /= slowness
    if dist.get_rank() == 0:
        table = {
            name: [[row.kind.value, row.ranks, row.num_bytes, row.seconds] for row in rows]
            for name, rows in links.items()
        }
        Path(result).write_text(json.dumps({"device": device, "links": table}), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _seconds(run: Callable[[], object]) -> float:
    """Seconds of a call that all ranks begin together, up to when the last one has ended.

    The slowest rank counts, since the others wait for it at the next collective.
    """
    run()
    began = time.perf_counter()
    run()
    rounds = torch.tensor(_SECONDS / (time.perf_counter() - began))
    dist.all_reduce(rounds, op=dist.ReduceOp.MIN)
    times = []
    for _ in range(max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(rounds)))):
        dist.barrier()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return typical(slowest.tolist())


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

    Ranks meet after every second one, as in a program: what they wait there for the slowest counts,
    the collective itself does not.
    """
    multiply = linear_on_cpu()
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
                with_meetings = _seconds(partial(_in_turn, multiply, vectors, matrices, meeting))
                meetings = len(matrices) // 2 * meeting.seconds
                seconds = max(with_meetings - meetings, with_meetings / 2)
                yield [rows, matrix, size, 2 * rows * width**2 * len(matrices) / seconds]


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
        yield [tokens, 4 * heads * tokens**2 * width / _seconds(call)]


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
        return _seconds(calls), moved // 3

    alone, _ = seconds_of(2, 128)  # what the calls take, from outside a program
    for tokens in _FUSED:
        seconds, moved = seconds_of(tokens, 1024)
        yield [moved, 3 * moved / max(seconds - alone, 1e-2 * seconds)]


def _stream(num_bytes: int) -> float:
    """Bytes per second of a sum of two vectors; so many are read and written."""
    left, right, out = torch.zeros(3, num_bytes // 12)
    repeats = max(1, 2**20 // num_bytes)
    seconds = _seconds(lambda: [torch.add(left, right, out=out) for _ in range(repeats)])
    return repeats * num_bytes / seconds


def _small_kernel() -> float:
    """Seconds of an operator that has next to nothing to do."""
    vector, matrix = torch.ones(1, 16), torch.ones(16, 16)
    return _seconds(lambda: [F.linear(vector, matrix) for _ in range(100)]) / 100


# ---- what the host takes


def _model(layers: int, width: int, dtype: str = "float32") -> CompiledModel:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(4, width // 64),
        vocab_size=2 * width,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to(getattr(torch, dtype))
    return spdcompile.compile(model, tp=launched_world_size())


def _host(
    shallow: CompiledModel, deep: CompiledModel, device: dict[str, Any], rows: Sequence[Timed]
) -> tuple[float, float]:
    """What each block, and a step besides, takes beyond kernels and collectives."""
    link = Link("measured", (fitted(rows),))
    kernels = Device("measured", {torch.float32: 1e12}, 1e12, device["kernel_s"])
    rest = []
    for model in (shallow, deep):
        work = work_of(model.remembering_program, Step(1, 1, _CONTEXT))
        known = latency_of(work, kernels, link, model.plan.tp).total
        rest.append(_seconds(_decode_steps(model)) / _STEPS - known)
    less, more = shallow.plan.num_layers, deep.plan.num_layers
    block = max(0.0, (rest[1] - rest[0]) / (more - less))
    return block, max(0.0, rest[0] - less * block)


def _slowness_of_products(
    model: CompiledModel, device: dict[str, Any], rows: Sequence[Timed]
) -> float:
    """How much longer products of few rows take among a program's other kernels than in a row.

    At least 1: memory is idle between them, and a rank reads on only after the slowest has come.
    """
    link = Link("measured", (fitted(rows),))
    known = Machines({"devices": {"": {**device, "sources": []}}, "links": {}}, "").device("")
    work = work_of(model.remembering_program, Step(1, 1, _CONTEXT))
    kernels = [kernel for kernel in work.kernels if kernel.matrix_bytes]
    products = sum(known.seconds(kernel, work.state_bytes) for kernel in kernels)
    rest = latency_of(work, known, link, model.plan.tp).total - products
    return max(1.0, (_seconds(_decode_steps(model)) / _STEPS - rest) / products)


def _decode_steps(model: CompiledModel) -> Callable[[], object]:
    cache, token = model.new_cache(1, 64), torch.ones((1, 1), dtype=torch.long)
    for _ in range(_CONTEXT):
        model(token, past_key_values=cache)  # not all at once, which would be compiled by itself
    lengths = cache.lengths

    def steps() -> None:
        for _ in range(_STEPS):
            model(token, past_key_values=cache)
            cache.set_lengths(lengths)

    return steps


if __name__ == "__main__":
    main(sys.argv[1:])
