"""The zoo's own machinery: what counts as split, rows of processes that fail, the table."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import fx

from spdcompile.passes.base import BlockGraph, ParamRef, Part, Program, add_call
from spdcompile.passes.layout import Layout
from spdcompile.passes.ops import TAKE
from spdcompile.passes.placement.types import P, R, Shard
from tests.zoo import __main__ as command
from tests.zoo.models import entries
from tests.zoo.pool import measure_all
from tests.zoo.rows import BOUND, Row, Run, Share, Structure
from tests.zoo.structure import State, survey
from tests.zoo.table import generic, render, summary

aten = torch.ops.aten
HIDDEN = 64


def _split(dim: int, size: int) -> Shard:
    return Shard(dim, Layout("mlp", size, torch.arange(size).numpy()))


class _Placed:
    """Writes a placed block by hand."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.params: dict[str, ParamRef] = {}
        self.x = self._placeholder("x", (1, 1, HIDDEN), R)

    def linear(self, x: fx.Node, name: str, size: int, placement: object, out: object) -> fx.Node:
        shape = (size, x.meta["val"].shape[-1])
        with self.graph.inserting_before(self.x):
            weight = self._placeholder(name, shape, placement)
        self.params[name] = ParamRef(f"model.layers.0.{name}", shape, torch.float32)
        return self.call(aten.linear.default, x, weight, out=out)

    def call(self, target: object, *args: object, out: object) -> fx.Node:
        value = target(*fx.map_arg(args, lambda node: node.meta["val"]))
        return add_call(self.graph, target, args, {"val": value, "placement": out})

    def take(self, x: fx.Node) -> fx.Node:
        size = x.meta["val"].shape[-1]
        index = self.call(aten.arange.default, size, out=_split(0, size))
        return self.call(TAKE, x, index, 2, size, out=_split(2, size))

    def _placeholder(self, name: str, shape: tuple[int, ...], placement: object) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta = {"val": torch.empty(shape, device="meta"), "placement": placement}
        return node

    def states(self, *results: fx.Node) -> dict[str, State]:
        """The state of each weight of the block that gives `results`."""
        self.graph.output(results)
        part = Part("layers.0", 0, "block", self.params, {}, (), module="model.layers.0")
        block = BlockGraph(fx.GraphModule({}, self.graph))
        program = Program({"block": block}, (part,), ("x",), "logits", "model.layers", tp=2)
        return {weight.path: weight.state for weight in survey(program)[1]}


def test_a_latent_that_split_columns_read_need_not_be_split() -> None:
    block = _Placed()
    latent = block.linear(block.x, "down", 16, R, R)
    heads = block.linear(latent, "up", 128, _split(0, 128), _split(2, 128))
    states = block.states(block.linear(heads, "out", HIDDEN, _split(1, 128), P))
    assert states == {"down": State.SHARED, "up": State.SPLIT, "out": State.SPLIT}


def test_a_weight_of_whose_result_a_rank_takes_a_share_is_whole() -> None:
    block = _Placed()
    share = block.take(block.linear(block.x, "query", 128, R, R))
    states = block.states(block.linear(share, "out", HIDDEN, _split(1, 128), P))
    assert states == {"query": State.WHOLE, "out": State.SPLIT}


def test_a_head_that_all_query_heads_share_need_not_be_split() -> None:
    block = _Placed()
    head = block.linear(block.x, "key", 16, R, R)
    heads = block.take(block.call(aten.repeat.default, head, (1, 1, 8), out=R))
    states = block.states(block.linear(heads, "out", HIDDEN, _split(1, 128), P))
    assert states == {"key": State.SHARED, "out": State.SPLIT}


def test_what_leaves_the_block_or_meets_a_whole_weight_is_whole() -> None:
    block = _Placed()
    up = block.linear(block.x, "up", 128, R, R)
    states = block.states(block.linear(up, "down", HIDDEN, R, R))
    assert states == {"up": State.WHOLE, "down": State.WHOLE}


def test_routers_and_small_gates_need_not_be_split() -> None:
    block = _Placed()
    scores = block.linear(block.x, "router", 16, R, R)
    chosen = block.call(aten.sort.default, scores, out=[R, R])
    states = block.states(chosen, block.linear(block.x, "gate", 4, R, R))
    assert states == {"router": State.ROUTER, "gate": State.SMALL}


