"""Finds what of a model is to be changed while it is exported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from spdcompile.passes.opaque import function_as_operator, method_as_operator
from spdcompile.passes.patches.replaced import Replacement, replaced
from spdcompile.passes.patches.table import OPAQUE_FUNCTIONS, OPAQUE_METHODS, PREPARED, REWRITTEN


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
        for method in vars(kind):
            path = f"{kind.__qualname__}.{method}"
            if path in OPAQUE_METHODS:
                yield kind, method, method_as_operator(vars(kind)[method], path)
            elif path in REWRITTEN:
                yield kind, method, REWRITTEN[path]
