"""Measures the study and writes docs/study.md.

    python -m examples.study [--only NAME ...] [--anew] [--quick] [--render]

Each section's results are kept when it is done, so that a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.study import document
from examples.study.measuring import measure, measured, saved
from examples.study.sections import SECTIONS
from examples.study.sizes import FULL, QUICK

ROOT = Path(__file__).parent.parent.parent
# Long ones first; those that use what others trained come after them.
ORDER = ("curve", "segments", "data", "grouping", "worst", "baselines", "decode")


def main(arguments: list[str] | None = None) -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[], help="these, anew")
    parser.add_argument("--anew", action="store_true", help="forget what was measured before")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: no figure means anything")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--jobs", type=int, default=2, help="sections at a time, one thread each")
    parser.add_argument("--work", type=Path, help="what was measured (out/study)")
    parser.add_argument("--page", type=Path, help="what is written (docs/study.md)")
    parser.add_argument("--measure", choices=SECTIONS, help=argparse.SUPPRESS)  # one job
    args = parser.parse_args(arguments)
    # A quick run must not overwrite the page.
    work = args.work or ROOT / "out" / ("study-quick" if args.quick else "study")
    page = args.page or (work / "study.md" if args.quick else ROOT / "docs" / "study.md")
    sizes = QUICK if args.quick else FULL
    if args.measure:
        measure(args.measure, sizes, work)
        return
    if args.anew:
        shutil.rmtree(work, ignore_errors=True)
    if not args.render:
        wanted = [name for name in ORDER if name in (args.only or SECTIONS)]
        left = [name for name in wanted if args.only or not measured(name, sizes, work)]
        run(left, work, args.jobs, quick=args.quick)
    document.write(saved(work, page.with_suffix("")), page)
    print(f"written to {page}")


def run(names: list[str], work: Path, jobs: int, *, quick: bool) -> None:
    """Measures sections, each in a process of its own.

    One thread each: the same sums in the same order on every machine, and no time lost to small
    operators that two threads share.
    """
    command = [sys.executable, "-m", "examples.study", "--work", str(work)]
    command += ["--quick"] if quick else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor(jobs) as pool:
        started = [
            pool.submit(
                subprocess.run, [*command, "--measure", name], check=True, cwd=ROOT, env=environment
            )
            for name in names
        ]
    for job in started:
        job.result()  # raises where a section failed


if __name__ == "__main__":
    main()
