"""What may stand between ids and logits if a program is to run on new tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from spdcompile.errors import RefusalError
from spdcompile.passes.base import BlockGraph, ParamRef, Part, Program
from spdcompile.passes.cache import remember
from spdcompile.passes.normalize import normalize
from spdcompile.passes.ops import ATTENTION
from spdcompile.passes.tokens import SUBJECT, TOKENS, follow_tokens
from spdcompile.runtime.executor import Backend
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.local import LocalExecutor
from tests.compare import rel_err
from tests.passes.graphs import synced

HIDDEN, VOCAB = 8, 13
INPUTS = ("input_ids", "attention_mask", "position_ids")
Body = Callable[["_Model", Tensor, Tensor, Tensor], Tensor]


class _Model(nn.Module):
    """An embedding, what a test puts behind it, and a head."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.body = body

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        return self.head(self.body(self, hidden, attention_mask, position_ids))


def _program(body: Body) -> Program:
    ids = torch.ones(3, 11, dtype=torch.long)
    named = {0: Dim("batch", min=1), 1: Dim("length", min=1)}
    exported = torch.export.export(
        _Model(body),
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        dynamic_shapes=dict.fromkeys(INPUTS, named),
    )
    graph = exported.graph_module.graph
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    params = {
        node.name: ParamRef(node.name, tuple(node.meta["val"].shape), node.meta["val"].dtype)
        for node in graph.find_nodes(op="placeholder")
        if node.name not in INPUTS
    }
    given = {name: name for name in names if name in INPUTS}
    part = Part("layers.0", 0, "block", params, given, ("logits",))
    module = torch.fx.GraphModule({}, graph)
    return normalize(
        Program({"block": BlockGraph(module)}, (part,), INPUTS, "logits", "layers")
    ).program


def _attend(x: Tensor, mask: Tensor, *, causal: bool = True) -> Tensor:
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return ATTENTION(heads, heads, heads, mask, None, 0.5, causal, 0, 0.0).flatten(2)


def _plain_attention(
    x: Tensor, mask: Tensor, *, last: int = 0, padding: bool = True, hidden: float = -1e30
) -> Tensor:
    """Softmax of scores, written out; a token sees those up to `last` after it."""
    columns = torch.arange(x.shape[1])
    seen = columns <= columns[:, None] + last
    seen = seen & mask.bool()[:, None] if padding else seen[None]
    scores = x @ x.mT + torch.where(seen, 0.0, hidden)
    return scores.softmax(-1) @ x


