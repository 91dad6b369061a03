"""Which settings of distillation win back most: one change at a time, on the bundled model.

    python examples/measure_distillation.py [--drop attn] [--steps 60] [--only NAME ...]
    python examples/measure_distillation.py --only "logits besides" --logit-steps 400 --sampled 2400

Every row trains the same blocks for as many steps, the paper's aside, which counts epochs. The
perplexity is that of held-out text.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer

import spdcompile
from spdcompile.runtime.data import perplexity
from spdcompile.runtime.distill_settings import DistillSettings, StudentInput
from spdcompile.runtime.training import Optimizer, Schedule

MODEL = Path(__file__).parent / "models" / "tiny-llama"
LAYERS, LENGTH = 8, 256
POINTS = {
    "attn": [(layer, "attn") for layer in range(LAYERS)],
    "attn-but-0": [(layer, "attn") for layer in range(1, LAYERS)],
    "attn-1-6": [(layer, "attn") for layer in range(1, LAYERS - 1)],
    "mlp": [(layer, "mlp") for layer in range(LAYERS - 1)],
    "all": [(layer, name) for layer in range(LAYERS) for name in ("attn", "mlp")][:-1],
}


def settings_of(steps: int, epochs: float, logit_steps: int) -> dict[str, DistillSettings]:
    """What is compared, by name."""
    best = DistillSettings(steps=steps)
    return {
        "default": best,
        "rate as it is": replace(best, scale_rate=False),
        "rate / 4 as it is": replace(best, scale_rate=False, learning_rate=best.learning_rate / 4),
        "AdamW": replace(best, optimizer=Optimizer.ADAMW, learning_rate=1e-3, scale_rate=False),
        "cosine": replace(best, schedule=Schedule.COSINE),
        "constant": replace(best, schedule=Schedule.CONSTANT),
        "teacher's inputs": replace(best, student_input=StudentInput.TEACHER),
        "rank-local norms": replace(best, rank_local_norms=True),
        "logits besides": replace(best, logit_steps=logit_steps),
        "the paper's": DistillSettings.paper(epochs=epochs, batch_size=best.batch_size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--drop", choices=POINTS, default="attn")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="a segment")
    parser.add_argument("--epochs", type=float, default=10.0, help="of the paper's row")
    parser.add_argument("--logit-steps", type=int, default=60, help="of the row with logits")
    parser.add_argument("--chunks", type=int, default=128, help="of calibration text")
    parser.add_argument(
        "--sampled", type=int, default=0, help="chunks that the model writes besides"
    )
    parser.add_argument("--heldout", type=int, default=96, help="chunks of held-out text")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the rows")
    args = parser.parse_args()
    compared = settings_of(args.steps, args.epochs, args.logit_steps)
    wanted = {name: x for name, x in compared.items() if not args.only or name in args.only}

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = {"calibration": args.chunks, "heldout": args.heldout}
    tokens = {
        name: spdcompile.chunks_of(
            (MODEL / f"{name}.txt").read_text("utf-8"), tokenizer, length=LENGTH, count=count
        )
        for name, count in texts.items()
    }
    training = tokens["calibration"]
    if args.sampled:
        sampled = spdcompile.sampled_chunks(model, training, count=args.sampled)
        training = torch.cat([sampled, training])
    compiled = spdcompile.compile(model, tp=args.tp, backend="eager", executor="local")
    plan = spdcompile.Plan(args.tp, LAYERS, frozenset(POINTS[args.drop]))
    dropped = compiled.with_mask(plan)
    kept = perplexity(compiled.executor, tokens["heldout"])

    def added(tensors: dict[str, torch.Tensor]) -> str:
        found = perplexity(dropped.with_weights(tensors).executor, tokens["heldout"])
        return f"{100 * (found / kept - 1):+.2f} %"

    rows: list[tuple[object, ...]] = [("nothing (zero-shot)", added({}), "", "")]
    for name, settings in wanted.items():
        began = time.process_time()
        distilled = spdcompile.distill(
            compiled, training, tp=args.tp, spd_mask=plan, settings=settings
        )
        seconds = time.process_time() - began
        steps = sum(entry.steps for entry in distilled.history)
        rows.append((name, added(dict(distilled.tensors)), steps, f"{seconds:.0f}"))
        print(*rows[-1], sep=" | ", flush=True)
    headers = ["settings", "perplexity added", "steps in all", "CPU seconds"]
    print("\n" + tabulate(rows, headers, tablefmt="pipe", disable_numparse=True))
    print(
        f"\ntp {args.tp}, dropped: {args.drop}; {args.steps} steps a segment, {args.chunks} chunks "
        f"of {LENGTH} tokens and {args.sampled} sampled, {args.heldout} held-out; "
        f"{platform.machine()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {date.today()}"
    )


if __name__ == "__main__":
    main()
