"""Packed products equal the separate ones, whatever they read and whichever rank they are on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

from spdcompile.passes import pipeline
from spdcompile.passes.base import Part, Program
from spdcompile.passes.ops import SYNC
from spdcompile.runtime.packing import Pack, pack_products, packed, packs_of
from spdcompile.runtime.weights import bind, checkpoint_tensors
from tests.compare import rel_err
from tests.models import tiny

TP = 3  # divides neither heads nor channels
SIZES = {"hidden": 32, "heads": 4, "intermediate": 50, "dtype": torch.float64}
LINEAR = torch.ops.aten.linear.default
# family -> how many products each pack of a block joins; biases make packs of their own
PACKS = {
    "llama_gqa": [3, 2],
    "qwen3": [3, 2],
    "opt": [3, 3],
    "gpt2": [],
    "gpt_neox": [],
    "phi3": [],
}


def lowered(family: str) -> tuple[Program, dict[str, Tensor]]:
    """A program for TP ranks, and the model's tensors."""
    model = tiny(family, **SIZES)
    lowering = pipeline.advance(pipeline.start(model), pipeline.preserving(TP, {}))
    return lowering.program, checkpoint_tensors(model)


def block_of(program: Program) -> tuple[Part, fx.GraphModule]:
    """The first block, without what ranks exchange."""
    part = next(part for part in program.parts if part.layer == 0)
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph_of(part).module.graph, {}))
    for node in graph.find_nodes(op="call_function", target=SYNC):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return part, fx.GraphModule(program.graph_of(part).module, graph)


def copied(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def run(module: fx.GraphModule, part: Part, params: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What a block gives for random hidden states, in tokens and positions of two sequences."""
    generator = torch.Generator().manual_seed(0)
    args = []
    for node in module.graph.find_nodes(op="placeholder"):
        if node.name in params:
            args.append(params[node.name])
            continue
        value = node.meta["val"]
        shape = [size if isinstance(size, int) else 7 for size in value.shape]
        shape[0] = 2 if len(shape) > 1 and shape[0] != 1 else shape[0]
        if value.dtype.is_floating_point:
            args.append(torch.randn(shape, generator=generator, dtype=value.dtype))
        else:
            args.append(torch.ones(shape, dtype=value.dtype))
    assert set(params) <= {node.name for node in module.graph.find_nodes(op="placeholder")}
    return module(*args)


@pytest.mark.parametrize("family", PACKS)
def test_packed_block_equals_the_block(family: str) -> None:
    program, tensors = lowered(family)
    part, module = block_of(program)
    packs = packs_of(program, part)
    assert [len(pack.members) for pack in packs] == PACKS[family]
    rewritten = copied(module)
    pack_products(rewritten, packs)
    separate = len(module.graph.find_nodes(op="call_function", target=LINEAR))
    weights = [pack for pack in packs if len(part.params[pack.members[0]].shape) == 2]
    joined = len(rewritten.graph.find_nodes(op="call_function", target=LINEAR))
    assert joined == separate - sum(len(pack.members) - 1 for pack in weights)
    for rank in range(TP):
        params = bind(program, part, tensors, torch.device("cpu"), rank)
        expected = run(module, part, params)
        found = run(rewritten, part, packed(params.items(), packs))
        for joint, own in zip(found, expected, strict=True):
            assert rel_err(joint, own) < 1e-13


def test_parted_products_read_their_rows() -> None:
    """As if a dropped sync point had given k another value than q and v."""
    program, tensors = lowered("llama_gqa")
    part, module = block_of(program)
    packs = packs_of(program, part)
    first = module.graph.find_nodes(op="call_function", target=LINEAR)[1]
    with module.graph.inserting_before(first):
        other = module.graph.call_function(torch.ops.aten.mul.Tensor, (first.args[0], 0.5))
    first.update_arg(0, other)
    module.recompile()
    rewritten = copied(module)
    pack_products(rewritten, packs)
    params = bind(program, part, tensors, torch.device("cpu"), 1)
    found, expected = run(rewritten, part, packed(params.items(), packs)), run(module, part, params)
    assert all(rel_err(a, b) < 1e-13 for a, b in zip(found, expected, strict=True))


def test_parameters_of_other_dtypes_or_uses_are_left_alone() -> None:
    program, _ = lowered("llama_gqa")
    part, _ = block_of(program)
    whole = [pack.members for pack in packs_of(program, part)]
    q, k, v = whole[0]
    graph = program.graph_of(part).module.graph
    weight = next(node for node in graph.find_nodes(op="placeholder") if node.name == k)
    (product,) = weight.users
    with graph.inserting_after(product):
        graph.call_function(torch.ops.aten.neg.default, (weight,))
    assert [pack.members for pack in packs_of(program, part)] == [(q, v), whole[1]]


def test_pack_is_one_tensor_in_the_order_of_its_members() -> None:
    pack = Pack("both", ("a", "b"), (2, 1))
    given = {"b": torch.zeros(1, 3), "a": torch.ones(2, 3), "other": torch.ones(1)}
    found = packed(given.items(), (pack,))
    assert set(found) == {"other", "both"}
    assert torch.equal(found["both"], torch.tensor([[1.0], [1], [0]]).expand(3, 3))


def test_members_are_read_one_at_a_time() -> None:
    """What a rank holds while it loads is its share and little more."""
    read: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def reading() -> Iterator[tuple[str, Tensor]]:
        for name in "abcd":
            alive.append(sum(tensor() is not None for tensor in read))
            tensor = torch.ones(1, 3)
            read.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    packed(reading(), (Pack("all", tuple("abcd"), (1, 1, 1, 1)),))
    assert max(alive) == 1
