"""The private torch names that this folder needs; tried on torch 2.13."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
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

_MODULE = "module"


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


@cache
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


def inductor_settings() -> str:
    """What Inductor is set to, as text."""
    from torch._inductor import config  # takes long to import

    return repr(sorted(config.save_config_portable().items()))


def below_functorch() -> bool:
    """Whether this runs inside torch.func.grad, torch.vmap or the like."""
    return maybe_current_level() is not None


class Guarded:
    """A compiled function, and the conditions on its inputs under which it holds.

    Args:
        function: what `aot_compile` or `load_compiled_function` gives.
    """

    def __init__(self, function: Any) -> None:
        self._function, self._call = function, function.fn
        self._check = function._artifacts.guard_manager.check

    def holds_for(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether it may be called with these."""
        return self._check({"inputs": inputs})

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._call(*inputs)

    def to_bytes(self, module: nn.Module) -> bytes:
        """What `load_compiled` reads, without the module.

        Raises:
            Exception: of whatever kind; something in it cannot be written down.
        """
        return type(self._function).serialize(self._function, {_MODULE: module}).serialized_data


def compile_ahead(
    module: nn.Module, inputs: tuple[Tensor, ...], backend: Any = "inductor"
) -> Guarded | None:
    """Compiles a module for inputs like these, of any size; None if this torch cannot do so."""
    from torch._dynamo import config  # all of these take long to import
    from torch._dynamo.callback import CallbackTrigger, callback_handler
    from torch._dynamo.eval_frame import set_enable_dynamic

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        return module(*inputs)

    options = {"guard_filter_fn": _about_inputs}
    # torch 2.11 has to be told both.
    with config.patch(enable_aot_compile=True), set_enable_dynamic(True):
        compiled = torch.compile(
            call, dynamic=True, fullgraph=True, backend=backend, options=options
        )
        if not hasattr(compiled, "aot_compile"):
            return None
        with callback_handler.install_callbacks(CallbackTrigger.DYNAMO, "ahead"):
            return Guarded(compiled.aot_compile((inputs, {})))


def load_compiled(file: Any, module: nn.Module) -> Guarded:
    """Reads what `Guarded.to_bytes` wrote; it is code, and runs.

    Raises:
        Exception: of whatever kind; it cannot be read.
    """
    return Guarded(torch.compiler.load_compiled_function(file, external_data={_MODULE: module}))


def _about_inputs(guards: Any) -> list[bool]:
    return [guard.guard_type in ("TENSOR_MATCH", "SHAPE_ENV") for guard in guards]


def on_compilation(begin: Callable[[Any], None], end: Callable[[Any], None]) -> None:
    """Calls `begin` before, and `end` after, all that torch.compile does in this process.

    May be called again with the same functions: torch.compiler.reset() forgets them.
    """
    from torch._dynamo.callback import callback_handler  # takes long to import

    if begin not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)


def spin_cycles(cycles: int) -> None:
    """Has the current CUDA stream wait for so many clock cycles."""
    torch.cuda._sleep(cycles)
