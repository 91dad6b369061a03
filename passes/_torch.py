"""Private parts of torch that the passes use; tried on torch 2.13.0."""

from __future__ import annotations

from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FakeTensorMode", "OpOverload", "TorchDispatchMode", "pytree"]
