"""One rank of the demo, started by torchrun: logits, latencies and a few words, plan by plan."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import spdcompile

LENGTH = 64
PROMPT = "The server reads its configuration from"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--backend", required=True)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = json.loads((args.out / "plans.json").read_text())
    plans = {share: spdcompile.Plan.from_dict(plan) for share, plan in data.items()}

    first = spdcompile.compile(model, tp=2, backend=args.backend)
    compiled = {share: first.with_mask(plan) for share, plan in plans.items()}
    text = (Path(args.model) / "heldout.txt").read_text(encoding="utf-8")
    ids = spdcompile.chunks_of(text, tokenizer, length=LENGTH, count=1)
    logits = {share: each(ids).logits for share, each in compiled.items()}
    medians = measure(compiled, ids, args.rounds)
    words = generate(compiled["50"], tokenizer)

    rank = dist.get_rank()
    save_file({**logits, "input_ids": ids}, args.out / f"logits-rank{rank}.safetensors")
    if rank == 0:
        rows = {share: {"median_ms": median} for share, median in medians.items()}
        (args.out / "ranks.json").write_text(json.dumps({"rows": rows, "text": words}))
    dist.barrier()
    dist.destroy_process_group()


def measure(
    compiled: dict[str, spdcompile.CompiledModel], ids: Tensor, rounds: int
) -> dict[str, float]:
    """Median milliseconds of a forward pass of each plan, all plans in turn in every round."""
    times: dict[str, list[float]] = {share: [] for share in compiled}
    for _ in range(rounds):
        for share, each in compiled.items():
            dist.barrier()
            began = time.perf_counter()
            each(ids)
            times[share].append(1000 * (time.perf_counter() - began))
    return {share: statistics.median(values) for share, values in times.items()}


def generate(compiled: spdcompile.CompiledModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt continued greedily to LENGTH tokens.

    Every step runs all LENGTH positions, those that are not written yet masked, so that one
    compiled shape serves all steps.
    """
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    padded = torch.zeros((1, LENGTH), dtype=torch.long)
    mask = torch.zeros_like(padded)
    count = ids.shape[1]
    padded[:, :count], mask[:, :count] = ids, 1
    for position in range(count, LENGTH):
        padded[:, position] = compiled(padded, mask).logits[:, position - 1].argmax(-1)
        mask[:, position] = 1
    return tokenizer.decode(padded[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
