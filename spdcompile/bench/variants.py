"""The variants that a run compares: a row each, with what makes it ready."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Any

from spdcompile.bench.settings import BenchSettings

BASELINE = "hf-tp-eager"
"""What the others' times are given as a ratio to."""
_TRANSPORTS = (
    ("spd-gloo", "gloo", "process-group"),
    ("spd-sockets", "sockets", "sockets"),
    ("spd-shm", "shared memory", "shared-memory"),
)


class Kind(StrEnum):
    """What makes a variant's model; `making.py` has a function for each."""

    WHOLE = "whole"
    TP_PLAN = "tp-plan"
    PARALLELIZED = "parallelized"
    DEEPSPEED = "deepspeed"
    VLLM = "vllm"
    LOCAL = "local"
    RANKS = "ranks"


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the tables.

    Args:
        name: for `--only`, JSON and messages.
        label: for readers.
        kind: what makes it.
        threads: of each of its processes.
        ranks: how many processes run it; 1 is rank 0 alone.
        compiled: torch.compile is applied to a model of transformers.
        transport: of a program of this compiler's.
        mask: what this drops, by its name in the settings; "" for nothing.
        blocks_per_graph: of a program of this compiler's.
    """

    name: str
    label: str
    kind: Kind
    threads: int
    ranks: int
    compiled: bool = False
    transport: str = ""
    mask: str = ""
    blocks_per_graph: int = 1


def variants_of(settings: BenchSettings) -> list[Variant]:
    """All variants of a run, in the order of the tables, or those that `only` names."""
    found = [*_peers(settings), *_own(settings)]
    return [each for each in found if not settings.only or each.name in settings.only]


def _peers(settings: BenchSettings) -> Iterator[Variant]:
    tp, threads = settings.tp, settings.threads
    every = tp * threads

    def pair(name: str, label: str, kind: Kind, ranks: int, threads: int) -> Iterator[Variant]:
        yield Variant(f"{name}-eager", f"{label}, eager", kind, threads, ranks)
        yield Variant(f"{name}-compiled", f"{label}, compiled", kind, threads, ranks, compiled=True)

    alone = "Hugging Face, one process, {}"
    yield from pair("hf", alone.format(_threads(threads)), Kind.WHOLE, 1, threads)
    yield from pair("hf-all-cores", alone.format(_threads(every)), Kind.WHOLE, 1, every)
    yield from pair("hf-tp", "Hugging Face TP", Kind.TP_PLAN, tp, threads)
    yield from pair("dtensor", "parallelize_module", Kind.PARALLELIZED, tp, threads)
    yield Variant("deepspeed", "DeepSpeed AutoTP, eager", Kind.DEEPSPEED, threads, tp)
    yield Variant("vllm", "vLLM", Kind.VLLM, threads, tp)


def _own(settings: BenchSettings) -> Iterator[Variant]:
    tp, threads = settings.tp, settings.threads
    every = tp * threads
    for blocks, mask in product(settings.blocks_per_graph, ("", *settings.masks)):
        end = (f"@{blocks}" if blocks > 1 else "") + (f"/{mask}" if mask else "")
        words = f", {blocks} blocks a graph" if blocks > 1 else ""
        words += f", attention dropped: {mask}" if mask else ""
        same: dict[str, Any] = {"mask": mask, "blocks_per_graph": blocks}
        alone = f"spdcompile, one process, {_threads(every)}{words}"
        yield Variant(f"spd-local{end}", alone, Kind.LOCAL, every, ranks=1, **same)
        for name, label, transport in _TRANSPORTS:
            yield Variant(
                f"{name}{end}",
                f"spdcompile, {label}{words}",
                Kind.RANKS,
                threads,
                tp,
                transport=transport,
                **same,
            )


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
