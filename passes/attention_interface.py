"""Routes a model's attention through `spd::attention`, by transformers' own interfaces.

Two functions are registered. The mask function learns from transformers what a mask means (causal,
a window, a chunk, which tokens are padding) and writes it on the mask that it makes. The attention
function reads it there and hands it to the operator, which makes its own mask. A model whose
attention asks for more than the operator does keeps its own attention; the reason is a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils

from spdcompile.passes.ops import ATTENTION
from spdcompile.passes.patches.replaced import Replacement, replaced

_INTERFACE = "spdcompile"
_ARGUMENT_VALID = 3
_CASTS = (
    torch.ops.aten.to.dtype,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten.to.device,
    torch.ops.aten._to_copy.default,
)
_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)
# Keyword arguments of attention functions that say nothing about what is computed: hints for
# other kernels, what to return besides, and the window, which the mask knows better (Exaone 4
# passes it for layers that have none).
_WITHOUT_MEANING = {
    *("sliding_window", "is_causal", "deterministic", "position_ids", "cache_position"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    *("use_cache", "layer_idx"),
}


class UnsupportedAttentionError(Exception):
    """A model asks its attention function for something that `spd::attention` does not do."""


@dataclass(frozen=True, slots=True)
class _Visible:
    """What a mask lets a token see.

    Args:
        valid: bool [B, S], False where a token is padding; None if none is.
        window: how many tokens, itself included; 0 for all.
        chunk: size of the chunks, counted from the first token that is no padding; 0 for none.
    """

    valid: Tensor | None
    causal: bool = True
    window: int = 0
    chunk: int = 0


@contextmanager
def attention_as_operator(model: PreTrainedModel) -> Iterator[None]:
    """Makes the model call `spd::attention`.

    Raises:
        UnsupportedAttentionError: the model has its own attention code. Inside the context too,
            as soon as an attention layer asks for what the operator does not do.
    """
    if not model._can_set_attn_implementation():
        raise UnsupportedAttentionError("the model has its own attention code")
    before = model.config._attn_implementation
    AttentionInterface.register(_INTERFACE, _attention_function)
    AttentionMaskInterface.register(_INTERFACE, _mask_function)
    model.set_attn_implementation(_INTERFACE)
    try:
        with replaced(_described_patterns()):
            yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Has the model write its attention in plain operators, where it has a choice.

    The scaled-dot-product form may decide by the mask's data, which no graph can hold.
    """
    before = model.config._attn_implementation
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


def take_mask_from_input(graph: fx.Graph, mask: fx.Node) -> None:
    """Makes attention that got a cast of the caller's mask take the mask itself.

    Args:
        mask: the placeholder of the caller's mask, int64 [B, S]; any cast keeps what is zero.
    """
    shape = mask.meta["val"].shape
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        source = node.args[_ARGUMENT_VALID]
        while source.target in _CASTS or (
            source.target in _RESHAPES and source.args[0].meta["val"].shape == shape
        ):
            source = source.args[0]
        if source is mask:
            node.update_arg(_ARGUMENT_VALID, mask)


def check_attention(graph: fx.Graph) -> None:
    """Raises UnsupportedAttentionError if no layer called the operator.

    Such a model read the mask itself, by rules that nobody gave it for this interface.
    """
    if not graph.find_nodes(op="call_function", target=ATTENTION):
        raise UnsupportedAttentionError("its layers do not call the attention interface")


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """What the model's attention layers call: q [B, H, S, D], k and v [B, Hkv, S, D]."""
    sinks, softcap = settings.pop("s_aux", None), settings.pop("softcap", None)
    if settings.pop("dropout", 0.0):
        raise UnsupportedAttentionError("its attention has dropout")
    for name, setting in settings.items():
        if setting is not None and name not in _WITHOUT_MEANING:
            raise UnsupportedAttentionError(f"its attention takes {name}")
    if query.shape[2] != key.shape[2]:
        raise UnsupportedAttentionError("its attention has more keys than queries")
    if attention_mask is None:
        raise UnsupportedAttentionError("its attention takes no mask")
    visible = getattr(attention_mask, "visible", None)
    if visible is None:
        raise UnsupportedAttentionError("its attention takes a mask that is computed from data")
    valid = visible.valid
    if valid is None:
        valid = query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool)
    out = torch.ops.spd.attention(
        *(query, key, value, valid, sinks),
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        *(visible.causal, visible.window, float(softcap or 0.0)),
        *([visible.chunk] if visible.chunk else []),
    )
    return out, None


def _mask_function(
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    q_length: int,
    kv_length: int,
    **settings: Any,
) -> Tensor:
    """What the model's mask builders call.

    Args:
        mask_function: (batch, head, query, key) -> whether the query sees the key.
        attention_mask: bool [B, S], False where a token is padding.

    Returns: the mask, bool [B, 1, S, S], for whoever reads it, with a `_Visible` for attention.
    """
    describe = _PATTERNS.get(mask_function) or getattr(mask_function, "describe", None)
    settings |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = masking_utils.sdpa_mask(
        mask_function=mask_function,
        attention_mask=attention_mask,
        q_length=q_length,
        kv_length=kv_length,
        **settings,
    )
    if describe is not None and q_length == kv_length:
        mask.visible = describe(attention_mask)
    return mask


def _full(valid: Tensor | None) -> _Visible:
    return _Visible(valid, causal=False)


_PATTERNS: dict[Callable[..., Any], Callable[[Tensor | None], _Visible]] = {
    masking_utils.causal_mask_function: _Visible,
    masking_utils.bidirectional_mask_function: _full,
}


def _window(size: int) -> Callable[[Tensor | None], _Visible]:
    return lambda valid: _Visible(valid, window=size)


def _chunk(size: int, left_padding: Tensor) -> Callable[[Tensor | None], _Visible]:
    return lambda valid: _Visible(valid, chunk=size)


def _described_patterns() -> list[Replacement]:
    """Makers of transformers' mask patterns with a size, whose patterns carry a `describe`.

    A pattern of another maker, or a combination of several, carries none.
    """
    describers = {
        "sliding_window_causal_mask_function": _window,
        "chunked_causal_mask_function": _chunk,
    }
    return [
        (masking_utils, name, _describing(getattr(masking_utils, name), describe))
        for name, describe in describers.items()
    ]


def _describing(maker: Callable[..., Any], describe: Callable[..., Any]) -> Callable[..., Any]:
    def described(*sizes: Any) -> Any:
        pattern = maker(*sizes)
        pattern.describe = describe(*sizes)
        return pattern

    return described
