"""What every pass speaks: the program, its parts, and the contract of a pass."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx

from spdcompile.passes.layout import Assignment, Layout, ShardSpec


class Numerics(enum.Enum):
    """What a pass may do to the numbers."""

    EXACT = "exact"
    ROUNDING = "rounding"
    CHANGES = "changes"


class Invariant(enum.Enum):
    """A property of a program; `verify.py` holds the check of each."""

    WELL_FORMED = "well formed"
    NORMAL = "normal"
    SPLIT = "split into parts"
    ASSIGNED = "assigned"
    PLACED = "placed"
    SYNCED = "synced"
    LOCAL = "local"


class RegionKind(enum.Enum):
    """What a region computes; the first two are also the kinds of sync points."""

    ATTENTION = "attn"
    MLP = "mlp"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class ParamRef:
    """Where a parameter's data comes from.

    Args:
        fqn: its name in the state_dict, or a constant's name in `Program.constants`.
        shape: global shape, after the transposition if there is one.
        transposed: the program's parameter is the checkpoint's tensor with its two dims swapped.
        constant: not a checkpoint tensor.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    constant: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rewrite that did not happen, and why.

    Args:
        subject: what was refused: a linear, a region, a sync point.
        node: the graph node that stood in the way.
        graph: key of its graph; "" where it is no matter of one graph.
    """

    subject: str
    reason: str
    node: str = ""
    graph: str = ""


@dataclass(frozen=True, slots=True)
class Region:
    """Projections that are split together.

    Args:
        name: unique in its graph: "attn", "mlp", "head", or with a number behind ("attn_2").
        num_units: how many units its channels fall into.
        columns: weight placeholder -> layout of its output features.
        rows: weight placeholder -> layout of its input features.
        dims: weight placeholder -> the dim that is split.
        linears: node names of its projections, in graph order.
    """

    name: str
    kind: RegionKind
    num_units: int
    columns: Mapping[str, Layout]
    rows: Mapping[str, Layout]
    dims: Mapping[str, int]
    linears: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SyncPoint:
    """One sync point of a graph, by name within its block.

    Args:
        name: "attn", "mlp", ...; `merged` names the points that share its all-reduce.
        refusal: why it cannot be dropped, or "".
        routed: it can be dropped if routers read the replicated part alone.
    """

    name: str
    merged: tuple[str, ...] = ()
    refusal: str = ""
    routed: bool = False


@dataclass(frozen=True, slots=True)
class BlockGraph:
    """One distinct graph with what the passes know of it.

    Args:
        partials: the sync point of each partial sum, in graph order, before any were merged.
        routers: modules that choose or weigh experts by the replicated part of a value alone.
    """

    module: fx.GraphModule
    regions: tuple[Region, ...] = ()
    sync_points: tuple[SyncPoint, ...] = ()
    partials: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()

    def copied(self) -> BlockGraph:
        """The same with a graph of its own: what a pass may change in place."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.module.graph, {}))
        return replace(self, module=fx.GraphModule(self.module, graph))


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What an attention remembers of every token.

    Args:
        shape: a rank's, with 0 for the sequences and for the tokens.
        dim: the dim of the tokens.
        span: how many tokens back are seen, so that no more are kept; 0 for all.
        per_rank: whether each rank has its own, rather than all the same.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int
    span: int = 0
    per_rank: bool = True


@dataclass(frozen=True, slots=True)
class Part:
    """A straight piece of the program: the prelude, one block or the postlude.

    Args:
        name: "prelude", "layers.3", "postlude".
        layer: index of the decoder layer; None outside the blocks.
        graph: key into `Program.graphs`.
        params: placeholder -> where its data comes from.
        inputs: placeholder -> name of the value it receives.
        outputs: names given to the graph's outputs, in order.
        shards: placeholder -> its split; a parameter that is not listed is replicated.
        assignments: region name -> units per rank.
        dropped: sync points of this part that the plan dropped.
        module: the module path of the block in the model ("model.layers.3").
        caches: placeholder -> the cache that it receives.
    """

    name: str
    layer: int | None
    graph: str
    params: Mapping[str, ParamRef]
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    shards: Mapping[str, ShardSpec] = field(default_factory=dict)
    assignments: Mapping[str, Assignment] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    module: str = ""
    caches: Mapping[str, CacheSpec] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Program:
    """A model as one SPMD program: distinct graphs, and the parts that call them in order.

    Args:
        inputs: names of the values that the caller gives, in order.
        output: name of the value that holds the logits.
        layers: module path of the list of decoder blocks ("model.layers").
        positions: how absent position ids are made (`Positions`), None if the model takes none.
        constants: data that is no checkpoint tensor (rotary frequencies, index tables).
        min_length: the shortest input that the program holds for.
        max_length: the longest one, None for any.
        one_start: whether new tokens must begin at one column for all sequences of a batch.
    """

    graphs: Mapping[str, BlockGraph]
    parts: tuple[Part, ...]
    inputs: tuple[str, ...]
    output: str
    layers: str
    tp: int = 1
    positions: Positions | None = None
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    min_length: int = 1
    max_length: int | None = None
    one_start: bool = False

    def graph_of(self, part: Part) -> BlockGraph:
        """The graph that a part calls."""
        return self.graphs[part.graph]

    def map_graphs(self, rewrite: Callable[[str, BlockGraph], BlockGraph]) -> Program:
        """A program in which each distinct graph went through `rewrite(key, graph)`."""
        return replace(self, graphs={key: rewrite(key, g) for key, g in self.graphs.items()})


class Positions(enum.Enum):
    """How position ids come about when the caller gives none, as the model itself does it."""

    ARANGE = "arange"
    FROM_MASK = "cumulative sum of the attention mask"
    FROM_IDS = "made in the graph, from the ids; none can be given"


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass gives back: the program, the number of rewrites, what it refused."""

    program: Program
    rewrites: int
    refusals: tuple[Refusal, ...] = ()


class Pass(Protocol):
    """A rewrite of programs; the contract of design section 5."""

    @property
    def name(self) -> str: ...
    @property
    def numerics(self) -> Numerics: ...
    @property
    def requires(self) -> frozenset[Invariant]: ...
    @property
    def ensures(self) -> frozenset[Invariant]: ...
    def __call__(self, program: Program) -> PassResult: ...


def add_call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    meta: Mapping[str, Any],
    kwargs: Mapping[str, Any] | None = None,
    **facts: Any,
) -> fx.Node:
    """Adds a call, named by its operator ("mul_1"), with `meta` updated by `facts`."""
    name = getattr(target, "__name__", str(target)).split(".")[0]
    node = graph.create_node("call_function", target, args, dict(kwargs or {}), name)
    node.meta = {**meta, **facts}
    return node


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that made a node, "" if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if not path.startswith("_empty")]
    return paths[-1].removeprefix("model.") if paths else ""
