"""The main job, on the bundled model: report, exactness, sensitivity, recovery, two processes.

    python examples/demo.py [--quick]

Ends with one table, which it also writes to out/demo.md and out/demo.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tabulate import tabulate
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import spdcompile
from spdcompile.report.text import render
from spdcompile.runtime.data import perplexity

HERE = Path(__file__).parent
MODEL = HERE / "models" / "tiny-llama"
SHARES = (0, 25, 50, 75, 100)
TP = 8


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the quick form is for continuous integration."""

    length: int = 256
    calibration: int = 32
    heldout: int = 64
    sensitivity: int = 16
    steps: int = 60
    rounds: int = 40
    backend: str = "inductor"


QUICK = Sizes(calibration=8, heldout=8, sensitivity=4, steps=8, rounds=5, backend="eager")


@contextmanager
def step(title: str) -> Iterator[None]:
    """One progress line before, one after, with the seconds between."""
    print(f"\n== {title}", flush=True)
    began = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - began:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of everything, no Inductor")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    sizes = QUICK if args.quick else Sizes()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokens = load_tokens(sizes)

    with step(f"trace and report, tp {TP}, attention dropped in layers 1-3"):
        compiled = spdcompile.compile(model, tp=TP, backend="eager")
        mask = [layer in (1, 2, 3) for layer in range(layers(model))]
        print(render(compiled.with_mask(mask).report))
    with step(f"tp {TP} with an empty mask against the unsharded model"):
        error = largest_error(compiled, model, tokens["heldout"][:2])
        print(f"   largest difference, relative to the largest logit: {error:.1e}")
        assert error < 1e-5, "an empty mask must keep the model's numbers"
    with step("sensitivity of each block"):
        chosen = tokens["calibration"][: sizes.sensitivity]
        attention = spdcompile.CalibrateSettings(points=spdcompile.Points.ATTENTION)
        sensitivity = spdcompile.calibrate(compiled, chosen, tp=TP, settings=attention)
        print_sensitivity(sensitivity)
    with step("perplexity by share of attention sync points dropped, zero-shot and after B2B"):
        masks = masks_for(sensitivity, layers(model))
        rows = [recover(compiled, share, masks[share], tokens, sizes) for share in SHARES]
    with step("two processes under torchrun"):
        ranks = run_ranks(model, masks, args.out, sizes)
        rows = [row | ranks["rows"][str(row["share"])] for row in rows]
        print(f"   generated, half of the attention sync points dropped: {ranks['text']!r}")
    write_results(rows, error, sensitivity, sizes, time.perf_counter() - began, args.out)


def layers(model: PreTrainedModel) -> int:
    return model.config.num_hidden_layers


def load_tokens(sizes: Sizes) -> dict[str, Tensor]:
    """Calibration and held-out chunks, int64 [chunks, length]."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return {
        name: spdcompile.chunks_of(
            (MODEL / f"{name}.txt").read_text(encoding="utf-8"),
            tokenizer,
            length=sizes.length,
            count=getattr(sizes, name),
        )
        for name in ("calibration", "heldout")
    }


def largest_error(compiled: spdcompile.CompiledModel, model: PreTrainedModel, ids: Tensor) -> float:
    """Largest difference of the logits, relative to the model's own largest."""
    with torch.no_grad():
        expected = model(ids).logits
    return float((compiled(ids).logits - expected).abs().max() / expected.abs().max())


def print_sensitivity(sensitivity: spdcompile.Sensitivity) -> None:
    found = sensitivity.found[spdcompile.Method.CUMULATIVE]
    rows = [
        (layer, f"{quality.perplexity:.3f}", f"{score:+.3f}")
        for (layer, _), quality, score in zip(
            sensitivity.points, found, sensitivity.scores, strict=True
        )
    ]
    print(tabulate(rows, ["block i", "perplexity, i..L dropped", "s_i"], disable_numparse=True))
    print(
        f"   kept whole: {sensitivity.undropped.perplexity:.3f}; "
        f"{sensitivity.block_evaluations} block evaluations instead of "
        f"{sensitivity.naive_block_evaluations}"
    )


def masks_for(sensitivity: spdcompile.Sensitivity, num_layers: int) -> dict[int, list[bool]]:
    """For each share, a mask that drops the least sensitive blocks' points."""
    masks = {}
    for share in SHARES:
        chosen = sensitivity.least_sensitive(round(num_layers * share / 100))
        masks[share] = [(layer, "attn") in chosen for layer in range(num_layers)]
    return masks


