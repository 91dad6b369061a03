"""A Llama with norms behind its sublayers, run on several tensor-parallel ranks at once.

Plain torch: what the compiler refuses is tried here. Shapes: B batch, S sequence, D hidden; what
differs between ranks has a dim for the rank in front.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM


class PostNorm(nn.Module):
    """RMSNorm of a sublayer's output; the identity until it is given a weight.

    Args:
        constant: mean size of what it norms, measured before training on and again after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = None
        self.constant = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x if self.weight is None else F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)

    def frozen(self, x: Tensor) -> Tensor:
        """With the constant in place of the statistic: linear in x."""
        return x if self.weight is None else x * (self.weight / self.constant)


@dataclass(frozen=True)
class Drop:
    """Which attention points go, and how."""

    tp: int = 1
    layers: frozenset[int] = frozenset()
    way: str = "own"


@dataclass
class Stream:
    """H and, in the way `carried`, what each rank has pending; [B, S, D] and [tp, B, S, D]."""

    whole: Tensor
    pending: Tensor | float = 0.0
    sizes: list[float] = field(default_factory=list)


class PostNormModel(nn.Module):
    """A Llama whose sublayers have a norm behind them, on one rank or on several at once."""

    def __init__(self, llama: LlamaForCausalLM) -> None:
        super().__init__()
        self.llama = llama
        count = llama.config.num_hidden_layers
        self.attn_norms = nn.ModuleList(PostNorm() for _ in range(count))
        self.mlp_norms = nn.ModuleList(PostNorm() for _ in range(count))

    def forward(self, ids: Tensor, drop: Drop) -> Tensor:
        """ids [B, S] -> logits [B, S, V]."""
        stream = Stream(self.llama.model.embed_tokens(ids))
        for index in range(len(self.attn_norms)):
            stream = self.block(index, stream, drop)
        return self.logits(stream)

    def logits(self, stream: Stream) -> Tensor:
        """The model's last norm reads the sum of all there is."""
        pending = stream.pending.sum(0) if isinstance(stream.pending, Tensor) else 0.0
        return self.llama.lm_head(self.llama.model.norm(stream.whole + pending))

    def block(self, index: int, stream: Stream, drop: Drop) -> Stream:
        """One block; the rank is a dim in front where values differ between ranks."""
        layer, norm = self.llama.model.layers[index], self.attn_norms[index]
        partial = self._attend(layer, stream.whole + stream.pending, drop.tp)
        total = partial.sum(0)
        stream.sizes.append(_size(total))
        pending = stream.pending
        if index not in drop.layers:
            shown: Tensor | float = norm(total)
            added = shown
        elif drop.way == "frozen":
            shown, added = norm.frozen(partial), norm.frozen(total)
        elif drop.way == "unseen":
            shown, added = 0.0, norm(total)
        elif drop.way == "own":
            shown, added = norm(partial), norm(total)
        elif drop.way == "own, mean":
            shown, added = norm(partial), norm(partial).mean(0)
        elif drop.way == "share":
            shown, added = norm(partial) / drop.tp, norm(partial).mean(0)
        else:
            shown, added = norm(partial) / drop.tp, 0.0
            pending = pending + shown
        seen = stream.whole + stream.pending + shown
        change = self._feed_forward(layer, seen, drop.tp)
        stream.sizes.append(_size(change))
        whole = stream.whole + added + self.mlp_norms[index](change)
        return Stream(whole, pending, stream.sizes)

    def _attend(self, layer: nn.Module, seen: Tensor, tp: int) -> Tensor:
        """P of every rank, [tp, B, S, D], out of what all see alike or [tp, B, S, D]."""
        attention, normed = layer.self_attn, layer.input_layernorm(seen)
        length, size = seen.shape[-2], attention.head_dim
        cos, sin = self.llama.model.rotary_emb(seen, torch.arange(length)[None])

        def heads(linear: nn.Linear) -> Tensor:
            return linear(normed).unflatten(-1, (-1, size)).transpose(-2, -3)

        query, key = (_turn(heads(p), cos, sin) for p in (attention.q_proj, attention.k_proj))
        out = F.scaled_dot_product_attention(query, key, heads(attention.v_proj), is_causal=True)
        out = out.transpose(-2, -3).flatten(-2)
        return _products(out, attention.o_proj.weight, tp, differs=seen.dim() == 4)

    def _feed_forward(self, layer: nn.Module, seen: Tensor, tp: int) -> Tensor:
        """The sum of Z over the ranks, [B, S, D]."""
        mlp, normed = layer.mlp, layer.post_attention_layernorm(seen)
        if seen.dim() == 3:
            return mlp(normed)
        gate, up = (p.weight.chunk(tp) for p in (mlp.gate_proj, mlp.up_proj))
        down = mlp.down_proj.weight.chunk(tp, 1)
        parts = [
            F.linear(F.silu(F.linear(normed[r], gate[r])) * F.linear(normed[r], up[r]), down[r])
            for r in range(tp)
        ]
        return torch.stack(parts).sum(0)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _products(x: Tensor, weight: Tensor, tp: int, *, differs: bool) -> Tensor:
    """Each rank's columns of x through its columns of the weight, [tp, B, S, D]."""
    columns = weight.chunk(tp, 1)
    parts = [(x[r] if differs else x).chunk(tp, -1)[r] for r in range(tp)]
    return torch.stack([F.linear(p, w) for p, w in zip(parts, columns, strict=True)])


def _size(x: Tensor) -> float:
    """Mean root of the mean square over the features."""
    return float(x.detach().pow(2).mean(-1).sqrt().mean())
