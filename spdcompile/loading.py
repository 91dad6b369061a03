"""From what the caller names as a model to its structure, its weights and its captured graph.

Of a directory the structure alone is built, on the meta device, and every rank reads its slices of
the files. A checkpoint that is no matter of names, stacks and cuts is loaded whole by transformers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spdcompile.log import Component, get_logger
from spdcompile.models import ModelSource, check_not_quantized, check_weights, resolve_model
from spdcompile.passes import pipeline
from spdcompile.passes.vocabulary import Vocabulary
from spdcompile.plan import Plan
from spdcompile.runtime._transformers import read_generation_config
from spdcompile.runtime.checkpoint import ConversionError, open_checkpoint, stored_tensors
from spdcompile.runtime.stored import Stored
from spdcompile.runtime.weights import Weights, check_finite, checkpoint_tensors

_LOG = get_logger(Component.RUNTIME)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and where its weights are.

    Args:
        model: on the meta device where the weights are in files.
        tensors: every tensor of its state_dict, in memory or in files.
        device: where the model is, or the CPU.
        directory: where it came from; None for a model that the caller loaded.
        dtype: what the caller asked for.
    """

    model: PreTrainedModel
    tensors: Weights
    device: torch.device
    directory: Path | None = None
    dtype: torch.dtype | None = None

    @property
    def in_files(self) -> bool:
        """Whether the weights are still to be read, the model being without them."""
        return any(isinstance(tensor, Stored) for tensor in self.tensors.values())


def load_model(source: ModelSource, dtype: torch.dtype | None) -> Loaded:
    """Takes a loaded model as it is; of a directory, reads nothing but the headers of its files.

    Args:
        dtype: of the parameters; default that of the config, or of the checkpoint.

    Raises:
        UsageError: it is no causal LM, no readable directory, or has no weights.
        CheckpointError: a tensor is missing, extra or misshapen.
    """
    if not isinstance(source, str | Path):
        model = resolve_model(source, weights=True, dtype=dtype)
        return Loaded(model, checkpoint_tensors(model), model.device)
    directory = Path(source)
    model = resolve_model(directory, weights=False, dtype=dtype)
    check_not_quantized(model, str(directory / "config.json"))
    check_weights(directory)
    reason = _unread(model, directory)
    if not reason:
        try:
            if dtype is None and model.config.dtype is None:
                model = resolve_model(directory, weights=False, dtype=_dtype_of(directory))
            tensors = open_checkpoint(directory, model)
            read_generation_config(model, directory)
            return Loaded(model, tensors, torch.device("cpu"), directory, dtype)
        except ConversionError as why:
            reason = str(why)
    return _whole(directory, dtype, reason)


def capture_loaded(loaded: Loaded) -> tuple[Loaded, pipeline.Lowering]:
    """Captures a model, with the shapes of its weights alone where they are in files.

    Returns: what was given and the captured graph; or the model with its weights in memory, where
        its first call changes them.

    Raises:
        CaptureError: the model cannot be captured.
    """
    if loaded.directory is None or not loaded.in_files:
        return loaded, pipeline.start(loaded.model)
    with _unwritten(loaded.model) as weights:
        before = [weight._version for weight in weights]
        captured = pipeline.start(loaded.model)
        changed = before != [weight._version for weight in weights]
    if changed:
        reason = "the model changes its weights before its first call"
        loaded = _whole(loaded.directory, loaded.dtype, reason)
        captured = pipeline.start(loaded.model)
    return loaded, captured


def lower_loaded(
    loaded: Loaded, plan: Plan, vocabulary: Vocabulary
) -> tuple[Loaded, pipeline.Lowering, pipeline.Lowering]:
    """Captures a model and runs the passes that a plan asks for.

    Returns: what `capture_loaded` gives for the model, the program before anything is dropped, and
        the one that runs.

    Raises:
        CaptureError, UsageError, RefusalError: as in `compile`.
    """
    loaded, captured = capture_loaded(loaded)
    passes = pipeline.preserving(plan.tp, plan.head_groups, vocabulary)
    base = pipeline.advance(captured, passes)
    lowering = pipeline.advance(base, pipeline.changing(plan.dropped, plan.router))
    del captured
    gc.collect()  # the graph of the whole model, in which nodes point at each other
    return loaded, base, lowering


def _unread(model: PreTrainedModel, directory: Path) -> str:
    """Why transformers has to load a directory; "" if that is not so."""
    if (directory / "adapter_config.json").is_file():
        return "the directory holds an adapter"
    for setting in ("transformers_weights", "extra_files", "fusion_config"):
        if getattr(model.config, setting, None):
            return f"the configuration sets {setting}"
    return ""


def _whole(directory: Path, dtype: torch.dtype | None, reason: str) -> Loaded:
    """The model loaded by transformers, every tensor of it."""
    _LOG.warning("%s is loaded whole on every rank: %s", directory, reason)
    model = resolve_model(directory, weights=True, dtype=dtype)
    tensors = checkpoint_tensors(model)
    for name, tensor in tensors.items():
        check_finite(tensor, f"{name} in {directory}")
    return Loaded(model, tensors, model.device, directory, dtype)


def _dtype_of(directory: Path) -> torch.dtype | None:
    """The dtype of a checkpoint whose config names none, as transformers finds it."""
    stored = stored_tensors(directory).values()
    return next((tensor.dtype for tensor in stored if tensor.dtype.is_floating_point), None)


@contextmanager
def _unwritten(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Gives what is on the meta device CPU memory that nothing is written to, for the time being.

    Models trace otherwise on meta than on a CPU, and memory that is not written takes no room.
    """
    places = [
        (kept, name, tensor)
        for module in model.modules()
        for kept in (module._parameters, module._buffers)
        for name, tensor in kept.items()
        if tensor is not None and tensor.is_meta
    ]
    made: dict[int, Tensor] = {}
    for kept, name, tensor in places:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        kept[name] = made[id(tensor)]
    try:
        yield list(made.values())
    finally:
        for kept, name, tensor in places:
            kept[name] = tensor
