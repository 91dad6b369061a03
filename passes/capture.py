"""Captures a causal LM as one export graph whose parameters carry state_dict names."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from transformers import PreTrainedModel

from spdcompile.errors import CaptureError
from spdcompile.passes._torch import check_size
from spdcompile.passes.attention_interface import (
    UnsupportedAttentionError,
    attention_as_operator,
    check_attention,
    plain_attention,
    take_mask_from_input,
)
from spdcompile.passes.base import (
    BlockGraph,
    ParamRef,
    Part,
    PassResult,
    Positions,
    Program,
    Refusal,
)
from spdcompile.passes.export import INPUTS, Exported, export, failure
from spdcompile.passes.patches import patched_for_export
from spdcompile.passes.positions import default_positions_of


class _Captured(nn.Module):
    """The model with the three inputs of a program, and the logits as its only output."""

    def __init__(self, model: PreTrainedModel, takes_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes_positions

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        for other in (attention_mask, position_ids):
            for dim in (0, 1):
                check_size(other.shape[dim] == input_ids.shape[dim])
        extra = {"position_ids": position_ids} if self.takes_positions else {}
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra
        )
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
    with patched_for_export(model):
        try:
            with attention_as_operator(model):
                program = _program(model)
                check_attention(program.graphs["model"].module.graph)
        except UnsupportedAttentionError as why:
            refusals = (Refusal("attention as one operator", str(why)),)
            program = _program_of_own_attention(model)
    return PassResult(replace(program, refusals=refusals), rewrites=1, refusals=refusals)


def _program_of_own_attention(model: PreTrainedModel) -> Program:
    """The program with the attention that the model is set to, or else with the plain form.

    The two differ in what a token gets that may attend to none, as padding before a text, and some
    models let other tokens see that.
    """
    try:
        return _program(model)
    except CaptureError:
        with plain_attention(model):
            return _program(model)


def _program(model: PreTrainedModel) -> Program:
    """The exported graph as a program of one part, parameters under their state_dict names."""
    path, layers = decoder_layers(model)
    positions = default_positions_of(model, layers)
    given = positions in (Positions.ARANGE, Positions.FROM_MASK)
    exported = _exported(_Captured(model, takes_positions=given), model)
    module = fx.GraphModule({}, exported.program.graph_module.graph)
    inputs = {node.name: node for node in module.graph.find_nodes(op="placeholder")}
    params, constants = _params(exported.program, inputs)
    names = [name for name in inputs if name not in params]
    take_mask_from_input(module.graph, inputs[INPUTS[1]])
    part = Part(
        name="model",
        layer=None,
        graph="model",
        params=params,
        inputs={name: name for name in names},
        outputs=("logits",),
    )
    return Program(
        graphs={"model": BlockGraph(module)},
        parts=(part,),
        inputs=tuple(names),
        output="logits",
        layers=path,
        positions=positions,
        constants=constants,
        min_length=exported.min_length,
        max_length=exported.max_length,
    )


def _exported(module: _Captured, model: PreTrainedModel) -> Exported:
    try:
        return export(module, model.device)
    except UnsupportedAttentionError:
        raise
    except Exception as error:
        found = error.found if isinstance(error, CaptureError) else failure(error)
        raise CaptureError(
            f"{type(model).__name__} cannot be captured as one graph.",
            where=f"torch.export of {type(model).__module__}",
            found=found,
            needed="a forward pass without data-dependent control flow",
            fix="see docs of torch.export, or report the architecture",
        ) from error


def _params(
    exported: ExportedProgram, inputs: dict[str, fx.Node]
) -> tuple[dict[str, ParamRef], dict[str, Tensor]]:
    """Where the data of the graph's parameters comes from, and that of its constants."""
    params, constants = {}, {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        value = inputs[spec.arg.name].meta["val"]
        name = spec.target.removeprefix("model.")
        in_checkpoint = spec.kind is InputKind.PARAMETER or (
            spec.kind is InputKind.BUFFER and spec.persistent
        )
        params[spec.arg.name] = ParamRef(
            name, tuple(value.shape), value.dtype, constant=not in_checkpoint
        )
        if not in_checkpoint:
            constants[name] = exported.constants[spec.target]
    return params, constants


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The model's decoder blocks: of the module lists as long as it has layers, the largest.

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
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)

    def rank(item: tuple[str, nn.ModuleList]) -> tuple[bool, int]:
        return len(item[1]) == wanted, sum(p.numel() for p in item[1].parameters())

    return max(lists, key=rank)
