"""What dropping attention points costs a mixture of experts whose router reads the replicated part.

    python examples/train_tiny_lm.py --work /tmp/tinylm --family mixtral --minutes 15
    python examples/measure_router.py /tmp/tinylm/mixtral

The folder holds the model and its texts, calibration.txt and heldout.txt. Layers are dropped in the
order of their sensitivity. Perplexity is zero-shot and after block-to-block distillation.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import spdcompile
from spdcompile.runtime.data import perplexity

SHARES = (25, 50, 75, 100)
CHUNKS = {"calibration": 32, "heldout": 32}
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=60, help="distillation steps a block")
    args = parser.parse_args()
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = {
        name: spdcompile.chunks_of(
            (args.model / f"{name}.txt").read_text("utf-8"), tokenizer, length=LENGTH, count=count
        )
        for name, count in CHUNKS.items()
    }
    rows = [row for tp in args.tp for row in measure(model, tokens, tp, args.steps)]
    headers = ["tp", "dropped", "layers", "all-reduces", "zero-shot", "after B2B"]
    print(tabulate(rows, headers, tablefmt="pipe"))
    print(
        f"\n{model.config.model_type}, {model.num_parameters():,} parameters; perplexity of "
        f"{CHUNKS['heldout']} held-out chunks of {LENGTH} tokens; {platform.machine()}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {date.today()}, {time.perf_counter() - began:.0f} s"
    )


def measure(
    model: PreTrainedModel, tokens: dict[str, Tensor], tp: int, steps: int
) -> list[tuple[object, ...]]:
    """One row for each share of the layers that lose their attention point."""
    compiled = spdcompile.compile(model, tp=tp, router="replicated", backend="eager")
    kept = perplexity(compiled.executor, tokens["heldout"])
    count = model.config.num_hidden_layers
    rows: list[tuple[object, ...]] = [(tp, "0 %", "", 2 * count, f"{kept:.2f}", f"{kept:.2f}")]
    attention = spdcompile.CalibrateSettings(points=spdcompile.Points.ATTENTION)
    found = spdcompile.calibrate(
        compiled, tokens["calibration"][::2], tp=tp, settings=attention, progress=False
    )
    for share in SHARES:
        points = found.least_sensitive(count * share // 100)
        layers = [layer for layer, _ in points]
        mask = [layer in layers for layer in range(count)]
        dropped = compiled.with_mask(mask)
        zero_shot = perplexity(dropped.executor, tokens["heldout"])
        settings = spdcompile.DistillSettings(steps=steps)
        distilled = spdcompile.distill(
            compiled,
            tokens["calibration"],
            tp=tp,
            spd_mask=mask,
            settings=settings,
            progress=False,
        )
        recovered = perplexity(dropped.with_weights(distilled.tensors).executor, tokens["heldout"])
        cells = [f"{v:.2f} ({100 * (v / kept - 1):+.1f}%)" for v in (zero_shot, recovered)]
        names = ",".join(map(str, layers))
        rows.append((tp, f"{share} %", names, 2 * count - len(layers), *cells))
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
