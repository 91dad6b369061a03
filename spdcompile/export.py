"""Writes what Hugging Face reads: an ordinary checkpoint, and beside it the plan that it is for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from spdcompile.errors import SaveError, UsageError
from spdcompile.files import staged
from spdcompile.models import check_weights, resolve_model
from spdcompile.plan import PLAN_FILE, Plan
from spdcompile.planning import make_plan

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_OTHERS = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json"),
    *("vocab.*", "merges.txt", "chat_template*"),
)


def export_hf(
    model: PreTrainedModel | str | Path,
    directory: str | Path,
    *,
    plan: Plan,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a Hugging Face checkpoint and `spd_plan.json`, the plan that its weights are for.

    `AutoModelForCausalLM.from_pretrained` reads it as any other; `compile(directory, tp=plan.tp,
    spd_mask=Plan.load(directory))` drops what the plan names.

    Args:
        model: a loaded model, or a local directory, whose tokenizer is copied too.
        directory: a new or empty one.
        plan: one for this model.
        tensors: new global tensors under their state_dict names, such as `Distilled.tensors`, in
            place of the model's; they are written in the model's own dtype.

    Raises:
        UsageError: the directory is not empty, or a tensor does not fit the model.
        PlanError: the plan was made for another model.
        SaveError: a file cannot be written; then none is left.
    """
    target = Path(directory)
    check_empty(target)
    if not isinstance(model, PreTrainedModel):
        check_weights(Path(model))
    make_plan(resolve_model(model, weights=False), plan.tp, plan)
    try:
        with staged(target) as aside:
            if isinstance(model, PreTrainedModel):
                _save(model, tensors or {}, aside)
            else:
                source = Path(model)
                copy_files(source, aside, _OTHERS if tensors else (*_OTHERS, *_WEIGHTS))
                if tensors:
                    loaded = AutoModelForCausalLM.from_pretrained(
                        source, dtype="auto", local_files_only=True, trust_remote_code=False
                    )
                    _save(loaded, tensors, aside)
            plan.save(aside / PLAN_FILE)
    except OSError as error:
        raise SaveError(
            "The checkpoint cannot be written.", where=str(target), found=str(error)
        ) from error


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copies the files of a checkpoint, of its configuration and of its tokenizer."""
    copy_files(source, target, (*_OTHERS, *_WEIGHTS))


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copies the files of a directory whose names match one of some patterns."""
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def check_empty(target: Path) -> None:
    """Raises UsageError unless a directory can be made there, or is empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            "The directory is not empty.",
            where=str(target),
            found=", ".join(sorted(os.listdir(target))[:3]) if target.is_dir() else "a file",
            needed="a new or empty directory, so that no file of another checkpoint is left in it",
        )


def _save(model: PreTrainedModel, tensors: Mapping[str, Tensor], target: Path) -> None:
    """Writes a model with some of its tensors replaced; it is left as it is."""
    state = model.state_dict()
    for name, tensor in tensors.items():
        own = state.get(name)
        if own is None or own.shape != tensor.shape:
            raise UsageError(
                "A tensor does not fit the model.",
                where=name,
                found=str(list(tensor.shape)),
                needed="a tensor of that name" if own is None else str(list(own.shape)),
            )
        new = tensor.detach().to(own.dtype)
        for other, theirs in state.items():
            if _is_same(theirs, own):
                state[other] = new  # tied
        state[name] = new
    model.save_pretrained(target, state_dict=state)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, under two names."""
    places = [(x.untyped_storage().data_ptr(), x.storage_offset(), x.shape) for x in (one, other)]
    return places[0] == places[1] and one.device != torch.device("meta")
