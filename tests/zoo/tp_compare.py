"""How transformers' tensor-parallel plans cut the weights of a model, and how the compiler does.

A plan maps patterns of module names to styles. The compiler never reads it, so it is an outside
witness: where both cut a weight, the ranks should hold the same rows or columns of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import torch
from torch import fx
from transformers import PreTrainedModel

from spdcompile.passes import pipeline
from spdcompile.passes.base import ParamRef, Part, Program, Refusal, RegionKind, module_path
from spdcompile.passes.projections import projection_of
from tests.zoo.table import generic
from tests.zoo.tp_styles import STYLES, Style
from tests.zoo.tp_witness import Witness, takes_shares

TP = 2


class Side(StrEnum):
    """Which features of a weight are cut."""

    COLUMNS = "columns"
    ROWS = "rows"
    WHOLE = "whole"


class Kind(StrEnum):
    """How two decisions about one weight compare."""

    SAME = "the same on both sides"
    OURS = "ours splits, theirs does not"
    THEIRS = "theirs splits, ours does not"
    OPPOSITE = "one splits by columns, the other by rows"
    INDICES = "split along the same dim, other indices on a rank"
    GATHERED = "split along the same dim, but theirs makes or reads the activation whole"


@dataclass(frozen=True, slots=True)
class Decision:
    """How a weight lies on the ranks.

    Args:
        held: per rank, the indices that it holds along the split dim; none if it holds all.
        gathers: as in `Style`.
    """

    side: Side = Side.WHOLE
    held: tuple[tuple[int, ...], ...] = ()
    gathers: bool = False


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that the program contracts with or looks up in, or one that the plan names itself.

    Args:
        module: its name without ".weight", with a star for each number.
        style: of the plan, or "" where the plan does not name it.
        region: graph and name of the region that it was found in, or "".
        words: why the compiler keeps it whole, or "".
        sums: what else than regions the compiler sums over the ranks in its block.
        left_out: theirs splits no weight of its region.
        uneven: the units of its region cannot be dealt evenly.
        packed: ours cuts it as "packed_colwise" would.
        reader: the operators that take it, where none contracts with it or looks up in it.
        elsewhere: all such readers of the module's weights in any block.
        operators: what computes on its features, where it stays whole.
        shared_heads: "leaves" or "arrives" if attention on its features shares K between blocks.
        takes: each rank takes its share of it at run time.
    """

    module: str
    style: str
    theirs: Decision
    ours: Decision
    region: str = ""
    words: str = ""
    sums: str = ""
    left_out: bool = True
    uneven: bool = False
    packed: bool = False
    reader: str = ""
    elsewhere: str = ""
    operators: str = ""
    shared_heads: str = ""
    takes: bool = False

    @property
    def alike(self) -> bool:
        """Whether the ranks hold the same indices on both sides."""
        return self.theirs.held == self.ours.held

    @property
    def kind(self) -> Kind:
        """How the two decisions compare."""
        theirs, ours = self.theirs, self.ours
        if Side.WHOLE in (theirs.side, ours.side):
            if theirs.side == ours.side:
                return Kind.SAME
            return Kind.OURS if theirs.side is Side.WHOLE else Kind.THEIRS
        if theirs.side != ours.side:
            return Kind.OPPOSITE
        if theirs.gathers != ours.gathers:
            return Kind.GATHERED
        return Kind.SAME if self.alike else Kind.INDICES


def generic_name(name: str) -> str:
    """A name with a star for each number, as plans write it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def style_of(parameter: str, plan: Mapping[str, str]) -> str:
    """The style of a parameter: its own or, but for a bias, that of its module; "" if none."""
    name = generic_name(parameter)
    module, _, leaf = name.rpartition(".")
    return plan.get(name, "" if leaf == "bias" else plan.get(module, ""))


def idle_rules(model: PreTrainedModel) -> list[str]:
    """The patterns of a model's plan that name nothing in it."""
    names = [name for name, _ in model.named_modules()]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return sorted(set(model.tp_plan) - set(map(generic_name, names)))


def weights_of(model: PreTrainedModel) -> list[Weight]:
    """The weights of a model with both decisions, in the order of the program.

    Raises:
        CaptureError: the model cannot be captured.
        KeyError: the plan has a style that is not in `STYLES`.
    """
    found = list(_Comparison(model).weights())
    reached = {weight.region for weight in found if weight.theirs.side is not Side.WHOLE}
    readers: dict[str, set[str]] = {}
    for weight in found:
        readers.setdefault(weight.module, set()).add(weight.reader)
    return [
        replace(
            weight,
            left_out=weight.region not in reached,
            elsewhere=", ".join(sorted(filter(None, readers[weight.module]))),
        )
        for weight in found
    ]


