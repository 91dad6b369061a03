"""Code that is one operator of a graph: what it computes, its gradient, ranks, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

import spdcompile.runtime.calls  # noqa: F401  (gives the operator its kernel)
from spdcompile.errors import InvariantError
from spdcompile.passes.opaque import OpaqueCodeError, function_as_operator, method_as_operator
from spdcompile.passes.ops import CALL
from tests.compare import rel_err

pytestmark = pytest.mark.usefixtures("reproducible")
WIDTH, STATES = 6, 2


def scan(x: Tensor, decay: Tensor, *, start: float = 0.0, states: bool = False) -> Any:
    """x [B, S, C], decay [C] -> [B, S, C] and, if wanted, the last state."""
    state, outs = torch.full_like(x[:, 0], start), []
    for place in range(x.shape[1]):
        state = state * decay + x[:, place]
        outs.append(state)
    return (torch.stack(outs, 1), state) if states else torch.stack(outs, 1)


class Mixer(nn.Module):
    """A scan between two projections; `layer_idx` is for a cache that nobody gives."""

    def __init__(self, layer_idx: int, start: float = 0.0) -> None:
        super().__init__()
        self.layer_idx, self.start = layer_idx, start
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.decay = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(scan(self.inner(x), self.decay, start=self.start, states=True)[0])


class Model(nn.Module):
    def __init__(self, *mixers: nn.Module) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = x + mixer(F.silu(x))
        return x


def whole_mixer() -> Any:
    """Mixers are one operator while this lasts."""
    operator = method_as_operator(Mixer.forward, "Mixer.forward", where=lambda module: True)
    return patch.object(Mixer, "forward", operator)


def scan_alone() -> Any:
    return patch(f"{__name__}.scan", function_as_operator(scan, "scan"))


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    shapes = {"x": {0: Dim("batch", min=1), 1: Dim("length", min=1)}}
    with torch.no_grad():
        return torch.export.export(
            model, (torch.randn(3, 11, WIDTH),), dynamic_shapes=shapes, strict=False
        )


def calls(program: torch.export.ExportedProgram) -> list[fx.Node]:
    return program.graph.find_nodes(op="call_function", target=CALL)


@pytest.mark.parametrize("as_operator", [whole_mixer, scan_alone])
def test_graph_computes_what_the_code_does(as_operator: Callable[[], Any]) -> None:
    model = Model(Mixer(0), Mixer(1, start=0.5))
    with as_operator():
        program = exported(model)
    assert len(calls(program)) == 2
    names = {node.name for node in program.graph.find_nodes(op="placeholder")}
    assert "p_mixers_1_decay" in names  # a parameter of the program, not of the code
    for shape in ((3, 13), (1, 5), (1, 1)):
        x = torch.randn(*shape, WIDTH)
        assert rel_err(program.module()(x), model(x)) < 1e-6


def test_code_is_shared_where_it_computes_the_same() -> None:
    with whole_mixer():
        program = exported(Model(Mixer(0), Mixer(1), Mixer(2, start=0.5)))
    first, second, third = (node.args[1] for node in calls(program))
    assert first == second != third


class Numbered(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.layer_idx == 0 else x


def test_code_that_computes_with_its_layer_is_refused() -> None:
    operator = method_as_operator(Numbered.forward, "Numbered.forward", where=lambda module: True)
    with (
        patch.object(Numbered, "forward", operator),
        pytest.raises(OpaqueCodeError, match="number of its layer"),
    ):
        exported(Model(Numbered(0)))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, decay: x.flatten(0, 1), "no size of its inputs"),
        (lambda x, decay: None, "gives no tensor"),
    ],
)
def test_code_of_unknown_result_is_refused(function: Callable[..., Any], reason: str) -> None:
    with (
        patch(f"{__name__}.scan", function_as_operator(function, "code")),
        pytest.raises(OpaqueCodeError, match=reason),
    ):
        exported(Scanning())


class Scanning(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return scan(x, x[0, 0])


def test_settings_that_graphs_cannot_share_are_refused() -> None:
    with pytest.raises(OpaqueCodeError, match="takes a object"):
        function_as_operator(scan, "scan")(torch.randn(2, 3, WIDTH), object())


def code_of_scan() -> tuple[str, list[int], torch.dtype]:
    with scan_alone():
        _, code, shape, dtype = calls(exported(Model(Mixer(0))))[0].args
    return code, list(shape), dtype


def test_result_of_another_shape_is_an_error() -> None:
    code, shape, _ = code_of_scan()
    inputs = [torch.randn(2, 5, WIDTH), torch.rand(WIDTH)]
    assert CALL(inputs, code, shape, torch.float32).shape == (2, 5, WIDTH)
    with pytest.raises(InvariantError, match="something else than when it was captured"):
        CALL(inputs, code, shape, torch.float64)
    with pytest.raises(InvariantError, match="something else than when it was captured"):
        CALL(inputs, code, [0, 0, 0, 0, 0, 2], torch.float32)


def test_gradient_is_that_of_the_code() -> None:
    code, shape, dtype = code_of_scan()
    x, decay = torch.randn(2, 5, WIDTH), torch.rand(WIDTH)

    def grads(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(), decay.clone().requires_grad_()]
        return torch.autograd.grad((function(*leaves) ** 2).sum(), leaves)

    found = grads(lambda *inputs: CALL(list(inputs), code, shape, dtype))
    for grad, expected in zip(found, grads(scan), strict=True):
        assert rel_err(grad, expected) < 1e-6
    per_rank = torch.func.vmap(
        torch.func.grad(lambda d: (CALL([x, d], code, shape, dtype) ** 2).sum())
    )(torch.stack([decay, decay / 2]))
    assert rel_err(per_rank[0], found[1]) < 1e-6


def test_ranks_are_run_one_by_one() -> None:
    code, shape, dtype = code_of_scan()
    x, decays = torch.randn(2, 5, WIDTH), torch.rand(3, WIDTH)

    def run(x: Tensor, decay: Tensor) -> Tensor:
        return CALL([x, decay], code, shape, dtype)

    found = torch.vmap(run, (None, 0))(x, decays)
    assert rel_err(found, torch.stack([scan(x, decay) for decay in decays])) < 1e-6
    shared = torch.vmap(lambda decay: run(x, decays[0]) * decay)(decays)
    assert rel_err(shared, scan(x, decays[0]) * decays[:, None, None]) < 1e-6


def test_compiled_graph_keeps_the_code_whole() -> None:
    code, shape, dtype = code_of_scan()
    targets: list[Any] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        targets.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    compiled = torch.compile(
        lambda x, decay: CALL([x, decay], code, shape, dtype) * 2,
        backend=backend,
        fullgraph=True,
        dynamic=True,
    )
    for length in (5, 9, 13):
        x, decay = torch.randn(2, length, WIDTH), torch.rand(WIDTH)
        assert rel_err(compiled(x, decay), scan(x, decay) * 2) < 1e-6
    assert targets.count(CALL) == 1
