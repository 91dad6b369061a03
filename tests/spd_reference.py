"""Tensor parallelism and Sync-Point Drop in plain torch: what a compiled model must compute.

Independent of the compiler: weights come from a Hugging Face state dict, each rank is one turn of a
Python loop, and the residual stream is the pair (R, P) of the general form.

Source: SPD, arXiv 2502.20727 (attention point dropped, MLP point kept), in the general (R, P) form,
where every sync point but the last can be dropped.

Shapes: B batch, S sequence, D hidden, H head dim, R rotary dims, N query heads, F MLP channels.
A unit is a KV group: one K/V head and the query heads that share it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.spd_families import Layer, Norm, Weights, find_family

SyncPoint = tuple[int, str]  # (layer, "attn" or "mlp")
Groups = Sequence[Sequence[int]]  # one list of units per rank
HeadGroups = Mapping[int, Groups]  # by layer


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream (R, P): R for all ranks and a pending P_i for each, all [B, S, D]."""

    replicated: Tensor
    pending: tuple[Tensor, ...]

    @classmethod
    def start(cls, replicated: Tensor, tp: int) -> Stream:
        return cls(replicated, (torch.zeros_like(replicated),) * tp)

    def seen_by(self, rank: int) -> Tensor:
        return self.replicated + self.pending[rank]

    def add(self, bias_D: Tensor, partials: Sequence[Tensor]) -> Stream:
        """Add a row-parallel linear: its bias enters R once, rank i's product enters P_i."""
        pending = tuple(old + new for old, new in zip(self.pending, partials, strict=True))
        return Stream(self.replicated + bias_D, pending)

    def sync(self) -> Stream:
        """A kept sync point: (R, P) becomes (R + sum of P, 0)."""
        return Stream.start(self.replicated + torch.stack(self.pending).sum(0), len(self.pending))


@dataclass(frozen=True, slots=True)
class Scene:
    """What attention needs besides the stream; the same in every layer."""

    head_dim: int
    allowed_BSS: Tensor  # bool, [query, key]
    score_bias_NBS: Tensor  # one number per key; zeros without ALiBi
    cos_SR: Tensor  # R = 0 without rope
    sin_SR: Tensor