class _Comparison:
    """Both decisions about every weight of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        lowering = pipeline.start(model)
        stages: dict[str, Program] = {}
        for step in pipeline.preserving(TP, {}):
            lowering = pipeline.advance(lowering, (step,))
            stages[step.name] = lowering.program
        self.plan = model.tp_plan
        self.split, self.regions, self.last = stages["split"], stages["regions"], lowering.program
        self.refusals = [r for record in lowering.records for r in record.refusals]
        self.names: dict[str, list[str]] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            self.names[name] = [n for n, other in parameters.items() if other is parameter]

    def weights(self) -> Iterator[Weight]:
        for early, late in zip(self.split.parts, self.last.parts, strict=True):
            graph = self.split.graph_of(early).module.graph
            witness = Witness(self.split, early, TP)
            found = {name: dims for name, dims in _readers(graph, frozenset(early.params))}
            for name, ref in early.params.items():
                if ref.constant or ref.fqn not in self.names:
                    continue
                reader, out_dim = found.get(name, (None, max(len(ref.shape) - 2, 0)))
                fqn = self._name(ref, reader)
                own = generic_name(fqn) in self.plan
                if reader is not None or own or (len(ref.shape) > 1 and style_of(fqn, self.plan)):
                    weight = self._weight(late, name, fqn, out_dim)
                    if reader is None:
                        weight = replace(weight, reader=witness.readers(name))
                    yield self._witnessed(weight, witness, late, name)

    def _witnessed(self, weight: Weight, witness: Witness, part: Part, name: str) -> Weight:
        if weight.kind is not Kind.THEIRS:
            return weight
        return replace(
            weight,
            operators=witness.operators(name),
            shared_heads=witness.shared_heads(name),
            takes=takes_shares(self.last.graph_of(part).module.graph, name),
        )

    def _name(self, ref: ParamRef, reader: fx.Node | None) -> str:
        """The name, among those of a tied parameter, of the module that reads it."""
        path = module_path(reader) if reader is not None else ""
        names = self.names[ref.fqn]
        return next((name for name in names if name.rpartition(".")[0] == path), ref.fqn)

    def _weight(self, part: Part, name: str, fqn: str, out_dim: int) -> Weight:
        ref, block = part.params[name], self.last.graph_of(part)
        style = style_of(fqn, self.plan)
        shape = ref.shape[::-1] if ref.transposed else ref.shape
        flipped = 1 - out_dim if ref.transposed else out_dim
        ours = self._ours(part, name, out_dim)
        found = [r for r in self.regions.graph_of(part).regions if name in (*r.columns, *r.rows)]
        region = found[0].name if found else ""
        packable = ours.side is Side.COLUMNS and shape[flipped] % (2 * TP) == 0
        return Weight(
            generic_name(fqn).removesuffix(".weight"),
            style,
            _theirs(STYLES[style] if style else Style(), shape, flipped),
            ours,
            f"{part.graph} {region}" if region else "",
            self._words(part, fqn, region) if ours.side is Side.WHOLE else "",
            ", ".join(sorted(set(block.partials) - {r.name for r in block.regions})),
            uneven=any(r.num_units % TP for r in found),
            packed=packable and ours.held == _held(shape[flipped], parts=2),
        )

    def _ours(self, part: Part, name: str, out_dim: int) -> Decision:
        """What the regions that were carried out say; a vector is cut along with them."""
        spec = part.shards.get(name)
        if spec is None:
            return Decision()
        side, gathers = _side(spec.dim, out_dim), False
        for region in self.last.graph_of(part).regions:
            named = dict.fromkeys(region.columns, Side.COLUMNS)
            named |= dict.fromkeys(region.rows, Side.ROWS)
            if named.get(name, side) is not side:
                raise AssertionError(f"{name} is cut along dim {spec.dim}, not by {named[name]}")
            # What a head makes, the logits, leaves the program whole.
            gathers = gathers or (name in named and region.kind is RegionKind.HEAD)
        return Decision(side, _indices(spec.index), gathers)

    def _words(self, part: Part, fqn: str, region: str) -> str:
        """What the compiler says of a weight that stays whole, or of the region that it was in."""

        def concerns(refusal: Refusal) -> bool:
            subjects = [generic_name(subject) for subject in refusal.subject.split(", ")]
            return generic_name(fqn.rpartition(".")[0]) in subjects or region in subjects

        found = [r.reason for r in self.refusals if r.graph == part.graph and concerns(r)]
        return generic("; ".join(dict.fromkeys(found)))


def _readers(graph: fx.Graph, params: frozenset[str]) -> Iterator[tuple[str, tuple[fx.Node, int]]]:
    """The weights that are contracted with or looked up in, each with a reader and its out dim."""
    for node in graph.nodes:
        projection = projection_of(node, params)
        if projection is not None:
            yield projection.weight.name, (node, projection.out_dim)
        elif node.target is torch.ops.aten.embedding.default and node.args[0].name in params:
            yield node.args[0].name, (node, 1)


def _theirs(style: Style, shape: tuple[int, ...], out_dim: int) -> Decision:
    if style.dim is None:
        return Decision()
    dim = max(len(shape) + style.dim, 0)
    return Decision(_side(dim, out_dim), _held(shape[dim], style.parts), style.gathers)


def _held(size: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """The indices that each rank holds of `parts` stretches, each of which is cut by itself."""
    stretches = np.arange(size).reshape(parts, -1)
    return _indices([chunk.reshape(-1) for chunk in np.array_split(stretches, TP, axis=1)])


def _side(dim: int, out_dim: int) -> Side:
    return Side.COLUMNS if dim == out_dim else Side.ROWS


def _indices(held: Iterable[np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(index) for index in indices if index >= 0) for indices in held)
