"""What written programs are made of: operators, constants of torch, whole numbers, texts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from spdcompile.passes.ops import APPEND, ATTEND_CACHED, CALL

FORMAT = 1
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "getitem")
} | {f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_int")}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_MUTATING = {APPEND, ATTEND_CACHED}
PLAIN = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


def name_of(target: Any) -> str | None:
    """The name of what a program calls, None if `target_of` would not give it back."""
    name = _NAMES.get(target) or str(target)
    try:
        return name if target_of(name) is target else None
    except (ValueError, AttributeError):
        return None


def target_of(name: Any) -> Callable[..., Any]:
    """The operator of a name; raises ValueError for one that a program may not call."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, packet, overload = text(name).split(".")
    if namespace not in ("aten", "spd") or not f"{packet}{overload}".isidentifier():
        raise ValueError(f"{name!r} is no operator of a program")
    target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    schema = target._schema
    files = any("file" in argument.name for argument in schema.arguments)
    if target is CALL or files or (schema.is_mutable and target not in _MUTATING):
        raise ValueError(f"a program may not call {name!r}")
    return target


def plain(kind: str, name: Any) -> Any:
    value = getattr(torch, text(name))
    if not isinstance(value, PLAIN[kind]):
        raise ValueError(f"{name!r} is no {kind}")
    return value


def whole(value: Any, least: int, most: int = 2**53) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{value!r} where a whole number from {least} to {most} belongs")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} where a text belongs")
    return value


def texts(values: Any) -> tuple[str, ...]:
    return tuple(text(value) for value in values)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} where true or false belongs")
    return value
