"""One rank of the demo, started by torchrun: logits, latencies and a few words, plan by plan.

Latencies are measured through shared memory, sockets and gloo, in the same rounds.
"""

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
TRANSPORTS = ("auto", "sockets", "process-group")
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

    models = {
        transport: spdcompile.compile(model, tp=2, backend=args.backend, transport=transport)
        for transport in TRANSPORTS
    }
    programs = {
        (share, transport): each.with_mask(plan)
        for share, plan in plans.items()
        for transport, each in models.items()
    }
    text = (Path(args.model) / "heldout.txt").read_text(encoding="utf-8")
    ids = spdcompile.chunks_of(text, tokenizer, length=LENGTH, count=1)
    logits = {"/".join(key): program(ids).logits for key, program in programs.items()}
    medians = measure(programs, ids, args.rounds)
    words = generate(programs["50", TRANSPORTS[0]], tokenizer)

    rank = dist.get_rank()
    save_file({**logits, "input_ids": ids}, args.out / f"logits-rank{rank}.safetensors")
    if rank == 0:
        names = {transport: each.executor.collectives.name for transport, each in models.items()}
        result = {"medians": medians, "transports": names, "text": words}
        (args.out / "ranks.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def measure(
    programs: dict[tuple[str, str], spdcompile.CompiledModel], ids: Tensor, rounds: int
) -> dict[str, float]:
    """Median milliseconds of a forward pass of each program, all in turn in every round."""
    times: dict[str, list[float]] = {"/".join(key): [] for key in programs}
    for _ in range(rounds):
        for key, program in programs.items():
            dist.barrier()
            began = time.perf_counter()
            program(ids)
            times["/".join(key)].append(1000 * (time.perf_counter() - began))
    return {key: statistics.median(values) for key, values in times.items()}


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
