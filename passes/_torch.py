"""Private parts of torch that the passes use; tried on torch 2.13.0."""

from __future__ import annotations

from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OpOverload", "TorchDispatchMode", "pytree"]
