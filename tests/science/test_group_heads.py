"""Head grouping: what it measures is what plain torch gives, and what it chooses is the best."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import spdcompile
from spdcompile import HeadGrouping, Plan
from spdcompile.errors import PlanError, RefusalError, UsageError
from spdcompile.passes.layout import even_split
from spdcompile.runtime.grouping import (
    Search,
    best_groups,
    num_partitions,
    partitions,
    random_groups,
    within,
)
from spdcompile.runtime.heads import head_distances, shard_norms
from spdcompile.undropped import local_executor, undropped
from tests.models import num_units, tiny, token_ids

TOKENS = token_ids(batch=3, length=12)
# Differences of sums of squares in float32.
BOUND = 1e-3
NORM_BOUND = 1e-5


def _random(num: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).random((num, num))
    return np.triu(values, 1) + np.triu(values, 1).T


def _brute(distances: np.ndarray, sizes: Sequence[int]) -> float:
    """The best of all ways to give each unit a rank."""
    best = -1.0
    for owners in product(range(len(sizes)), repeat=len(distances)):
        if sorted(owners.count(rank) for rank in range(len(sizes))) == sorted(sizes):
            same = np.equal.outer(owners, owners)
            best = max(best, float(distances[same].sum()) / 2)
    return best


# ---- the choice


@pytest.mark.parametrize(("num", "tp"), [(4, 2), (6, 3), (6, 4), (7, 2), (7, 3), (8, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_groups_are_the_best_of_all(num: int, tp: int, seed: int) -> None:
    distances = _random(num, seed)
    best = _brute(distances, [len(group) for group in even_split(num, tp)])
    for most, search in ((20_000, Search.EXHAUSTIVE), (0, Search.LOCAL)):
        groups, how = best_groups(distances, tp, most=most)
        assert how is search
        assert sorted(unit for group in groups for unit in group) == list(range(num))
        assert within(distances, groups) == pytest.approx(best)
    assert within(distances, even_split(num, tp)) < best


@pytest.mark.parametrize(("num", "tp"), [(12, 2), (12, 3), (16, 2)])
def test_local_search_finds_what_all_partitions_hold(num: int, tp: int) -> None:
    for seed in range(3):
        distances = _random(num, seed)
        exact, how = best_groups(distances, tp)
        found, _ = best_groups(distances, tp, most=0)
        assert how is Search.EXHAUSTIVE
        assert within(distances, found) == pytest.approx(within(distances, exact))


def test_many_units_are_left_to_local_search() -> None:
    distances = _random(32, 0)
    groups, how = best_groups(distances, 4)
    assert how is Search.LOCAL and [len(group) for group in groups] == [8] * 4
    assert within(distances, groups) > 1.1 * within(distances, even_split(32, 4))


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (2, 2, 2), (3, 2, 2), (4, 1), (2, 1, 1)])
def test_each_partition_comes_once(sizes: tuple[int, ...]) -> None:
    found = [frozenset(p) for p in partitions(tuple(range(sum(sizes))), sizes)]
    assert len(found) == len(set(found)) == num_partitions(sizes)


@pytest.mark.parametrize(("num", "tp"), [(4, 4), (3, 5)])
def test_one_unit_a_rank_leaves_nothing_to_choose(num: int, tp: int) -> None:
    assert best_groups(_random(num, 0), tp) == (even_split(num, tp), Search.NOTHING)


# ---- what is measured


@torch.no_grad()
def _expected_distances(model: PreTrainedModel, units: int) -> list[np.ndarray]:
    """From the attention that Hugging Face itself gives."""
    model.set_attn_implementation("eager")
    attentions = model(TOKENS, output_attentions=True).attentions
    results = []
    for attention in attentions:  # [B, H, S, S]
        heads = attention.double().transpose(0, 1).flatten(1)
        apart = torch.cdist(heads, heads) / TOKENS.numel() ** 0.5
        per_unit = len(heads) // units
        blocks = apart.unflatten(0, (units, per_unit)).unflatten(2, (units, per_unit))
        by_units = blocks.sum((1, 3))
        results.append(by_units.fill_diagonal_(0).numpy())
    return results


@pytest.mark.parametrize(
    ("family", "tp"),
    [
        *((family, 2) for family in ("llama_gqa", "phi3", "gpt2", "gpt_neox_seq")),
        ("opt", 3),  # padded
        ("llama_gqa", 4),  # more ranks than K/V heads: query heads move
    ],
)
def test_distances_are_those_of_hugging_face_s_attention(family: str, tp: int) -> None:
    model = tiny(family, layers=1, hidden=32, heads=4, intermediate=48)
    executor = local_executor(undropped(model, tp))
    found = head_distances(executor, TOKENS, frozenset({0}), progress=False)
    units = 4 if tp > num_units(model.config) else num_units(model.config)
    for layer, expected in enumerate(_expected_distances(model, units)):
        assert found[layer].shape == (units, units)
        np.testing.assert_allclose(found[layer], expected, atol=BOUND, rtol=0)
        assert expected.max() > 0.1


@cache
def _llama() -> PreTrainedModel:
    return tiny("llama", layers=2, hidden=32, heads=8, intermediate=50)


@torch.no_grad()
def _expected_norms(layer: int, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """In plain torch: block input, head outputs, then one MLP shard beside one head set."""
    seen: dict[str, Tensor] = {}
    block = _llama().model.layers[layer]
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(o=args[0])),
    ]
    _llama()(TOKENS)
    for hook in hooks:
        hook.remove()
    norms = np.zeros((len(groups), len(groups)))
    for row, units in enumerate(groups):
        columns = [4 * unit + i for unit in units for i in range(4)]
        share = seen["o"][..., columns] @ block.self_attn.o_proj.weight[:, columns].T
        normed = block.post_attention_layernorm(seen["x"] + share)
        for rank, channels in enumerate(even_split(50, len(groups))):
            own = list(channels)
            mlp = block.mlp
            gate = F.silu(normed @ mlp.gate_proj.weight[own].T)
            inner = gate * (normed @ mlp.up_proj.weight[own].T)
            norms[row, rank] = (inner @ mlp.down_proj.weight[:, own].T).norm()
    return norms


@pytest.mark.parametrize("groups", [((0, 3, 5, 6), (1, 2, 4, 7)), ((1, 7), (0, 4, 6), (2, 3, 5))])
def test_norms_are_those_of_plain_torch(groups: tuple[tuple[int, ...], ...]) -> None:
    """3 ranks: heads and channels are padded."""
    executor = local_executor(undropped(_llama(), len(groups), {1: groups}))
    found = shard_norms(executor, TOKENS, frozenset({1}), "attn", progress=False)
    expected = _expected_norms(1, groups)
    np.testing.assert_allclose(found[1], expected, rtol=NORM_BOUND)
    assert np.ptp(expected) > 0.01 * expected.max()


# ---- both together


@cache
def _grouping(tp: int) -> HeadGrouping:
    return spdcompile.group_heads(_llama(), TOKENS, tp=tp, draws=0, progress=False)


@pytest.mark.parametrize("tp", (2, 4, 8))
def test_groups_are_matched_to_the_shards_with_the_largest_norms(tp: int) -> None:
    found = _grouping(tp)
    assert [row.layer for row in found.layers] == [0, 1]
    for row in found.layers:
        assert sorted(unit for units in row.groups for unit in units) == list(range(8))
        assert row.distance >= row.distance_even and row.norm >= row.norm_unmatched
        norms = _expected_norms(row.layer, row.groups)
        assert np.trace(norms) == pytest.approx(row.norm, rel=NORM_BOUND)
        orders = permutations(range(tp)) if tp < 8 else [range(8), range(7, -1, -1)]
        best = max(norms[list(order), range(tp)].sum() for order in orders)
        assert best == pytest.approx(row.norm, rel=NORM_BOUND)
    improved = [row.norm > row.norm_unmatched * 1.001 for row in found.layers]
    assert any(improved) or tp == 2


def test_one_unit_a_rank_is_only_matched() -> None:
    assert {row.search for row in _grouping(8).layers} == {Search.NOTHING}
    assert any(row.groups != even_split(8, 8) for row in _grouping(8).layers)
    assert {row.search for row in _grouping(4).layers} == {Search.EXHAUSTIVE}


@pytest.mark.parametrize("tp", (3, 8))
def test_measured_groups_are_the_cheapest_of_the_candidates(tp: int) -> None:
    found = spdcompile.group_heads(_llama(), TOKENS, tp=tp, draws=4, progress=False)
    paper = spdcompile.group_heads(_llama(), TOKENS, tp=tp, draws=0, progress=False)
    for row, papers in zip(found.layers, paper.layers, strict=True):
        assert row.kl <= min(row.kl_paper, row.kl_even)
        assert papers.kl is None and row.distance == papers.distance
    row, papers = found.layers[0], paper.layers[0]
    ways = ((row.groups, row.kl), (papers.groups, row.kl_paper), (even_split(8, tp), row.kl_even))
    for groups, kl in ways:
        assert _kl(tp, row.layer, groups) == pytest.approx(kl, rel=1e-4)
    assert any(row.kl < row.kl_even for row in found.layers)


def _kl(tp: int, layer: int, groups: tuple[tuple[int, ...], ...]) -> float:
    plan = Plan(tp, 2, frozenset({(layer, "attn")}), {layer: groups})
    compiled = spdcompile.compile(_llama(), tp=tp, spd_mask=plan, executor="local", backend="eager")
    with torch.no_grad():
        expected = _llama()(TOKENS).logits[:, :-1].log_softmax(-1)
    found = compiled(TOKENS).logits[:, :-1].log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize(("num", "tp"), [(8, 2), (8, 3), (5, 8)])
def test_random_groups_hold_each_unit_once(num: int, tp: int) -> None:
    drawn = {random_groups(num, tp, np.random.default_rng(seed)) for seed in range(20)}
    assert len(drawn) > 5
    for groups in drawn:
        assert sorted(unit for group in groups for unit in group) == list(range(num))
        assert [len(group) for group in groups] == [len(group) for group in even_split(num, tp)]
        assert all(list(group) == sorted(group) for group in groups)


def test_plan_runs_the_model_and_knows_it(tmp_path: Path) -> None:
    plan = _grouping(4).plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    compiled = spdcompile.compile(_llama(), tp=4, spd_mask=plan, executor="local", backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(TOKENS).logits, _llama()(TOKENS).logits, atol=1e-5, rtol=1e-5
        )
    other = tiny("llama", layers=2, hidden=32, heads=8, intermediate=54)
    with pytest.raises(PlanError, match="made for something else"):
        spdcompile.compile(other, tp=4, spd_mask=plan)


def test_some_layers_alone_are_grouped() -> None:
    only = frozenset({1})
    for draws in (0, 2):
        some, all_of_them = (
            spdcompile.group_heads(
                _llama(), TOKENS, tp=2, layers=layers, draws=draws, progress=False
            )
            for layers in (only, None)
        )
        assert some.head_groups == {1: all_of_them.head_groups[1]}
    with pytest.raises(UsageError, match=r"does not have these layers[\s\S]*\[2\]"):
        spdcompile.group_heads(_llama(), TOKENS, tp=2, layers=frozenset({2}), progress=False)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "no single operator"),
        ("gpt_neox", "merged into"),
        ("gemma2", "layernorm"),
    ],
)
def test_model_whose_heads_cannot_be_grouped_is_refused(family: str, reason: str) -> None:
    with pytest.raises(RefusalError, match=reason):
        spdcompile.group_heads(tiny(family, layers=1), TOKENS, tp=2, progress=False)


def test_compiled_model_is_refused() -> None:
    compiled = spdcompile.compile(_llama(), tp=2, executor="local", backend="eager")
    with pytest.raises(UsageError, match="the model itself"):
        spdcompile.group_heads(compiled, TOKENS, tp=2, progress=False)
