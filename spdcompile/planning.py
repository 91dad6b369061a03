"""From the arguments of a call to the plan that it describes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TypeVar

from transformers import PreTrainedModel

from spdcompile.errors import PlanError, UsageError
from spdcompile.passes.capture import decoder_layers
from spdcompile.plan import HeadGroups, Plan, Router, attention_points

_Kind = TypeVar("_Kind", bound=Enum)


def make_plan(
    model: PreTrainedModel,
    tp: int,
    spd_mask: Sequence[bool] | Plan | None,
    head_groups: Mapping[int, Sequence[Sequence[int]]] | None = None,
    router: str | None = None,
) -> Plan:
    """The plan that a call to `compile` describes.

    Raises:
        UsageError: the mask does not fit the model, or there is no such router setting.
        PlanError: the plan was made for another tp or model.
        CaptureError: the model has no list of decoder layers.
    """
    num_layers = len(decoder_layers(model)[1])  # which not every config has under that name
    if not isinstance(spd_mask, Plan):
        points = attention_points(spd_mask, num_layers)
        reads = Router.EXACT if router is None else choice(Router, router, "router")
        return Plan(tp, num_layers, points, groups_of(head_groups or {}), router=reads)
    if head_groups is not None:
        raise UsageError("A Plan brings its own head groups.", where="head_groups")
    if router is not None:
        raise UsageError("A Plan brings its own router setting.", where="router")
    if (spd_mask.tp, spd_mask.num_layers) != (tp, num_layers):
        raise PlanError(
            "The plan was made for something else.",
            found=f"a plan for tp={spd_mask.tp} and {spd_mask.num_layers} layers",
            needed=f"tp={tp} and {num_layers} layers",
        )
    if spd_mask.model and spd_mask.model != structure_of(model):
        raise PlanError(
            "The plan was made for something else.",
            found=f"a plan for a model {spd_mask.model}",
            needed=f"one for this model, {structure_of(model)}",
        )
    return spd_mask


def structure_of(model: PreTrainedModel) -> str:
    """A few letters that tell models of different structure apart, whatever their weights.

    Returns: the model type, and a hash of the shapes of all tensors.
    """
    shapes = sorted(tuple(tensor.shape) for tensor in model.state_dict().values())
    return f"{model.config.model_type}-{hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]}"


def groups_of(head_groups: Mapping[int, Sequence[Sequence[int]]]) -> HeadGroups:
    """Head groups as a plan holds them: the units of each rank in ascending order."""
    return {
        layer: tuple(tuple(sorted(units)) for units in ranks)
        for layer, ranks in head_groups.items()
    }


def check_tp(tp: int) -> None:
    """Raises UsageError unless tp is a whole number of at least 1."""
    if not isinstance(tp, int) or isinstance(tp, bool) or tp < 1:
        raise UsageError(f"tp={tp!r} is no number of ranks.", where="tp", needed="an int >= 1")


def choice(kind: type[_Kind], value: str, where: str) -> _Kind:
    """The member of an enum that a setting names; raises UsageError if there is none."""
    names = [member.value for member in kind]
    if value not in names:
        raise UsageError(
            f"There is no {where} {value!r}.", where=where, needed=" or ".join(map(repr, names))
        )
    return kind(value)
