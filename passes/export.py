"""torch.export of a model whose batch and length are dynamic, and the lengths it holds for."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from spdcompile.errors import CaptureError
from spdcompile.passes._torch import UserError, forget_traced, sympy_functions
from spdcompile.passes.functional import made_functional, writes_in_place

INPUTS = ("input_ids", "attention_mask", "position_ids")
# Sizes that are unlikely to equal a size of the model, lest export tie the two together.
_BATCH, _LENGTH = 3, 11
# How torch says so; the second where it cannot even say what would be needed.
_UNPROVED = ("Constraints violated", "Cannot create Dim with inconsistent")
_MAX_ERROR_LINES = 4
_BATCHES_TRIED = (1, 2, 3, 7)
_LONGEST_TRIED = 2**18
_ASSERT = torch.ops.aten._assert_scalar.default


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported program and the shortest and longest input that it holds for, None for any."""

    program: ExportedProgram
    min_length: int = 1
    max_length: int | None = None


def export(module: nn.Module, device: torch.device) -> Exported:
    """Exports `module(input_ids, attention_mask, position_ids)` for every batch and length.

    Args:
        module: takes int64 [B, S] three times, and checks that they are of one size.

    Where tracing met a condition on the sizes that torch cannot prove, it is tried on sizes here;
    the lengths at which one fails bound the length from above and from below.

    Raises:
        CaptureError: a condition depends on data or fails for some batch whatever the length.
    """
    ids = torch.ones((_BATCH, _LENGTH), dtype=torch.long, device=device)
    inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    try:
        with torch.no_grad():
            return _exported(module, inputs)
    finally:
        forget_traced()


def _exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> Exported:
    named = {0: Dim("batch", min=1), 1: Dim("length", min=1)}
    try:
        exported = torch.export.export(
            module, inputs, dynamic_shapes=dict.fromkeys(INPUTS, named), strict=False
        )
        return Exported(_functional(exported))
    except (UserError, AssertionError) as error:
        if not str(error).startswith(_UNPROVED):
            raise
    relaxed = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in INPUTS}
    exported = torch.export.export(
        module,
        inputs,
        dynamic_shapes=relaxed,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    return Exported(_functional(exported), *_lengths(exported))


def failure(error: Exception) -> str:
    """An error in a few lines, with the line of the model's code that it comes from."""
    lines = str(error).strip().split("\n\n")[0].splitlines()[:_MAX_ERROR_LINES]
    text = f"{type(error).__name__}: " + "\n".join(dict.fromkeys(lines))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "modeling_" in Path(frame.filename).name]
    return f"{text}\nin {own[-1].name}: {own[-1].line}" if own else text


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """The same with each operator that writes in place made functional, if there is one."""
    if not any(writes_in_place(node) for node in exported.graph.nodes):
        return exported
    plain = made_functional(exported.graph)
    if plain is not None:
        exported.graph_module.graph = plain
        return exported
    with warnings.catch_warnings():
        # torch 2.13 copies its own tree specs in a way that it deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        return exported.run_decompositions({})


def _lengths(exported: ExportedProgram) -> tuple[int, int | None]:
    """The shortest and the longest input between which every condition of the tracing holds.

    Conditions are made of the sizes and of constants by sums, products, divisions, minima and
    maxima, so that nothing new happens beyond a multiple of the largest constant: they are tried
    at every length up to there.
    """
    ids = next(node for node in exported.graph.nodes if node.name == INPUTS[0])
    batch, length = (size.node.expr for size in ids.meta["val"].shape)
    _check_batch(exported, batch)
    bound = exported.range_constraints[length]
    # torch takes 2 for granted, and 1 behaves like it but for layouts.
    shortest = int(bound.lower) if bound.lower > 2 else 1
    longest = int(bound.upper) if bound.upper.is_Integer else None
    for condition in _conditions(exported.graph):
        if condition.free_symbols - {batch, length}:
            raise _refusal(condition)
        holds = sympy.lambdify([batch, length], condition, modules=[sympy_functions(), "math"])
        batches = _BATCHES_TRIED if batch in condition.free_symbols else (_BATCH,)
        constants = [abs(int(atom)) for atom in condition.atoms(sympy.Integer)]
        last = min(2 * max(constants, default=0) + 64, longest or _LONGEST_TRIED)
        for size in range(shortest, last + 1):
            if all(holds(number, size) for number in batches):
                continue
            if size == _LENGTH:
                raise _refusal(condition)
            if size > _LENGTH:
                longest = size - 1
                break
            shortest = size + 1
    return shortest, longest


def _check_batch(exported: ExportedProgram, batch: sympy.Symbol) -> None:
    bound = exported.range_constraints[batch]
    if bound.lower > 2:
        raise _refusal(sympy.Ge(batch, bound.lower))
    if bound.upper.is_Integer:
        raise _refusal(sympy.Le(batch, bound.upper))


def _conditions(graph: fx.Graph) -> Iterator[Any]:
    for node in graph.find_nodes(op="call_function", target=_ASSERT):
        value = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else node.args[0]
        if isinstance(value, torch.SymBool) and value.node.expr is not sympy.true:
            yield value.node.expr


def _refusal(condition: Any) -> CaptureError:
    return CaptureError(
        "The forward pass takes another path for other inputs.",
        found=f"the condition {condition}",
        needed="one path for every batch and length",
    )
