"""The names of transformers that it does not document; tried on transformers 5.23."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

__all__ = [
    "WeightConverter",
    "WeightRenaming",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "keep_dtypes",
    "not_ignored",
    "read_generation_config",
    "recompute",
    "rename_source_key",
    "tied_names",
]


def keep_dtypes(model: PreTrainedModel) -> None:
    """Gives what a model keeps in float32 that dtype, as loading it would; it is on meta."""
    plan = model._get_dtype_plan(model.config.dtype or model.dtype)
    if not plan:
        return
    pattern, groups, _ = build_glob_alternation(list(plan))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if match := pattern.search(name):
            tensor.data = tensor.data.to(plan[groups[match.lastgroup]])


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Name of each tied tensor -> the name of the one that it is tied to."""
    return dict(model.all_tied_weights_keys)


def not_ignored(
    model: PreTrainedModel, missing: Iterable[str], unexpected: Iterable[str]
) -> tuple[set[str], set[str]]:
    """What is left of both without the names that the model's class says not to mind."""
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys, info.unexpected_keys


def recompute(model: PreTrainedModel, absent: Iterable[str]) -> dict[str, torch.Tensor]:
    """Computes what no checkpoint holds, as `from_pretrained` does: by the model's own rules.

    Args:
        model: on the meta device; its non-persistent buffers are replaced by ones with data.
        absent: parameters and other buffers to compute as well.

    Returns: those of `absent`; what is drawn at random is the same each time.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    made = dict(model.named_non_persistent_buffers())
    made.update({name: model.get_parameter_or_buffer(name) for name in absent})
    for name, tensor in made.items():
        _put(model, name, torch.empty_like(tensor, device="cpu"))
    for module in model.modules():
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.initialize_weights()
    return {name: model.get_parameter_or_buffer(name).detach() for name in absent}


def read_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """Gives a model the generation settings of its directory, as `from_pretrained` does."""
    if not model.can_generate():
        return
    local = {"local_files_only": True}
    try:
        made = GenerationConfig.from_pretrained(directory, **local)
    except OSError:
        made = GenerationConfig.from_pretrained(
            directory, config_file_name="config.json", _from_model_config=True, **local
        )
    model.generation_config = made


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replaces a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, tensor)
