"""The kernel, gradient and vmap rule of `spd::call`: code that runs as it is.

Importing this module registers them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spdcompile.errors import InvariantError
from spdcompile.passes.opaque import code_of
from spdcompile.passes.ops import CALL
from spdcompile.runtime._torch import autograd_in_kernel, register_autograd

_LIBRARY = torch.library.Library("spd", "FRAGMENT")
_LIBRARY.define("call_backward(Tensor grad, Tensor[] tensors, str code) -> Tensor[]")
CALL_BACKWARD = torch.ops.spd.call_backward.default


def _call(tensors: list[Tensor], code: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The result, which the graph was promised to be of a certain shape and dtype."""
    out = code_of(code)(tensors)
    pairs = zip(shape[::2], shape[1::2], strict=True)
    sizes = tuple(dim if place < 0 else tensors[place].shape[dim] for place, dim in pairs)
    if out.shape != sizes or out.dtype != dtype:
        raise InvariantError(
            "Code that is one operator gives something else than when it was captured.",
            where=code,
            found=f"{out.dtype} {list(out.shape)}",
            needed=f"{dtype} {list(sizes)}",
        )
    return out.contiguous()


def _call_backward(grad: Tensor, tensors: list[Tensor], code: str) -> list[Tensor]:
    """Gradients of the tensors that are floating; computes anew."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with autograd_in_kernel():
        out = code_of(code)(leaves)
        grads = torch.autograd.grad(out, wanted, grad, materialize_grads=True)
    return [x.contiguous() for x in grads]


@torch.library.register_fake("spd::call_backward", lib=_LIBRARY)
def _call_backward_fake(grad: Tensor, tensors: list[Tensor], code: str) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors if x.is_floating_point()]


def _save(ctx: Any, tensors: list[Tensor], code: str, shape: list[int], _: Any) -> None:
    ctx.save_for_backward(*tensors)
    ctx.code, ctx.no_shape = code, [None] * len(shape)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = iter(CALL_BACKWARD(grad, list(ctx.saved_tensors), ctx.code))
    by_input = [next(grads) if x.is_floating_point() else None for x in ctx.saved_tensors]
    return by_input, None, ctx.no_shape, None


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("spd::call has no second derivative")


_LIBRARY.impl(CALL, _call, "CompositeExplicitAutograd")
_LIBRARY.impl(CALL_BACKWARD, _call_backward, "CompositeExplicitAutograd")
register_autograd(_LIBRARY, CALL, save=_save, backward=_gradient)
register_autograd(_LIBRARY, CALL_BACKWARD, save=lambda ctx, *_: None, backward=_no_second_gradient)


@torch.library.register_vmap("spd::call", lib=_LIBRARY)
def _call_rule(info: Any, in_dims: Any, tensors: list[Tensor], *rest: Any) -> tuple[Tensor, int]:
    """Rank by rank: code that was written for one sequence of calls knows no ranks."""
    outs = [CALL(_of_rank(rank, in_dims[0], tensors), *rest) for rank in range(info.batch_size)]
    return torch.stack(outs), 0


@torch.library.register_vmap("spd::call_backward", lib=_LIBRARY)
def _call_backward_rule(
    info: Any, in_dims: Any, grad: Tensor, tensors: list[Tensor], code: str
) -> tuple[list[Tensor], list[int]]:
    grads = [
        CALL_BACKWARD(
            *_of_rank(rank, in_dims[:1], [grad]), _of_rank(rank, in_dims[1], tensors), code
        )
        for rank in range(info.batch_size)
    ]
    stacked = [torch.stack(ranks) for ranks in zip(*grads, strict=True)]
    return stacked, [0] * len(stacked)


def _of_rank(rank: int, dims: Any, tensors: list[Tensor]) -> list[Tensor]:
    return [x if dim is None else x.select(dim, rank) for dim, x in zip(dims, tensors, strict=True)]
