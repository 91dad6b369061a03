"""What is changed while a model is exported, by name in transformers' modeling code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spdcompile.passes.patches import constants, experts, norms

# Scans over the tokens, alone or by chunks: functions that transformers itself replaces by a
# kernel where one is installed, with torch code that loops otherwise.
OPAQUE_FUNCTIONS = {
    "mamba_selective_scan",  # Mamba, Falcon Mamba, Jamba, Zamba
    "mamba2_chunk_scan",  # Mamba 2, Bamba, Falcon H1, Nemotron H, Granite hybrids, Zamba 2
    "torch_chunk_gated_delta_rule",  # Qwen 3 Next, Qwen 3.5, OLMo hybrid
    "chunk_kimi_delta_attention",  # Kimi Linear, Bailing
    "rwkv_linear_attention",
}
# Methods that loop or choose as functions do: they read nothing of their module.
OPAQUE_STATIC_METHODS = {
    "RecurrentGemmaRglru._rnn_scan",
    "DogeAttention.prepare_dynamic_mask",  # chooses the best keys of an input that has too many
}
# Methods that read their module -> for which modules they are opaque.
OPAQUE_METHODS: Mapping[str, Callable[[Any], bool]] = {
    "MiniMaxLightningAttention.forward": lambda module: True,
    "xLSTMBackend.forward": lambda module: True,
    "Qwen4ExpTextQSAIndexer.forward": lambda module: True,  # picks keys for each token in turn
    "MiniMaxM3VLAttention.forward": lambda module: module.indexer is not None,  # picks blocks
    # Keys of an input that is long enough to have some are summed up in further keys.
    "DeepseekV4Attention.forward": lambda module: module.compressor is not None,
}
# Methods that are written anew, computing the same.
REWRITTEN: Mapping[str, Callable[..., Any]] = {
    "DbrxExperts.forward": experts.dbrx_experts,
    "LongcatFlashExperts.forward": experts.longcat_flash_experts,
    "JetMoeTopKGating.forward": experts.jetmoe_gating,
    "JetMoeParallelExperts.forward": experts.jetmoe_experts,
    "StableLmLayerNormPerHead.forward": norms.stablelm_norms,
    "CpmAntModel._prepare_attention_mask": constants.cpmant_mask,
}
# Modules that change themselves at their first call, which is to happen before they are traced.
PREPARED: Mapping[str, Callable[[Any], None]] = {"RwkvModel": constants.rescale_rwkv}
