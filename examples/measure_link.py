"""Measures what dropped sync points save over a slow link, and what they were predicted to save.

    sudo python examples/measure_link.py [--rates 1gbit 200mbit] [--delay MS] [--rounds 30]
        [--transport process-group]

Two ranks run in two network namespaces of this machine, joined by slow_link.py. In every round
each mask runs a prompt and a token in turn. The baseline is lossless: no mask, and sums over
sockets, or by gloo in whichever way is faster on that link. The prediction is arithmetic: as many
collectives as the mask drops, times what one takes by itself, as far from the one before as in a
program.
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
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from slow_link import slow_link
from tabulate import tabulate
from torch import Tensor, fx
from transformers import LlamaConfig, LlamaForCausalLM

import spdcompile
from spdcompile.passes.ops import SYNC
from spdcompile.runtime.collectives import Collectives, lower_collectives

PROMPT, PORT, TP = 128, 29431, 2
SIZES = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1408}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192}
LAYERS = SIZES["num_hidden_layers"]
STEPS = {"prompt": PROMPT, "token": 1}
SUMS = 8  # that are timed in a round, as far from each other as in a program


def masks() -> dict[str, spdcompile.Plan]:
    """Nothing; attention points by quarters; then MLP points too, all but the last."""

    def plan(attention: int, mlp: int = 0) -> spdcompile.Plan:
        dropped = {(layer, "attn") for layer in range(attention)}
        return spdcompile.Plan(TP, LAYERS, frozenset(dropped | {(i, "mlp") for i in range(mlp)}))

    quarters = {f"attention {25 * n} %": plan(LAYERS * n // 4) for n in range(1, 5)}
    every = {"attention 100 %, MLP 50 %": plan(LAYERS, LAYERS // 2)}
    return {"nothing": plan(0), **quarters, **every, "all but the last": plan(LAYERS, LAYERS - 1)}


# ---- one rank


def rank_main(result: Path, rounds: int, transport: str) -> None:
    """Measures all masks; rank 0 writes what it found."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    first = spdcompile.compile(model, tp=TP, transport=transport)
    programs = {name: first.with_mask(plan) for name, plan in masks().items()}
    prompt = torch.randint(3, SIZES["vocab_size"], (1, PROMPT))
    exchange = sum_over_ranks(first.executor.collectives)
    runs: dict[str, Callable[[], object]] = {}
    for step, tokens in STEPS.items():
        for name, program in programs.items():
            runs[f"{step}/{name}"] = running(program, prompt, tokens)
        part = torch.ones(1, tokens, SIZES["hidden_size"])
        runs[f"{step}/sum"] = lambda part=part: exchange(part)
    times: dict[str, list[float]] = {key: [] for key in runs}
    for number in range(rounds + 2):
        between = {step: 0.0 for step in STEPS}
        for key, run in runs.items():
            step, name = key.split("/")
            if name == "sum":
                seconds = timed(run, SUMS, between[step])
            else:
                seconds = timed(run)
                between[step] = seconds / (2 * LAYERS)  # of the program with the fewest in the end
            if number >= 2:  # the first ones compile
                times[key].append(seconds)
    if dist.get_rank() == 0:
        kept = {name: each.report.collectives.all_reduces for name, each in programs.items()}
        sums = first.executor.collectives.name
        result.write_text(json.dumps({"times": times, "kept": kept, "sums": sums}))
    dist.barrier()
    dist.destroy_process_group()


def sum_over_ranks(collectives: Collectives) -> fx.GraphModule:
    """The sum as the model's blocks have it."""
    graph = fx.Graph()
    graph.output(graph.call_function(SYNC, (graph.placeholder("part"), "attn")))
    module = fx.GraphModule({}, graph)
    lower_collectives(module, collectives)
    return module


def running(program: spdcompile.CompiledModel, prompt: Tensor, tokens: int) -> Callable[[], object]:
    """Runs the prompt, or one token behind it."""
    cache = program.new_cache(1, PROMPT + 1)
    program(prompt, past_key_values=cache, logits_to_keep=1)

    def run() -> None:
        cache.crop(PROMPT - 1 if tokens == 1 else 0)
        program(prompt[:, :tokens], past_key_values=cache, logits_to_keep=1)

    return run


def timed(run: Callable[[], object], repeats: int = 1, apart: float = 0.0) -> float:
    """Seconds of one of so many, from when both ranks are there.

    Args:
        apart: seconds between them in which a rank computes, and the link is at rest.
    """
    dist.barrier()
    taken = 0.0
    for _ in range(repeats):
        until = time.perf_counter() + apart
        while time.perf_counter() < until:
            pass
        began = time.perf_counter()
        run()
        taken += time.perf_counter() - began
    return taken / repeats


# ---- both ranks on a link


def measured(rate: str, delay: float, rounds: int, transport: str) -> dict[str, Any]:
    """What two ranks on a link found."""
    with slow_link(rate, delay) as ends, tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--rank", str(result), "--rounds", str(rounds)]
        command += ["--transport", transport]
        common = {"WORLD_SIZE": str(TP), "MASTER_ADDR": ends[0].address, "MASTER_PORT": str(PORT)}
        common |= {"OMP_NUM_THREADS": "1"}
        ranks = []
        for rank, end in enumerate(ends):
            own = {"RANK": str(rank), "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": end.interface}
            start = ["ip", "netns", "exec", end.namespace, *command]
            ranks.append(subprocess.Popen(start, env={**os.environ, **common, **own}))
        codes = [process.wait(timeout=1200) for process in ranks]
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        return json.loads(result.read_text())


def rows_of(link: str, found: dict[str, Any]) -> list[list[str]]:
    """Measured and predicted gain of each mask, by medians."""
    times = {key: statistics.median(values) for key, values in found["times"].items()}
    rows = []
    for name, kept in found["kept"].items():
        row = [link, name, str(kept)]
        for step in STEPS:
            plain, one = times[f"{step}/nothing"], times[f"{step}/sum"]
            gain = 1 - times[f"{step}/{name}"] / plain
            predicted = (found["kept"]["nothing"] - kept) * one / plain
            row += [f"{1000 * times[f'{step}/{name}']:.1f}"]
            row += [f"{gain:.1%}", f"{gain / predicted:.2f}"] if predicted else ["", ""]
        rows.append(row)
    one = [(f"{1000 * times[f'{step}/sum']:.2f}", "", "") for step in STEPS]
    return [*rows, [link, f"one sum by itself, {found['sums']}", "", *one[0], *one[1]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "200mbit"])
    parser.add_argument("--delay", type=float, help="one-way, in ms: each rate with it, too")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--transport", default="sockets", choices=("sockets", "process-group"))
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_main(args.rank, args.rounds, args.transport)
        return
    links = {rate: (rate, 0.0) for rate in args.rates}
    if args.delay:
        links |= {f"{rate}, {args.delay:g} ms": (rate, args.delay / 1e3) for rate in args.rates}
    all_found = {name: measured(*link, args.rounds, args.transport) for name, link in links.items()}
    rows = [row for name, found in all_found.items() for row in rows_of(name, found)]
    headers = ["link", "dropped", "sums left"]
    headers += [f"{step}{of}" for step in STEPS for of in (", ms", ": gain", ", of predicted")]
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True))
    print(
        f"\nLlama of {LAYERS} layers, width {SIZES['hidden_size']}, random weights, float32, tp "
        f"{TP}; a prompt of {PROMPT} tokens, a token behind it; medians of {args.rounds} rounds; "
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {date.today()}"
    )
    if args.json:
        args.json.write_text(json.dumps(all_found) + "\n")


if __name__ == "__main__":
    main()
