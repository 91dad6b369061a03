"""What dropping attention sync points costs where a norm acts on the sum before the residual.

    python examples/measure_post_norm.py [--steps 60] [--distill 40]

The bundled tiny-llama gets a norm behind the output of every attention and MLP (as GLM-4 and
Gemma 2 have), which starts at the mean size of what it norms, and is trained on from there on
calibration.txt. Then attention points are dropped in several ways and held-out perplexity is
measured, in plain torch: the compiler refuses all of these drops. H is the block's input, P_i rank
i's partial sum, N the norm behind the attention, Z_i the rank's partial sum of the MLP:

    own         rank i reads H + N(P_i); the block adds N(sum P)
    own, mean   rank i reads H + N(P_i); the block adds the mean of N(P_i)
    share       rank i reads H + N(P_i)/tp; the block adds the mean of N(P_i)
    frozen      N divides by a constant measured beforehand, so it is linear: rank i reads
                H + N(P_i), the block adds N(sum P)
    unseen      rank i reads H alone; the block adds N(sum P)
    carried     as share, but the sum over ranks waits until the model's last norm

The MLP's sum has a norm of its own behind it, so no P can join its all-reduce: all ways but
`carried` send P beside Z in one all-reduce of twice the size. N(tp * P_i) is N(P_i) but for
epsilon, so scaling the partial sum is no further way. Without the norms (N = identity) the first
way is SPD itself (arXiv 2502.20727): the yardstick in the last lines.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import platform
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from post_norm_model import Drop, PostNormModel, Stream
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import spdcompile

MODEL = Path(__file__).parent / "models" / "tiny-llama"
WAYS = ("own", "own, mean", "share", "frozen", "unseen", "carried")
SHARES = (25, 50, 75, 100)


@torch.no_grad()
def measure_sizes(model: PostNormModel, ids: Tensor) -> None:
    """Notes the mean size of what each norm gets; a norm without a weight gets that as one."""
    stream = Stream(model.llama.model.embed_tokens(ids))
    for index in range(len(model.attn_norms)):
        stream = model.block(index, stream, Drop())
    norms = itertools.chain.from_iterable(zip(model.attn_norms, model.mlp_norms, strict=True))
    for norm, size in zip(norms, stream.sizes, strict=True):
        norm.constant = size
        if norm.weight is None:
            norm.weight = nn.Parameter(torch.full((model.llama.config.hidden_size,), size))


def train(model: PostNormModel, tokens: Tensor, steps: int, rate: float = 3e-4) -> None:
    """Trains everything on, 4 chunks a step, in order; the rate falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step, rows in zip(range(steps), itertools.cycle(tokens.split(4)), strict=False):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        logits = model(rows, Drop())
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def perplexity(model: PostNormModel, tokens: Tensor, drop: Drop) -> float:
    """Over chunks [N, S], each by itself."""
    losses = []
    for rows in tokens.split(8):
        logits = model(rows, drop)[:, :-1].flatten(0, 1)
        losses.append(F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum"))
    return math.exp(float(sum(losses)) / tokens[:, 1:].numel())


def least_sensitive(model: PostNormModel, tokens: Tensor, tp: int) -> list[int]:
    """Layers by what dropping each alone, in the way `own`, does to the perplexity."""
    cost = {
        layer: perplexity(model, tokens, Drop(tp, frozenset({layer})))
        for layer in range(len(model.attn_norms))
    }
    return sorted(cost, key=cost.__getitem__)


def masks(order: list[int]) -> dict[int, frozenset[int]]:
    """Share of the layers in per cent -> the least sensitive ones."""
    return {share: frozenset(order[: len(order) * share // 100]) for share in SHARES}


def distil(model: PostNormModel, tokens: Tensor, drop: Drop, steps: int) -> PostNormModel:
    """A copy whose blocks without a sync point have learnt to give what the originals give."""
    student = copy.deepcopy(model)
    batches = list(tokens.split(4))
    with torch.no_grad():
        teaching = [Stream(model.llama.model.embed_tokens(rows)) for rows in batches]
    learning = list(teaching)
    for index in range(len(model.attn_norms)):
        with torch.no_grad():
            teaching = [model.block(index, stream, Drop()) for stream in teaching]
        if index in drop.layers:
            parameters = [
                *student.llama.model.layers[index].parameters(),
                *student.attn_norms[index].parameters(),
                *student.mlp_norms[index].parameters(),
            ]
            optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = 1e-3 * min((step + 1) / 8, 1 - step / steps)
                number = step % len(batches)
                found = student.block(index, learning[number], drop).whole
                F.mse_loss(found, teaching[number].whole).backward()
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            learning = [student.block(index, stream, drop) for stream in learning]
    return student


def load(length: int = 256) -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    """The bundled model in float32, and chunks of its two texts."""
    llama = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = {n: (MODEL / f"{n}.txt").read_text("utf-8") for n in ("calibration", "heldout")}
    counts = {"calibration": None, "heldout": 16}
    return llama, {
        name: spdcompile.chunks_of(text, tokenizer, length=length, count=counts[name])
        for name, text in texts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="training steps after the norms")
    parser.add_argument("--distill", type=int, default=40, help="steps a block")
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()
    llama, tokens = load()
    heldout, few = tokens["heldout"], tokens["heldout"][::3]
    plain, model = PostNormModel(copy.deepcopy(llama)), PostNormModel(llama)
    measure_sizes(model, tokens["calibration"][:8])
    before = perplexity(model, heldout, Drop())
    train(model, tokens["calibration"], args.steps)
    measure_sizes(model, tokens["calibration"][:8])
    kept = perplexity(model, heldout, Drop())
    kept_plain = perplexity(plain, heldout, Drop())
    print(
        f"held-out perplexity: {kept_plain:.2f} without the norms, {before:.2f} when they are put "
        f"in, {kept:.2f} after {args.steps} steps ({time.perf_counter() - began:.0f} s)",
        flush=True,
    )
    rows = []
    for tp in args.tp:
        chosen = masks(least_sensitive(model, few, tp))
        for way in WAYS:
            found = [perplexity(model, heldout, Drop(tp, chosen[s], way)) for s in SHARES]
            rows.append((tp, way, *(_cell(value, kept) for value in found)))
            print(rows[-1], flush=True)
        found = [_recovered(model, tokens, Drop(tp, chosen[s]), args) for s in (50, 100)]
        cells = [_cell(value, kept) for value in found]
        rows.append((tp, "own, after B2B", "", cells[0], "", cells[1]))
        print(rows[-1], flush=True)
        chosen = masks(least_sensitive(plain, few, tp))
        found = [perplexity(plain, heldout, Drop(tp, chosen[s])) for s in SHARES]
        rows.append((tp, "without the norms (SPD)", *(_cell(v, kept_plain) for v in found)))
    print(tabulate(rows, ["tp", "way", *(f"{s} % dropped" for s in SHARES)], tablefmt="pipe"))
    print(
        f"\n16 held-out chunks of 256 tokens; {platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, {date.today()}, {time.perf_counter() - began:.0f} s in all"
    )


def _recovered(
    model: PostNormModel, tokens: dict[str, Tensor], drop: Drop, args: argparse.Namespace
) -> float:
    student = distil(model, tokens["calibration"][:32], drop, args.distill)
    return perplexity(student, tokens["heldout"], drop)


def _cell(value: float, kept: float) -> str:
    return f"{value:.2f} ({100 * (value / kept - 1):+.1f}%)"


if __name__ == "__main__":
    main()