def _sorted_and_back(_: Any, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    order = x[..., 0].argsort(1)
    return x.gather(1, order[..., None].expand_as(x))


MIX: dict[str, Body] = {
    "sum": lambda m, x, mask, p: x + x.sum(1, keepdim=True),
    "mean": lambda m, x, mask, p: x - x.mean(1, keepdim=True),
    "softmax": lambda m, x, mask, p: x.softmax(1),
    "largest": lambda m, x, mask, p: x + x.amax((1, 2), keepdim=True),
    "roll": lambda m, x, mask, p: x.roll(1, 1),
    "flip": lambda m, x, mask, p: x.flip(1),
    "sort": _sorted_and_back,
    "tokens by tokens": lambda m, x, mask, p: (x @ x.mT) @ x,
    "all scores": lambda m, x, mask, p: (x @ x.mT).softmax(-1) @ x,
    "padding alone hidden": lambda m, x, mask, p: _plain_attention(x, mask, last=99),
    "the next token seen": lambda m, x, mask, p: _plain_attention(x, mask, last=1),
    "a first token that sees none": lambda m, x, mask, p: _plain_attention(x, mask, last=-1),
    "far later tokens seen": lambda m, x, mask, p: (
        x @ x.mT * (torch.arange(x.shape[1]) - torch.arange(x.shape[1])[:, None] > 20) @ x
    ),
    "hidden a little": lambda m, x, mask, p: _plain_attention(x, mask, hidden=-7.0),
    "mean so far of all": lambda m, x, mask, p: x.cumsum(1) / x.shape[1],
    "the last ones": lambda m, x, mask, p: x * (torch.arange(x.shape[1]) > x.shape[1] - 3)[:, None],
    "padding's mean seen": lambda m, x, mask, p: _plain_attention(
        _plain_attention(x, mask), mask, padding=False
    ),
    "other order": lambda m, x, mask, p: x.transpose(0, 1).reshape(x.shape),
    "convolution": lambda m, x, mask, p: (
        nn.functional.conv1d(x.mT, torch.ones(HIDDEN, 1, 3), padding=1, groups=HIDDEN).mT
    ),
    "numbered by all": lambda m, x, mask, p: (
        x + torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2])[..., None]
    ),
    "numbered from the end": lambda m, x, mask, p: (
        x + torch.arange(x.shape[1] - 1, -1, -1)[:, None]
    ),
    "their number": lambda m, x, mask, p: x * x.shape[1],
    "attention to both sides": lambda m, x, mask, p: _attend(x, mask, causal=False),
    "attention by another mask": lambda m, x, mask, p: _attend(x, p),
    "attention of sequences": lambda m, x, mask, p: _attend(x.transpose(0, 1), mask.T).transpose(
        0, 1
    ),
}
BEFORE: dict[str, Body] = {
    "cumsum": lambda m, x, mask, p: x.cumsum(1),
    "first token": lambda m, x, mask, p: x + x[:, :1],
    "lower triangle": lambda m, x, mask, p: (x @ x.mT).tril() @ x,
    "the mask itself": lambda m, x, mask, p: x * mask[..., None],
    "positions counted": lambda m, x, mask, p: x + mask.cumsum(1)[..., None],
    "scores": lambda m, x, mask, p: _plain_attention(x, mask),
    "scores of padding too": lambda m, x, mask, p: _plain_attention(x, mask, padding=False),
    "scores twice": lambda m, x, mask, p: _plain_attention(_plain_attention(x, mask).sin(), mask),
    "convolution": lambda m, x, mask, p: (
        nn.functional.conv1d(
            (x * mask[..., None]).mT, torch.ones(HIDDEN, 1, 3), padding=2, groups=HIDDEN
        )[..., :-2].mT
    ),
    "distances": lambda m, x, mask, p: (
        (x @ x.mT + (p[:, None] - p[..., None])).tril() @ x * mask[..., None]
    ),
}
ALONE: dict[str, Body] = {
    "nothing": lambda m, x, mask, p: x,
    "norm": lambda m, x, mask, p: nn.functional.layer_norm(x, (HIDDEN,)),
    "softmax of features": lambda m, x, mask, p: x.softmax(-1) + x.sum(-1, keepdim=True),
    "folded": lambda m, x, mask, p: x.reshape(-1, HIDDEN).relu().reshape(x.shape),
    "positions": lambda m, x, mask, p: x * p[..., None].cos(),
    "best features": lambda m, x, mask, p: x.scatter(2, x.topk(2)[1], 0.0),
    "attention": lambda m, x, mask, p: _attend(x, mask),
    "attention twice": lambda m, x, mask, p: _attend(_attend(x, mask).exp(), mask),
    "zeros": lambda m, x, mask, p: x + torch.zeros(x.shape[1], 1),
}


@pytest.mark.parametrize("name", MIX)
def test_operator_that_mixes_tokens_is_refused(name: str) -> None:
    program = _program(MIX[name])
    result = follow_tokens(program)
    assert [refusal.subject for refusal in result.refusals] == [SUBJECT]
    with pytest.raises(RefusalError, match="new tokens alone"):
        remember(result.program)


@pytest.mark.parametrize("name", ALONE)
def test_operator_on_each_token_alone_is_followed(name: str) -> None:
    result = follow_tokens(_program(ALONE[name]))
    assert not result.refusals
    graph = result.program.graphs["block"].module.graph
    logits = graph.output_node().args[0][0]
    assert logits.meta[TOKENS] == 1


@pytest.mark.parametrize("name", [*BEFORE, "numbered"])
def test_pieces_equal_the_whole(name: str) -> None:
    body = BEFORE.get(name, lambda m, x, mask, p: x * torch.arange(x.shape[1]).cos()[:, None])
    program = synced(follow_tokens(_program(body)).program, tp=1)
    shapes = {ref.fqn: ref.shape for ref in program.parts[0].params.values()}
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in sorted(shapes.items())}
    whole = LocalExecutor(program, tensors, backend=Backend.EAGER, device=torch.device("cpu"))
    remembering = whole.with_program(remember(program).program)
    ids = torch.randint(0, VOCAB, (3, 11))
    mask = (torch.arange(11) >= torch.tensor([[0], [2], [6]])).long()
    expected = whole.run(program_inputs(program, ids, mask))
    cache, found, first = remembering.new_cache(3, 11), [], 0
    for last in (5, 6, 9, 10, 11):
        piece = program_inputs(remembering.program, ids[:, first:last], mask[:, :last], None, cache)
        found.append(remembering.run(piece, cache))
        cache.advance(last - first)
        first = last
    assert rel_err(torch.cat(found, 1), expected, real=mask) < 1e-5


def test_program_given_is_left_as_it_is() -> None:
    program = _program(ALONE["attention"])
    follow_tokens(program)
    nodes = program.graphs["block"].module.graph.nodes
    assert not any(TOKENS in node.meta for node in nodes)