@torch.no_grad()
def spd_logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    tp: int,
    dropped: frozenset[SyncPoint] = frozenset(),
    head_groups: HeadGroups | None = None,
) -> Tensor:
    """Logits of `model` run by `tp` ranks, without the sync points in `dropped`.

    Args:
        input_ids: [B, S].
        attention_mask: [B, S] of 0/1; logits at padding are finite and mean nothing.
        dropped: Sync points that have no all-reduce. A parallel attention + MLP block has one
            point, (layer, "mlp").
        head_groups: Units of each rank, for the layers named; the others split theirs evenly, in
            order. MLP channels are always split evenly, in order.

    Returns:
        [B, S, vocabulary] in the model's dtype; the model's own logits when nothing is dropped.

    Raises:
        ValueError: A point that does not exist or is the last one, groups that are no partition of
            the units, or a model that the reference does not describe.

    Source: SPD, arXiv 2502.20727, in the general (R, P) form.
    """
    config, family, weights = model.config, find_family(model.config), Weights(model.state_dict())
    mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    parallel = config.model_type == "gpt_neox" and config.use_parallel_residual
    _check_points(dropped, config.num_hidden_layers, parallel=parallel)
    _check_layers(head_groups or {}, config.num_hidden_layers)

    scene = _scene(config, mask_BS, weights["lm_head.weight"].dtype, alibi=family.alibi)
    stream = Stream.start(family.embed(weights, input_ids, mask_BS, config), tp)
    run_block = _run_parallel_block if parallel else _run_block
    for index in range(config.num_hidden_layers):
        layer = family.read_layer(weights.under(f"{family.layers}.{index}"), config)
        groups = _groups(head_groups or {}, index, len(layer.k.weight) // scene.head_dim, tp)
        kept = [point for point in ("attn", "mlp") if (index, point) not in dropped]
        stream = run_block(stream, layer, groups, scene, kept)
    final_norm = weights.norm(family.final_norm, config)
    return F.linear(final_norm(stream.replicated), weights["lm_head.weight"])


def balanced_parts(count: int, num_parts: int) -> list[range]:
    """Cut range(count) into contiguous parts; the first count % num_parts have one element more."""
    size, extra = divmod(count, num_parts)
    starts = [part * size + min(part, extra) for part in range(num_parts + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _run_block(
    stream: Stream,
    layer: Layer,
    groups: Groups,
    scene: Scene,
    kept: Collection[str],
) -> Stream:
    stream = stream.add(layer.o.bias, _attention_partials(stream, layer, groups, scene))
    stream = stream.sync() if "attn" in kept else stream
    stream = stream.add(layer.down.bias, _mlp_partials(stream, layer))
    return stream.sync() if "mlp" in kept else stream


def _run_parallel_block(
    stream: Stream,
    layer: Layer,
    groups: Groups,
    scene: Scene,
    kept: Collection[str],
) -> Stream:
    """Attention and MLP read the same stream, and their partials meet in one sum."""
    attention, mlp = _attention_partials(stream, layer, groups, scene), _mlp_partials(stream, layer)
    stream = stream.add(layer.o.bias, attention).add(layer.down.bias, mlp)
    return stream.sync() if "mlp" in kept else stream


def _attention_partials(stream: Stream, layer: Layer, groups: Groups, scene: Scene) -> list[Tensor]:
    """P_i: rank i's units on what rank i sees, through their columns of o, without bias.

    Returns one [B, S, D] per rank.
    """
    partials = []
    for rank, units in enumerate(groups):
        x_BSD = layer.attn_norm(stream.seen_by(rank))
        partials.append(
            sum((_run_unit(x_BSD, layer, unit, scene) for unit in units), torch.zeros_like(x_BSD))
        )
    return partials


def _run_unit(x_BSD: Tensor, layer: Layer, unit: int, scene: Scene) -> Tensor:
    """One K/V head and its query heads, through their columns of o; [B, S, D]."""
    heads_per_unit = len(layer.q.weight) // len(layer.k.weight)
    kv_rows = _channels(unit, scene.head_dim)
    k_BSH = _rotate(layer.k.rows(kv_rows)(x_BSD), layer.k_norm, scene)
    v_BSH = layer.v.rows(kv_rows)(x_BSD)
    out_BSD = torch.zeros_like(x_BSD)
    for head in range(unit * heads_per_unit, (unit + 1) * heads_per_unit):
        channels = _channels(head, scene.head_dim)
        q_BSH = _rotate(layer.q.rows(channels)(x_BSD), layer.q_norm, scene)
        scores_BSS = (
            q_BSH @ k_BSH.mT / math.sqrt(scene.head_dim) + scene.score_bias_NBS[head][:, None, :]
        )
        probs_BSS = scores_BSS.masked_fill(~scene.allowed_BSS, -math.inf).softmax(-1)
        out_BSD += F.linear(probs_BSS @ v_BSH, layer.o.weight[:, channels])
    return out_BSD


def _mlp_partials(stream: Stream, layer: Layer) -> list[Tensor]:
    """Z_i: rank i's MLP channels on what rank i sees, without bias; one [B, S, D] per rank."""
    partials = []
    for rank, part in enumerate(balanced_parts(len(layer.up.weight), len(stream.pending))):
        channels = slice(part.start, part.stop)
        x_BSD = layer.mlp_norm(stream.seen_by(rank))
        inner_BSF = layer.up.rows(channels)(x_BSD)
        if layer.gate is None:
            inner_BSF = layer.act(inner_BSF)
        else:
            inner_BSF = layer.act(layer.gate.rows(channels)(x_BSD)) * inner_BSF
        partials.append(F.linear(inner_BSF, layer.down.weight[:, channels]))
    return partials


def _channels(head: int, head_dim: int) -> slice:
    return slice(head * head_dim, (head + 1) * head_dim)


def _rotate(x_BSH: Tensor, norm: Norm | None, scene: Scene) -> Tensor:
    """Norm the head, then rotate: of the first R channels, c turns with c + R/2."""
    x_BSH = x_BSH if norm is None else norm(x_BSH)
    num_rotary = scene.cos_SR.shape[-1]
    rotary, rest = x_BSH[..., :num_rotary], x_BSH[..., num_rotary:]
    first, second = rotary.chunk(2, dim=-1)
    turned = rotary * scene.cos_SR + torch.cat((-second, first), dim=-1) * scene.sin_SR
    return torch.cat((turned, rest), dim=-1)


def _scene(config: PreTrainedConfig, mask_BS: Tensor, dtype: torch.dtype, *, alibi: bool) -> Scene:
    """Mask, score bias and rotation as Hugging Face derives them from the attention mask alone.

    Rope counts from 0 whatever the padding; ALiBi counts the real tokens. A token may always attend
    itself, so that no row of the softmax is empty.
    """
    length, heads, settings = mask_BS.shape[1], config.num_attention_heads, config.to_dict()
    head_dim = settings.get("head_dim") or config.hidden_size // heads
    causal_SS = torch.ones(length, length, dtype=torch.bool).tril()
    allowed_BSS = (causal_SS & mask_BS[:, None, :].bool()) | torch.eye(length, dtype=torch.bool)
    slopes_N = _alibi_slopes(heads) if alibi else torch.zeros(heads)
    score_bias_NBS = slopes_N[:, None, None] * ((mask_BS.cumsum(1) - 1) * mask_BS)
    angles_SR = _rope_angles(settings.get("rope_parameters"), head_dim, length)
    return Scene(
        head_dim,
        allowed_BSS,
        score_bias_NBS.to(dtype),
        angles_SR.cos().to(dtype),
        angles_SR.sin().to(dtype),
    )


def _rope_angles(rope: Mapping[str, float] | None, head_dim: int, length: int) -> Tensor:
    """Angles [S, R], in float32 whatever the model's dtype, as Hugging Face computes them."""
    if rope is None:
        return torch.zeros(length, 0)
    num_rotary = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    frequencies = 1.0 / rope["rope_theta"] ** (
        torch.arange(0, num_rotary, 2, dtype=torch.float32) / num_rotary
    )
    return torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)


def _alibi_slopes(heads: int) -> Tensor:
    """Slopes [N] for a power-of-two number of heads (ALiBi, arXiv 2108.12409, section 3)."""
    if heads & (heads - 1):
        raise ValueError(f"ALiBi slopes need a power-of-two number of heads here; found {heads}")
    return torch.tensor([2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)])


def _groups(head_groups: HeadGroups, layer: int, num_units: int, tp: int) -> Groups:
    groups = head_groups.get(layer, balanced_parts(num_units, tp))
    if len(groups) != tp or sorted(unit for units in groups for unit in units) != list(
        range(num_units)
    ):
        raise ValueError(
            f"layer {layer}: {groups} is no partition of {num_units} units over {tp} ranks"
        )
    return groups


def _check_layers(head_groups: HeadGroups, num_layers: int) -> None:
    unknown = set(head_groups) - set(range(num_layers))
    if unknown:
        raise ValueError(f"head groups for layers {sorted(unknown)} of a model with {num_layers}")


def _check_points(dropped: frozenset[SyncPoint], num_layers: int, *, parallel: bool) -> None:
    kinds = ("mlp",) if parallel else ("attn", "mlp")
    last = (num_layers - 1, "mlp")
    unknown = dropped - {(layer, kind) for layer in range(num_layers) for kind in kinds}
    if unknown:
        raise ValueError(
            f"no such sync points: {sorted(unknown)}; {num_layers} layers have {kinds} each"
        )
    if last in dropped:
        raise ValueError(
            f"the last sync point {last} cannot be dropped: the logits need the whole sum"
        )