ROW = Row(
    "llama",
    "LlamaForCausalLM",
    structure=Structure(
        2,
        {"attention": Share(2, 2)},
        {"attention": Share(8, 8), "mlp": Share(7, 6, 1)},
        (4, 2),
        {"mlp": (1, 2)},
    ),
    runs=(Run(2, 1e-7, 2e-7, 4e-7), Run(4, 3e-7, 1e-7, 1e-7)),
    control=0.5,
)
WRONG = replace(ROW, runs=(Run(2, 1e-7, 2 * BOUND),))
PART = replace(
    ROW, structure=replace(ROW.structure, weights={"attention": Share(8, 8), "mlp": Share(6, 0)})
)


def test_verdicts() -> None:
    assert ROW.verdict == "all split"
    assert PART.verdict == "attention split; MLP whole"
    assert WRONG.verdict == "WRONG"
    assert replace(ROW, control=1e-4).verdict == "WRONG"
    assert replace(ROW, repeat=1e-4).verdict == "WRONG"
    assert replace(ROW, runs=(Run(2, math.inf, math.inf),)).verdict == "WRONG"
    assert replace(ROW, runs=(Run(2, failure="RuntimeError: no"),)).verdict == "fails when run"
    assert replace(ROW, runs=(Run(2, 1e-7, 2e-7, 2 * BOUND),)).verdict == "WRONG"
    assert Row("x", stage="capture", failure="loop").verdict == "not captured"


def test_a_model_that_cannot_use_so_many_ranks_is_exact() -> None:
    refused = Run(4, failure="UsageError: 2 units", refused=True)
    assert replace(ROW, runs=(ROW.runs[0], refused)).is_exact
    assert not replace(ROW, runs=(refused,)).is_exact


def test_a_model_of_which_nothing_is_split_does_not_count_as_split() -> None:
    empty = replace(ROW.structure, mixers={}, weights={})
    assert not replace(ROW, structure=empty).is_split
    assert replace(ROW, structure=empty).verdict == "nothing to split"


def _measured(entry: str) -> Row:
    if entry == "crash":
        os._exit(3)
    if entry == "error":
        raise ValueError("no such thing")
    if entry == "endless":
        time.sleep(60)
    print("noise")
    return Row(entry)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12
def test_a_crash_an_error_and_an_endless_loop_are_rows() -> None:
    names = ["good", "crash", "error", "endless"]
    rows = {row.entry: row for row in measure_all(names, _measured, jobs=2, limit_s=2)}
    assert {name: row.stage for name, row in rows.items()} == {
        "good": "",
        "crash": "crash",
        "error": "crash",
        "endless": "time",
    }
    assert rows["error"].failure == "ValueError: no such thing"
    assert rows["crash"].failure == "the process ended with exit code 3"


def test_the_table_holds_what_the_rows_say() -> None:
    failed = Row("mamba", stage="capture", failure="loop | over tokens", seconds=1.0)
    text = render([failed, ROW], (2, 4), seconds=3.0, command="make zoo")
    lines = text.splitlines()
    (llama,) = [line for line in lines if line.startswith("| llama ")]
    cells = [cell.strip() for cell in llama.split("|")[1:-1]]
    assert cells[:7] == ["llama", "all split", "8/8", "6/7 (1 need not)", "-", "-", "2 -> 1"]
    assert cells[7:] == ["mlp 1/2", "1e-07", "3e-07", "2e-07", "4e-07", "0"]
    assert any("loop \\| over tokens" in line for line in lines)
    assert "## Wrong" not in text
    assert "## Wrong" in render([WRONG], (2,), seconds=3.0, command="make zoo")


def test_a_type_counts_once() -> None:
    variant = replace(ROW, entry="llama@other")
    counted = summary([ROW, variant]).splitlines()
    (measured,) = [line for line in counted if line.startswith("| measured ")]
    assert measured.split("|")[2].strip() == "1"


def test_a_reason_is_told_without_module_paths() -> None:
    assert generic("aten.min.other (mlp.act_fn) has no placement rule") == (
        "aten.min.other has no placement rule"
    )
    assert generic("its channels form one unit; self_attn.o_proj reads them whole") == (
        "its channels form one unit; a module reads them whole"
    )


@pytest.mark.parametrize(("row", "code"), [(ROW, 0), (WRONG, 1)])
def test_a_wrong_row_is_an_error(
    row: Row, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*_: object, **__: object) -> Iterator[Row]:
        yield row

    monkeypatch.setattr(command, "measure_all", measured)
    assert command.main(["--only", "llama"]) == code
    assert ("WRONG: llama" in capsys.readouterr().err) == bool(code)


def test_a_part_of_the_zoo_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", "llama", "--write", "docs/architectures.md"])
    assert "whole zoo" in capsys.readouterr().err


def test_an_unknown_entry_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no_such_model" not in entries()
    with pytest.raises(SystemExit):
        command.main(["--only", "no_such_model"])
    assert "no such entries here: no_such_model" in capsys.readouterr().err
