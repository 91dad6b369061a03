"""A few letters that tell checkpoints apart, without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_SAMPLES = 256  # of each tensor, evenly spaced


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, shapes, dtypes and some values of global tensors.

    Args:
        tensors: by name. Only their samples are copied, and moved to the CPU.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_samples(tensor).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _samples(tensor: Tensor) -> Tensor:
    count = tensor.numel()
    if not count or not tensor.ndim:
        return tensor.reshape(-1).cpu().contiguous()
    steps = min(count, _SAMPLES)
    flat = torch.arange(steps, device=tensor.device) * (count - 1) // max(steps - 1, 1)
    return tensor[torch.unravel_index(flat, tensor.shape)].cpu().contiguous()
