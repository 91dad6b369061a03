"""Finds what of a model is to be changed while it is exported."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from spdcompile.passes.opaque import function_as_operator, method_as_operator
from spdcompile.passes.patches.replaced import Replacement, replaced
from spdcompile.passes.patches.table import (
    OPAQUE_FUNCTIONS,
    OPAQUE_METHODS,
    OPAQUE_STATIC_METHODS,
    PREPARED,
    REWRITTEN,
)


@contextmanager
def patched_for_export(model: PreTrainedModel) -> Iterator[None]:
    """Changes the code of a model's modules as the table says, while it lasts."""
    for module in model.modules():
        if prepare := PREPARED.get(type(module).__qualname__):
            prepare(module)
    with replaced(_replacements(model)):
        yield


def _replacements(model: PreTrainedModel) -> Iterator[Replacement]:
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    for name in {kind.__module__ for kind in kinds}:
        code = sys.modules[name]
        for function in vars(code).keys() & OPAQUE_FUNCTIONS:
            yield code, function, function_as_operator(getattr(code, function), function)
    for kind in kinds:
        for name, method in vars(kind).items():
            path = f"{kind.__qualname__}.{name}"
            if instead := _instead_of(path, method):
                yield kind, name, instead


def _instead_of(path: str, method: Any) -> Callable[..., Any] | None:
    if path in OPAQUE_STATIC_METHODS:
        call = function_as_operator(functools.partial(method, None), path)
        return lambda _, *args, **kwargs: call(*args, **kwargs)
    if path in OPAQUE_METHODS:
        return method_as_operator(method, path, where=OPAQUE_METHODS[path])
    return REWRITTEN.get(path)
