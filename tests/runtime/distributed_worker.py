"""What each rank of test_distributed.py runs, under torchrun: several cases in one launch.

Usage: distributed_worker.py FOLDER. Every rank writes FOLDER/rank_<r>.pt: case -> logits, or the
text of the error that the case raised.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

import spdcompile
from spdcompile import Plan, Router
from spdcompile.errors import SpdCompileError
from spdcompile.passes.ops import SYNC
from spdcompile.runtime import cpu_operators, shared_memory, sockets
from spdcompile.runtime.collectives import OfGatheredParts, OfProcessGroup, lower_collectives
from spdcompile.runtime.transport import Transport, collectives_of
from tests.models import left_padded, tiny, token_ids

TP = 2
CPU = torch.device("cpu")
VOCAB = 97  # two ranks do not divide it


class Case(NamedTuple):
    """A model, and what is dropped; both are also what the local executor runs."""

    family: str
    dropped: frozenset[tuple[int, str]]
    backend: str = "eager"
    lengths: tuple[int, ...] = (9,)
    router: Router = Router.EXACT
    intermediate: int = 50
    transport: str = "auto"
    blocks_per_graph: int = 1

    def model(self) -> PreTrainedModel:
        sizes = {"layers": 2, "hidden": 32, "heads": 4, "intermediate": self.intermediate}
        return tiny(self.family, **sizes, vocab=VOCAB)

    def plan(self) -> Plan:
        return Plan(tp=TP, num_layers=2, dropped=self.dropped, router=self.router)

    def run(self, executor: str) -> list[Tensor]:
        """The logits of one left-padded batch a length."""
        compiled = spdcompile.compile(
            self.model(),
            tp=TP,
            spd_mask=self.plan(),
            executor=executor,
            backend=self.backend,
            transport=self.transport,
            blocks_per_graph=self.blocks_per_graph,
        )
        return [compiled(*case_inputs(length)).logits for length in self.lengths]


NOTHING: frozenset[tuple[int, str]] = frozenset()
ATTENTION = frozenset({(0, "attn")})
ALL_ATTENTION = frozenset({(0, "attn"), (1, "attn")})  # equal blocks, compiled once
RUN = frozenset({(0, "attn"), (0, "mlp"), (1, "attn")})
DRAWN = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5}
GREEDY = {
    "max_new_tokens": 12,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
CASES = {
    "llama, nothing dropped": Case("llama", NOTHING),
    "opt, nothing dropped": Case("opt", NOTHING),
    "gpt_neox, nothing dropped": Case("gpt_neox", NOTHING),
    "llama, attn dropped": Case("llama", ATTENTION),
    "opt, attn and mlp dropped": Case("opt", RUN),
    "phi3, attn and mlp dropped": Case("phi3", RUN),
    # Hugging Face's own product of experts wants rows of a multiple of 16 bytes.
    "mixtral, attn dropped": Case(
        "mixtral", ALL_ATTENTION, router=Router.REPLICATED, intermediate=48
    ),
    "llama, inductor, attn dropped": Case("llama", ALL_ATTENTION, "inductor", (9, 5)),
    "llama, inductor, both blocks as one": Case(
        "llama", ATTENTION, "inductor", (9, 5), blocks_per_graph=2
    ),
    "llama, gloo": Case("llama", ATTENTION, transport="process-group"),
    "llama, shared memory": Case("llama", ATTENTION, transport="shared-memory"),
    "llama, sockets": Case("llama", ATTENTION, transport="sockets"),
}


def case_inputs(length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of a case, the same on every rank."""
    return left_padded(token_ids(batch=2, length=length, vocab=VOCAB))


def _different_plans(rank: int) -> list[Tensor]:
    """Each rank drops something else, so no rank may start."""
    case = CASES["llama, attn dropped"]
    return case._replace(dropped=ATTENTION if rank == 0 else NOTHING).run("distributed")


def _different_graphs(rank: int) -> list[Tensor]:
    """Each rank has another number of blocks in a graph."""
    case = CASES["llama, attn dropped"]
    return case._replace(blocks_per_graph=1 + rank).run("distributed")


def _wrong_tp(rank: int) -> list[Tensor]:
    model = CASES["llama, nothing dropped"].model()
    spdcompile.compile(model, tp=4, executor="distributed", backend="eager")
    return []


