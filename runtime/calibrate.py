"""Sensitivity of each block to losing its attention sync point (SPD, arXiv 2502.20727).

s_i = PPL(SPD on blocks i..L) - PPL(SPD on blocks i+1..L), the blocks before being plain tensor
parallel. Their hidden states are the same in every evaluation, so they are computed once: the last
L - i blocks are all that evaluation i runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from spdcompile.passes import pipeline
from spdcompile.plan import Router
from spdcompile.runtime.data import batches_of, token_loss
from spdcompile.runtime.executor import Executor
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.local import LocalExecutor


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What dropping attention sync points costs, block by block.

    Args:
        perplexities: entry i: perplexity with the points of blocks i..L dropped; the last entry,
            L, is that of the unchanged model.
        block_evaluations: blocks run on the whole calibration set.
        naive_block_evaluations: what L + 1 whole evaluations would have run.
    """

    perplexities: tuple[float, ...]
    block_evaluations: int
    naive_block_evaluations: int

    @property
    def scores(self) -> tuple[float, ...]:
        """s_i for each block: the perplexity that dropping its point adds."""
        pairs = zip(self.perplexities, self.perplexities[1:], strict=False)
        return tuple(dropped - kept for dropped, kept in pairs)

    def least_sensitive(self, count: int) -> tuple[int, ...]:
        """The `count` blocks with the smallest scores, in ascending order of layer."""
        order = sorted(range(len(self.scores)), key=lambda layer: self.scores[layer])
        return tuple(sorted(order[:count]))


def calibrate(
    base: pipeline.Lowering,
    plain: LocalExecutor,
    tokens: Tensor,
    *,
    router: Router = Router.EXACT,
    batch_size: int = 8,
    progress: bool = True,
) -> Sensitivity:
    """Measures the paper's s_i for every block, L + 1 evaluations from the last block on.

    Args:
        base: the program before anything is dropped.
        plain: runs it.
        tokens: calibration chunks, int64 [chunks, length].
        router: what routers read where a dropped point is pending.

    Raises:
        RefusalError: a block's attention point cannot be dropped.
        UsageError: the tokens do not fit.
    """
    layers = [part.layer for part in base.program.parts if part.layer is not None]
    every = frozenset((layer, "attn") for layer in layers)
    dropped = pipeline.advance(base, pipeline.changing(every, router)).program
    prefixes = [(batch, _prefix(plain, batch)) for batch in batches_of(tokens, batch_size)]
    spd = plain.with_program(dropped)
    starts = tqdm(
        range(len(layers), -1, -1), desc="sensitivity", unit="evaluation", disable=not progress
    )
    perplexities = [_perplexity(spd, prefixes, start) for start in starts]
    count = len(layers)
    return Sensitivity(
        tuple(reversed(perplexities)),
        block_evaluations=count + count * (count + 1) // 2,
        naive_block_evaluations=count * (count + 1),
    )


@torch.no_grad()
def _prefix(executor: Executor, batch: Tensor) -> dict[str, Tensor]:
    """Every value of a plain run up to the last block."""
    env = program_inputs(executor.program, batch.to(executor.device))
    executor.run_parts(env, executor.program.parts[:-1])
    return env


@torch.no_grad()
def _perplexity(
    executor: Executor, prefixes: list[tuple[Tensor, dict[str, Tensor]]], start: int
) -> float:
    """Perplexity with the executor's own blocks from `start` on, the cached ones before."""
    parts = executor.program.parts[1 + start :]
    loss, count = 0.0, 0
    for batch, prefix in prefixes:
        env = dict(prefix)
        executor.run_parts(env, parts)
        batch_loss, batch_count = token_loss(env[executor.program.output], batch)
        loss, count = loss + batch_loss, count + batch_count
    return math.exp(loss / count)
