"""Prints programs as text that reads like the code they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from spdcompile.passes._torch import OpOverload
from spdcompile.passes.base import BlockGraph, Program, module_path


def print_program(program: Program) -> str:
    """The whole program: each distinct graph, then the parts that call them."""
    symbols = _symbols(program)
    sections = []
    for key, block in program.graphs.items():
        users = [part.name for part in program.parts if part.graph == key]
        sections.append("\n".join([f"def {key}:  # {_span(users)}", *graph_lines(block, symbols)]))
    calls = []
    for part in program.parts:
        given = ", ".join(f"{name}={value}" for name, value in part.inputs.items())
        dropped = f"  # dropped: {', '.join(part.dropped)}" if part.dropped else ""
        calls.append(f"{', '.join(part.outputs)} = {part.graph}[{part.name}]({given}){dropped}")
    return "\n\n".join([*sections, "\n".join(calls)])


def graph_lines(block: BlockGraph, symbols: Mapping[str, str]) -> list[str]:
    """One line a node: what it computes, its placement, shape, and the module it comes from.

    Args:
        symbols: names to print for symbolic sizes.
    """
    lines = []
    for node in block.module.graph.nodes:
        if node.op == "placeholder":
            text = f"input {node.name}"
        elif node.op == "output":
            text = f"return {', '.join(_argument(arg) for arg in node.args[0])}"
        else:
            text = f"{node.name} = {_call(node)}"
        comment = " ".join(_comments(node, symbols))
        lines.append(f"    {text}  # {comment}" if comment else f"    {text}")
    return lines


def _call(node: fx.Node) -> str:
    name = str(node.target) if not callable(node.target) else _target(node.target)
    args = [_argument(arg) for arg in node.args]
    kwargs = [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    return f"{name}({', '.join([*args, *kwargs])})"


def _target(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removeprefix("aten.").removesuffix(".default")
    return target.__name__


def _argument(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return arg.name
    if isinstance(arg, list | tuple):
        return f"[{', '.join(_argument(item) for item in arg)}]"
    return repr(arg)


def _comments(node: fx.Node, symbols: Mapping[str, str]) -> Iterator[str]:
    placement = node.meta.get("placement")
    if isinstance(placement, list):
        yield ", ".join(map(str, placement))
    elif placement is not None:
        yield str(placement)
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_size(size, symbols) for size in value.shape)
        yield f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if node.op == "call_function" and (path := module_path(node)):
        yield path


def _symbols(program: Program) -> dict[str, str]:
    """B and S for the batch and length symbols of the inputs."""
    for part in program.parts:
        for node in program.graph_of(part).module.graph.find_nodes(op="placeholder"):
            if part.inputs.get(node.name) in program.inputs:
                return {str(s): n for s, n in zip(node.meta["val"].shape, "BS", strict=False)}
    return {}


def _size(size: Any, symbols: Mapping[str, str]) -> str:
    return re.sub(r"\bs\d+\b", lambda m: symbols.get(m[0], m[0]), str(size))


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}, {len(names)} parts"
