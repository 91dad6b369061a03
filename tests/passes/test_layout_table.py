"""Each way in which models lay out their weights, found by following channels.

A row is a way of laying out, the models that show it, and what the compiler must find for the
weights whose names match: the runs of the split dim as indices per unit ("8+8+8"), a "*" behind a
run that several units share, "every" for what all ranks hold, "whole" for what is not split.
"""

from __future__ import annotations

import re
from functools import cache

import pytest

from spdcompile.passes import pipeline
from spdcompile.passes.base import BlockGraph, Part, Program
from spdcompile.passes.layout import Layout
from tests.zoo.models import build

QKV_APART = {"q_proj": "16", "k_proj": "8", "v_proj": "8"}
# way of laying out -> (zoo entry, tp, weight of a block -> its layout)
LAYOUTS = {
    "separate q, k, v": ("llama", 2, QKV_APART | {"gate_proj": "1", "up_proj": "1"}),
    "fused [q|k|v]": ("phi3", 2, {"qkv_proj": "16+8+8", "gate_up_proj": "1+1"}),
    "Conv1D, fused [q|k|v]": ("gpt2", 2, {"c_attn": "8+8+8", "c_fc": "1"}),
    "fused by chunk": ("mpt", 2, {"wqkv": "8+8+8"}),
    "fused with one K/V head": ("gpt_bigcode", 2, {"c_attn": "8+every"}),
    "x @ W.T with one K/V head": ("falcon", 2, {"query_key_value": "8+every", "h_to_4h": "1"}),
    "fused per head": ("bloom", 2, {"query_key_value": "24"}),
    "fused per head, ALiBi": ("falcon@alibi", 2, {"query_key_value": "24"}),
    "fused per head by chunk": ("gpt_neox", 2, {"query_key_value": "24"}),
    "fused per head, q and k normed": ("persimmon", 2, {"query_key_value": "24"}),
    "fused per head, one linear": ("gpt_bigcode@mha", 2, {"c_attn": "24"}),
    "fused per group": ("falcon@new", 2, {"query_key_value": "32"}),
    "fused per block of heads": ("codegen", 2, {"qkv_proj": "48"}),
    "fused gate and up": ("glm", 2, {"gate_up_proj": "1+1"}),
    "K/V heads shared by ranks": ("llama", 8, {"q_proj": "8", "k_proj": "8*", "v_proj": "8*"}),
    "norm over all heads": ("olmo2", 2, QKV_APART),
    "norm over all heads, no room to share": ("olmo2", 8, QKV_APART),
    "norm per head": ("qwen3", 2, QKV_APART),
    "norm before the row split": ("bitnet", 2, QKV_APART | {"gate_proj": "1"}),
    "MLA": (
        "deepseek_v3",
        2,
        {"q_b_proj": "16", "kv_b_proj": "16", "q_a_proj": "whole", "kv_a_proj": "whole"},
    ),
    "MLA with complex rotation": ("deepseek_v2", 2, {"q_b_proj": "16", "kv_b_proj": "16"}),
    "experts [gate|up]": ("mixtral", 2, {"experts_gate_up_proj": "1+1", "mlp_gate_": "whole"}),
    "experts, gate and up in turn": ("gpt_oss", 2, {"experts_gate_up_proj": "2"}),
    "experts as one batched product": ("llama4_text", 2, {"experts_gate_up_proj": "1+1"}),
    "shared experts": ("qwen2_moe", 2, {"shared_expert_gate_proj": "1"}),
}
# Zoo entry -> its sync points at tp 2, those merged into one in brackets.
POINTS = {
    "llama": "attn mlp",
    "olmo2": "q_norm k_norm attn mlp",
    "olmoe": "q_norm k_norm attn mlp",
    "bitnet": "attn_sub_norm attn ffn_sub_norm mlp",
    "gpt_neox": "(attn mlp)",
    "gptj": "(attn mlp)",
    "phi": "(attn mlp)",
    "cohere": "(attn mlp)",
    "falcon": "(attn mlp)",
    "gemma2": "attn mlp",
    "granite": "attn mlp",
    "qwen2_moe": "attn (mlp mlp_2)",
}


@pytest.mark.parametrize("way", LAYOUTS)
def test_layout_is_found(way: str) -> None:
    entry, tp, expected = LAYOUTS[way]
    program = lowered(entry, tp)
    seen = {name: set() for name in expected}
    for part in program.parts:
        for name in part.params:
            for pattern in expected:
                if part.layer is not None and re.search(pattern, name, re.I) and "bias" not in name:
                    seen[pattern].add(describe(program.graph_of(part), part, name))
    assert seen == {name: {layout} for name, layout in expected.items()}


@pytest.mark.parametrize("entry", POINTS)
def test_sync_points_are_found(entry: str) -> None:
    program = lowered(entry, 2)
    blocks = [program.graph_of(part) for part in program.parts if part.layer is not None]
    found = set()
    for block in blocks:
        points = ((*point.merged, point.name) for point in block.sync_points)
        found.add(" ".join(f"({' '.join(p)})" if len(p) > 1 else p[0] for p in points))
    assert POINTS[entry] in found


def test_statistics_and_post_norms_stay() -> None:
    for entry, name, reason in (
        ("olmo2", "q_norm", "each rank would normalise by its own share"),
        ("olmo2", "attn", "post_attention_layernorm acts on the sum"),
        ("gemma2", "mlp", "post_feedforward_layernorm acts on the sum"),
        ("bitnet", "ffn_sub_norm", "each rank would normalise by its own share"),
    ):
        program = lowered(entry, 2)
        points = {p.name: p for p in program.graph_of(program.parts[1]).sync_points}
        assert reason in points[name].refusal


def test_multipliers_do_not_stand_in_the_way() -> None:
    """Granite multiplies what a block adds to the stream: linear, so its points can go."""
    program = lowered("granite", 2)
    assert not any(p.refusal for p in program.graph_of(program.parts[1]).sync_points)


@cache
def lowered(entry: str, tp: int) -> Program:
    """The program of a zoo model before the drop."""
    return pipeline.advance(pipeline.start(build(entry)), pipeline.preserving(tp, {})).program


def describe(block: BlockGraph, part: Part, name: str) -> str:
    """How a weight is split."""
    for region in block.regions:
        layout = {**region.columns, **region.rows}.get(name)
        if layout is not None:
            return "+".join(_runs(layout))
    assert name not in part.shards
    return "whole"


def _runs(layout: Layout) -> list[str]:
    return [
        f"{run.each}{'*' if run.group > 1 else ''}" if run.each else "every" for run in layout.runs
    ]
