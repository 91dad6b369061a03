"""The plain-torch reference against Hugging Face, and against SPD's equations written by hand.

Tolerances are relative to the largest logit. float32: 1e-5, about ten times the rounding seen,
because ranks sum in another order. float64: 1e-10, only where no part of the model is computed in
float32 (RMSNorm and eager softmax are).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.compare import rel_err
from tests.models import (
    FAMILIES,
    GROUPED_QUERY_FAMILIES,
    SPD_FAMILIES,
    left_padded,
    num_units,
    tiny,
    token_ids,
)
from tests.spd_families import find_family
from tests.spd_reference import balanced_parts, spd_logits

F32_BOUND = 1e-5
F64_BOUND = 1e-10
VISIBLE = 1e-2  # a change that no rounding explains

FAMILY_AND_TP = [
    (family, tp)
    for family, tp in product(SPD_FAMILIES, (1, 2, 4, 8))
    if tp < 8 or family not in GROUPED_QUERY_FAMILIES  # those have 4 K/V heads
]
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense", "dense_4h_to_h")
FAMILIES_WITH_ATTENTION_POINT = [family for family in SPD_FAMILIES if family != "gpt_neox"]


@cache
def _model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny(family, dtype=dtype)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask).logits


def _all_points(model: PreTrainedModel) -> list[tuple[int, str]]:
    """Every sync point that can be dropped."""
    parallel = model.config.to_dict().get("use_parallel_residual", False)
    kinds = ("mlp",) if parallel else ("attn", "mlp")
    return list(product(range(model.config.num_hidden_layers), kinds))[:-1]


@pytest.mark.parametrize(("family", "tp"), FAMILY_AND_TP)
def test_reference_equals_hugging_face(family: str, tp: int) -> None:
    model, ids = _model(family), token_ids()
    assert rel_err(spd_logits(model, ids, tp=tp), _logits(model, ids)) < F32_BOUND
    ids, mask = left_padded(ids)
    result = spd_logits(model, ids, mask, tp=tp)
    assert rel_err(result, _logits(model, ids, mask), real=mask) < F32_BOUND
    assert result.isfinite().all()


@pytest.mark.parametrize(("family", "tp"), list(product(("llama", "opt", "bloom"), (2, 4))))
def test_reference_equals_hugging_face_right_padded(family: str, tp: int) -> None:
    model, (ids, mask) = _model(family), (t.flip(1) for t in left_padded(token_ids()))
    expected = _logits(model, ids, mask)
    assert rel_err(spd_logits(model, ids, mask, tp=tp), expected, real=mask) < F32_BOUND


@pytest.mark.parametrize(("family", "tp"), list(product(("gpt2", "opt"), (1, 2, 4, 8))))
def test_reference_equals_hugging_face_float64(family: str, tp: int) -> None:
    model, ids = _model(family, torch.float64), token_ids()
    assert rel_err(spd_logits(model, ids, tp=tp), _logits(model, ids)) < F64_BOUND
    ids, mask = left_padded(ids)
    result = spd_logits(model, ids, mask, tp=tp)
    assert rel_err(result, _logits(model, ids, mask), real=mask) < F64_BOUND


@pytest.mark.parametrize("family", SPD_FAMILIES)
def test_one_rank_is_the_reference_with_any_mask(family: str) -> None:
    model, ids, draw = _model(family), token_ids(), random.Random(0)
    points = _all_points(model)
    for num_dropped in range(1, len(points) + 1):
        dropped = frozenset(draw.sample(points, num_dropped))
        assert (
            rel_err(spd_logits(model, ids, tp=1, dropped=dropped), _logits(model, ids)) < F32_BOUND
        )


@pytest.mark.parametrize("family", SPD_FAMILIES)
def test_random_head_groups_change_nothing_when_every_point_is_kept(family: str) -> None:
    model, (ids, mask) = _model(family), left_padded(token_ids())
    groups = _random_groups(model, tp=2, seed=0)
    result = spd_logits(model, ids, mask, tp=2, head_groups=groups)
    assert rel_err(result, _logits(model, ids, mask), real=mask) < F32_BOUND


@pytest.mark.parametrize("family", FAMILIES_WITH_ATTENTION_POINT)
def test_head_groups_matter_when_a_point_is_dropped(family: str) -> None:
    model, ids, dropped = _model(family), token_ids(), frozenset({(0, "attn")})
    in_order = spd_logits(model, ids, tp=2, dropped=dropped)
    grouped = spd_logits(
        model, ids, tp=2, dropped=dropped, head_groups=_random_groups(model, tp=2, seed=0)
    )
    assert rel_err(grouped, in_order) > VISIBLE


@pytest.mark.parametrize("family", ("llama_gqa", "gpt2", "bloom"))
def test_uneven_parts_equal_hugging_face(family: str) -> None:
    model, ids = _model(family), token_ids()
    assert rel_err(spd_logits(model, ids, tp=3), _logits(model, ids)) < F32_BOUND


def test_balanced_parts_give_the_first_ranks_one_more() -> None:
    assert balanced_parts(8, 3) == [range(0, 3), range(3, 6), range(6, 8)]
    assert balanced_parts(2, 3) == [range(0, 1), range(1, 2), range(2, 2)]


@pytest.mark.parametrize("family", SPD_FAMILIES)
def test_every_drop_changes_the_logits(family: str) -> None:
    model, ids = _model(family), token_ids()
    for point in _all_points(model):
        changed = spd_logits(model, ids, tp=2, dropped=frozenset({point}))
        assert rel_err(changed, _logits(model, ids)) > VISIBLE, point


@pytest.mark.parametrize("tp", (2, 4))
@torch.no_grad()
def test_dropped_attention_point_is_the_block_equation(tp: int) -> None:
    """Y = X + b + c + sum(P_i + Z_i(norm(X + P_i + b))), SPD with bias."""
    model, ids = tiny("opt", layers=1, dtype=torch.float64), token_ids()
    layer, decoder = model.model.decoder.layers[0], model.model.decoder
    with _recorded_input(layer) as x, _recorded_input(layer.self_attn.out_proj) as context:
        model(ids)
    b, c = layer.self_attn.out_proj.bias, layer.fc2.bias
    p = [_partial(layer.self_attn.out_proj, context[0], rank, tp) for rank in range(tp)]
    z = [_opt_mlp_partial(layer, x[0] + p[rank] + b, rank, tp) for rank in range(tp)]
    y = x[0] + b + c + sum(p) + sum(z)

    expected = model.lm_head(decoder.final_layer_norm(y))
    result = spd_logits(model, ids, tp=tp, dropped=frozenset({(0, "attn")}))
    assert rel_err(result, expected) < F64_BOUND


@pytest.mark.parametrize(("family", "tp"), [(f, tp) for f, tp in FAMILY_AND_TP if tp in (2, 4)])
@torch.no_grad()
def test_run_of_dropped_points_is_each_rank_alone(family: str, tp: int) -> None:
    """With only the last point kept, rank i is the model without the other ranks' columns.

    Its stream ends as R + P_i, and the stream of a model without any columns ends as R.
    """
    model, (ids, mask) = _model(family), left_padded(token_ids())
    groups = _random_groups(model, tp=tp, seed=0)
    alone = [_final_stream(model, ids, mask, groups, rank) for rank in range(tp)]
    replicated = _final_stream(model, ids, mask, groups, None)
    stream = replicated + sum(value - replicated for value in alone)

    expected = model.lm_head(_final_norm(model)(stream))
    dropped = frozenset(_all_points(model))
    result = spd_logits(model, ids, mask, tp=tp, dropped=dropped, head_groups=groups)
    assert rel_err(result, expected, real=mask) < F32_BOUND


@pytest.mark.parametrize(
    ("family", "point", "reason"),
    [
        ("llama", (1, "mlp"), "last sync point"),
        ("gpt_neox", (1, "mlp"), "last sync point"),
        ("gpt_neox", (0, "attn"), "no such sync points"),
        ("llama", (2, "attn"), "no such sync points"),
        ("llama", (0, "norm"), "no such sync points"),
    ],
)
def test_point_that_cannot_be_dropped_is_refused(
    family: str, point: tuple[int, str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        spd_logits(_model(family), token_ids(), tp=2, dropped=frozenset({point}))


@pytest.mark.parametrize(
    "groups", ({0: [[0, 1], [2, 2]]}, {0: [[0, 1, 2, 3]]}, {0: [[0], [1]]}, {5: [[0, 1], [2, 3]]})
)
def test_groups_that_are_no_partition_are_refused(groups: dict[int, list[list[int]]]) -> None:
    with pytest.raises(ValueError, match=r"no partition|head groups for layers"):
        spd_logits(_model("llama_gqa"), token_ids(), tp=2, head_groups=groups)


@pytest.mark.parametrize("family", ("gemma2", "mixtral"))
def test_family_outside_the_reference_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="no reference for"):
        spd_logits(_model(family), token_ids(), tp=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_is_deterministic_and_leaves_the_random_state_alone(family: str) -> None:
    before = torch.get_rng_state()
    first, second, other = tiny(family), tiny(family), tiny(family, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    ids = token_ids()
    assert torch.equal(_logits(first, ids), _logits(second, ids))
    assert rel_err(_logits(other, ids), _logits(first, ids)) > VISIBLE


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_shows_the_first_token_in_the_last_logits(family: str) -> None:
    model, ids = _model(family), token_ids()
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % 96
    assert rel_err(_logits(model, changed)[:, -1], _logits(model, ids)[:, -1]) > VISIBLE


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tiny_shows_every_lost_vector(family: str) -> None:
    """Doubling any bias or norm weight moves the logits, except a key bias: softmax ignores it."""
    model, ids = tiny(family), token_ids()
    expected = _logits(model, ids)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.endswith("k_proj.bias"):
            parameter.mul_(2)
            assert rel_err(_logits(model, ids), expected) > 1e-3, name
            parameter.div_(2)


def _random_groups(model: PreTrainedModel, *, tp: int, seed: int) -> dict[int, list[list[int]]]:
    """A shuffled even split of the units of every layer; never the split in order."""
    draw, units, groups = random.Random(seed), num_units(model.config), {}
    for layer in range(model.config.num_hidden_layers):
        order = list(range(units))
        while set(order[: units // tp]) in (
            set(range(units // tp)),
            set(range(units // tp, units)),
        ):
            draw.shuffle(order)
        groups[layer] = [[order[unit] for unit in part] for part in balanced_parts(units, tp)]
    return groups


@contextmanager
def _recorded_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of each call of `module`."""
    calls: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    yield calls
    handle.remove()