def recover(
    compiled: spdcompile.CompiledModel,
    share: int,
    mask: list[bool],
    tokens: dict[str, Tensor],
    sizes: Sizes,
) -> dict[str, Any]:
    """Held-out perplexity with a mask, before and after block-to-block distillation."""
    dropped = compiled.with_mask(mask)
    zero_shot = recovered = perplexity(dropped.executor, tokens["heldout"])
    if any(mask):
        settings = spdcompile.DistillSettings(steps=sizes.steps, batch_size=4)
        distilled = spdcompile.distill(
            compiled, tokens["calibration"], tp=TP, spd_mask=mask, settings=settings
        )
        student = dropped.with_weights(distilled.tensors)
        recovered = perplexity(student.executor, tokens["heldout"])
    print(f"   {share:3d} % dropped: perplexity {zero_shot:.2f}, after B2B {recovered:.2f}")
    return {
        "share": share,
        "layers": [layer for layer, drop in enumerate(mask) if drop],
        "all_reduces": dropped.report.collectives.all_reduces,
        "zero_shot": zero_shot,
        "distilled": recovered,
    }


def run_ranks(
    model: PreTrainedModel, masks: dict[int, list[bool]], out: Path, sizes: Sizes
) -> dict[str, Any]:
    """Runs demo_ranks.py under torchrun and compares its logits with the local executor's."""
    plans = {
        str(share): spdcompile.Plan(
            2, layers(model), frozenset((layer, "attn") for layer, drop in enumerate(mask) if drop)
        )
        for share, mask in masks.items()
    }
    (out / "plans.json").write_text(json.dumps({k: p.to_dict() for k, p in plans.items()}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "demo_ranks.py"), "--model", str(MODEL), "--out", str(out)]
    command += ["--rounds", str(sizes.rounds), "--backend", sizes.backend]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    measured = json.loads((out / "ranks.json").read_text())
    logits = [load_file(out / f"logits-rank{rank}.safetensors") for rank in range(2)]
    local = spdcompile.compile(model, tp=2, backend="eager")
    rows = {share: {"error": 0.0, "ms": {}} for share in plans}
    for key, median in measured["medians"].items():
        share, transport = key.split("/")
        mine, other = logits[0][key], logits[1][key]
        assert torch.equal(mine, other), "both ranks must hold the same logits"
        expected = local.with_mask(plans[share])(logits[0]["input_ids"]).logits
        error = float((mine - expected).abs().max() / expected.abs().max())
        assert error < 1e-5, "the distributed executor must agree with the local one"
        rows[share]["error"] = max(rows[share]["error"], error)
        rows[share]["ms"][measured["transports"][transport]] = median
    return {"rows": rows, "text": measured["text"]}


def write_results(
    rows: list[dict[str, Any]],
    error: float,
    sensitivity: spdcompile.Sensitivity,
    sizes: Sizes,
    seconds: float,
    out: Path,
) -> None:
    """Prints the table and writes it as Markdown and JSON."""
    base = rows[0]["zero_shot"]
    headers = ["dropped", "layers", "all-reduces", "perplexity", "after B2B"]
    headers += [*(f"ms, {name}" for name in rows[0]["ms"]), "against local"]
    cells = [
        (
            f"{row['share']} %",
            ",".join(map(str, row["layers"])) or "-",
            row["all_reduces"],
            f"{row['zero_shot']:.2f} ({row['zero_shot'] / base - 1:+.1%})",
            f"{row['distilled']:.2f} ({row['distilled'] / base - 1:+.1%})",
            *(f"{ms:.1f} ({ms / rows[0]['ms'][name] - 1:+.0%})" for name, ms in row["ms"].items()),
            f"{row['error']:.0e}",
        )
        for row in rows
    ]
    note = (
        f"tiny-llama, attention sync points, least sensitive first; perplexity at tp {TP} on "
        f"{sizes.heldout} held-out chunks of {sizes.length} tokens; empty mask against the "
        f"unsharded model {error:.0e}. ms: tp 2, two processes of one machine, one forward pass of "
        f"64 tokens, float32, {sizes.backend}, median of {sizes.rounds} interleaved rounds. "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, "
        f"{time.strftime('%Y-%m-%d')}, {seconds:.0f} s in all."
    )
    table = tabulate(cells, headers, tablefmt="pipe", disable_numparse=True)
    (out / "demo.md").write_text(f"{table}\n\n{note}\n", encoding="utf-8")
    data = {"rows": rows, "error": error, "scores": sensitivity.scores, "note": note}
    (out / "demo.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table}\n\n{note}\n\nwritten to {out / 'demo.md'} and {out / 'demo.json'}")


if __name__ == "__main__":
    main()
