"""What one rank computes, reads and exchanges in a step, counted from its program.

The graphs run once on the meta device, which has shapes and no data. A product, an attention or
a look-up is a kernel of its own: it reads its inputs and writes its output. What lies between
those is taken to be fused: it reads what comes from such kernels and writes what goes to them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import spdcompile.runtime.executor  # noqa: F401  (gives the operators their kernels)
from spdcompile.passes.base import CacheSpec, ParamRef, Part, Program
from spdcompile.passes.layout import ShardSpec
from spdcompile.passes.ops import (
    APPEND,
    ATTEND,
    ATTEND_CACHED,
    ATTENTION,
    GATHER,
    GROUPED_MM,
    SYNC,
)
from spdcompile.passes.tokens import TOKENS

_ATEN = torch.ops.aten
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
class Kernel:
    """One kernel on one rank.

    Args:
        name: its operator, or "fused".
        flops: floating-point operations, a multiply-add counted as two.
        num_bytes: read and written.
        dtype: that of its result, in which it computes.
    """

    name: str
    flops: float
    num_bytes: int
    dtype: torch.dtype


class Kind(enum.Enum):
    """A kind of collective."""

    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"


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
    """What a rank does in a step, in program order."""

    kernels: tuple[Kernel, ...] = field(default=())
    exchanges: tuple[Exchange, ...] = field(default=())
    weight_bytes: int = 0

    @property
    def flops(self) -> float:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def num_bytes(self) -> int:
        return sum(kernel.num_bytes for kernel in self.kernels)


def work_of(program: Program, step: Step) -> Work:
    """Counts the work of the rank with most of it; ranks of an even split have equal work.

    Args:
        program: for a step with a context, one that remembers (`pipeline.remembering`).
    """
    counter = _Counter(program, step)
    env = _inputs(program, step)
    *parts, postlude = program.parts
    for part in parts:
        env.update(counter.run(part, env))
    counter.run(postlude, _of_last(program, postlude, env, step.last))
    return Work(tuple(counter.kernels), tuple(counter.exchanges), counter.weight_bytes)


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
        self._known: dict[object, tuple[_Counting, list[Tensor]]] = {}

    def run(self, part: Part, env: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of a part, whose work is added."""
        params = {name: _local(ref, part.shards.get(name)) for name, ref in part.params.items()}
        given = {**params, **{name: self._cache(spec) for name, spec in part.caches.items()}}
        module = self.program.graph_of(part).module
        names = [node.name for node in module.graph.find_nodes(op="placeholder")]
        args = [given[name] if name in given else env[part.inputs[name]] for name in names]
        key = (part.graph, tuple((tuple(arg.shape), arg.dtype) for arg in args))
        if key not in self._known:
            counting = _Counting(module, self.program.tp)
            self._known[key] = counting, list(counting.run(*args))
        counting, outputs = self._known[key]
        self.kernels += counting.kernels()
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


# ---- floating-point operations of kernels


def _product(out: Tensor, left: Tensor, right: Tensor, *_: Any) -> float:
    """Of left [..., k], whatever the layout of the other."""
    return 2.0 * out.numel() * left.shape[-1]


def _sum_and_product(out: Tensor, bias: Tensor, left: Tensor, *_: Any) -> float:
    return 2.0 * out.numel() * left.shape[-1]


def _attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> float:
    """q [B, H, S, D], k [B, Hkv, T, D]; the half that a causal mask hides is not left out."""
    return 2.0 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])


def _cached_attention(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, *_: Any
) -> float:
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k_cache.shape[2]
    return 2.0 * pairs * (q.shape[3] + v.shape[3])


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *_: Any) -> float:
    return 2.0 * out.numel() * weight[0].numel()


def _nothing(*_: Any) -> float:
    return 0.0


Flops = Callable[..., float]
KERNELS: Mapping[Callable[..., Any], Flops] = {
    _ATEN.linear.default: _product,
    _ATEN.matmul.default: _product,
    _ATEN.mm.default: _product,
    _ATEN.bmm.default: _product,
    _ATEN.addmm.default: _sum_and_product,
    _ATEN.scaled_dot_product_attention.default: _attention,
    _ATEN.conv1d.default: _convolution,
    _ATEN.embedding.default: _nothing,
    _ATEN.index_select.default: _nothing,
    ATTENTION: _attention,
    ATTEND: _attention,
    ATTEND_CACHED: _cached_attention,
    GROUPED_MM: _product,
    APPEND: _nothing,
}
"""(output, *arguments) -> operations of each operator that is a kernel of its own."""
_LOOK_UPS = frozenset({_ATEN.embedding.default, _ATEN.index_select.default, APPEND})
_COLLECTIVES = {SYNC: Kind.ALL_REDUCE, GATHER: Kind.ALL_GATHER}


class _Counting(fx.Interpreter):
    """Runs one graph, and notes every kernel and collective."""

    def __init__(self, module: fx.GraphModule, ranks: int) -> None:
        super().__init__(module)
        self.ranks = ranks
        self.exchanges: list[tuple[Kind, str, int]] = []
        self._own: dict[fx.Node, Kernel] = {}
        self._sizes: dict[fx.Node, int] = {}
        self._dtypes: dict[fx.Node, torch.dtype] = {}

    def run_node(self, node: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        result = getattr(self, node.op)(node.target, args, kwargs)
        if isinstance(result, Tensor):
            self._sizes[node], self._dtypes[node] = result.nbytes, result.dtype
        if node.target in _COLLECTIVES:
            kind = _COLLECTIVES[node.target]
            if kind is Kind.ALL_GATHER:
                shape = list(result.shape)
                shape[node.args[1]] *= self.ranks
                result = result.new_empty(shape)
                self._sizes[node] = result.nbytes
            name = node.args[1] if kind is Kind.ALL_REDUCE else "gather"
            self.exchanges.append((kind, name, result.nbytes))
        elif node.target in KERNELS:
            self._own[node] = self._kernel(node, args, result)
        return result

    def _kernel(self, node: fx.Node, args: tuple[Any, ...], result: Any) -> Kernel:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        out = result if isinstance(result, Tensor) else tensors[0]
        moved = 2 * out.nbytes
        if node.target not in _LOOK_UPS:
            moved = out.nbytes + sum(tensor.nbytes for tensor in tensors)
        flops = KERNELS[node.target](out, *args)
        return Kernel(str(node.target).split(".")[-2], flops, moved, out.dtype)

    def kernels(self) -> Iterator[Kernel]:
        """All kernels: those of their own, and what is fused between them."""
        for node in self.module.graph.nodes:
            if node in self._own:
                yield self._own[node]
            fused = self._fused(node)
            if fused:
                yield Kernel("fused", 0.0, fused, self._dtypes[node])

    def _fused(self, node: fx.Node) -> int:
        """What fused code writes of a value, or reads if a kernel made it."""
        if node not in self._sizes or not node.users:
            return 0
        alone = self._is_alone(node)
        crosses = any(self._is_alone(user) != alone for user in node.users)
        return self._sizes[node] if crosses and not _is_view(node) else 0

    def _is_alone(self, node: fx.Node) -> bool:
        """Whether it is no part of fused code."""
        return node.op != "call_function" or node in self._own or node.target in _COLLECTIVES


_SHAPES = ("view", "reshape", "transpose", "permute", "unsqueeze", "expand", "slice", "select")
_VIEWS = frozenset(getattr(_ATEN, name) for name in _SHAPES)


def _is_view(node: fx.Node) -> bool:
    """Whether it moves nothing."""
    return getattr(node.target, "overloadpacket", None) in _VIEWS
