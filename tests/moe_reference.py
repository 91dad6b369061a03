"""Sync-Point Drop of mixtures of experts in plain torch, the router reading the replicated part.

Independent of the compiler: Hugging Face's own modules run once for each rank, on what that rank
sees, with the columns of the other ranks zeroed in every projection that ends in a sum.

The residual stream is the pair (R, P): rank i sees R + P_i. Attention and experts read what their
rank sees; routers and the gates of shared experts read R, so they are the same for all ranks.

Shapes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.models import randomise
from tests.spd_reference import Stream, SyncPoint, balanced_parts

HIDDEN, HEADS, VOCAB = 32, 4, 96
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Plain; with a gated shared expert and a dense layer; sigmoid scores in groups, gathered weights.
MOE_FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
    },
    "glm4_moe": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    },
}
_SUMMING = ("o_proj", "down_proj")


def tiny_moe(family: str, *, layers: int = 3, seed: int = 0) -> PreTrainedModel:
    """A small random model of a family of MOE_FAMILIES, in eval mode."""
    settings = {**_COMMON, **MOE_FAMILIES[family], "num_hidden_layers": layers}
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    randomise(model, torch.Generator().manual_seed(seed), weight_std=HIDDEN**-0.5)
    return model.eval()


@torch.no_grad()
def routed_logits(
    model: PreTrainedModel, input_ids: Tensor, *, tp: int, dropped: frozenset[SyncPoint]
) -> Tensor:
    """Logits [B, S, V] of `model` on `tp` ranks without the points in `dropped`.

    Args:
        input_ids: [B, S], no padding.
        dropped: (layer, "attn" or "mlp") of each; the last MLP point is always kept.
    """
    body = model.model
    stream = Stream.start(body.embed_tokens(input_ids), tp)
    positions = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
    rope = body.rotary_emb(stream.replicated, positions)
    for index, layer in enumerate(body.layers):
        ranks = [_of_rank(layer, rank, tp) for rank in range(tp)]

        def attend(own: nn.Module, seen: Tensor, _: Tensor) -> Tensor:
            normed = own.input_layernorm(seen)
            return own.self_attn(normed, position_embeddings=rope, attention_mask=None)[0]

        stream = _add(stream, ranks, attend, (index, "attn") not in dropped)
        stream = _add(stream, ranks, _feed_forward, (index, "mlp") not in dropped)
    return model.lm_head(body.norm(stream.replicated))


def _add(
    stream: Stream,
    ranks: Sequence[nn.Module],
    run: Callable[[nn.Module, Tensor, Tensor], Tensor],
    kept: bool,
) -> Stream:
    """Adds each rank's partial sum of `run(its layer, R + P_i, R)`, and sums if the point is kept.

    What a projection adds beside the product (no family here has a bias there) would count twice.
    """
    partials = [
        run(layer, stream.seen_by(rank), stream.replicated) for rank, layer in enumerate(ranks)
    ]
    added = stream.add(torch.zeros_like(stream.replicated), partials)
    return added.sync() if kept else added


def _feed_forward(layer: nn.Module, seen: Tensor, replicated: Tensor) -> Tensor:
    """A rank's partial sum of the MLP or the experts, [B, S, D]."""
    own = layer.post_attention_layernorm(seen)
    if not hasattr(layer.mlp, "experts"):
        return layer.mlp(own)
    shared = layer.post_attention_layernorm(replicated)
    _, weights, chosen = layer.mlp.gate(shared.flatten(0, 1))
    total = layer.mlp.experts(own.flatten(0, 1), chosen, weights).view_as(own)
    if hasattr(layer.mlp, "shared_expert"):
        total += layer.mlp.shared_expert_gate(shared).sigmoid() * layer.mlp.shared_expert(own)
    if hasattr(layer.mlp, "shared_experts"):
        total += layer.mlp.shared_experts(own)
    return total


def _of_rank(layer: nn.Module, rank: int, tp: int) -> nn.Module:
    """A copy of a layer whose projections that end in a sum have only this rank's columns."""
    own = deepcopy(layer)
    for name, weight in own.named_parameters():
        if any(summing in name for summing in _SUMMING):
            pieces = HEADS if "o_proj" in name else weight.shape[-1]
            size = weight.shape[-1] // pieces
            kept = torch.zeros(weight.shape[-1])
            for piece in balanced_parts(pieces, tp)[rank]:
                kept[piece * size : (piece + 1) * size] = 1.0
            weight.mul_(kept)
    return own
