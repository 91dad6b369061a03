"""A graph as Inductor compiles it, once for each kind of input that it meets, and from one start to
the next.

`torch.compile` alone keeps kernels, but traces and lowers a graph again at each start, which takes
seconds. Its `aot_compile` gives a function that can be written down, with the conditions on its
inputs under which it holds. Those conditions are asked at each call, as torch.compile does it; what
is not an input, such as autocast, is asked here.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spdcompile.files import write_whole
from spdcompile.runtime._torch import (
    Guarded,
    below_functorch,
    compile_ahead,
    inductor_settings,
    load_compiled,
)
from spdcompile.runtime.kernel_directory import work_in_use

_LOG = logging.getLogger(__name__)
_FOLDER = "functions"


class Conditions(NamedTuple):
    """What a compiled function depends on beside the sizes and types of its inputs."""

    grad: bool
    autocast: bool
    deterministic: bool
    matmul_precision: str
    default_dtype: torch.dtype
    threads: int
    same: tuple[int, ...]

    @classmethod
    def now(cls, inputs: tuple[Tensor, ...]) -> Conditions:
        """Those of a call; `same` is, for each input, the first that is the same tensor."""
        ids = [id(x) for x in inputs]
        return cls(
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            () if len(set(ids)) == len(ids) else tuple(map(ids.index, ids)),
        )


class CompiledFunction:
    """A graph module, compiled when it is called.

    Args:
        module: without parameters of its own.
        text: what tells it from others: its code, and what that leaves open.
    """

    def __init__(self, module: nn.Module, text: str) -> None:
        self._module, self._text = module, text
        self._plain = torch.compile(module, dynamic=True, fullgraph=True)
        self._variants: dict[Conditions, list[Guarded]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        conditions = Conditions.now(inputs)
        if below_functorch() or conditions.autocast or _needs_gradient(conditions, inputs):
            return self._plain(*inputs)
        if conditions not in self._variants:
            self._variants[conditions] = list(self._kept(conditions, inputs))
        variants = self._variants[conditions]
        for place, variant in enumerate(variants):
            if variant.holds_for(inputs):
                if place:  # the next call is most likely like this one
                    variants.insert(0, variants.pop(place))
                return variant(*inputs)
        variant = self._new_variant(conditions, inputs)
        if variant is None:
            return self._plain(*inputs)
        return variant(*inputs)

    def _new_variant(self, conditions: Conditions, inputs: tuple[Tensor, ...]) -> Guarded | None:
        variant = compile_ahead(self._module, inputs)
        if variant is None:
            return None
        self._variants[conditions].append(variant)
        folder = self._folder(conditions, inputs)
        if folder is not None:
            try:
                content = variant.to_bytes(self._module)
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / hashlib.sha256(content).hexdigest()[:16], content)
            except Exception as error:  # whatever kind, it still runs
                _LOG.info("A compiled function cannot be kept: %s", error)
        return variant

    def _kept(self, conditions: Conditions, inputs: tuple[Tensor, ...]) -> Iterator[Guarded]:
        """The variants that were kept at an earlier start."""
        folder = self._folder(conditions, inputs)
        files = [] if folder is None or not folder.is_dir() else sorted(folder.iterdir())
        for file in files:
            try:
                yield load_compiled(io.BytesIO(file.read_bytes()), self._module)
            except Exception as error:  # whatever kind, it is compiled again
                _LOG.warning("Compiled anew, since a kept function cannot be read: %s", error)

    def _folder(self, conditions: Conditions, inputs: tuple[Tensor, ...]) -> Path | None:
        """Where variants for these conditions are written; None if none are kept."""
        work = work_in_use()
        if work is None:
            return None
        sizes = [(x.shape, x.dtype) for x in inputs if isinstance(x, nn.Parameter)]
        text = f"{self._text}\n{conditions}\n{sizes}\n{inductor_settings()}"
        return work.path / _FOLDER / hashlib.sha256(text.encode()).hexdigest()


def _needs_gradient(conditions: Conditions, inputs: tuple[Tensor, ...]) -> bool:
    return conditions.grad and any(x.requires_grad for x in inputs)
