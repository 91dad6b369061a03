"""The captured graph computes what the model computes, whatever batch, length and padding.

One entry of the zoo for each thing that capture does so that a graph can hold the model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

import spdcompile.runtime.executor  # noqa: F401  (gives the operators their kernels)
from spdcompile.errors import UsageError
from spdcompile.passes.base import Positions, Program
from spdcompile.passes.capture import capture
from spdcompile.passes.ops import ATTENTION, CALL, GROUPED_MM
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.weights import checkpoint_tensors
from tests.compare import rel_err
from tests.zoo.models import build, left_padded, token_ids

SDPA = torch.ops.aten.scaled_dot_product_attention.default
BOUND = 1e-5  # float32, relative to the largest logit; most are equal to the last bit

# Entry -> operators that its graph has, and how many.
OPERATORS: dict[str, dict[fx.node.Target, int]] = {
    "exaone4": {ATTENTION: 2},  # a window in one layer, by the mask; not by the argument
    "llama4_text": {ATTENTION: 4},  # chunks
    "lfm2": {ATTENTION: 1},  # asks data of the padding mask
    "roberta": {ATTENTION: 2},  # numbers its tokens by the ids
    "mamba": {CALL: 2},  # a scan in a function
    "recurrent_gemma": {CALL: 2, ATTENTION: 1},  # a scan in a method that reads no module
    "minimax": {CALL: 1, ATTENTION: 1},  # a module that loops over blocks
    "rwkv": {CALL: 2},  # scales its weights at its first call
    "dbrx": {GROUPED_MM: 6, ATTENTION: 2},  # loops over the experts that data chose
    "longcat_flash": {GROUPED_MM: 4},  # experts that give their input back
    "jetmoe": {GROUPED_MM: 8, ATTENTION: 2},  # experts in the attention too
    "stablelm@par": {ATTENTION: 2, torch.ops.aten.layer_norm.default: 7},  # a norm for each head
    "cpmant": {},  # a constant of the length, and a prompt of its own
    "doge": {CALL: 2},  # another path for long inputs
    "aria_text": {ATTENTION: 2},  # a condition on sizes that torch cannot prove
}


def _runner(model: PreTrainedModel, program: Program) -> Callable[..., Tensor]:
    """(ids, mask) -> logits of the captured graph over the model's weights."""
    (part,) = program.parts
    tensors = {**checkpoint_tensors(model), **program.constants}
    module = program.graph_of(part).module

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        inputs = program_inputs(program, ids, mask)
        nodes = module.graph.find_nodes(op="placeholder")
        names = [node.name for node in nodes]
        args = [tensors[part.params[n].fqn] if n in part.params else inputs[n] for n in names]
        with torch.no_grad():
            return module(*args)[0]

    return run


def _count(program: Program, target: fx.node.Target) -> int:
    graph = program.graphs["model"].module.graph
    return len(graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("entry", OPERATORS)
def test_captured_graph_computes_what_the_model_does(entry: str) -> None:
    model = build(entry)
    program = capture(model).program
    run = _runner(model, program)
    found = {target: _count(program, target) for target in OPERATORS[entry]}
    assert found == OPERATORS[entry]
    for shape, pads in (((3, 13), None), ((1, 5), None), ((1, 1), None), ((2, 13), (4, 1))):
        ids = token_ids(shape, model.config.vocab_size)
        mask = torch.ones_like(ids)
        if pads is not None:
            ids, mask = left_padded(ids, pads)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=False).logits
        assert rel_err(run(ids, mask), expected, real=mask) < BOUND, (shape, pads)


def test_capture_leaves_the_model_as_it_was() -> None:
    model = build("recurrent_gemma")
    kind = type(next(m for m in model.modules() if hasattr(m, "_rnn_scan")))
    scan, attention = kind._rnn_scan, model.config._attn_implementation
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    capture(model)
    assert kind._rnn_scan is scan
    assert model.config._attn_implementation == attention
    for name, module in model.named_modules():
        assert vars(module) == attributes[name], name


def test_length_is_bounded_where_the_model_takes_another_path() -> None:
    program = capture(build("mpt")).program
    assert program.max_length is not None
    longest = torch.ones((1, program.max_length), dtype=torch.long)
    assert program_inputs(program, longest)["input_ids"] is longest
    with pytest.raises(UsageError, match=f"at most {program.max_length}"):
        program_inputs(program, torch.ones((1, program.max_length + 1), dtype=torch.long))


def test_length_is_bounded_from_below_too() -> None:
    model = build("zaya")
    program = capture(model).program
    run = _runner(model, program)
    for length in (program.min_length, 5, 13):
        ids = token_ids((2, length), model.config.vocab_size)
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
        assert rel_err(run(ids, torch.ones_like(ids)), expected) < BOUND
    assert program.min_length > 1
    with pytest.raises(UsageError, match=f"at least {program.min_length}"):
        program_inputs(program, torch.ones((1, program.min_length - 1), dtype=torch.long))


def test_attention_that_is_no_operator_stays_what_the_model_is_set_to() -> None:
    model = build("minimax_m3_vl_text")
    graph = capture(model).program.graphs["model"].module.graph
    assert any(node.target is SDPA for node in graph.nodes)
    model.set_attn_implementation("eager")
    graph = capture(model).program.graphs["model"].module.graph
    assert not any(node.target is SDPA for node in graph.nodes)


@pytest.mark.parametrize(
    ("entry", "positions"),
    [
        ("llama", Positions.ARANGE),
        ("opt", Positions.FROM_MASK),
        ("roberta", Positions.FROM_IDS),
        ("bloom", None),
    ],
)
def test_capture_finds_how_tokens_are_numbered(entry: str, positions: Positions | None) -> None:
    assert capture(build(entry)).program.positions is positions


def test_given_positions_are_refused_where_the_graph_makes_them() -> None:
    program = capture(build("roberta")).program
    ids = torch.ones((1, 4), dtype=torch.long)
    with pytest.raises(UsageError, match="numbers its tokens itself"):
        program_inputs(program, ids, position_ids=ids)


def test_nothing_of_a_capture_outlives_its_program() -> None:
    """Torch keeps the last graph that it traced, with every fake value of the whole model."""
    before = _num_nodes()
    program = capture(build("llama")).program
    assert _num_nodes() > before + 100
    del program
    assert _num_nodes() <= before


def _num_nodes() -> int:
    gc.collect()
    return sum(type(thing) is fx.Node for thing in gc.get_objects())
