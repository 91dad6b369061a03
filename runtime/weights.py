"""From a model's tensors to what each rank holds, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spdcompile.errors import UsageError
from spdcompile.passes.base import ParamRef, Part, Program


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors under their state_dict names, without gradients.

    Raises:
        UsageError: the model was built without weights.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise UsageError(
            "The model has no weights.",
            where=type(model).__name__,
            found="tensors on the meta device",
            needed="weights, to run it",
            fix="give a loaded model or a directory that holds safetensors",
        )
    return tensors


def whole_param(ref: ParamRef, tensors: Mapping[str, Tensor], program: Program) -> Tensor:
    """The global tensor behind a program's parameter, transposed where the program wants it so."""
    tensor = program.constants[ref.fqn] if ref.constant else tensors[ref.fqn]
    return tensor.t() if ref.transposed else tensor


def bind(
    program: Program,
    part: Part,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    rank: int | None = None,
) -> dict[str, Tensor]:
    """The parameters of one part, by placeholder.

    Args:
        rank: this rank's shards; None stacks all ranks' shards, [tp, ...]. What is not split
            comes whole either way.
    """
    bound = {}
    for name, ref in part.params.items():
        whole, spec = whole_param(ref, tensors, program), part.shards.get(name)
        if spec is None:
            local = whole
        elif rank is None:
            local = spec.shard(whole)
        else:
            local = spec.shard_of(whole, rank)
        # torch.compile takes the sizes of a Parameter, and of nothing else, for constants.
        local = local.to(device).contiguous()
        bound[name] = torch.nn.Parameter(local, requires_grad=False)
    return bound


def unbind(part: Part, bound: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(state_dict name, global tensor) of each checkpoint parameter that `bound` holds stacked.

    The inverse of `bind` with all ranks' shards: a distilled block is an ordinary checkpoint again.
    """
    for name, tensor in bound.items():
        ref, spec = part.params[name], part.shards.get(name)
        if ref.constant:
            continue
        whole = tensor if spec is None else spec.unshard(tensor, ref.shape[spec.dim])
        yield ref.fqn, (whole.t() if ref.transposed else whole).contiguous()
