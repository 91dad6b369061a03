"""Captures a causal LM as one export graph whose parameters carry state_dict names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from transformers import AttentionInterface, PreTrainedModel

from spdcompile.errors import CaptureError
from spdcompile.passes._torch import OpOverload
from spdcompile.passes.base import (
    BlockGraph,
    ParamRef,
    Part,
    PassResult,
    Positions,
    Program,
    Refusal,
)
from spdcompile.passes.ops import ATTENTION
from spdcompile.passes.positions import default_positions_of

_INTERFACE = "spdcompile"
_WINDOWED_LAYERS = {"full_attention", "sliding_attention"}
_VALID: ContextVar[Tensor] = ContextVar("attention mask of the model being captured")


class _UnsupportedAttentionError(Exception):
    """A model asks its attention function for something that `spd::attention` does not do."""


class _Captured(nn.Module):
    """The model with the three inputs of a program, and the logits as its only output."""

    def __init__(self, model: PreTrainedModel, takes_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes_positions

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        extra = {"position_ids": position_ids} if self.takes_positions else {}
        token = _VALID.set(attention_mask)
        try:
            out = self.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra
            )
        finally:
            _VALID.reset(token)
        return out.logits


def capture(model: PreTrainedModel) -> PassResult:
    """Captures `model(input_ids, attention_mask, position_ids).logits` as a program of one part.

    Args:
        model: a causal LM in eval mode, on any device; meta tensors are enough.

    Returns: a program with inputs int64 [B, S], [B, S], [B, S] and float logits [B, S, V].

    Raises:
        CaptureError: torch.export cannot trace the model.
    """
    refusals: tuple[Refusal, ...] = ()
    try:
        with _attention_as_operator(model):
            program = _program(model)
            _check_attention(program)
    except _UnsupportedAttentionError as why:
        refusals = (Refusal("attention as one operator", str(why)),)
        with _own_attention(model):
            program = _program(model)
    return PassResult(replace(program, refusals=refusals), rewrites=1, refusals=refusals)


def _export(model: PreTrainedModel, positions: Positions | None) -> ExportedProgram:
    batch, length = Dim("batch", min=1), Dim("length", min=1)
    # Sizes that are unlikely to equal a size of the model, lest export tie the two together.
    ids = torch.ones((3, 11), dtype=torch.long, device=model.device)
    shape = {0: batch, 1: length}
    try:
        with torch.no_grad():
            exported = torch.export.export(
                _Captured(model, positions is not None),
                (ids, torch.ones_like(ids), torch.zeros_like(ids)),
                dynamic_shapes=dict.fromkeys(
                    ("input_ids", "attention_mask", "position_ids"), shape
                ),
                strict=False,
            )
            return _functional(exported) if _writes_in_place(exported) else exported
    except _UnsupportedAttentionError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured as one graph.",
            where=f"torch.export of {type(model).__module__}",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            needed="a forward pass without data-dependent control flow",
            fix="see docs of torch.export, or report the architecture",
        ) from error


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """The same without decompositions, but each operator that writes in place made functional."""
    with warnings.catch_warnings():
        # torch 2.13 copies its own tree specs in a way that it deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        return exported.run_decompositions({})


def _writes_in_place(exported: ExportedProgram) -> bool:
    return any(
        isinstance(node.target, OpOverload) and node.target._schema.is_mutable
        for node in exported.graph.nodes
    )


@contextmanager
def _attention_as_operator(model: PreTrainedModel) -> Iterator[None]:
    """Routes the model's attention through `spd::attention`, where it has an interface for it.

    The mask interface stays without an entry, so that the model builds no mask: the operator is
    causal itself and gets the caller's padding mask.
    """
    config = model.config
    if not model._can_set_attn_implementation():
        raise _UnsupportedAttentionError("the model has its own attention code")
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - _WINDOWED_LAYERS:
        raise _UnsupportedAttentionError(f"layer types {sorted(kinds - _WINDOWED_LAYERS)}")
    before = config._attn_implementation
    AttentionInterface.register(_INTERFACE, _attention_function)
    model.set_attn_implementation(_INTERFACE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Keeps the model's own attention, in plain operators where it has a choice.

    The scaled-dot-product form may decide by the mask's data, which no graph can hold.
    """
    before = model.config._attn_implementation
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """What the model's attention layers call: q [B, H, S, D], k and v [B, Hkv, S, D]."""
    if attention_mask is not None:
        raise _UnsupportedAttentionError("its attention takes a mask that is computed from data")
    if settings.get("position_bias") is not None:
        raise _UnsupportedAttentionError("its attention takes a position bias")
    causal = settings.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    out = torch.ops.spd.attention(
        query,
        key,
        value,
        _VALID.get(),
        settings.get("s_aux"),
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        bool(causal),
        int(settings.get("sliding_window") or 0),
        float(settings.get("softcap") or 0.0),
    )
    return out, None


def _program(model: PreTrainedModel) -> Program:
    """The exported graph as a program of one part, parameters under their state_dict names."""
    path, layers = decoder_layers(model)
    positions = default_positions_of(model, layers)
    exported = _export(model, positions)
    module = fx.GraphModule({}, exported.graph_module.graph)
    values = {
        node.name: node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"
    }
    params, constants = {}, {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        value, name = values[spec.arg.name], spec.target.removeprefix("model.")
        in_checkpoint = spec.kind is InputKind.PARAMETER or (
            spec.kind is InputKind.BUFFER and spec.persistent
        )
        params[spec.arg.name] = ParamRef(
            name, tuple(value.shape), value.dtype, constant=not in_checkpoint
        )
        if not in_checkpoint:
            constants[name] = exported.constants[spec.target]
    inputs = [name for name in values if name not in params]
    part = Part(
        name="model",
        layer=None,
        graph="model",
        params=params,
        inputs={name: name for name in inputs},
        outputs=("logits",),
    )
    return Program(
        graphs={"model": BlockGraph(module)},
        parts=(part,),
        inputs=tuple(inputs),
        output="logits",
        layers=path,
        positions=positions,
        constants=constants,
    )


def _check_attention(program: Program) -> None:
    """A model without a mask and without the operator that replaces it would not be causal."""
    nodes = program.graphs["model"].module.graph.nodes
    if not any(node.target is ATTENTION for node in nodes):
        raise _UnsupportedAttentionError("its layers do not call the attention interface")


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The model's decoder blocks: its outermost module list with the most parameters.

    Returns: the list's path ("model.layers") and the list.

    Raises:
        CaptureError: the model has no module list.
    """
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise CaptureError(
            f"{type(model).__name__} has no list of decoder layers.",
            needed="a torch.nn.ModuleList whose members are the blocks",
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