def _partial(linear: nn.Linear, x: Tensor, rank: int, tp: int) -> Tensor:
    """Rank i's input channels through its columns, without bias."""
    size = linear.in_features // tp
    part = slice(rank * size, (rank + 1) * size)
    return F.linear(x[..., part], linear.weight[:, part])


def _opt_mlp_partial(layer: nn.Module, seen: Tensor, rank: int, tp: int) -> Tensor:
    return _partial(layer.fc2, F.relu(layer.fc1(layer.final_layer_norm(seen))), rank, tp)


def _final_norm(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(find_family(model.config).final_norm)


def _final_stream(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    groups: dict[int, list[list[int]]],
    rank: int | None,
) -> Tensor:
    """Input of the final norm [B, S, D] when only `rank` has its columns of o and down."""
    alone, in_dim = deepcopy(model), 0 if model.config.model_type == "gpt2" else 1
    for name, weight in alone.named_parameters():
        if name.split(".")[-2] in ROW_PARALLEL and name.endswith(".weight"):
            (layer,) = (int(part) for part in name.split(".") if part.isdigit())
            is_mlp = ".mlp." in name or ".fc2." in name
            num_pieces = weight.shape[in_dim] if is_mlp else num_units(model.config)
            owners = balanced_parts(num_pieces, len(groups[layer])) if is_mlp else groups[layer]
            kept = torch.zeros(num_pieces)
            kept[[] if rank is None else list(owners[rank])] = 1.0
            kept = kept.repeat_interleave(weight.shape[in_dim] // num_pieces)
            weight.mul_(kept.unsqueeze(1 - in_dim))
    with _recorded_input(_final_norm(alone)) as streams:
        alone(ids, attention_mask=mask)
    return streams[0]
