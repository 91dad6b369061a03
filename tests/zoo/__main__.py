"""Measures the zoo: `python -m tests.zoo [--only llama,gpt2] [--tp 2,4] [--write FILE]`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tests.zoo.measure import measure
from tests.zoo.models import entries
from tests.zoo.pool import measure_all
from tests.zoo.rows import Row
from tests.zoo.table import progress, render, summary


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 1 if a row is wrong."""
    args = _parse(argv)
    began = time.monotonic()
    rows: list[Row] = []
    one = partial(measure, tps=args.tp)
    for row in measure_all(args.only, one, jobs=args.jobs, limit_s=args.limit):
        rows.append(row)
        print(f"[{len(rows)}/{len(args.only)}] {progress(row)}", flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    print(f"\n{summary(rows)}\n")
    if args.write:
        command = shlex.join(
            ["python", "-m", "tests.zoo", *(sys.argv[1:] if argv is None else argv)]
        )
        text = render(rows, args.tp, seconds=time.monotonic() - began, command=command)
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text, encoding="utf-8")
    wrong = [row for row in rows if row.complaints]
    for row in wrong:
        print(f"WRONG: {row.entry}: {'; '.join(row.complaints)}", file=sys.stderr)
    return 1 if wrong else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    known = entries()
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--only", type=_names, default=known, help="entries, comma-separated")
    parser.add_argument("--tp", type=_numbers, default=(2, 4), help="numbers of ranks")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one entry")
    parser.add_argument("--write", type=Path, help="Markdown file; needs the whole zoo")
    parser.add_argument("--json", type=Path, help="file that gets a line for each row")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.only) - set(known)):
        parser.error(f"no such entries here: {', '.join(unknown)}")
    if args.write and set(args.only) != set(known):
        parser.error("--write needs the whole zoo: a table of a part would read as all of it")
    return args


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
