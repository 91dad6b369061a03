"""What torch raises when a connection between ranks breaks: no type of its own, so by its words."""

from __future__ import annotations

import torch.distributed as dist

_WORDS = ("gloo", "nccl", "connection", "socket", "broken pipe", "timed out", "shared memory")


def is_broken_connection(error: Exception) -> bool:
    """Whether an error comes from a connection to another rank, not from this rank's own work."""
    if isinstance(error, dist.DistError | ConnectionError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS)


def in_a_line(error: BaseException) -> str:
    """An error's type, summary and, where it is one of ours, what it found."""
    words = [type(error).__name__, *str(error).splitlines()[:1], getattr(error, "found", None)]
    return ": ".join(word for word in words if word)
