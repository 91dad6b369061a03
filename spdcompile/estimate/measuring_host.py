"""What a program takes beside its kernels and collectives, from steps of real programs.

Each takes what its kernels and collectives take by themselves, and three things more: something for
the step, something for each block (Python, and what it drives out of the caches), and its products
take longer than such products in a row: between those of few rows memory is idle. Programs of
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
from spdcompile.estimate.devices import Device, Host
from spdcompile.estimate.latency import latency_of
from spdcompile.estimate.links import Link, Timed, fitted
from spdcompile.estimate.machines import Machines
from spdcompile.estimate.timing import seconds_together
from spdcompile.estimate.work import Step, work_of
from spdcompile.runtime.launch import launched_world_size

FEW_ROWS = 8  # of products that take as long as reading the matrix
_LAYERS, _WIDTHS = (2, 6), (384, 768, 1536)
PROMPT, _CONTEXT = 128, 31  # tokens that are timed at once; those before one that is
_STEPS = 5  # in a row, so that what ranks wait for each other at a barrier counts little


class Beside(NamedTuple):
    """What a step takes beyond what is known.

    Args:
        slowness: how much longer its products take than in a row, at least 1.
    """

    host: Host
    slowness: float


class Known(NamedTuple):
    """A step of a program.

    Args:
        tokens: of it.
        products: seconds of its products by themselves.
        rest: seconds of its other kernels, and of its collectives.
        seconds: of the step, as measured.
    """

    tokens: int
    layers: int
    products: float
    rest: float
    seconds: float


def beside_products(
    dtype: str, device: dict[str, Any], rows: Sequence[Timed]
) -> tuple[Beside, Beside]:
    """Measures it for one token and for a prompt; all ranks call this together.

    Args:
        device: what was measured of kernels.
        rows: what was measured of the collectives that the programs use.
    """
    link = Link("measured", (fitted(rows),))
    known = Machines({"devices": {"": {**device, "host": [], "sources": []}}, "links": {}}, "")
    tokens, prompts = [], []
    for width in _WIDTHS:
        for layers in _LAYERS:
            model = random_model(layers, width, dtype)
            tokens.append(_known(model, Step(1, 1, _CONTEXT), known.device(""), link))
            prompts.append(_known(model, Step(1, PROMPT), known.device(""), link))
    return told_apart(tokens), told_apart(prompts)


def told_apart(steps: Sequence[Known]) -> Beside:
    """What fits steps of as many tokens best, in parts of what each takes, with nothing below 0."""
    weight = np.array([1 / step.seconds for step in steps])
    columns = np.array([(step.layers, 1, step.products) for step in steps]) * weight[:, None]
    missing = np.array([step.seconds - step.rest - step.products for step in steps]) * weight
    best, least = np.zeros(3), float(missing @ missing)
    for chosen in map(list, chain.from_iterable(combinations(range(3), n) for n in (1, 2, 3))):
        found = np.zeros(3)
        found[chosen] = np.linalg.lstsq(columns[:, chosen], missing, rcond=None)[0]
        wrong = columns @ found - missing
        if found.min() >= 0 and wrong @ wrong < least:
            best, least = found, float(wrong @ wrong)
    block_s, step_s, slower = map(float, best)
    return Beside(Host(steps[0].tokens, block_s, step_s), 1 + slower)


def _known(model: CompiledModel, step: Step, device: Device, link: Link) -> Known:
    work = work_of(model.remembering_program, step)
    products = sum(
        device.seconds(kernel, work.state_bytes) for kernel in work.kernels if kernel.matrix_bytes
    )
    rest = latency_of(work, device, link, model.plan.tp).total - products
    seconds = seconds_together(_in_a_row(model, step)) / _STEPS
    return Known(step.new, model.plan.num_layers, products, rest, seconds)


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


def _in_a_row(model: CompiledModel, step: Step) -> Callable[[], object]:
    """Some steps, one after the other."""
    cache = model.new_cache(1, step.context + step.new)
    for _ in range(step.context):
        model(torch.ones((1, 1), dtype=torch.long), past_key_values=cache)
    ids, lengths = torch.ones((1, step.new), dtype=torch.long), cache.lengths

    def steps() -> None:
        for _ in range(_STEPS):
            cache.set_lengths(lengths)
            model(ids, past_key_values=cache, logits_to_keep=1)

    return steps
