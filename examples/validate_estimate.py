"""Estimated latencies beside measured ones: three sizes, three links, three masks, two steps.

First the constants of this machine, then the comparison, with nothing else running:

    python -m spdcompile.cli measure-machine --ranks 2 --output machine.json
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 \
        examples/validate_estimate.py --machine machine.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import spdcompile
from spdcompile.compiled import CompiledModel
from spdcompile.estimate.estimates import estimate_of, steps_of
from spdcompile.estimate.links import Link, Timed, fitted
from spdcompile.estimate.machines import Machines
from spdcompile.estimate.measuring_links import LINKS, burst, trials_of
from spdcompile.estimate.structure import Structure
from spdcompile.estimate.timing import typical
from spdcompile.plan import Plan, attention_points

WIDTHS, LAYERS, LENGTH = (256, 512, 1024), 4, 128
MASKS = {
    "nothing": [False] * LAYERS,
    "half": [layer % 2 == 0 for layer in range(LAYERS)],
    "all attention": [True] * LAYERS,
}
IN_A_ROW = {"prefill": 5, "decode": 20}
BOUND = 0.15


@dataclass(frozen=True)
class Row:
    """One step of one program; times in seconds.

    Args:
        measured: mean of all rounds but the slowest tenth, as constants are; `fast` is the tenth
            percentile.
        estimated: from the constants of a machine that was measured before.
        then: with collectives as long as they were in the same rounds.
    """

    width: int
    link: str
    mask: str
    step: str
    measured: float
    fast: float
    estimated: float
    then: float

    @property
    def errors(self) -> tuple[float, float]:
        """Relative, of both estimates."""
        return self.estimated / self.measured - 1, self.then / self.measured - 1


def main() -> int:
    """Measures, prints and, if asked, writes; 1 if an error is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", type=Path, required=True, help="what measure-machine wrote")
    parser.add_argument("--device", default="cpu", help="name of the device in it")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--json", type=Path, help="file to write what is found to")
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
        (source,) = machines.device(args.device).sources
        data = {
            "machine": f"Constants {source}; steps on {date.today()}, {args.rounds} rounds.",
            "rows": [{**asdict(row), "errors": row.errors} for row in rows],
            "report": report(rows),
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0 if all(abs(row.errors[1]) <= BOUND for row in rows) else 1


def compare(width: int, machines: Machines, args: argparse.Namespace) -> list[Row]:
    """All links, masks and steps of one model, in turn in every round."""
    model = model_of(width)
    programs = {}
    for link, transport in LINKS.items():
        compiled = spdcompile.compile(model, tp=2, transport=transport.value)
        for mask, dropped in MASKS.items():
            for step, run in steps(compiled.with_mask(dropped)).items():
                programs[link, mask, step] = run
    times: dict[tuple[str, str, str], list[float]] = {key: [] for key in programs}
    trials = trials_of(dist.group.WORLD)
    taken = {(link, i): [] for link, each in trials.items() for i in range(len(each))}
    for number in range(args.rounds + 2):
        for key, run in programs.items():
            seconds = in_a_row(run, IN_A_ROW[key[-1]])
            if number >= 2:  # the first calls compile
                times[key].append(seconds)
        for link, i in taken:
            taken[link, i].append(burst(trials[link][i]))
    structure, device = Structure(model), machines.device(args.device)
    rows = []
    for link in LINKS:
        timed = [
            Timed(trial.kind, 2, trial.num_bytes, typical(taken[link, i][2:]))
            for i, trial in enumerate(trials[link])
        ]
        links = machines.link(link), Link(link, (fitted(timed),))
        for mask, dropped in MASKS.items():
            plan = Plan(2, LAYERS, attention_points(dropped, LAYERS))
            sizes = steps_of(1, LENGTH, LENGTH)
            before, then = (estimate_of(structure, plan, device, each, sizes) for each in links)
            for each, again in zip(before.steps, then.steps, strict=True):
                own = times[link, mask, each.name]
                found = typical(own), sorted(own)[len(own) // 10]
                estimated = each.dropped.total, again.dropped.total
                rows.append(Row(width, link, mask, each.name, *found, *estimated))
    return rows


def in_a_row(run: Callable[[], object], count: int) -> float:
    """Seconds of a step among so many like it, as in a generation.

    Processor caches hold what the step before has read, and what ranks wait at the barrier because
    they leave it one after the other is divided by the number of steps.
    """
    run()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - began) / count


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
            *(f"{1e3 * seconds:.2f}" for seconds in (row.measured, row.fast)),
            *(f"{1e3 * seconds:.2f}" for seconds in (row.estimated, row.then)),
            *(f"{error:+.1%}" for error in row.errors),
        )
        for row in rows
    ]
    headers = ["hidden", "link", "dropped", "step", "mean ms", "p10 ms"]
    headers += ["estimated ms", "with the link as it was then", "error", "error then"]
    table = tabulate(cells, headers, tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{summary(rows)}"


def summary(rows: list[Row]) -> str:
    """How many rows are within the bound, by link."""
    lines = []
    for link in dict.fromkeys(row.link for row in rows):
        errors = [[abs(row.errors[which]) for row in rows if row.link == link] for which in (0, 1)]
        before, then = (
            f"{sum(e <= BOUND for e in each)} of {len(each)} within {BOUND:.0%}, "
            f"the largest error {max(each):.1%}"
            for each in errors
        )
        lines.append(f"{link}: {before}; with the link as it was then {then}.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
