"""From a model's tensors to what each rank holds, and back."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spdcompile.errors import CheckpointError, UsageError
from spdcompile.passes.base import ParamRef, Part, Program
from spdcompile.passes.layout import ShardSpec
from spdcompile.runtime import pages
from spdcompile.runtime.stored import Kept, Stored

Weights = Mapping[str, Tensor | Stored]
"""Global tensors under their state_dict names, in memory or in files."""


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


class OnDemand(Mapping[str, dict[str, Tensor]]):
    """Parameters of parts by the part's name, bound when they are first asked for.

    Args:
        parts: all that there are.
        bind: makes the parameters of one, by placeholder.
    """

    def __init__(self, parts: Iterable[Part], bind: Callable[[Part], dict[str, Tensor]]) -> None:
        self._parts = {part.name: part for part in parts}
        self._bind = bind
        self._held: dict[str, dict[str, Tensor]] = {}

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        if name not in self._held:
            self._held[name] = self._bind(self._parts[name])
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def release(self) -> None:
        """Forgets what was bound; it is bound anew when asked for."""
        self._held.clear()


def read_shared(program: Program, tensors: Weights) -> Weights:
    """The same with what several parameters of a program share read once, and held once.

    Parameters with one split of it get one tensor. If the splits differ it is read whole.
    """
    uses: dict[int, set[tuple[bool, ShardSpec | None]]] = defaultdict(set)
    names: dict[int, list[ParamRef]] = defaultdict(list)
    for part in program.parts:
        for name, ref in part.params.items():
            if not ref.constant and isinstance(tensors[ref.fqn], Stored):
                key = id(tensors[ref.fqn])
                uses[key].add((ref.transposed, part.shards.get(name)))
                names[key].append(ref)
    shared: dict[str, Tensor | Stored] = {}
    for key, refs in names.items():
        stored = tensors[refs[0].fqn]
        if len(refs) > 1 and isinstance(stored, Stored):
            made = _shared(stored, uses[key], refs[0].dtype)
            shared.update({ref.fqn: made for ref in refs})
    return {**tensors, **shared}


def _shared(
    stored: Stored, uses: set[tuple[bool, ShardSpec | None]], dtype: torch.dtype
) -> Tensor | Stored:
    splits = [spec for _, spec in uses]
    turned = {transposed for transposed, _ in uses}
    first = splits[0]
    if first is not None and len(turned) == 1 and all(_alike(first, spec) for spec in splits):
        return Kept(stored.shape, stored.dtype, stored)
    whole = stored.whole(dtype)
    check_finite(whole, stored.place)
    return whole


def _alike(spec: ShardSpec, other: ShardSpec | None) -> bool:
    return other is not None and spec.dim == other.dim and np.array_equal(spec.index, other.index)


def bind(
    program: Program,
    part: Part,
    tensors: Weights,
    device: torch.device,
    rank: int | None = None,
) -> dict[str, Tensor]:
    """The parameters of one part, by placeholder.

    Args:
        tensors: global tensors by state_dict name; of one in files only this rank's part is read.
        rank: this rank's shards; None stacks all ranks' shards, [tp, ...]. What is not split
            comes whole either way.

    Raises:
        CheckpointError: what was read from a file is not finite.
    """
    return dict(bind_each(program, part, tensors, device, rank))


def bind_each(
    program: Program,
    part: Part,
    tensors: Weights,
    device: torch.device,
    rank: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """What `bind` gives, one parameter read after the other."""
    for name, ref in part.params.items():
        source = program.constants[ref.fqn] if ref.constant else tensors[ref.fqn]
        spec = part.shards.get(name)
        if isinstance(source, Stored):
            local = _read(source, ref, spec, rank)
        else:
            local = _cut(source.t() if ref.transposed else source, spec, rank)
            if spec is not None:  # else it shares the model's memory
                local = pages.settled(local)
        # torch.compile takes the sizes of a Parameter, and of nothing else, for constants.
        yield name, torch.nn.Parameter(local.to(device).contiguous(), requires_grad=False)


def bind_stacked(part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of one part that come from some global tensors, all ranks' shards stacked.

    Gradients flow back to those tensors.
    """
    bound = {}
    for name, ref in part.params.items():
        if not ref.constant and ref.fqn in tensors:
            whole = tensors[ref.fqn]
            bound[name] = _cut(whole.t() if ref.transposed else whole, part.shards.get(name), None)
    return bound


def _cut(whole: Tensor, spec: ShardSpec | None, rank: int | None) -> Tensor:
    if spec is None:
        return whole
    return spec.shard(whole) if rank is None else spec.shard_of(whole, rank)


def _read(stored: Stored, ref: ParamRef, spec: ShardSpec | None, rank: int | None) -> Tensor:
    """What a rank holds of a tensor in files, or all ranks do, in the program's orientation."""
    if spec is None or rank is None:
        whole = stored.whole(ref.dtype)
        check_finite(whole, stored.place)
        return _cut(whole.t() if ref.transposed else whole, spec, rank)
    dim = 1 - spec.dim if ref.transposed else spec.dim
    local = stored.take(dim, spec.index[rank], ref.dtype)
    check_finite(local, stored.place)
    return pages.settled(local.t()) if ref.transposed else local


def check_finite(tensor: Tensor, place: str) -> None:
    """Raises CheckpointError if a tensor from `place` holds NaN or an infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    least, most = (float(value) for value in torch.aminmax(tensor))  # both NaN if there is one
    if not (math.isfinite(least) and math.isfinite(most)):
        raise CheckpointError(
            "A tensor of the checkpoint is not finite.",
            where=place,
            found="NaN" if math.isnan(least) else f"infinity as {tensor.dtype}",
            needed="finite numbers",
            fix=None if math.isnan(least) else "load it in a dtype with a wider range",
        )


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
