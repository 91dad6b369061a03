"""What happens where an all-reduce is dropped and nothing carries the partial sums on.

Each rank then goes on with X plus its own share of the attention's output, and the ranks' residual
streams part for good. Run by the model's own modules: as many copies of the batch as there are
ranks, each of which sees its rank's heads and channels alone, and sums over the copies at the sync
points that are kept.

Shapes: R ranks, B batch, S tokens, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from examples.study.context import ATTENTION, MLP
from examples.study.quality import Run
from spdcompile.plan import Point


def naive(model: PreTrainedModel, tp: int, points: Iterable[Point]) -> Run:
    """A run of a Llama whose ranks lose what others would have sent at some sync points.

    Args:
        points: the sync points that are left out; the heads and channels must divide by tp.

    Returns: a function of tokens [B, S] that gives each rank's logits, [R, B, S, V].
    """
    dropped = frozenset(points)

    @torch.no_grad()
    def run(tokens: Tensor) -> Tensor:
        hooks = _hooked(model, tp, dropped)
        try:
            logits = model(tokens.repeat(tp, 1), use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits.unflatten(0, (tp, -1))

    return run


def _hooked(model: PreTrainedModel, tp: int, dropped: frozenset[Point]) -> list[Any]:
    """Makes each copy a rank, for as long as the hooks are there."""
    hooks = []
    for layer, block in enumerate(model.model.layers):
        for name, linear in ((ATTENTION, block.self_attn.o_proj), (MLP, block.mlp.down_proj)):
            hooks.append(linear.register_forward_pre_hook(partial(_own_features, tp)))
            if (layer, name) not in dropped:
                hooks.append(linear.register_forward_hook(_summed(tp)))
    return hooks


def _own_features(tp: int, linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Of each rank's copy only that rank's features, [R * B, S, F]; zeros elsewhere."""
    x = inputs[0].unflatten(0, (tp, -1)).unflatten(-1, (tp, -1))  # [R, B, S, R, F / R]
    own = torch.eye(tp, dtype=x.dtype, device=x.device)[:, None, None, :, None]
    return ((x * own).flatten(-2).flatten(0, 1),)


def _summed(tp: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """An all-reduce over the copies, [R * B, S, F]."""

    def hook(linear: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        total = output.unflatten(0, (tp, -1)).sum(0)
        return total.repeat(tp, 1, 1)

    return hook
