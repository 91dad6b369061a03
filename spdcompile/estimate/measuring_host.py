"""What a program takes beside its kernels and collectives, from next tokens of real programs.

Each takes what its kernels and collectives take by themselves, and three things more: something for
the step, something for each block (Python, and what it drives out of the caches), and its products
of few rows take longer than such products in a row, since memory is idle between them. Programs of
two depths and three widths tell the three apart: the narrow ones show what is the host's, the wide
ones how fast products are. None of them is as small as to stay in the caches
that are next to the processor, where Python is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spdcompile
from spdcompile.compiled import CompiledModel
from spdcompile.estimate.latency import latency_of
from spdcompile.estimate.links import Link, Timed, fitted
from spdcompile.estimate.machines import Machines
from spdcompile.estimate.timing import seconds_together
from spdcompile.estimate.work import Step, work_of
from spdcompile.runtime.launch import launched_world_size

FEW_ROWS = 8  # of products that take as long as reading the matrix
_LAYERS, _WIDTHS = (2, 6), (384, 768, 1536)
_CONTEXT = 31  # tokens before those that are timed
_STEPS = 5  # in a row, so that what ranks wait for each other at a barrier counts little


class Beside(NamedTuple):
    """What a step takes beyond what is known.

    Args:
        block_s, step_s: seconds for each block, and for a step besides.
        slowness: how much longer products of few rows take than in a row, at least 1.
    """

    block_s: float
    step_s: float
    slowness: float


class Known(NamedTuple):
    """A program's next token.

    Args:
        products: seconds of its products by themselves.
        rest: seconds of its other kernels, and of its collectives.
        seconds: of the token, as measured.
    """

    layers: int
    products: float
    rest: float
    seconds: float


def beside_products(dtype: str, device: dict[str, Any], rows: Sequence[Timed]) -> Beside:
    """Measures it; all ranks call this together.

    Args:
        device: what was measured of kernels.
        rows: what was measured of the collectives that the programs use.
    """
    tokens = []
    for width in _WIDTHS:
        for layers in _LAYERS:
            model = random_model(layers, width, dtype)
            tokens.append(_known(model, device, rows))
    return told_apart(tokens)


def told_apart(tokens: Sequence[Known]) -> Beside:
    """What fits the tokens best, in parts of what each takes, with nothing below 0."""
    weight = np.array([1 / token.seconds for token in tokens])
    columns = np.array([(token.layers, 1, token.products) for token in tokens]) * weight[:, None]
    missing = np.array([t.seconds - t.rest - t.products for t in tokens]) * weight
    best, least = np.zeros(3), float(missing @ missing)
    for chosen in map(list, chain.from_iterable(combinations(range(3), n) for n in (1, 2, 3))):
        found = np.zeros(3)
        found[chosen] = np.linalg.lstsq(columns[:, chosen], missing, rcond=None)[0]
        wrong = columns @ found - missing
        if found.min() >= 0 and wrong @ wrong < least:
            best, least = found, float(wrong @ wrong)
    return Beside(float(best[0]), float(best[1]), 1 + float(best[2]))


def _known(model: CompiledModel, device: dict[str, Any], rows: Sequence[Timed]) -> Known:
    link = Link("measured", (fitted(rows),))
    kernels = {**device, "block_s": 0.0, "step_s": 0.0, "sources": []}
    known = Machines({"devices": {"": kernels}, "links": {}}, "").device("")
    work = work_of(model.remembering_program, Step(1, 1, _CONTEXT))
    products = sum(
        known.seconds(kernel, work.state_bytes) for kernel in work.kernels if kernel.matrix_bytes
    )
    rest = latency_of(work, known, link, model.plan.tp).total - products
    seconds = seconds_together(_decode_steps(model)) / _STEPS
    return Known(model.plan.num_layers, products, rest, seconds)


def random_model(layers: int, width: int, dtype: str = "float32") -> CompiledModel:
    """A model of random weights, one rank of it here."""
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
