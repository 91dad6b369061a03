"""Private parts of torch that the passes use; tried on torch 2.13.0."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._dynamo.exc import UserError
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = [
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "UserError",
    "check_size",
    "forget_traced",
    "outside_tracing",
    "pytree",
    "sympy_functions",
]

# Tells export that a condition on sizes holds.
check_size = torch._check
# While it lasts, nothing is traced and new tensors are what they are outside: not fake.
outside_tracing = _disable_current_modes


def forget_traced() -> None:
    """Lets go of the last traced graph, which torch otherwise keeps, with all that it refers to."""
    proxy_tensor._FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT.clear()


def sympy_functions() -> dict[str, Any]:
    """The functions that torch's expressions of sizes are made of, by name."""
    return {
        "Min": min,
        "Max": max,
        "FloorDiv": operator.floordiv,
        "CleanDiv": operator.floordiv,
        "PythonMod": operator.mod,
        "Mod": operator.mod,
        "ModularIndexing": lambda base, divisor, modulus: base // divisor % modulus,
    }
