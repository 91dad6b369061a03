"""Estimated latencies beside measured ones: three sizes, two links, three masks, two steps.

First the constants of this machine, then the comparison, with nothing else running:

    python -m spdcompile.cli measure-machine --ranks 2 --output machine.json
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 \
        examples/validate_estimate.py --machine machine.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import spdcompile
from spdcompile.compiled import CompiledModel
from spdcompile.estimate.estimates import estimate_of, steps_of
from spdcompile.estimate.machines import Machines
from spdcompile.estimate.structure import Structure
from spdcompile.plan import Plan, attention_points

WIDTHS, LAYERS, LENGTH = (256, 512, 1024), 4, 128
TRANSPORTS = {"shared-memory": "shared-memory", "gloo": "process-group"}
MASKS = {
    "nothing": [False] * LAYERS,
    "half": [layer % 2 == 0 for layer in range(LAYERS)],
    "all attention": [True] * LAYERS,
}
BOUND = 0.15


@dataclass(frozen=True)
class Row:
    """One step of one program; times in seconds.

    Args:
        measured: median of all rounds; `fast` is the tenth percentile.
    """

    width: int
    link: str
    mask: str
    step: str
    measured: float
    fast: float
    estimated: float

    @property
    def error(self) -> float:
        return self.estimated / self.measured - 1


def main() -> int:
    """Measures, prints and, if asked, writes; 1 if an error is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", type=Path, required=True, help="what measure-machine wrote")
    parser.add_argument("--device", default="cpu", help="name of the device in it")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    machines = Machines.load(args.machine)
    rows = [row for width in args.widths for row in compare(width, machines, args)]
    is_first = dist.get_rank() == 0
    dist.barrier()
    dist.destroy_process_group()
    if not is_first:
        return 0  # torchrun would end the first rank while it writes
    print(report(rows))
    if args.json:
        data = [{**asdict(row), "error": row.error} for row in rows]
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0 if all(abs(row.error) <= BOUND for row in rows) else 1


def compare(width: int, machines: Machines, args: argparse.Namespace) -> list[Row]:
    """All links, masks and steps of one model, in turn in every round."""
    model = model_of(width)
    programs = {}
    for link, transport in TRANSPORTS.items():
        compiled = spdcompile.compile(model, tp=2, transport=transport)
        for mask, dropped in MASKS.items():
            for step, run in steps(compiled.with_mask(dropped)).items():
                programs[link, mask, step] = run
    times: dict[tuple[str, str, str], list[float]] = {key: [] for key in programs}
    for number in range(args.rounds + 2):
        for key, run in programs.items():
            dist.barrier()
            began = time.perf_counter()
            run()
            if number >= 2:  # the first calls compile
                times[key].append(time.perf_counter() - began)
    structure, device = Structure(model), machines.device(args.device)
    rows = []
    for link in TRANSPORTS:
        for mask, dropped in MASKS.items():
            plan = Plan(2, LAYERS, attention_points(dropped, LAYERS))
            sizes = steps_of(1, LENGTH, LENGTH)
            found = estimate_of(structure, plan, device, machines.link(link), sizes)
            for each in found.steps:
                own = sorted(times[link, mask, each.name])
                numbers = (statistics.median(own), own[len(own) // 10], each.dropped.total)
                rows.append(Row(width, link, mask, each.name, *numbers))
    return rows


def model_of(width: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        vocab_size=8192,
        max_position_embeddings=2 * LENGTH,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def steps(compiled: CompiledModel) -> dict[str, Callable[[], object]]:
    """Calls of a program: a prompt, and one token after a text one shorter."""
    ids = torch.ones((1, LENGTH), dtype=torch.long)
    prompt, text = (compiled.new_cache(1, LENGTH) for _ in range(2))
    compiled(ids[:, 1:], past_key_values=text)
    lengths = text.lengths

    def prefill() -> None:
        prompt.reset()
        compiled(ids, past_key_values=prompt, logits_to_keep=1)

    def decode() -> None:
        text.set_lengths(lengths)
        compiled(ids[:, :1], past_key_values=text, logits_to_keep=1)

    return {"prefill": prefill, "decode": decode}


def report(rows: list[Row]) -> str:
    """The table, and how many rows are within the bound."""
    cells = [
        (
            *(row.width, row.link, row.mask, row.step),
            *(f"{1e3 * seconds:.2f}" for seconds in (row.measured, row.fast, row.estimated)),
            f"{row.error:+.1%}",
            f"{row.estimated / row.fast - 1:+.1%}",
        )
        for row in rows
    ]
    headers = ["hidden", "link", "dropped", "step", "median ms", "p10 ms", "estimated ms"]
    headers += ["error", "error of p10"]
    within = sum(abs(row.error) <= BOUND for row in rows)
    worst = max(abs(row.error) for row in rows)
    table = tabulate(cells, headers, tablefmt="github", disable_numparse=True)
    return (
        f"{table}\n\n{within} of {len(rows)} within {BOUND:.0%}; the largest error is {worst:.1%}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
