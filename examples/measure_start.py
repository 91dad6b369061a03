"""Measures the first and the second start of a model, to its first token.

    python examples/measure_start.py [--rounds 3] [--tp 2] [--random 32x256 ...] [--ranks]

Each start is a new process: it imports torch, compiles or loads, and generates one token. The first
one has no kernels and compiles the model from its directory; the second one loads what the first
saved. Rounds alternate, over the bundled model and random Llamas of so many layers of such a width.
With --ranks each start is a torchrun of tp processes, of which the first is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUNDLED = Path(__file__).parent / "models" / "tiny-llama"
STEPS = ("import", "compile or load", "first token")


def make_random(folder: Path, size: str) -> None:
    """Writes a random Llama; `size` is LAYERSxWIDTH, with an MLP of 2.75 times that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width = map(int, size.split("x"))
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        vocab_size=8192,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def start_main(how: str, source: str, target: str, tp: int, blocks: int) -> None:
    """Starts once; prints the seconds of each step as JSON."""
    begin = time.perf_counter()
    import torch

    import spdcompile

    torch.set_num_threads(1)
    times = [time.perf_counter()]
    if how == "first":
        compiled = spdcompile.compile(source, tp=tp, blocks_per_graph=blocks)
    else:
        compiled = spdcompile.load(target, blocks_per_graph=blocks)
    times.append(time.perf_counter())
    tokens = compiled.generate(torch.arange(8)[None], max_new_tokens=1, do_sample=False)
    times.append(time.perf_counter())
    if how == "first":
        compiled.save(target)
    seconds = [after - before for before, after in zip([begin, *times], times, strict=False)]
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"seconds": seconds, "token": int(tokens[0, -1])}))


def measured(
    how: str, source: Path, folder: Path, options: argparse.Namespace
) -> dict[str, object]:
    """What one start took."""
    tp = options.tp
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp}"]
    command = [sys.executable, *(torchrun if options.ranks else []), __file__]
    command += ["--being", how, str(source), str(folder / "saved")]
    environment = {**os.environ, "SPD_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    ended = subprocess.run(
        [*command, "--tp", str(tp), "--blocks-per-graph", str(options.blocks_per_graph)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(ended.stdout.splitlines()[-1])


def table(name: str, source: Path, options: argparse.Namespace) -> list[list[object]]:
    """Rows: each step of both starts, their sums, and the ratio round by round."""
    found: dict[str, list[list[float]]] = {"first": [], "second": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            tokens = set()
            for how, times in found.items():
                start = measured(how, source, Path(folder), options)
                times.append(start["seconds"])
                tokens.add(start["token"])
            assert len(tokens) == 1, "both starts give the same token"
    rows = []
    for how, times in found.items():
        steps = [statistics.median(column) for column in zip(*times, strict=True)]
        rows.append([name, how, *steps, statistics.median(map(sum, times)), None])
    ratios = [sum(b) / sum(a) for a, b in zip(*found.values(), strict=True)]
    rows[-1][-1] = statistics.median(ratios)
    return rows


def main() -> None:
    """Parses the command line, and measures or is one of the starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--random", nargs="*", default=["32x256"], metavar="LAYERSxWIDTH")
    parser.add_argument("--ranks", action="store_true", help="one process a rank, by torchrun")
    parser.add_argument("--blocks-per-graph", type=int, default=1, metavar="N")
    parser.add_argument("--being", nargs=3, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.being:
        start_main(*settings.being, settings.tp, settings.blocks_per_graph)
        return
    import torch
    import transformers
    from tabulate import tabulate

    rows = table("bundled, 8 layers", BUNDLED, settings)
    for size in settings.random:
        with tempfile.TemporaryDirectory() as folder:
            make_random(Path(folder), size)
            rows += table(f"random, {size}", Path(folder), settings)
    headers = ["model", "start", *(f"{step} (s)" for step in STEPS), "all (s)", "second / first"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=(*[".1f"] * 6, ".3f")))
    print(
        f"\ntp {settings.tp}, {'torchrun' if settings.ranks else 'local executor'}, "
        f"blocks per graph {settings.blocks_per_graph}, {settings.rounds} rounds, medians; "
        f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}"
    )


if __name__ == "__main__":
    main()
