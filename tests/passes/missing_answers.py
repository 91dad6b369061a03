"""Answers that would be right but that no placement rule gives, and why that is accepted."""

from __future__ import annotations

import torch

from spdcompile.passes.ops import ATTENTION

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default

_UNSUMMED = "linear here, but no model leaves this operand as an unreduced sum"
_VECTORS = "products with vectors are left whole"
_SHAPE = "only the shape is read; under vmap the result would be one for each rank all the same"
_FEATURES = "v's features could be split alone; a region's unit is a head"
_CHOOSERS = "what chooses is never split: no model chooses by a rank's share of something"
_AGREE = "a mask that happens to say the same of each share"
# Operator, row -> why.
MISSING = {
    (aten.layer_norm.default, "P <- R P"): _UNSUMMED,
    (aten.layer_norm.default, "P <- R P P"): _UNSUMMED,
    (aten.rms_norm.default, "P <- R P"): _UNSUMMED,
    (aten.embedding.default, "P <- P R"): _UNSUMMED,
    (aten.embedding.default, "S <- S R"): "the table of tokens stays whole",
    (aten.matmul.default, "P <- S S"): _VECTORS,
    (aten.matmul.default, "S <- S R"): _VECTORS,
    (aten.matmul.default, "S <- R S"): _VECTORS,
    (aten.ones_like.default, "R <- P"): _SHAPE,
    (aten.zeros_like.default, "R <- P"): _SHAPE,
    (aten.empty_like.default, "R <- P"): _SHAPE,
    (aten.full_like.default, "R <- P"): _SHAPE,
    (aten.expand_as.default, "S <- S S"): "an operand of which only the shape is read, split apart",
    (aten.any.default, "R <- S"): _AGREE,
    (aten.all.default, "R <- S"): _AGREE,
    (aten.any.dim, "R <- S"): _AGREE,
    (aten.all.dim, "R <- S"): _AGREE,
    (aten.histc.default, "P <- S"): "the zeros of padded units would be counted",
    (aten.conv1d.default, "P <- R P P"): _UNSUMMED,
    (aten.conv1d.default, "P <- P R P"): _UNSUMMED,
    (aten.conv1d.default, "P <- S S P"): _UNSUMMED,
    (aten.conv1d.default, "P <- S S"): "some channels of each group: no model lays units out so",
    (aten.index.Tensor, "S <- R S"): _CHOOSERS,
    (aten.index.Tensor, "S <- R S S"): _CHOOSERS,
    (aten.index.Tensor, "S <- R R S"): _CHOOSERS,
    (aten.index_select.default, "S <- R S"): _CHOOSERS,
    (aten.gather.default, "S <- R S"): _CHOOSERS,
    (aten.index_put.default, "P <- P S S"): _CHOOSERS,
    (aten.index_add.default, "P <- P S S"): _CHOOSERS,
    (aten.scatter_add.default, "P <- P S S"): _CHOOSERS,
    (aten.gather.default, "S <- S S"): "an index that leaves out the same entries of each unit",
    (aten.scatter.src, "S <- S S S"): "an index that leaves out the same entries of each unit",
    (SDPA, "P <- R R P"): _UNSUMMED,
    (SDPA, "P <- R R P R"): _UNSUMMED,
    (SDPA, "S <- R R S"): _FEATURES,
    (SDPA, "S <- R R S R"): _FEATURES,
    (SDPA, "S <- S R R"): "query heads in turn over whole K/V heads: no model lays them out so",
    (ATTENTION, "P <- R R P R"): _UNSUMMED,
    (ATTENTION, "P <- R R P R R"): _UNSUMMED,
    (ATTENTION, "S <- R R S R"): _FEATURES,
    (ATTENTION, "S <- R R S R R"): _FEATURES,
    (ATTENTION, "S <- S R R R"): "query heads in turn over whole K/V heads",
    (ATTENTION, "S <- S R R R S"): "as for the other operator: heads in turn",
}
