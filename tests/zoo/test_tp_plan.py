"""A slice of the types that carry a plan of transformers; all of them with ZOO_ALL=1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import CONFIG_MAPPING

from tests.import_rules import ROOT
from tests.zoo.models import build, model_type
from tests.zoo.pool import measure_all
from tests.zoo.tp_compare import Decision, Kind, Side, Weight, weights_of
from tests.zoo.tp_plan import Compared, compare, complaints, planned, render, unexplained
from tests.zoo.tp_reasons import REASONS
from tests.zoo.tp_styles import STYLES

SLICE = (
    "cohere2",  # attention and MLP in parallel
    "deepseek_v3",  # latent attention, experts, shared experts
    "gemma3n_text",  # K and V shared between layers
    "gpt_neox",  # fused projections by head
    "granite_swa",  # sinks
    "granitemoe",  # a plan for the experts only
    "inkling_text",  # fused experts that theirs cuts through
    "llama",
    "llama@mqa",
    "llama@uneven",  # heads that cannot be dealt evenly
    "llama4_text",  # experts whose weights are [in, out]
    "mixtral",
    "olmo2",  # norms over all heads
    "phi3",  # fused projections, one part after the other
    "qwen3_next",  # recurrence
)
compared = cache(compare)


@pytest.mark.parametrize("entry", SLICE)
def test_explain_each_difference_from_the_plan(entry: str) -> None:
    row = compared(entry)
    assert not row.failure
    wrong = "\n".join(unexplained(entry, row.weights))
    assert not wrong, f"give these a reason in tests/zoo/tp_reasons.py, or mend them:\n{wrong}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not os.environ.get("ZOO_ALL"), reason="ZOO_ALL=1 compares every type")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12
def test_explain_each_difference_of_all_types() -> None:
    rows = list(measure_all(planned(), compare, jobs=2, limit_s=300))
    assert all(isinstance(row, Compared) for row in rows), [row.failure for row in rows]
    wrong = "\n".join(complaints(rows))
    assert not wrong, wrong


def test_agree_on_every_linear_of_llama() -> None:
    kinds = {weight.module: weight.kind for weight in compared("llama").weights}
    assert kinds.pop("model.embed_tokens") is Kind.THEIRS
    assert len(kinds) == 8
    assert set(kinds.values()) == {Kind.SAME}


def _wrong(weight: Weight) -> Iterator[tuple[Kind, Decision]]:
    """Wrong decisions about a weight that both sides split alike."""
    ours = weight.ours
    other = Side.ROWS if ours.side is Side.COLUMNS else Side.COLUMNS
    yield Kind.OPPOSITE, replace(ours, side=other)
    yield Kind.INDICES, replace(ours, held=ours.held[::-1])
    yield Kind.GATHERED, replace(ours, gathers=not ours.gathers)
    yield Kind.THEIRS, Decision()


@pytest.mark.parametrize("entry", SLICE)
def test_report_each_wrong_decision(entry: str) -> None:
    for weight in compared(entry).weights:
        if weight.kind is Kind.SAME and weight.ours.side is not Side.WHOLE:
            for kind, ours in _wrong(weight):
                wrong = replace(weight, ours=ours)
                assert wrong.kind is kind
                (text,) = unexplained(entry, [wrong])
                assert f"{entry}: {weight.module}: theirs {weight.theirs.side}" in text
                assert f"ours {ours.side}" in text


def test_compiler_does_not_follow_the_plan() -> None:
    model, flip = build("llama"), {"colwise": "rowwise", "rowwise": "colwise"}
    model.tp_plan = {rule: flip.get(style, "replicate") for rule, style in model.tp_plan.items()}
    against = dict.fromkeys(weights_of(model))
    blocks = [weight for weight in against if ".layers." in weight.module]
    assert {weight.kind for weight in blocks} == {Kind.OPPOSITE}
    ours = [(weight.module, weight.ours) for weight in compared("llama").weights]
    assert [(weight.module, weight.ours) for weight in against] == ours


@pytest.mark.parametrize("folder", ["passes", "runtime", "spdcompile"])
def test_compiler_never_reads_a_plan(folder: str) -> None:
    sources = [
        path
        for path in (ROOT / folder).rglob("*.py")
        if "bench" not in path.parts  # which runs Hugging Face's tensor parallelism beside ours
    ]
    assert sources
    assert not [path for path in sources if "tp_plan" in path.read_text(encoding="utf-8")]


def test_complain_of_a_reason_without_a_difference() -> None:
    found = complaints([compared("llama")])
    assert len(found) == len(REASONS) - 1
    assert all(text.startswith("no difference has the reason: ") for text in found)


def test_complain_of_what_fails_after_its_capture() -> None:
    failed = Compared("x", stage="compile", failure="ValueError: no")
    missing = Compared("y", stage="capture", failure="CaptureError: loop")
    found = complaints([failed, missing])
    assert "x: ValueError: no" in found
    assert not [text for text in found if text.startswith("y")]


def test_document_holds_what_the_rows_say() -> None:
    failed = Compared("x", stage="capture", failure="CaptureError: loop")
    lines = render([compared("phi3"), compared("llama"), failed], "make plan").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert ["llama", "8", "-", "1", "-", "-", "-"] in cells
    assert ["phi3", "1", "-", "1", "-", "-", "4"] in cells
    assert ["with a plan", "3", ""] in cells
    assert ["compared", "2", "15"] in cells
    assert ["CaptureError: loop", "x"] in cells
    (fused,) = [row for row in cells if "colwise_gather_output -> columns" in row]
    assert fused[-1] == "phi3"
    assert "model.layers.\\*.self_attn.qkv_proj" in fused[-2]


# ---- the styles, as transformers itself carries them out

SHAPES = ((8,), (8, 6), (2, 8, 6))
USED = sorted(
    {s for e in planned() for s in CONFIG_MAPPING[model_type(e)].base_model_tp_plan.values()}
)


@pytest.fixture
def mesh() -> Iterator[dist.DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", USED)
def test_style_does_what_transformers_does(name: str, mesh: dist.DeviceMesh) -> None:
    parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    style, known = parallel.ALL_PARALLEL_STYLES[name], STYLES[name]
    for shape in SHAPES[1:2] if name.startswith("embedding") else SHAPES:
        module = nn.Module()
        module.w = nn.Parameter(torch.empty(shape, device="meta"))
        style.shard_param(module, "w", mesh)
        if known.dim is None or not isinstance(module.w, DTensor):
            assert known.dim is None and not isinstance(module.w, DTensor)
            continue
        (placement,) = module.w.placements
        if isinstance(placement, Replicate):
            assert name == "packed_rowwise" and len(shape) == 1
            continue
        assert placement.dim % len(shape) == max(len(shape) + known.dim, 0)
        if len(shape) > 1:
            assert getattr(placement, "split_factor", 1) == known.parts


@pytest.mark.parametrize("name", USED)
def test_style_gathers_where_transformers_does(name: str) -> None:
    parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    style = parallel.ALL_PARALLEL_STYLES[name]
    whole = False
    if isinstance(style, parallel.ColwiseParallel):
        whole = isinstance(style.output_layouts, Replicate)
    elif isinstance(style, parallel.RowwiseParallel):
        whole = isinstance(style.input_layouts, Replicate)
    assert STYLES[name].gathers == whole
