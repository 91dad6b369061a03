"""Code that no graph can hold, as one operator of it: `spd::call`.

A loop over the tokens, or a choice by data, is unrolled or refused by torch.export. Such a function
or module is left alone: the graph calls it by name, with its tensors (a module's parameters among
them, so that they stay parameters of the program), and at run time it runs as it is.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from spdcompile.passes._torch import outside_tracing, pytree

Code = Callable[[Sequence[Tensor]], Any]

# What the names in graphs stand for. Like the operators of torch.library, it is the process's: a
# graph that names a piece of code was captured by the same process.
_CODE: dict[str, Code] = {}

# Sizes for the symbols of a shape, twice: which size of which input is each size of the result?
_TRIED = ((13, 17, 19, 23), (29, 31, 37, 41))
_LAYER_NUMBERS = ("layer_idx", "layer_id")  # where a cache would keep a layer's states


class OpaqueCodeError(Exception):
    """A piece of code cannot be made one operator."""


class _NoNumber:
    """A layer's number in code that many layers share: whoever computes with it fails."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise OpaqueCodeError("it computes with the number of its layer")

    def __repr__(self) -> str:
        return "the layer's number"


def function_as_operator(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that calls `function` as one operator.

    Args:
        function: of tensors and plain values, alone or in containers; gives a tensor, or several
            of which the first is wanted: the others become None.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return _call(function, name, "", [], (args, kwargs))

    return call


def method_as_operator(
    method: Callable[..., Any], name: str, where: Callable[[nn.Module], bool]
) -> Callable[..., Any]:
    """As `function_as_operator`, of a method that reads the parameters of its module.

    Args:
        where: whether a module's method is to be an operator; the others' stays what it is.
    """

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not where(module):
            return method(module, *args, **kwargs)
        skeleton = _Method(_without_data(module), method)
        state = [*module.parameters(), *module.buffers()]
        names = [name for name, _ in (*skeleton.named_parameters(), *skeleton.named_buffers())]

        def run(*inputs: Any, **settings: Any) -> Any:
            tensors = dict(zip(names, inputs, strict=False))
            rest = inputs[len(names) :]
            return torch.func.functional_call(skeleton, tensors, rest, settings)

        return _call(run, name, _described(skeleton), state, (args, kwargs))

    return call


def code_of(what: str) -> Code:
    """The code that a `spd::call` names: takes the operator's tensors, gives its result."""
    return _CODE[what]


class _Method(nn.Module):
    def __init__(self, module: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(self.module, *args, **kwargs)


def _call(
    function: Callable[..., Any], name: str, about: str, state: Sequence[Tensor], inputs: Any
) -> Any:
    """Adds the operator to the graph that is being traced -> what `function` gives."""
    leaves, spec = pytree.tree_flatten(inputs)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    settings = [None if isinstance(leaf, Tensor) else _plain(name, leaf) for leaf in leaves]
    tensors = [*state, *(leaves[place] for place in places)]

    def run(given: Sequence[Tensor]) -> Any:
        filled = list(settings)
        for place, tensor in zip(places, given[len(state) :], strict=True):
            filled[place] = tensor
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return function(*given[: len(state)], *args, **kwargs)

    facts = (about, repr(settings), str(places), str(spec))
    what = f"{name}#{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"
    _CODE[what] = lambda given: _first(pytree.tree_leaves(run(given)))
    shape, example = _result(run, tensors)
    parts, structure = pytree.tree_flatten(example)
    out = torch.ops.spd.call(tensors, what, shape, _first(parts).dtype)
    first = next(place for place, part in enumerate(parts) if isinstance(part, Tensor))
    others = [None if isinstance(part, Tensor) else part for part in parts]
    return pytree.tree_unflatten([*others[:first], out, *others[first + 1 :]], structure)


def _first(parts: Sequence[Any]) -> Tensor:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        raise OpaqueCodeError("it gives no tensor")
    return tensors[0]


def _plain(name: str, value: Any) -> Any:
    """A setting as it is, if graphs with equal settings may share the code."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    raise OpaqueCodeError(f"{name} takes a {type(value).__name__}")


def _result(run: Code, tensors: Sequence[Tensor]) -> tuple[list[int], Any]:
    """Runs the code without data at two sets of sizes.

    Returns: where each size of the result is from, one pair of numbers after the other: an input
        and its dim, or -1 and a constant size; and a result.
    """
    inputs = [_at_sizes(tensors, sizes) for sizes in _TRIED]
    with outside_tracing(), torch.no_grad():
        try:
            results = [run(given) for given in inputs]
        except (NotImplementedError, RuntimeError):  # it reads data, and gets zeros then
            results = [run([_zeros(tensor) for tensor in given]) for given in inputs]
    shapes = [_first(pytree.tree_leaves(result)).shape for result in results]
    sources: dict[Any, tuple[int, int]] = {}
    for place, pair in enumerate(zip(*inputs, strict=True)):
        for dim, sizes in enumerate(zip(*(tensor.shape for tensor in pair), strict=True)):
            sources.setdefault(sizes, (place, dim))
    rule: list[int] = []
    for dim, sizes in enumerate(zip(*shapes, strict=True)):
        if sizes[0] == sizes[1]:
            rule += (-1, sizes[0])
        elif sizes in sources:
            rule += sources[sizes]
        else:
            raise OpaqueCodeError(f"size {dim} of its result is no size of its inputs")
    return rule, results[0]


def _at_sizes(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Tensors of the same kinds without data, each symbol in their shapes made a size."""
    symbols = {s for t in tensors for size in t.shape for s in _symbols(size)}
    values = dict(zip(sorted(symbols, key=str), sizes, strict=False))
    if len(values) < len(symbols):
        raise OpaqueCodeError(f"its inputs have {len(symbols)} sizes that are not constant")
    shapes = [
        tuple(int(s.node.expr.subs(values)) if _symbols(s) else int(s) for s in t.shape)
        for t in tensors
    ]
    with outside_tracing():
        return [
            torch.empty(shape, dtype=t.dtype, device="meta")
            for shape, t in zip(shapes, tensors, strict=True)
        ]


def _zeros(tensor: Tensor) -> Tensor:
    """Zeros like a tensor, however large, in the memory of one."""
    return torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)


def _symbols(size: int | torch.SymInt) -> set[Any]:
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()


def _without_data(module: nn.Module) -> nn.Module:
    """A copy of a module with its structure and settings, and its number unknown."""
    with outside_tracing():
        memo: dict[int, Any] = {
            id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for tensor in (*module.parameters(), *module.buffers())
        }
        skeleton = copy.deepcopy(module, memo)
    for part in skeleton.modules():
        for name in vars(part).keys() & _LAYER_NUMBERS:
            setattr(part, name, _NoNumber())
    return skeleton


def _described(module: nn.Module) -> str:
    """Text that two modules share only if they compute the same from the same tensors."""
    own = vars(nn.Module())
    lines = []
    for path, part in module.named_modules():
        kind = f"{type(part).__module__}.{type(part).__qualname__}"
        settings = {name: value for name, value in vars(part).items() if name not in own}
        lines.append(f"{path} {kind} { {name: _text(v) for name, v in sorted(settings.items())} }")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, PreTrainedConfig):
        return value.to_json_string(use_diff=False)
    if isinstance(value, list | tuple):
        return repr([_text(item) for item in value])
    if isinstance(value, dict):
        return repr({repr(key): _text(item) for key, item in value.items()})
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | _NoNumber):
        return repr(value)
    if isinstance(value, functools.partial):
        return _text([value.func, value.args, value.keywords])
    if isinstance(value, FunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{type(value).__name__} at {id(value)}"
