"""Measures the first and the second start of a model, to its first token.

    python examples/measure_start.py [--rounds 3] [--tp 2]

Each start is a new process: it imports torch, compiles or loads, and generates one token. The first
one has no kernels and compiles the model from its directory; the second one loads what the first
saved. Rounds alternate, over the bundled model and a random one of 32 layers.
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


def make_deep(folder: Path) -> None:
    """Writes a random Llama of 32 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=32,
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8192,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def start_main(how: str, source: str, target: str, tp: int) -> None:
    """Starts once; prints the seconds of each step as JSON."""
    begin = time.perf_counter()
    import torch

    import spdcompile

    torch.set_num_threads(1)
    times = [time.perf_counter()]
    compiled = spdcompile.compile(source, tp=tp) if how == "first" else spdcompile.load(target)
    times.append(time.perf_counter())
    tokens = compiled.generate(torch.arange(8)[None], max_new_tokens=1, do_sample=False)
    times.append(time.perf_counter())
    if how == "first":
        compiled.save(target)
    seconds = [after - before for before, after in zip([begin, *times], times, strict=False)]
    print(json.dumps({"seconds": seconds, "token": int(tokens[0, -1])}))


def measured(how: str, source: Path, folder: Path, tp: int) -> dict[str, object]:
    """What one start took."""
    command = [sys.executable, __file__, "--start", how, str(source), str(folder / "saved")]
    environment = {**os.environ, "SPD_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    ended = subprocess.run(
        [*command, "--tp", str(tp)], env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(ended.stdout.splitlines()[-1])


def table(name: str, source: Path, rounds: int, tp: int) -> list[list[object]]:
    """Rows: each step of both starts, their sums, and the ratio round by round."""
    found: dict[str, list[list[float]]] = {"first": [], "second": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            tokens = set()
            for how, times in found.items():
                start = measured(how, source, Path(folder), tp)
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
    parser.add_argument("--start", nargs=3, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.start:
        start_main(*settings.start, settings.tp)
        return
    import torch
    import transformers
    from tabulate import tabulate

    with tempfile.TemporaryDirectory() as folder:
        make_deep(Path(folder))
        rows = table("bundled, 8 layers", BUNDLED, settings.rounds, settings.tp)
        rows += table("random, 32 layers", Path(folder), settings.rounds, settings.tp)
    headers = ["model", "start", *(f"{step} (s)" for step in STEPS), "all (s)", "second / first"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=(*[".1f"] * 6, ".3f")))
    print(
        f"\ntp {settings.tp}, local executor, {settings.rounds} rounds, medians; "
        f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}"
    )


if __name__ == "__main__":
    main()
