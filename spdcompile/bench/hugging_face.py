"""Models of transformers as they are used without this compiler, each in its usual form."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.distributed.configuration_utils import DistributedConfig

from spdcompile.bench.subject import NotMeasuredError, Subject

_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_COLUMNS += ("mlp.gate_proj", "mlp.up_proj")
_ROWS = ("self_attn.o_proj", "mlp.down_proj")
_numbers = itertools.count()


def load(directory: Path, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    """The model of a directory, in eval mode."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, local_files_only=True, **settings
    )
    return model.eval()


def load_split(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model split by transformers' own plan for its type.

    Raises:
        NotMeasuredError: transformers has no plan for it.
    """
    model = load(directory, dtype, distributed_config=DistributedConfig(tp_plan="auto"))
    if not model.tp_plan:
        raise NotMeasuredError(f"transformers has no tp_plan for {model.config.model_type}")
    return model


def load_parallelized(directory: Path, dtype: torch.dtype, tp: int) -> PreTrainedModel:
    """The model split by `parallelize_module`, with the plan that suits Llama and its like.

    Raises:
        NotMeasuredError: its modules have other names.
    """
    model = load(directory, dtype)
    plan = _plan_for(model)
    mesh = init_device_mesh("cpu", (tp,))
    parallelize_module(model, mesh, plan)
    return model


def _plan_for(model: PreTrainedModel) -> dict[str, ParallelStyle]:
    modules = dict(model.named_modules())
    layers = [name for name in modules if name.endswith(".self_attn")]
    plan: dict[str, ParallelStyle] = {}
    for layer in (name.removesuffix(".self_attn") for name in layers):
        plan |= {f"{layer}.{name}": ColwiseParallel() for name in _COLUMNS}
        plan |= {f"{layer}.{name}": RowwiseParallel() for name in _ROWS}
    if not plan or not all(isinstance(modules.get(name), nn.Linear) for name in plan):
        raise NotMeasuredError(
            f"no plan for {model.config.model_type}: its layers are not named as Llama's"
        )
    return plan | {"lm_head": ColwiseParallel(output_layouts=Replicate())}


class Eager(Subject):
    """A model called operator by operator, with a cache that grows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._settings = {"use_cache": True, **({"logits_to_keep": 1} if keeps else {})}

    def new_cache(self, text: Tensor, prompt: int) -> Any:
        return DynamicCache(config=self.model.config)

    def run(self, input_ids: Tensor, cache: Any) -> Tensor:
        output = self.model(input_ids=input_ids, past_key_values=cache, **self._settings)
        return output.logits[:, -1]


class WholeGraph(Eager):
    """A model under torch.compile, a program for each shape, with a cache of fixed size.

    transformers advises to compile the decoding alone, so the context of a TPOT step is filled in
    without the compiler; the prompt of a TTFT step is what is timed, and is compiled.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, model: PreTrainedModel, backend: str) -> None:
        super().__init__(model)
        self._backend = backend
        self._caches: dict[tuple[int, int], StaticCache] = {}
        self._programs: dict[tuple[int, ...], Callable[[Tensor, StaticCache], Tensor]] = {}

    def new_cache(self, text: Tensor, prompt: int) -> Any:
        batch, length = text.shape
        # One for all rounds: a program is compiled for the addresses of its tensors.
        if (batch, length) not in self._caches:
            cache = StaticCache(config=self.model.config, max_cache_len=length)
            super().run(torch.zeros(batch, 1, dtype=torch.long), cache)  # allocates
            self._caches[batch, length] = cache
        cache = self._caches[batch, length]
        cache.reset()
        return cache

    def fill(self, input_ids: Tensor, cache: Any) -> None:
        super().run(input_ids, cache)

    def run(self, input_ids: Tensor, cache: Any) -> Tensor:
        key = (*input_ids.shape, id(cache))
        if key not in self._programs:
            eagerly = super().run

            def step(input_ids: Tensor, cache: StaticCache) -> Tensor:
                return eagerly(input_ids, cache)

            self._programs[key] = torch.compile(
                _with_own_code(step), backend=self._backend, dynamic=False
            )
        return self._programs[key](input_ids, cache)


def _with_own_code(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A copy with a code object that no other function has.

    torch.compile keeps programs by code object and tries their guards one after the other: models
    that share `forward` would pay for each other's guards, and reach the limit of programs.
    """
    assert isinstance(function, FunctionType), "a plain function"
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
