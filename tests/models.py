"""Tiny random models whose weights are large enough for a mistake to show in the logits.

Freshly initialised Hugging Face models hide errors: weights of std 0.02 make attention uniform,
biases are zero and norm weights are one, so a bias added twice or a head in the wrong place changes
nothing.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SPD_FAMILIES = (
    "llama",
    "llama_gqa",
    "qwen3",
    "gpt2",
    "opt",
    "phi3",
    "gpt_neox",
    "gpt_neox_seq",
    "bloom",
)
REFUSED_FAMILIES = ("gemma2", "mixtral")  # post-norm block, mixture of experts
FAMILIES = SPD_FAMILIES + REFUSED_FAMILIES
GROUPED_QUERY_FAMILIES = ("llama_gqa", "qwen3", "phi3", "gemma2", "mixtral")

PAD_ID = 0
NORM_STD = 0.2
BIAS_STD = 0.1

_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_PRE_NORM_KEYS = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "intermediate": "intermediate_size",
}
_GPT2_KEYS = {"hidden": "n_embd", "heads": "n_head", "layers": "n_layer", "intermediate": "n_inner"}
_OPT_KEYS = {**_PRE_NORM_KEYS, "intermediate": "ffn_dim"}
# No intermediate size: Bloom's MLP always has 4 * hidden channels.
_BLOOM_KEYS = {"hidden": "hidden_size", "heads": "n_head", "layers": "n_layer"}

# family -> (model_type, names of the size settings, settings that are not sizes)
_CONFIGS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "llama": ("llama", _PRE_NORM_KEYS, {"rope_parameters": _ROPE}),
    "llama_gqa": ("llama", _PRE_NORM_KEYS, {"rope_parameters": _ROPE}),
    "qwen3": ("qwen3", _PRE_NORM_KEYS, {"rope_parameters": _ROPE}),
    "phi3": ("phi3", _PRE_NORM_KEYS, {"rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0}}),
    "gpt2": ("gpt2", _GPT2_KEYS, {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "opt": ("opt", _OPT_KEYS, {"dropout": 0.0, "attention_dropout": 0.0}),
    "gpt_neox": (
        "gpt_neox",
        _PRE_NORM_KEYS,
        {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}, "use_parallel_residual": True},
    ),
    "gpt_neox_seq": (
        "gpt_neox",
        _PRE_NORM_KEYS,
        {
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
            "use_parallel_residual": False,
        },
    ),
    "bloom": ("bloom", _BLOOM_KEYS, {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "gemma2": ("gemma2", _PRE_NORM_KEYS, {"rope_parameters": _ROPE, "sliding_window": 6}),
    "mixtral": (
        "mixtral",
        _PRE_NORM_KEYS,
        {
            "rope_parameters": _ROPE,
            "sliding_window": None,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}
_FAMILIES_WITH_MAX_POSITIONS = tuple(family for family in FAMILIES if family != "bloom")
_FAMILIES_WITH_HEAD_DIM = ("llama", "llama_gqa", "qwen3", "gemma2", "mixtral")


def tiny(
    family: str,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 8,
    kv_heads: int | None = None,
    intermediate: int = 128,
    vocab: int = 96,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Build a small random causal LM in eval mode, the same one for the same arguments.

    The weights do not depend on `dtype` (they are drawn in float32), and the global random state is
    left alone.

    Args:
        family: One of `FAMILIES`.
        kv_heads: K/V heads; default `heads`, or half of them for the grouped-query families
            (llama_gqa, qwen3, phi3, gemma2, mixtral).
        intermediate: MLP channels; Bloom has no such setting and uses 4 * hidden.
        config_overrides: Passed to the configuration last, under its own names.

    Raises:
        ValueError: Unknown family, or `kv_heads` for a family whose heads each have their own K
            and V.
    """
    sizes = {"hidden": hidden, "heads": heads, "layers": layers, "intermediate": intermediate}
    settings = _settings(family, sizes, kv_heads) | {"vocab_size": vocab} | config_overrides
    config = AutoConfig.for_model(_CONFIGS[family][0], **settings)
    with torch.random.fork_rng(devices=[]):  # Hugging Face initialises from the global generator
        model = AutoModelForCausalLM.from_config(config)
    randomise(model, torch.Generator().manual_seed(seed), weight_std=hidden**-0.5)
    return model.to(dtype).eval()


def num_units(config: PreTrainedConfig) -> int:
    """Number of KV groups, the smallest piece of attention that can be on a rank of its own."""
    return getattr(config, "num_key_value_heads", config.num_attention_heads)


def token_ids(*, batch: int = 2, length: int = 12, vocab: int = 96, seed: int = 0) -> Tensor:
    """Random token ids [batch, length] without the pad, bos and eos ids 0, 1, 2."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(input_ids: Tensor, *, num_pads: int = 3) -> tuple[Tensor, Tensor]:
    """Ids and 0/1 mask, both [B, S], with `num_pads` tokens of the first row made padding."""
    mask = torch.ones_like(input_ids)
    mask[0, :num_pads] = 0
    return input_ids.masked_fill(mask == 0, PAD_ID), mask


def _settings(family: str, sizes: dict[str, int], kv_heads: int | None) -> dict[str, Any]:
    if family not in _CONFIGS:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    _, names, fixed = _CONFIGS[family]
    settings = {name: sizes[size] for size, name in names.items()} | deepcopy(fixed)
    settings |= {"pad_token_id": PAD_ID, "bos_token_id": 1, "eos_token_id": 2}
    if family in _FAMILIES_WITH_MAX_POSITIONS:
        settings["max_position_embeddings"] = 128
    if family in _FAMILIES_WITH_HEAD_DIM:
        settings["head_dim"] = sizes["hidden"] // sizes["heads"]
    if family in (*GROUPED_QUERY_FAMILIES, "llama"):
        default = (
            max(1, sizes["heads"] // 2) if family in GROUPED_QUERY_FAMILIES else sizes["heads"]
        )
        settings["num_key_value_heads"] = kv_heads or default
    elif kv_heads not in (None, sizes["heads"]):
        raise ValueError(
            f"{family} has one K/V head per query head; kv_heads={kv_heads} needs another family"
        )
    return settings


@torch.no_grad()
def randomise(model: PreTrainedModel, generator: torch.Generator, *, weight_std: float) -> None:
    """Overwrite every parameter; tied ones stay tied because the change is in place.

    A matrix of std hidden**-0.5 maps normed activations to activations of std about 1, so attention
    scores and logits have std about 1 too. A norm weight varies around its initial value, which is
    1, or 0 where the family multiplies by 1 + weight.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(weight_std * noise)
        elif name.endswith("bias"):
            parameter.copy_(BIAS_STD * noise)
        else:
            parameter.add_(NORM_STD * noise)
