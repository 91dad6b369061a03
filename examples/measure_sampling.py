"""Measures both ways to give every rank the same drawn tokens, in turn, round by round.

    torchrun --standalone --nproc-per-node 2 examples/measure_sampling.py

`generate` shares the random state of rank 0 once, lets every rank draw, and compares the tokens at
the end. The other way is written here alone: rank 0 draws, and each step broadcasts its token. Both
are one loop over the bundled model with its cache. A round is short, so that both of its halves
meet the same load of the machine; what happens once a text is timed by itself.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tabulate import tabulate
from torch import Tensor

import spdcompile
from spdcompile.runtime.cache import KVCache
from spdcompile.runtime.launch import agree, same_random_state

MODEL = Path(__file__).parent / "models" / "tiny-llama"
PROMPT_LENGTH, NUM_NEW = 16, 8
WARM_UP, ROUNDS = 5, 200
DRAWN, BROADCAST = "every rank draws", "rank 0 draws, and broadcasts"
SHARE, COMPARE = "sharing the state, once a text", "comparing the tokens, once a text"
TOKEN = "broadcasting a token, each step"
CPU = torch.device("cpu")


def main() -> None:
    torch.set_num_threads(1)
    tp = int(os.environ["WORLD_SIZE"])
    compiled = spdcompile.compile(MODEL, tp=tp, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, compiled.config.vocab_size, (1, PROMPT_LENGTH), generator=generator)
    times = measure(compiled, ids)
    if dist.get_rank() == 0:
        print(_table("ms per token", {name: times[name] for name in (DRAWN, BROADCAST)}))
        print(f"\n{_difference(times[DRAWN], times[BROADCAST])}\n")
        print(_table("ms", {name: times[name] for name in (SHARE, COMPARE, TOKEN)}))
        print(
            f"\n{MODEL.name}, tp {tp}, inductor, gloo on loopback, float32, {ROUNDS} rounds; "
            f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, {date.today()}"
        )
    dist.barrier()
    dist.destroy_process_group()


def measure(compiled: spdcompile.CompiledModel, ids: Tensor) -> dict[str, list[float]]:
    """Milliseconds per token of both ways, and of what either adds to the model."""
    group = compiled.executor.group
    times: dict[str, list[float]] = {}
    for number in range(WARM_UP + ROUNDS):
        ways = sorted((DRAWN, BROADCAST), reverse=number % 2 == 1)  # either is first
        for name, took in _round(compiled, ids, ways, group):
            times.setdefault(name, []).append(took)
    return {name: values[WARM_UP:] for name, values in times.items()}


def _round(
    compiled: spdcompile.CompiledModel, ids: Tensor, ways: list[str], group: dist.ProcessGroup
) -> Iterator[tuple[str, float]]:
    cache = compiled.new_cache(1, PROMPT_LENGTH + 2 * NUM_NEW)
    logits = compiled(ids, past_key_values=cache, logits_to_keep=1).logits
    tokens = [logits[:, -1:].argmax(-1)]
    yield SHARE, _timed(lambda: _share(group), group)
    for way in ways:
        with same_random_state(group, CPU):
            took = _timed(lambda w=way: write(compiled, cache, tokens, way=w), group)
        yield way, took / NUM_NEW
    yield COMPARE, _timed(lambda: _compare(tokens, group), group)
    yield TOKEN, _timed(lambda: dist.broadcast(tokens[-1], group=group, group_src=0), group)


def write(
    compiled: spdcompile.CompiledModel, cache: KVCache, tokens: list[Tensor], *, way: str
) -> None:
    """Draws NUM_NEW tokens, the same on every rank, and appends them to `tokens`."""
    group = compiled.executor.group
    draws = way == DRAWN or dist.get_rank(group) == 0
    for _ in range(NUM_NEW):
        logits = compiled(tokens[-1], past_key_values=cache, logits_to_keep=1).logits[:, -1]
        new = torch.multinomial(logits.softmax(-1), 1) if draws else tokens[-1].clone()
        if way == BROADCAST:
            dist.broadcast(new, group=group, group_src=0)
        tokens.append(new)


def _share(group: dist.ProcessGroup) -> None:
    with same_random_state(group, CPU):
        pass


def _compare(tokens: list[Tensor], group: dist.ProcessGroup) -> None:
    agree(group, {"generated tokens": str(torch.cat(tokens, 1).tolist())})


def _timed(run: Callable[[], object], group: dist.ProcessGroup) -> float:
    dist.barrier(group)
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


def _difference(first: list[float], second: list[float]) -> str:
    """The median difference within a round, and the order statistics that bracket it."""
    longer = sorted(b - a for a, b in zip(first, second, strict=True))
    half, reach = len(longer) / 2, 0.98 * len(longer) ** 0.5
    low, high = longer[math.floor(half - reach)], longer[math.ceil(half + reach)]
    return (
        f"broadcasting takes {statistics.median(longer):+.2f} ms per token in the same round "
        f"(95 % interval of the median {low:+.2f} to {high:+.2f})"
    )


def _table(unit: str, times: dict[str, list[float]]) -> str:
    rows = []
    for name, values in times.items():
        tenths = statistics.quantiles(values, n=10)
        rows.append((name, statistics.median(values), tenths[0], tenths[-1]))
    return tabulate(rows, (unit, "median", "p10", "p90"), tablefmt="github", floatfmt=".2f")


if __name__ == "__main__":
    main()
