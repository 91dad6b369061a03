"""Weights of nine Hugging Face families, read into one layer structure for `spd_reference.py`.

Only layouts live here: which rows of a fused matrix are q, k, v, gate and up, and where a family
keeps its norms and embeddings. Fused matrices are cut by hand, never through the model's forward.

Shapes: B batch, S sequence, D hidden, H head dim, N query heads, F MLP channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

Norm = Callable[[Tensor], Tensor]
Activation = Callable[[Tensor], Tensor]

LAYER_NORM_EPS = ("layer_norm_epsilon", "layer_norm_eps")
OPT_NORM_EPS = 1e-5  # OPT has no such setting and takes the default of torch
OPT_POSITION_OFFSET = 2
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
}


class Linear(NamedTuple):
    """weight [out, in] and bias [out]; a missing bias is read as zeros."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def rows(self, part: slice) -> Linear:
        return Linear(self.weight[part], self.bias[part])


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One block: q [N * H, D], k, v [units * H, D], o [D, N * H], up, gate [F, D], down [D, F]."""

    attn_norm: Norm
    mlp_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    up: Linear
    down: Linear
    act: Activation
    gate: Linear | None = None  # with a gate: act(gate(x)) * up(x); without: act(up(x))
    q_norm: Norm | None = None  # per head, before the rotation
    k_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """A state dict seen from the module `prefix`."""

    state: Mapping[str, Tensor]
    prefix: str = ""

    def under(self, module: str) -> Weights:
        return Weights(self.state, f"{self.prefix}{module}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def linear(self, module: str) -> Linear:
        weight = self[f"{module}.weight"]
        bias = self.state.get(f"{self.prefix}{module}.bias")
        return Linear(weight, weight.new_zeros(len(weight)) if bias is None else bias)

    def conv1d(self, module: str) -> Linear:
        """GPT-2's linear, stored [in, out]."""
        return Linear(self[f"{module}.weight"].T, self[f"{module}.bias"])

    def norm(self, module: str, config: PreTrainedConfig) -> Norm:
        """LayerNorm, or RMSNorm in the families that have `rms_norm_eps`.

        RMSNorm is computed in float32 and cast back before its weight, whatever the dtype.
        """
        weight, settings = self[f"{module}.weight"], config.to_dict()
        if "rms_norm_eps" in settings:
            eps = settings["rms_norm_eps"]
            return lambda x: weight * F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype)
        eps = next((settings[name] for name in LAYER_NORM_EPS if name in settings), OPT_NORM_EPS)
        return partial(
            F.layer_norm,
            normalized_shape=weight.shape,
            weight=weight,
            bias=self[f"{module}.bias"],
            eps=eps,
        )


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family keeps what lies outside its layers, and how to read one of them."""

    layers: str
    # input_ids and mask [B, S] -> [B, S, D]
    embed: Callable[[Weights, Tensor, Tensor, PreTrainedConfig], Tensor]
    final_norm: str
    read_layer: Callable[[Weights, PreTrainedConfig], Layer]
    alibi: bool = False


def _contiguous(fused: Linear, *sizes: int) -> list[Linear]:
    """Cut rows laid out one part after the other, as in q|k|v."""
    return [
        Linear(*cut) for cut in zip(fused.weight.split(sizes), fused.bias.split(sizes), strict=True)
    ]


def _per_head(fused: Linear, heads: int) -> list[Linear]:
    """Cut rows laid out (head, [q, k, v], H) into q, k and v, each [heads * H, D]."""
    weight = fused.weight.unflatten(0, (heads, 3, -1)).unbind(1)
    bias = fused.bias.unflatten(0, (heads, 3, -1)).unbind(1)
    return [Linear(w.flatten(0, 1), b.flatten()) for w, b in zip(weight, bias, strict=True)]


def _read_llama(at: Weights, config: PreTrainedConfig) -> Layer:
    attention, mlp = at.under("self_attn"), at.under("mlp")
    has_head_norms = config.model_type == "qwen3"
    return Layer(
        attn_norm=at.norm("input_layernorm", config),
        mlp_norm=at.norm("post_attention_layernorm", config),
        q=attention.linear("q_proj"),
        k=attention.linear("k_proj"),
        v=attention.linear("v_proj"),
        o=attention.linear("o_proj"),
        gate=mlp.linear("gate_proj"),
        up=mlp.linear("up_proj"),
        down=mlp.linear("down_proj"),
        act=ACTIVATIONS[config.hidden_act],
        q_norm=attention.norm("q_norm", config) if has_head_norms else None,
        k_norm=attention.norm("k_norm", config) if has_head_norms else None,
    )


def _read_phi3(at: Weights, config: PreTrainedConfig) -> Layer:
    head_dim = config.hidden_size // config.num_attention_heads
    kv_size = config.num_key_value_heads * head_dim
    q, k, v = _contiguous(at.linear("self_attn.qkv_proj"), config.hidden_size, kv_size, kv_size)
    gate, up = _contiguous(at.linear("mlp.gate_up_proj"), *[config.intermediate_size] * 2)
    return Layer(
        attn_norm=at.norm("input_layernorm", config),
        mlp_norm=at.norm("post_attention_layernorm", config),
        q=q,
        k=k,
        v=v,
        o=at.linear("self_attn.o_proj"),
        gate=gate,
        up=up,
        down=at.linear("mlp.down_proj"),
        act=ACTIVATIONS[config.hidden_act],
    )


def _read_gpt2(at: Weights, config: PreTrainedConfig) -> Layer:
    q, k, v = _contiguous(at.conv1d("attn.c_attn"), *[config.hidden_size] * 3)
    return Layer(
        attn_norm=at.norm("ln_1", config),
        mlp_norm=at.norm("ln_2", config),
        q=q,
        k=k,
        v=v,
        o=at.conv1d("attn.c_proj"),
        up=at.conv1d("mlp.c_fc"),
        down=at.conv1d("mlp.c_proj"),
        act=ACTIVATIONS[config.activation_function],
    )


def _read_opt(at: Weights, config: PreTrainedConfig) -> Layer:
    return Layer(
        attn_norm=at.norm("self_attn_layer_norm", config),
        mlp_norm=at.norm("final_layer_norm", config),
        q=at.linear("self_attn.q_proj"),
        k=at.linear("self_attn.k_proj"),
        v=at.linear("self_attn.v_proj"),
        o=at.linear("self_attn.out_proj"),
        up=at.linear("fc1"),
        down=at.linear("fc2"),
        act=ACTIVATIONS[config.activation_function],
    )


def _read_neox(at: Weights, config: PreTrainedConfig) -> Layer:
    return _read_per_head(at, config, attention="attention", act=ACTIVATIONS[config.hidden_act])


def _read_bloom(at: Weights, config: PreTrainedConfig) -> Layer:
    return _read_per_head(at, config, attention="self_attention", act=ACTIVATIONS["gelu_new"])


def _read_per_head(
    at: Weights, config: PreTrainedConfig, *, attention: str, act: Activation
) -> Layer:
    q, k, v = _per_head(at.linear(f"{attention}.query_key_value"), config.num_attention_heads)
    return Layer(
        attn_norm=at.norm("input_layernorm", config),
        mlp_norm=at.norm("post_attention_layernorm", config),
        q=q,
        k=k,
        v=v,
        o=at.linear(f"{attention}.dense"),
        up=at.linear("mlp.dense_h_to_4h"),
        down=at.linear("mlp.dense_4h_to_h"),
        act=act,
    )


def _embed_words(at: Weights, input_ids: Tensor, mask: Tensor, config: PreTrainedConfig) -> Tensor:
    names = {"gpt_neox": "gpt_neox.embed_in"}
    return at[names.get(config.model_type, "model.embed_tokens") + ".weight"][input_ids]


def _embed_gpt2(at: Weights, input_ids: Tensor, mask: Tensor, config: PreTrainedConfig) -> Tensor:
    """Positions count from 0 whatever the padding."""
    words = at["transformer.wte.weight"][input_ids]
    return words + at["transformer.wpe.weight"][: input_ids.shape[1]]


def _embed_opt(at: Weights, input_ids: Tensor, mask: Tensor, config: PreTrainedConfig) -> Tensor:
    """Positions count the real tokens; padding has position -1, before the offset."""
    words = at["model.decoder.embed_tokens.weight"][input_ids]
    positions = mask.cumsum(1) * mask - 1 + OPT_POSITION_OFFSET
    return words + at["model.decoder.embed_positions.weight"][positions]


def _embed_bloom(at: Weights, input_ids: Tensor, mask: Tensor, config: PreTrainedConfig) -> Tensor:
    norm = at.norm("transformer.word_embeddings_layernorm", config)
    return norm(at["transformer.word_embeddings.weight"][input_ids])


_LLAMA = Family("model.layers", _embed_words, "model.norm", _read_llama)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": Family("model.layers", _embed_words, "model.norm", _read_phi3),
    "gpt2": Family("transformer.h", _embed_gpt2, "transformer.ln_f", _read_gpt2),
    "bloom": Family("transformer.h", _embed_bloom, "transformer.ln_f", _read_bloom, alibi=True),
    "opt": Family("model.decoder.layers", _embed_opt, "model.decoder.final_layer_norm", _read_opt),
    "gpt_neox": Family("gpt_neox.layers", _embed_words, "gpt_neox.final_layer_norm", _read_neox),
}

# Settings that change the computation and that nothing here reads: only these values are right.
_REQUIRED = {
    "sliding_window": None,
    "do_layer_norm_before": True,
    "layer_norm_elementwise_affine": True,
    "apply_residual_connection_post_layernorm": False,
    "slow_but_exact": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def find_family(config: PreTrainedConfig) -> Family:
    """The reader for `config`.

    Raises:
        ValueError: No reader for the family, or a setting asks for what the reference lacks.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"no reference for {config.model_type!r}; known: {', '.join(FAMILIES)}")
    settings = config.to_dict()
    wrong = {
        name: settings[name]
        for name, value in _REQUIRED.items()
        if settings.get(name, value) != value
    }
    rope_type = (settings.get("rope_parameters") or {}).get("rope_type", "default")
    if wrong or rope_type != "default":
        raise ValueError(
            f"the reference does not describe {wrong or rope_type} of {config.model_type}"
        )
    return FAMILIES[config.model_type]
