"""Writes docs/latency.md: estimated latencies, what they rest on, and the paper's figure.

No weights are needed; every number of the page is computed or read from what was measured:

    python -m examples.latency_tables --write docs/latency.md

What validate_estimate.py and `replay` wrote with --json is shown from docs/latency/.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.latency_page import Page, page
from spdcompile.cli.quiet import quiet_transformers
from spdcompile.estimate.estimates import StepEstimate, estimate_of
from spdcompile.estimate.latency import latency_of
from spdcompile.estimate.machines import Machines
from spdcompile.estimate.structure import Structure
from spdcompile.estimate.work import Step
from spdcompile.plan import Plan

FOLDERS = (Path(__file__).parent / "latency_configs", Path(__file__).parent / "configs")
MODELS = (
    *("LLaMA-2-7B", "LLaMA-2-13B", "LLaMA-2-70B"),
    *("Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B"),
    *("OPT-6.7B", "OPT-66B", "Qwen2.5-72B"),
)
DEVICE = "a100-80g"
LINKS = ("nvlink3", "pcie4", "no-p2p", "two-nodes")
TPS = (2, 4, 8)
SHARES = (50, 70, 100)
STEPS = {
    "prefill 128": Step(1, 128),
    "prefill 2,048": Step(1, 2048),
    "decode": Step(1, 1, 2047),
    "decode, batch 32": Step(32, 1, 2047),
}
PAPER_MODEL, PAPER_TP, PAPER_LINK, PAPER_SHARE = "LLaMA-2-70B", 8, "no-p2p", 70
PAPER_BATCHES, PAPER_PROMPTS = (1, 8, 16, 32), (128, 512, 2048)
CHECK_MODEL, CHECK_TP, CHECK_TOKENS = "Llama-3.1-70B", 4, 4096


@dataclass(frozen=True)
class Row:
    """One step of one model, at one tp, on one link.

    Args:
        shares: percent of attention points dropped -> the estimate.
    """

    model: str
    tp: int
    link: str
    step: str
    shares: dict[int, StepEstimate]


@dataclass(frozen=True)
class Workload:
    """A batch of prompts at the paper's setting.

    Args:
        prefill: over the prompts.
        decode: of the token after them.
    """

    batch: int
    prompt: int
    prefill: StepEstimate
    decode: StepEstimate


def main() -> int:
    """Estimates everything, prints the page and, if asked, writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="file to write the page to")
    parser.add_argument("--only", default="", help="models, separated by commas, of all tables")
    args = parser.parse_args()
    quiet_transformers()
    names = [name for name in args.only.split(",") if name] or MODELS
    machines = Machines.load()
    rows, workloads, checks = [], [], {}
    for name in names:
        structure = Structure(directory_of(name))
        rows += list(estimated(name, structure, machines))
        if name == PAPER_MODEL:
            workloads = list(paper(structure, machines))
        if name == CHECK_MODEL:
            checks = published(structure, machines)
        print(f"{name}: done", file=sys.stderr)
        del structure
        gc.collect()  # the graph of the whole model, in which nodes point at each other
    text = page(Page(machines, rows, workloads, checks))
    print(text)
    if args.write:
        args.write.write_text(text + "\n", encoding="utf-8")
    return 0


def directory_of(name: str) -> Path:
    """Where a model's config.json is."""
    return next(folder / name for folder in FOLDERS if (folder / name).is_dir())


def dropping(structure: Structure, tp: int, share: int) -> Plan:
    """A plan without the attention points of so many percent of the layers."""
    layers = range(round(structure.num_layers * share / 100))
    return Plan(tp, structure.num_layers, frozenset((layer, "attn") for layer in layers))


def estimated(name: str, structure: Structure, machines: Machines) -> Iterator[Row]:
    """All rows of one model."""
    device = machines.device(DEVICE)
    for tp in TPS:
        plans = {share: dropping(structure, tp, share) for share in SHARES}
        for link in LINKS:
            found = {
                share: estimate_of(structure, plan, device, machines.link(link), STEPS).steps
                for share, plan in plans.items()
            }
            for number, step in enumerate(STEPS):
                yield Row(name, tp, link, step, {s: steps[number] for s, steps in found.items()})


def paper(structure: Structure, machines: Machines) -> Iterator[Workload]:
    """Prefill and decode of several batches of prompts, as the paper drops."""
    plan = dropping(structure, PAPER_TP, PAPER_SHARE)
    device, link = machines.device(DEVICE), machines.link(PAPER_LINK)
    for batch in PAPER_BATCHES:
        for prompt in PAPER_PROMPTS:
            steps = {"prefill": Step(batch, prompt), "decode": Step(batch, 1, prompt)}
            prefill, decode = estimate_of(structure, plan, device, link, steps).steps
            yield Workload(batch, prompt, prefill, decode)


def published(structure: Structure, machines: Machines) -> dict[str, float]:
    """Link -> seconds of a prefill whose latency is published."""
    plan = Plan(CHECK_TP, structure.num_layers)
    work, device = structure.work(plan, Step(1, CHECK_TOKENS)), machines.device(DEVICE)
    return {
        link: latency_of(work, device, machines.link(link), CHECK_TP).total
        for link in ("nvlink3", "pcie4", "no-p2p")
    }


if __name__ == "__main__":
    raise SystemExit(main())
