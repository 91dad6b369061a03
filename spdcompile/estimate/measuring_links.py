"""What collectives take between the ranks that are here, each as a program runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx

from spdcompile.errors import UsageError
from spdcompile.estimate.counting import Kind
from spdcompile.estimate.links import Timed
from spdcompile.estimate.timing import typical
from spdcompile.runtime.transport import Transport, collectives_of

LINKS = {
    "shared-memory": Transport.SHARED_MEMORY,
    "sockets": Transport.SOCKETS,
    "gloo": Transport.PROCESS_GROUP,
}
"""Names of links between ranks of one host, and how to ask for them."""
_REDUCED = tuple(2**exponent for exponent in (10, 12, 14, 16, 18, 20, 22))
_GATHERED = tuple(2**exponent for exponent in (12, 16, 20))
_BURST = 40  # collectives in a row, with work between them: about what a few steps have
_BURST_BYTES = 2**24  # of large ones
_UNCOUNTED = 3  # first rounds


@dataclass(frozen=True, slots=True)
class Trial:
    """A collective to be measured.

    Args:
        num_bytes: of its result, on each rank.
    """

    kind: Kind
    num_bytes: int
    run: Callable[[], object]


def trials_of(group: dist.ProcessGroup) -> dict[str, list[Trial]]:
    """Collectives of several sizes through each link that the ranks have, by the link's name."""
    ranks, found = dist.get_world_size(group), {}
    for name, transport in LINKS.items():
        try:
            collectives = collectives_of(group, torch.device("cpu"), transport)
        except UsageError:
            continue
        reduce, gather = _calling(collectives.all_reduce), _calling(collectives.all_gather)
        found[name] = [
            *(Trial(Kind.ALL_REDUCE, n, partial(reduce, torch.ones(n // 4))) for n in _REDUCED),
            *(
                Trial(Kind.ALL_GATHER, n, partial(gather, torch.ones(n // 4 // ranks)))
                for n in _GATHERED
            ),
        ]
    return found


def _calling(emit: Callable[[fx.Graph, fx.Node], fx.Node]) -> Callable[[Tensor], Tensor]:
    """What a collective becomes in a graph, by itself."""
    graph = fx.Graph()
    graph.output(emit(graph, graph.placeholder("tensor")))
    return fx.GraphModule({}, graph)


def timed(trials: Mapping[str, Sequence[Trial]], ranks: int, rounds: int) -> dict[str, list[Timed]]:
    """What each collective takes; all ranks call this together."""
    return {
        name: [
            Timed(trial.kind, ranks, trial.num_bytes, typical(times))
            for trial in each
            for times in [[burst(trial) for _ in range(rounds + _UNCOUNTED)][_UNCOUNTED:]]
        ]
        for name, each in trials.items()
    }


def burst(trial: Trial) -> float:
    """Seconds of a collective that comes after work, as in a program: ranks wait for each other.

    The work takes about a millisecond: threads that have had nothing to do for so long are asleep.
    """
    vectors, matrices = _other_work()
    taken, count = 0.0, min(_BURST, _BURST_BYTES // trial.num_bytes)
    for _ in range(count):
        for matrix in matrices:
            F.linear(vectors, matrix)
        began = time.perf_counter()
        trial.run()
        taken += time.perf_counter() - began
    return taken / count


@cache
def _other_work() -> tuple[Tensor, Tensor]:
    return torch.ones(4, 512), torch.ones(8, 512, 512)
