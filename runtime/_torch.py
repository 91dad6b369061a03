"""The private torch names that this folder needs; tried on torch 2.13."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _after_autograd_keyset,
    _AutoDispatchBelowAutograd,
    _dispatch_tls_local_exclude_set,
    _dispatch_tls_local_include_set,
    _ExcludeDispatchKeyGuard,
    _ForceDispatchKeyGuard,
)
from torch._C._functorch import is_batchedtensor, maybe_current_level, maybe_get_level
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd.function import _SingleLevelFunction
from torch.distributed import distributed_c10d
from torch.utils import _pytree as pytree


def define_copy(library: torch.library.Library, op: OpOverload) -> OpOverload:
    """Defines an operator of the same name, overload, schema and meaning, to get a vmap rule.

    Outside vmap it becomes `op` when traced: it is one of the composite operators.
    """
    schema = str(op._schema).removeprefix(f"{op.namespace}::")
    library.define(schema)
    packet = getattr(getattr(torch.ops, library.ns), schema.split("(")[0].split(".")[0])
    copy = getattr(packet, op._overloadname)
    library.impl(copy, op, "CompositeImplicitAutograd")
    return copy


def register_autograd(
    library: torch.library.Library,
    op: OpOverload,
    *,
    save: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Gives `op` a gradient that also works below torch.func.grad.

    torch.library.register_autograd is the public way; on torch 2.13 its operators raise inside
    torch.func.grad, because it builds on a Function of the outermost level.

    Args:
        op: an operator without keyword-only arguments.
        save: (ctx, *inputs), keeps what `backward` needs.
        backward: (ctx, *grads) -> a tuple with one gradient or None for each input; for a list of
            tensors a list of them.
    """

    def forward(ctx: Any, keyset: DispatchKeySet, spec: Any, *leaves: Any) -> Any:
        inputs = pytree.tree_unflatten(leaves, spec)
        save(ctx, *inputs)
        # A Function's forward runs without gradients, which would hold for outer levels too.
        with torch.enable_grad():
            return _below_autograd(op, keyset, inputs)

    def backward_all(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *pytree.tree_leaves(backward(ctx, *grads))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_all)}
    function = type(f"{op.name()}_with_gradient", (_SingleLevelFunction,), methods)

    def kernel(keyset: DispatchKeySet, *inputs: Any) -> Any:
        leaves, spec = pytree.tree_flatten(inputs)
        tensors = (x for x in leaves if isinstance(x, Tensor))
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            with enable_single_level_autograd_function():
                return function.apply(keyset, spec, *leaves)
        return _below_autograd(op, keyset, inputs)

    library.impl(op, kernel, "Autograd", with_keyset=True)


def _below_autograd(op: OpOverload, keyset: DispatchKeySet, inputs: tuple[Any, ...]) -> Any:
    with _AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _after_autograd_keyset, *inputs)


@contextmanager
def autograd_in_kernel() -> Iterator[None]:
    """Records gradients inside a kernel, which otherwise runs below autograd."""
    excluded = _dispatch_tls_local_exclude_set()
    for key in (DispatchKey.AutogradFunctionality, DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = _dispatch_tls_local_include_set()
    with _ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def register_unbatched_vmap(
    library: torch.library.Library, op: OpOverload, refuse: Callable[..., None]
) -> None:
    """Calls `refuse(*inputs)`, which raises, where vmap meets `op` on a value it does not batch.

    A vmap rule is never asked about such a value: vmap runs the operator as if it were outside.

    Args:
        op: an operator whose first input is a tensor.
    """

    def kernel(*inputs: Any) -> Any:
        if not _batched_by_innermost_vmap(inputs[0]):
            refuse(*inputs)
        with _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.FuncTorchVmapMode)):
            return op(*inputs)

    library.impl(op, kernel, "FuncTorchVmapMode")


def _batched_by_innermost_vmap(value: Tensor) -> bool:
    return is_batchedtensor(value) and maybe_get_level(value) == maybe_current_level()


def started_collectives(group: dist.ProcessGroup) -> int:
    """How many collectives of a group this process has started, waited for or not."""
    return group._get_sequence_number_for_group()


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """How long a group's collectives may take from now on."""
    distributed_c10d._set_pg_timeout(timeout, group)


def default_store() -> dist.Store:
    """A connection of its own to the store of the default process group."""
    return distributed_c10d._get_default_store().clone()


def default_kernel_directory() -> str:
    """Where Inductor keeps what it compiles if it is told nothing."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes long to import

    return default_cache_dir()


def vector_instructions_work() -> bool:
    """Whether all vector instructions that the CPU claims passed Inductor's probes."""
    from torch._inductor import config, cpu_vec_isa  # takes long to import

    found = cpu_vec_isa.valid_vec_isa_list()
    with config.patch({"cpp.vec_isa_ok": True}):
        return found == cpu_vec_isa.valid_vec_isa_list.__wrapped__()


def skip_probing_vector_instructions() -> None:
    """Has Inductor believe what the CPU claims, which it otherwise probes for a second or more."""
    from torch._inductor import config, cpu_vec_isa  # takes long to import

    with config.patch({"cpp.vec_isa_ok": True}):
        cpu_vec_isa.valid_vec_isa_list()


def on_compilation(begin: Callable[[Any], None], end: Callable[[Any], None]) -> None:
    """Calls `begin` before, and `end` after, all that torch.compile does in this process.

    May be called again with the same functions: torch.compiler.reset() forgets them.
    """
    from torch._dynamo.callback import callback_handler  # takes long to import

    if begin not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)
