"""Answers that would be right but that no placement rule gives, and why that is accepted."""

from __future__ import annotations

import torch

from spdcompile.passes.ops import ATTENTION

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default

_UNSUMMED = "linear here, but no model leaves this operand as an unreduced sum"
_VECTORS = "products with vectors are left whole"
_CONSTANT = "holds none of the operand's data, but the sizes it is given would have to be local"
_FEATURES = "v's features could be split alone; a region's unit is a head"
_CHOOSERS = "what chooses is never split: no model chooses by a rank's share of something"
# Operator, row -> why.
MISSING = {
    (aten.mean.dim, "P <- P"): _UNSUMMED,
    (aten.cumsum.default, "P <- P"): _UNSUMMED,
    (aten.layer_norm.default, "P <- R P"): _UNSUMMED,
    (aten.layer_norm.default, "P <- R P P"): _UNSUMMED,
    (aten.rms_norm.default, "P <- R P"): _UNSUMMED,
    (aten.masked_fill.Tensor, "P <- P R P"): _UNSUMMED,
    (aten.where.self, "P <- R P P"): _UNSUMMED,
    (aten.embedding.default, "P <- P R"): _UNSUMMED,
    (aten.embedding.default, "S <- S R"): "the table of tokens stays whole",
    (aten.matmul.default, "P <- S S"): _VECTORS,
    (aten.matmul.default, "S <- S R"): _VECTORS,
    (aten.matmul.default, "S <- R S"): _VECTORS,
    (aten.new_ones.default, "R <- P"): _CONSTANT,
    (aten.new_ones.default, "R <- S"): _CONSTANT,
    (aten.new_zeros.default, "R <- P"): _CONSTANT,
    (aten.new_zeros.default, "R <- S"): _CONSTANT,
    (aten.new_full.default, "R <- P"): _CONSTANT,
    (aten.new_full.default, "R <- S"): _CONSTANT,
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
    (SDPA, "S <- S S S S"): "a mask comes whole and is cut",
    (ATTENTION, "P <- R R P R"): _UNSUMMED,
    (ATTENTION, "P <- R R P R R"): _UNSUMMED,
    (ATTENTION, "S <- R R S R"): _FEATURES,
    (ATTENTION, "S <- R R S R R"): _FEATURES,
    (ATTENTION, "S <- S R R R"): "query heads in turn over whole K/V heads",
    (ATTENTION, "S <- S R R R S"): "as for the other operator: heads in turn",
    (ATTENTION, "S <- S S S R S"): "sinks come whole and are cut",
}