def _chosen_by_world_size(rank: int) -> list[Tensor]:
    """Without `executor`, torchrun's WORLD_SIZE makes it distributed."""
    model = CASES["llama, nothing dropped"].model()
    compiled = spdcompile.compile(model, tp=TP, backend="eager")
    assert type(compiled.executor).__name__ == "DistributedExecutor"
    return [compiled(*case_inputs(9)).logits]


def _generate_from_other_seeds(rank: int) -> list[Tensor]:
    """Tokens drawn where each rank's own random state is another, and that state afterwards."""
    compiled = spdcompile.compile(
        CASES["llama, nothing dropped"].model(), tp=TP, executor="distributed", backend="eager"
    )
    ids, mask = case_inputs(9)
    torch.manual_seed(rank)
    tokens = compiled.generate(ids, attention_mask=mask, **DRAWN)
    return [tokens, torch.rand(1)]


def _generate_in_bfloat16(rank: int) -> list[Tensor]:
    """Greedy tokens, and the logits that each was chosen by."""
    model = CASES["llama, nothing dropped"].model().to(torch.bfloat16)
    compiled = spdcompile.compile(model, tp=TP, executor="distributed", backend="eager")
    ids, mask = case_inputs(9)
    out = compiled.generate(ids, attention_mask=mask, **GREEDY)
    return [out.sequences, torch.stack(out.logits, 1)]


def _both_sums(rank: int) -> list[Tensor]:
    """What the ranks' parts add up to, summed by the process group and by each rank itself."""
    group = torch.distributed.group.WORLD
    sums = []
    for way in (OfProcessGroup, OfGatheredParts):
        graph = fx.Graph()
        graph.output(graph.call_function(SYNC, (graph.placeholder("part"), "attn")))
        module = fx.GraphModule({}, graph)
        assert lower_collectives(module, way(group.group_name, TP, "gloo")) == 1
        part = torch.randn(3, 5, generator=torch.Generator().manual_seed(rank))
        sums.append(module(part))
    return sums


def _whether_to_widen(rank: int) -> list[Tensor]:
    """What is decided where the ranks' own measurements differ, one way round and the other."""
    decide, group = cpu_operators.widening_pays.__wrapped__, torch.distributed.group.WORLD
    found = []
    for first in (True, False):
        own = first if rank == 0 else not first
        with patch.object(cpu_operators, "_widening_is_faster", lambda own=own: own):
            found.append(torch.tensor(decide(group)))
    return found


def _unconnected(rank: int) -> list[Tensor]:
    """Sockets are asked for where one rank has no network."""
    group, broken = torch.distributed.group.WORLD, OSError("no network")
    own = patch.object(sockets, "_own_address", side_effect=broken) if rank else nullcontext()
    with patch.object(sockets.SOCKETS, "_asked", {}), own:
        collectives_of(group, CPU, Transport.SOCKETS)
    return []


def _far_and_unconnected(rank: int) -> list[Tensor]:
    """Whatever can be had, where that is neither memory to share nor sockets."""
    group = torch.distributed.group.WORLD
    nothing = {group.group_name: (group, "not today")}
    with ExitStack() as stack:
        for kind in (shared_memory.SHARED_MEMORY, sockets.SOCKETS):
            stack.enter_context(patch.object(kind, "_asked", nothing))
        found = collectives_of(group, CPU, Transport.AUTO)
    return [torch.tensor(isinstance(found, OfProcessGroup))]


ATTEMPTS: dict[str, Callable[[int], list[Tensor]]] = {
    "different plans": _different_plans,
    "different graphs": _different_graphs,
    "unconnected": _unconnected,
    "far and unconnected": _far_and_unconnected,
    "wrong tp": _wrong_tp,
    "chosen by WORLD_SIZE": _chosen_by_world_size,
    "both sums": _both_sums,
    "whether to widen": _whether_to_widen,
    "generated in bfloat16": _generate_in_bfloat16,
    "generated from other seeds": _generate_from_other_seeds,
}


def main(folder: Path) -> None:
    """Runs every case and writes what came of it."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    results: dict[str, list[Tensor] | str] = {}
    for name, case in CASES.items():
        results[name] = case.run("distributed")
    for name, attempt in ATTEMPTS.items():
        try:
            results[name] = attempt(rank)
        except SpdCompileError as error:
            results[name] = f"{type(error).__name__}: {error}"
    torch.save(results, folder / f"rank_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
