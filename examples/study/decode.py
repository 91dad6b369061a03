"""Does what holds for prefill hold for decoding?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from examples.study.context import Context
from examples.study.plans import one_sync_per
from examples.study.quality import percent
from examples.study.section import Kind, Panel, Series, Shown, Table
from examples.study.sizes import Sizes
from spdcompile import CompiledModel


@dataclass(frozen=True, slots=True)
class Texts:
    """Held-out tokens for decoding.

    Args:
        prompts: int64 [prompts, length].
        own: what the unsharded model writes after them, int64 [prompts, new].
        chunks: decoded token by token, int64 [chunks, length].
    """

    prompts: Tensor
    own: Tensor
    chunks: Tensor


_METHOD = (
    "Greedy continuations of {prompts} held-out prompts of {prompt_length} tokens by {new_tokens} "
    "tokens, beside those of the unsharded model: the mean number of first tokens that are equal, "
    "the share of all tokens that are equal at their place, and the share of continuations that "
    "are equal throughout. Once a token differs, what follows is another text, so that the share "
    "of equal tokens is low even where each of them is as good. Perplexity of {decode_chunks} "
    "held-out chunks of {decode_length} tokens, in one pass (prefill) and token by token through "
    "the cache."
)


def measure(context: Context) -> dict[str, Any]:
    """Greedy continuations, and perplexity through a KV cache, at several masks."""
    texts = _texts(context)
    return {"rows": [row for tp in _ends(context.sizes) for row in _at(context, tp, texts)]}


def present(numbers: Mapping[str, Any], sizes: Sizes) -> Shown:
    """What each program writes, and how well it reads."""
    rows = numbers["rows"]
    return Shown(
        title="Decode",
        question="Does what holds for prefill hold for decoding with a KV cache?",
        method=_METHOD.format(**asdict(sizes)),
        findings=_findings(rows, sizes.new_tokens),
        tables=[_table(rows, tp) for tp in _ends(sizes)],
        panels=[_panel(rows)],
    )


def _ends(sizes: Sizes) -> tuple[int, ...]:
    """The fewest and the most ranks."""
    return tuple(dict.fromkeys((sizes.tps[0], sizes.main_tp)))


def _texts(context: Context) -> Texts:
    sizes = context.sizes
    prompts = context.chunks(context.heldout_text, sizes.prompts, sizes.prompt_length)
    chunks = context.chunks(context.heldout_text, sizes.decode_chunks, sizes.decode_length)
    own = _continued(context, context.model, prompts)
    return Texts(prompts, own, chunks)


@torch.no_grad()
def _continued(context: Context, model: Any, prompts: Tensor) -> Tensor:
    """Greedy tokens after the prompts, int64 [prompts, new]; the end token does not end them."""
    new = context.sizes.new_tokens
    mask = torch.ones_like(prompts)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    tokens = model.generate(prompts, attention_mask=mask, **settings)
    return tokens[:, prompts.shape[1] :]


def _at(context: Context, tp: int, texts: Texts) -> list[dict[str, Any]]:
    """Every program at one tp."""
    compiled = context.compiled(tp)
    rows = []
    masks = {f"{share} % of attention": context.attention_share(tp, share) for share in (50, 75)}
    masks["all attention"] = context.all_attention()
    masks["one sync per 4 sub-layers"] = one_sync_per(4, context.num_layers)
    programs = {"nothing": compiled}
    programs |= {name: context.dropped(compiled, points) for name, points in masks.items()}
    if tp == context.sizes.main_tp:
        name = "all attention"
        programs[f"{name}, after B2B"] = context.distilled(compiled, masks[name])
    undropped = None
    for name, program in programs.items():
        print(f"   tp {tp}, {name}", flush=True)
        row = _measured(context, program, texts)
        undropped = undropped or row["prefill"]
        increase = 100 * (row["cached"] / undropped - 1)
        rows.append({"tp": tp, "dropped": name, **row, "increase": increase})
    return rows


def _measured(context: Context, program: CompiledModel, texts: Texts) -> dict[str, float]:
    equal = _continued(context, program, texts.prompts) == texts.own  # bool [prompts, new]
    prefill = program(texts.chunks).logits
    cached = _decoded(program, texts.chunks)
    return {
        "prefix": float(equal.long().cumprod(1).sum(1).double().mean()),
        "tokens": float(equal.double().mean()),
        "whole": float(equal.all(1).double().mean()),
        "prefill": _perplexity(prefill, texts.chunks),
        "cached": _perplexity(cached, texts.chunks),
        "difference": float((cached - prefill).abs().max() / prefill.abs().max()),
    }


def _decoded(program: CompiledModel, chunks: Tensor) -> Tensor:
    """The logits of all positions, one token at a time through a KV cache, [B, S, V]."""
    cache = program.new_cache(*chunks.shape)
    steps = [program(token, past_key_values=cache).logits for token in chunks.split(1, 1)]
    return torch.cat(steps, 1)


def _perplexity(logits: Tensor, tokens: Tensor) -> float:
    flat = logits[:, :-1].float().flatten(0, 1)
    return math.exp(torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten()))


def _table(rows: Sequence[dict[str, Any]], tp: int) -> Table:
    headers = ["dropped", "equal first tokens", "equal tokens", "equal throughout"]
    headers += ["perplexity: prefill", "decode", "added", "largest difference of logits"]
    cells = [
        [
            row["dropped"],
            f"{row['prefix']:.1f}",
            f"{row['tokens']:.0%}",
            f"{row['whole']:.0%}",
            f"{row['prefill']:.3f}",
            f"{row['cached']:.3f}",
            percent(row["increase"]),
            f"{row['difference']:.0e}",
        ]
        for row in rows
        if row["tp"] == tp
    ]
    return Table(f"Decoding at tp {tp}", headers, cells)


def _panel(rows: Sequence[dict[str, Any]]) -> Panel:
    series = []
    for tp in dict.fromkeys(row["tp"] for row in rows):
        own = [row for row in rows if row["tp"] == tp]
        names = [row["dropped"] for row in own]
        series.append(Series(f"tp {tp}", names, [row["prefix"] for row in own]))
    return Panel("greedy continuations", "dropped", "equal first tokens", series, Kind.BARS)


def _findings(rows: Sequence[dict[str, Any]], new_tokens: int) -> list[str]:
    worst = max(row["difference"] for row in rows)
    apart = max(abs(row["cached"] / row["prefill"] - 1) for row in rows)
    found = [
        "Decoding through the cache gives the perplexity of the prefill at every mask: they are at "
        f"most {apart:.0e} apart, relatively, and no logit differs by more than {worst:.0e} of the "
        "largest."
    ]
    for row in rows:
        found.append(
            f"tp {row['tp']}, dropped: {row['dropped']}: the first {row['prefix']:.1f} of "
            f"{new_tokens} greedy tokens are the undropped model's, on average, and "
            f"{row['tokens']:.0%} of all; perplexity {percent(row['increase'])}."
        )
    return found
