"""What one rank computes, reads and exchanges in a step, counted from its program.

The graphs run once on the meta device, which has shapes and no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import spdcompile.runtime.executor  # noqa: F401  (gives the operators their kernels)
from spdcompile.estimate.counting import Counting, Kind
from spdcompile.estimate.kernels import Kernel
from spdcompile.passes.base import CacheSpec, ParamRef, Part, Program
from spdcompile.passes.layout import ShardSpec
from spdcompile.passes.tokens import TOKENS

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Step:
    """A call of the program.

    Args:
        batch: sequences.
        new: tokens of each that are computed.
        context: tokens of each that are remembered; 0 for a prompt.
        last: how many tokens' logits are computed, where the program can leave the others out; 0
            for all.
    """

    batch: int
    new: int
    context: int = 0
    last: int = 1


@dataclass(frozen=True, slots=True)
class Exchange:
    """One collective.

    Args:
        point: "layers.3.attn" for a sync point; the part and "gather" for a gather.
        num_bytes: of its result, on each rank.
    """

    kind: Kind
    point: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank does in a step, in program order.

    Args:
        weight_bytes: of all parameters; what two parts share counts once for each.
        blocks: how many decoder layers the program calls.
        tokens: that are computed, of all sequences.
    """

    kernels: tuple[Kernel, ...] = field(default=())
    exchanges: tuple[Exchange, ...] = field(default=())
    weight_bytes: int = 0
    blocks: int = 0
    tokens: int = 1

    @property
    def flops(self) -> float:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def num_bytes(self) -> int:
        return sum(kernel.num_bytes for kernel in self.kernels)

    @property
    def state_bytes(self) -> int:
        """What a step reads of weights and caches: a processor's cache that holds it is faster."""
        return sum(kernel.num_bytes for kernel in self.kernels if kernel.reads_state)


def work_of(program: Program, step: Step) -> Work:
    """Counts the work of the rank with most of it; ranks of an even split have equal work.

    Args:
        program: for a step with a context, one that remembers (`pipeline.remembering`).

    Raises:
        UsageError: the program has an operator whose cost is not known.
    """
    counter = _Counter(program, step)
    env = _inputs(program, step)
    *parts, postlude = program.parts
    for part in parts:
        env.update(counter.run(part, env))
    counter.run(postlude, _of_last(program, postlude, env, step.last))
    return Work(
        tuple(counter.kernels),
        tuple(counter.exchanges),
        counter.weight_bytes,
        sum(part.layer is not None for part in program.parts),
        step.batch * step.new,
    )


def _inputs(program: Program, step: Step) -> dict[str, Tensor]:
    batch, total = step.batch, step.context + step.new

    def whole(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.long, device=_META)

    known = {
        "input_ids": whole(batch, step.new),
        "attention_mask": whole(batch, total),
        "position_ids": whole(batch, step.new),
        "start": whole(1 if program.one_start else batch),
    }
    return {name: known[name] for name in program.inputs}


def _of_last(
    program: Program, part: Part, env: Mapping[str, Tensor], last: int
) -> Mapping[str, Tensor]:
    """What a part receives of the last tokens alone, as executors cut it."""
    placeholders = program.graph_of(part).module.graph.find_nodes(op="placeholder")
    given = [node for node in placeholders if node.name in part.inputs]
    if not last or not all(TOKENS in node.meta for node in given):
        return env
    cut = {}
    for node in given:
        tensor, dim = env[part.inputs[node.name]], node.meta[TOKENS]
        cut[part.inputs[node.name]] = tensor.narrow(dim, 0, min(last, tensor.shape[dim]))
    return {**env, **cut}


class _Counter:
    """Runs parts; of equal graphs on equal shapes the first is counted, and the others like it."""

    def __init__(self, program: Program, step: Step) -> None:
        self.program, self.step = program, step
        self.kernels: list[Kernel] = []
        self.exchanges: list[Exchange] = []
        self.weight_bytes = 0
        self._known: dict[object, tuple[Counting, tuple[Kernel, ...], list[Tensor]]] = {}

    def run(self, part: Part, env: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of a part, whose work is added."""
        params = {name: _local(ref, part.shards.get(name)) for name, ref in part.params.items()}
        given = {**params, **{name: self._cache(spec) for name, spec in part.caches.items()}}
        module = self.program.graph_of(part).module
        names = [node.name for node in module.graph.find_nodes(op="placeholder")]
        args = [given[name] if name in given else env[part.inputs[name]] for name in names]
        key = (part.graph, tuple((tuple(arg.shape), arg.dtype) for arg in args))
        if key not in self._known:
            counting = Counting(module, self.program.tp)
            outputs = list(counting.run(*args))
            self._known[key] = counting, tuple(counting.kernels()), outputs
        counting, kernels, outputs = self._known[key]
        self.kernels += kernels
        self.exchanges += [
            Exchange(kind, f"{part.name}.{name}", size) for kind, name, size in counting.exchanges
        ]
        self.weight_bytes += sum(param.nbytes for param in params.values())
        return dict(zip(part.outputs, outputs, strict=True))

    def _cache(self, spec: CacheSpec) -> Tensor:
        shape = [size or self.step.batch for size in spec.shape]
        total = self.step.context + self.step.new
        shape[spec.dim] = min(spec.span or total, total)
        return torch.empty(shape, dtype=spec.dtype, device=_META)


def _local(ref: ParamRef, spec: ShardSpec | None) -> Tensor:
    """A rank's part of a parameter, without data."""
    shape = list(ref.shape)
    if spec is not None:
        shape[spec.dim] = spec.index.shape[1]
    return torch.empty(shape, dtype=ref.dtype, device=_META)
