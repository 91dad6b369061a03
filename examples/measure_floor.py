"""Measures a next token's step against reading its weights once, which it cannot do without.

    torchrun --standalone --nproc-per-node 2 examples/measure_floor.py [--dtype bfloat16]

Rounds take these in turn, each three times, all ranks at once: the step, by a graph a block and by
`--blocks` blocks a graph; a sum over each
weight that the step multiplies by, which is what reading them takes torch; those products alone.
Weights are random, of the model that the benchmarks use.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import spdcompile
from spdcompile.compiled import CompiledModel
from spdcompile.runtime.cpu_operators import linear_on_cpu
from spdcompile.runtime.launch import launched_world_size

MODEL = Path(__file__).parent / "models" / "bench-llama"
CONTEXT, IN_A_ROW = 128, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--blocks", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL)).eval()
    model, tp = model.to(getattr(torch, args.dtype)), launched_world_size()
    by_block, joined = (
        spdcompile.compile(model, tp=tp, blocks_per_graph=blocks) for blocks in (1, args.blocks)
    )
    weights = weights_of(by_block)
    ways: dict[str, Callable[[], object]] = {
        "a step, a graph a block": step_of(by_block),
        f"a step, {args.blocks} blocks a graph": step_of(joined),
        "reading its weights": lambda: [weight.sum() for weight in weights],
        "its products": products_of(weights),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 3):
        for name, run in ways.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(IN_A_ROW):
                run()
            if number >= 3:  # the first ones compile
                times[name].append((time.perf_counter() - began) / IN_A_ROW)
    slowest = {name: until_all_are_done(taken) for name, taken in times.items()}
    if dist.get_rank() == 0:
        print(report(slowest, sum(weight.nbytes for weight in weights), args.dtype))
    dist.barrier()
    dist.destroy_process_group()


def weights_of(compiled: CompiledModel) -> list[Tensor]:
    """All matrices of a rank but the table of token embeddings, of which a step reads one row."""
    first = compiled.executor.program.parts[0].name
    return [
        tensor
        for part, params in compiled.executor.params.items()
        for tensor in params.values()
        if tensor.dim() == 2 and part != first
    ]


def step_of(compiled: CompiledModel) -> Callable[[], object]:
    cache = compiled.new_cache(1, CONTEXT)
    compiled(torch.ones((1, CONTEXT - 1), dtype=torch.long), past_key_values=cache)
    lengths, token = cache.lengths, torch.ones((1, 1), dtype=torch.long)

    def step() -> None:
        cache.set_lengths(lengths)
        compiled(token, past_key_values=cache, logits_to_keep=1)

    return step


def products_of(weights: list[Tensor]) -> Callable[[], object]:
    multiply = linear_on_cpu()
    rows = {
        size: torch.ones(1, size, dtype=weights[0].dtype) for size in {w.shape[1] for w in weights}
    }
    return lambda: [multiply(rows[weight.shape[1]], weight) for weight in weights]


def until_all_are_done(taken: list[float]) -> Tensor:
    """Of each round, until the last rank is done: the first to begin has the memory to itself."""
    all_of_them = torch.tensor(taken, dtype=torch.float64)
    dist.all_reduce(all_of_them, op=dist.ReduceOp.MAX)
    return all_of_them


def report(times: dict[str, Tensor], num_bytes: int, dtype: str) -> str:
    floor = times["reading its weights"].quantile(0.1)
    rows = [
        (
            name,
            *(f"{1e3 * taken.quantile(q):.2f}" for q in (0.1, 0.5)),
            f"{taken.quantile(0.1) / floor:.2f}",
            f"{num_bytes / taken.quantile(0.1) / 1e9:.1f}",
        )
        for name, taken in times.items()
    ]
    headers = (f"{num_bytes / 1e6:.0f} MB a rank, {dtype}", "p10 ms", "median ms", "ratio", "GB/s")
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
    return (
        f"{table}\n\n{dist.get_world_size()} ranks at once, one thread each, context {CONTEXT}; "
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {date.today()}"
    )


if __name__ == "__main__":
    main()
