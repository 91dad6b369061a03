"""Splits true configurations on paper: no weights, one process, this machine's time and memory.

For each model and number of ranks it runs `trace-and-report` in a process of its own and notes the
wall time, the peak resident memory and the time of each pass:

    python examples/scale.py --write docs/scale.md

The configurations in examples/configs are those of the published models.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tabulate import tabulate

CONFIGS = Path(__file__).parent / "configs"
TPS = (8, 16)
MAX_SECONDS, MAX_GIB = 120.0, 3.0


@dataclass(frozen=True)
class Measured:
    """One run.

    Args:
        seconds: wall time of the process.
        gib: its peak resident memory, GiB.
        passes: pass -> its seconds.
        report: the report as data.
    """

    model: str
    tp: int
    seconds: float
    gib: float
    passes: dict[str, float]
    report: dict

    @property
    def faults(self) -> Iterator[str]:
        """Which bounds it breaks."""
        if self.seconds > MAX_SECONDS:
            yield f"{self.model} at tp {self.tp}: {self.seconds:.0f} s"
        if self.gib > MAX_GIB:
            yield f"{self.model} at tp {self.tp}: {self.gib:.1f} GiB"
        slowest = max(self.passes, key=self.passes.__getitem__)
        if slowest != "capture":
            yield f"{self.model} at tp {self.tp}: {slowest} takes longer than capture"


def main() -> int:
    """Measures, prints and, if asked, writes; 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="file to write the tables to")
    parser.add_argument("--only", default="", help="models, separated by commas")
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name]
    found = []
    for directory in sorted(CONFIGS.iterdir()):
        for tp in TPS:
            if not names or directory.name in names:
                found.append(measure(directory, tp))
                print(f"{directory.name}, tp {tp}: {found[-1].seconds:.1f} s", file=sys.stderr)
    text = page(found)
    print(text)
    if args.write:
        args.write.write_text(text + "\n", encoding="utf-8")
    faults = [fault for one in found for fault in one.faults]
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


def measure(directory: Path, tp: int) -> Measured:
    """Runs trace-and-report on one configuration."""
    command = [sys.executable, "-m", "spdcompile.cli", "trace-and-report", str(directory)]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--tp", str(tp), "--json", "-"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None, "it was asked for"
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    report = json.loads(output)
    passes = {one["name"]: one["seconds"] for one in report["passes"]}
    kib = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return Measured(directory.name, tp, seconds, kib / 2**20, passes, report)


def page(found: list[Measured]) -> str:
    """The tables in Markdown."""
    passes = list(found[0].passes)
    totals, times = [], []
    for one in found:
        parameters = one.report["parameters"]
        totals.append(
            (
                *(one.model, one.tp, f"{one.seconds:.1f}", f"{one.gib:.2f}"),
                f"{parameters['total']['count'] / 1e9:.1f}",
                f"{parameters['per_rank']['num_bytes'] / 2**30:.1f}",
                f"{parameters['padding_bytes'] / 2**30:.2f}",
                f"{parameters['shared_bytes'] / 2**30:.2f}",
                one.report["collectives"]["all_reduces"],
            )
        )
        times.append((one.model, one.tp, *(f"{one.passes[name]:.2f}" for name in passes)))
    headers = ["model", "tp", "seconds", "peak GiB", "10^9 parameters", "GiB a rank"]
    headers += ["padding GiB", "shared heads GiB", "all-reduces"]
    return "\n\n".join(
        (
            "# True configurations on paper",
            f"`python examples/scale.py --write docs/scale.md`, {datetime.date.today()}: "
            f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
            f"torch {torch.__version__}, transformers {transformers.__version__}. No weights; a "
            "process for each row. Parameters a rank are in the configuration's dtype; padding and "
            "the further copies of shared K/V heads are over all ranks.",
            tabulate(totals, headers, tablefmt="github"),
            "Seconds a pass, without the checks between them:",
            tabulate(times, ["model", "tp", *passes], tablefmt="github"),
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
