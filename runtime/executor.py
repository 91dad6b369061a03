"""What the two executors share: running a program part by part."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Self

import torch
from torch import Tensor, fx

import spdcompile.runtime.cached_attention
import spdcompile.runtime.calls
import spdcompile.runtime.grouped
import spdcompile.runtime.ops  # noqa: F401  (gives the operators their kernels)
from spdcompile.passes.base import Part, Program
from spdcompile.passes.tokens import TOKENS
from spdcompile.passes.verify import check_collectives
from spdcompile.runtime.cache import KVCache
from spdcompile.runtime.compiled_function import CompiledFunction
from spdcompile.runtime.joining import join_blocks
from spdcompile.runtime.kernels import Kernels
from spdcompile.runtime.weights import OnDemand, Weights, read_shared

Function = Callable[..., tuple[Tensor, ...]]


class Backend(enum.Enum):
    """What runs a part's graph."""

    EAGER = "eager"
    INDUCTOR = "inductor"


class Built(NamedTuple):
    """What runs a graph.

    Args:
        inputs: names of what it takes, in order.
        emitted: its all-reduces.
    """

    function: Function
    inputs: tuple[str, ...]
    emitted: int


class Executor(ABC):
    """Runs a program. Parts of equal structure share one function, compiled once.

    Args:
        program: what to run.
        tensors: global tensors under their state_dict names, in memory or in files.
        device: where to run.
        blocks_per_graph: how many consecutive blocks are one function.
        on_demand: whether to hold a part's parameters only from when they are needed until
            `release`.
    """

    stacks_ranks: bool  # whether a value of every rank is one tensor here, [tp, ...]

    def __init__(
        self,
        program: Program,
        tensors: Weights,
        *,
        backend: Backend,
        device: torch.device,
        blocks_per_graph: int = 1,
        on_demand: bool = False,
    ) -> None:
        self.program = join_blocks(program, blocks_per_graph)
        self.backend, self.device, self.blocks_per_graph = backend, device, blocks_per_graph
        self._on_demand = on_demand
        self._load(tensors)
        self._built: dict[fx.GraphModule, Built] = {}
        self._prepare()

    def with_program(self, program: Program) -> Self:
        """An executor of another program over the same weights, sharing what is compiled.

        Args:
            program: one that differs from this executor's in its dropped sync points and caches
                only.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.program = join_blocks(program, self.blocks_per_graph)
        other._prepare()
        return other

    def with_tensors(self, tensors: Weights) -> Self:
        """An executor of the same program over other weights, sharing what is compiled.

        Args:
            tensors: global tensors under their state_dict names; the others stay.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._load({**self.tensors, **tensors})
        return other

    def _load(self, tensors: Weights) -> None:
        self.tensors = tensors
        here = read_shared(self.program, tensors)
        self.params: Mapping[str, dict[str, Tensor]] = OnDemand(
            self.program.parts, lambda part: self._bind(part, here)
        )
        if not self._on_demand:
            self.params = {name: self.params[name] for name in self.params}

    def release(self) -> None:
        """Forgets parameters that are held on demand; they are bound anew when needed."""
        if isinstance(self.params, OnDemand):
            self.params.release()

    def run(
        self, inputs: Mapping[str, Tensor], cache: KVCache | None = None, last: int = 0
    ) -> Tensor:
        """The logits, [B, S, V], or of the last tokens alone.

        Args:
            inputs: the program's inputs by name.
            cache: for a program that remembers; the new tokens are written into it.
            last: how many tokens' logits to compute; 0 for all.
        """
        env = dict(inputs)
        *parts, postlude = self.program.parts
        with self._kernels_at_hand():
            self._run_parts(env, parts, cache)
            if last:
                self._keep_last(env, postlude, last)
            self._run_parts(env, [postlude], cache)
        logits = env[self.program.output]
        return logits[:, -last:] if last else logits

    def _keep_last(self, env: dict[str, Tensor], part: Part, last: int) -> None:
        """Cuts what a part receives of each token to the last tokens, if it receives no more."""
        placeholders = self.program.graph_of(part).module.graph.find_nodes(op="placeholder")
        given = [node for node in placeholders if node.name in part.inputs]
        if not all(TOKENS in node.meta for node in given):
            return
        for node in given:
            name, dim = part.inputs[node.name], node.meta[TOKENS]
            tokens = env[name]
            first = max(tokens.shape[dim] - last, 0)
            env[name] = tokens.narrow(dim, first, tokens.shape[dim] - first).contiguous()

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """Empty caches for a program that remembers."""
        return KVCache(
            self.program,
            batch=batch,
            max_length=max_length,
            device=self.device,
            tp=self.program.tp if self.stacks_ranks else None,
        )

    def run_parts(
        self, env: dict[str, Tensor], parts: Iterable[Part], cache: KVCache | None = None
    ) -> None:
        """Runs some parts in order; reads their inputs from `env` and adds their outputs to it."""
        with self._kernels_at_hand():
            self._run_parts(env, parts, cache)

    def _run_parts(
        self, env: dict[str, Tensor], parts: Iterable[Part], cache: KVCache | None
    ) -> None:
        for part in parts:
            env.update(self.call(part, env, None if cache is None else cache.of(part.name)))

    def _kernels_at_hand(self) -> AbstractContextManager[None]:
        return self._kernels.at_hand() if self._kernels else nullcontext()

    def call(
        self, part: Part, env: Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Runs one part.

        Args:
            params: parameters to use in place of the part's own, and its caches, by placeholder.
        """
        built = self._built[self.program.graph_of(part).module]
        given = {**self.params[part.name], **(params or {})}
        args = [given[n] if n in given else env[part.inputs[n]] for n in built.inputs]
        return dict(zip(part.outputs, built.function(*args), strict=True))

    def _prepare(self) -> None:
        """Makes the functions of graphs that have none yet; counts their all-reduces."""
        self._kernels = (
            None if self.backend is Backend.EAGER else Kernels(self.program, self.device)
        )
        emitted = {}
        for part in self.program.parts:
            module = self.program.graph_of(part).module
            if module not in self._built:
                self._built[module] = self._build(part, module)
            emitted[part.graph] = self._built[module].emitted
        check_collectives(self.program, emitted)

    def _compile(self, module: fx.GraphModule, text: str) -> Function:
        """What runs a module; `text` tells it from others."""
        eager = self.backend is Backend.EAGER
        return module if eager else CompiledFunction(module, text)

    @abstractmethod
    def _bind(self, part: Part, tensors: Weights) -> dict[str, Tensor]:
        """The part's parameters as this executor's functions take them."""

    @abstractmethod
    def _build(self, part: Part, module: fx.GraphModule) -> Built:
        """What runs a graph; `part` is one of those that have it."""


def input_names(module: fx.GraphModule) -> tuple[str, ...]:
    """What a graph takes, in order."""
    return tuple(node.name for node in module.graph.find_nodes(op="placeholder"))


def on_device(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of a graph whose new tensors are made on `device`; a program itself names none."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    return fx.GraphModule(module, graph)
