"""One rank of a program by itself: random weights of a rank's size, and waits for collectives.

So one device shows what a rank of a model takes that is too large for the machine.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spdcompile.passes.base import ParamRef, Part, Program
from spdcompile.passes.layout import ShardSpec
from spdcompile.runtime.delays import Delays, OfDelays, Seconds, cycles_per_s, set_delays
from spdcompile.runtime.executor import Backend
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.rank import RankExecutor
from spdcompile.runtime.weights import Weights

_NAME = "replay"


class ReplayExecutor(RankExecutor):
    """Runs rank 0 of a program without the others, and without the model's weights.

    Parameters are drawn on the device, each of the rank's own shape, so that never more than a rank
    holds is in memory. What the program computes means nothing; how long it takes does.
    """

    def __init__(self, program: Program, *, backend: Backend, device: torch.device) -> None:
        collectives = OfDelays(_NAME, program.tp)
        super().__init__(program, {}, backend=backend, device=device, collectives=collectives)

    def _load(self, tensors: Weights) -> None:
        self.tensors = tensors
        parts = self.program.parts
        self._uses = Counter(ref.fqn for part in parts for ref in part.params.values())
        self._shared: dict[object, Tensor] = {}
        self.params = {part.name: self._bind(part, tensors) for part in parts}

    def _bind(self, part: Part, tensors: Weights) -> dict[str, Tensor]:
        drawn = (
            (name, self._drawn_once(ref, part.shards.get(name)))
            for name, ref in part.params.items()
        )
        return self._packed(part, drawn)

    def _drawn_once(self, ref: ParamRef, spec: ShardSpec | None) -> Tensor:
        """A parameter; one tensor for what several share, as real weights are."""
        split = None if spec is None else (spec.dim, spec.index.tobytes())
        key = (ref.fqn, ref.transposed, split)
        if key in self._shared:
            return self._shared[key]
        drawn = nn.Parameter(self._drawn_anew(ref, spec), requires_grad=False)
        if self._uses[ref.fqn] > 1:
            self._shared[key] = drawn
        return drawn

    def _drawn_anew(self, ref: ParamRef, spec: ShardSpec | None) -> Tensor:
        constant = self.program.constants[ref.fqn] if ref.constant else None
        if constant is not None and not constant.is_meta:
            local = constant if spec is None else spec.shard_of(constant, 0)
            return local.to(self.device).contiguous()
        shape = list(ref.shape)
        if spec is not None:
            shape[spec.dim] = spec.local_size
        empty = torch.empty(shape, dtype=ref.dtype, device=self.device)
        if not ref.dtype.is_floating_point:
            return empty.zero_()
        # Values stay near 1 from block to block: arithmetic on denormal numbers or NaN takes
        # another time.
        return empty.normal_(std=1 / math.sqrt(ref.shape[-1])) if len(shape) > 1 else empty.fill_(1)


def without_delays() -> Delays:
    """Lets collectives take no time, for measuring the rest."""
    return set_delays(_NAME, _no_time, _no_time)


def with_delays(all_reduce: Seconds, all_gather: Seconds) -> Delays:
    """Lets collectives wait, each for what its bytes take."""
    return set_delays(_NAME, all_reduce, all_gather)


def _no_time(num_bytes: int) -> float:
    return 0.0


class Replayed:
    """One step of a replayed rank, to be called over and over: the same tokens each time.

    Args:
        executor: of a program that remembers, or of any where there is no context.
        batch, new, context: as of a step.
        graphs: whether to run a captured CUDA graph on CUDA, so that the host, which is slower than
            a small kernel, launches one thing a step; its delays are those at the first call.
    """

    def __init__(
        self,
        executor: ReplayExecutor,
        *,
        batch: int,
        new: int,
        context: int = 0,
        graphs: bool = True,
    ) -> None:
        self.executor, self._cache = executor, None
        program, device = executor.program, executor.device
        ids = torch.zeros((batch, new), dtype=torch.long, device=device)
        if any(part.caches for part in program.parts):
            self._cache = executor.new_cache(batch, context + new)
            self._cache.advance(context)
        self._inputs = program_inputs(program, ids, cache=self._cache)
        self._graphs = graphs and device.type == "cuda"
        self._captured: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        """Runs the step; on CUDA it may still be running afterwards."""
        if not self._graphs:
            self._run()
            return
        if self._captured is None:
            self._captured = _capture(self._run, self.executor.device)
        self._captured.replay()

    def forget_graph(self) -> None:
        """Has the next call capture anew, with the delays that are set then."""
        self._captured = None

    @torch.no_grad()
    def launch(self) -> None:
        """Runs the step outside any graph, so that what counts collectives counts each once."""
        self._run()

    def _run(self) -> None:
        self.executor.run(self._inputs, self._cache, 1)

    def seconds(self, rounds: int) -> float:
        """The median of some calls, after two that do not count: the first compiles."""
        times = []
        for number in range(rounds + 2):
            _synchronize(self.executor.device)
            began = time.perf_counter()
            self()
            _synchronize(self.executor.device)
            if number >= 2:
                times.append(time.perf_counter() - began)
        return statistics.median(times)


def _capture(run: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """A step as one CUDA graph, after calls on another stream, which compile."""
    cycles_per_s(device)  # measured once, and not while a graph is captured
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        run()
        run()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
