"""What `tune` finds for budgets that say how many sync points go and what that may cost.

    python examples/measure_targets.py [--only NAME ...] [--sampled 1200] [--logit-steps 900]

Each budget is tuned from the calibration text alone, the end of which chooses between candidates;
what came out is then judged on the held-out text, which tuning has not seen. With --work, what is
measured is kept there, so that a run that was killed goes on; then its time is not the whole one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer

import spdcompile
from spdcompile import Budget, DistillSettings, Points, Tuned, TuneSettings
from spdcompile.runtime.data import perplexity
from spdcompile.tuning.ladder import Effort, Rung

MODEL = Path(__file__).parent / "models" / "tiny-llama"
TP, LENGTH, ALL_REDUCES = 8, 256, 16


@dataclass(frozen=True, slots=True)
class Target:
    """How many points are to go, and what that may cost."""

    points: Points
    count: int
    max_loss: float

    @property
    def budget(self) -> Budget:
        return Budget(max_loss=self.max_loss, min_saved=self.count / ALL_REDUCES)


TARGETS = {
    "6 of 8 attention": Target(Points.ATTENTION, 6, 0.001),
    "8 of 8 attention": Target(Points.ATTENTION, 8, 0.004),
    "9 of 16": Target(Points.ALL, 9, 0.004),
    "12 of 16": Target(Points.ALL, 12, 0.01),
    "15 of 16": Target(Points.ALL, 15, 0.1),
}
HEADERS = {
    "points": "points dropped",
    "allowed": "allowed",
    "zero_shot": "zero-shot",
    "recovered": "recovered",
    "recovery": "by",
    "minutes": "minutes",
    "processor_minutes": "of processor time",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--steps", type=int, default=60, help="a segment")
    parser.add_argument("--logit-steps", type=int, default=900, help="in the end, together")
    parser.add_argument("--sampled", type=int, default=1200, help="chunks that the model writes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--heldout", type=int, help="chunks of held-out text (all)")
    parser.add_argument("--work", type=Path, help="keep what is measured there")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = {
        name: spdcompile.chunks_of(
            (MODEL / f"{name}.txt").read_text("utf-8"), tokenizer, length=LENGTH, count=count
        )
        for name, count in (("calibration", None), ("heldout", args.heldout))
    }
    settings = TuneSettings(
        distill=DistillSettings(steps=args.steps, logit_steps=args.logit_steps),
        effort=Effort(rungs=(Rung.ZERO_SHOT, Rung.DISTIL)),
        sampled=args.sampled,
        resume=args.work,
    )
    rows = []
    for name in args.only:
        rows.append(_measured(name, texts["calibration"], texts["heldout"], settings))
        print(*rows[-1].values(), sep=" | ", flush=True)
    conditions = (
        f"tp {TP}; {args.steps} steps a segment and {args.logit_steps} for the logits, of 4 chunks "
        f"of {LENGTH} tokens; {len(texts['calibration'])} calibration chunks, {args.sampled} "
        f"sampled; {len(texts['heldout'])} held-out chunks; {platform.machine()}, "
        f"{os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {date.today()}"
    )
    shown = [{HEADERS[key]: row[key] for key in HEADERS} for row in rows]
    print("\n" + tabulate(shown, headers="keys", tablefmt="pipe", disable_numparse=True))
    print(f"\n{conditions}")
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=2) + "\n")


def _measured(
    name: str, calibration: torch.Tensor, heldout: torch.Tensor, settings: TuneSettings
) -> dict[str, Any]:
    """One budget: the plan that is found for it, and what it costs on text of its own."""
    target = TARGETS[name]
    began, used = time.perf_counter(), time.process_time()
    tuned = spdcompile.tune(
        MODEL,
        calibration,
        tp=TP,
        budget=target.budget,
        points=target.points,
        settings=settings,
    )
    minutes = (time.perf_counter() - began) / 60
    processor_minutes = (time.process_time() - used) / 60
    zero_shot, recovered = _added(tuned, heldout)
    return {
        "points": name,
        "allowed": f"{target.max_loss:+.1%}",
        "zero_shot": f"{zero_shot:+.2%}",
        "recovered": f"{recovered:+.2%}",
        "recovery": tuned.recovery.value,
        "minutes": f"{minutes:.0f}",
        "processor_minutes": f"{processor_minutes:.0f}",
        "on_calibration_text": f"{tuned.increase:+.2%}",
        "dropped": sorted(f"{layer}.{point}" for layer, point in tuned.plan.dropped),
    }


def _added(tuned: Tuned, heldout: torch.Tensor) -> tuple[float, float]:
    """Perplexity added zero-shot and recovered, as shares."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    compiled = spdcompile.compile(model, tp=TP, backend="eager", executor="local")
    dropped = compiled.with_mask(tuned.plan)
    kept = perplexity(compiled.executor, heldout)
    tensors = ({}, {name: tensor.float() for name, tensor in tuned.tensors.items()})
    zero_shot, recovered = (
        perplexity(dropped.with_weights(each).executor, heldout) / kept - 1 for each in tensors
    )
    return zero_shot, recovered


if __name__ == "__main__":
    main()
