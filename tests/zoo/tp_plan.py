"""Writes where the compiler and transformers' plans differ.

`python -m tests.zoo.tp_plan [--only llama,glm] [--write docs/tp_plan.md]`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from transformers import CONFIG_MAPPING

from spdcompile.errors import CaptureError
from tests.zoo.measure import text_of
from tests.zoo.models import build, entries, model_type
from tests.zoo.pool import measure_all
from tests.zoo.rows import Row
from tests.zoo.tp_compare import TP, Kind, Weight, idle_rules, weights_of
from tests.zoo.tp_reasons import REASONS, reasons_for


@dataclass(frozen=True, slots=True)
class Compared(Row):
    """A row with both decisions about each weight.

    Args:
        weights: one of those that are equal in all, such as of equal blocks.
        idle: patterns of the plan that name nothing in this model.
    """

    weights: tuple[Weight, ...] = ()
    idle: tuple[str, ...] = ()

    def modules(self, kind: Kind) -> list[str]:
        """The module patterns of a kind; one is of two kinds if its layers differ."""
        return list(dict.fromkeys(w.module for w in self.weights if w.kind is kind))

    @property
    def differences(self) -> list[Weight]:
        """The weights that differ."""
        return [weight for weight in self.weights if weight.kind is not Kind.SAME]


def planned() -> list[str]:
    """The entries whose config class has a tensor-parallel plan."""
    return [entry for entry in entries() if CONFIG_MAPPING[model_type(entry)].base_model_tp_plan]


def compare(entry: str) -> Compared:
    """Both decisions about the weights of an entry; whatever goes wrong is in the row."""
    began = time.perf_counter()
    try:
        model = build(entry)
        weights = tuple(dict.fromkeys(weights_of(model)))
    except Exception as error:
        stage = "capture" if isinstance(error, CaptureError) else "compile"
        return Compared(entry, stage=stage, failure=text_of(error))
    return Compared(
        entry,
        type(model).__name__,
        seconds=time.perf_counter() - began,
        weights=weights,
        idle=tuple(idle_rules(model)),
    )


def unexplained(entry: str, weights: Iterable[Weight]) -> Iterator[str]:
    """The differences that not exactly one reason covers, each in one line."""
    for weight in weights:
        reasons = reasons_for(weight)
        if weight.kind is not Kind.SAME and len(reasons) != 1:
            words = f" ({weight.words})" if weight.words else ""
            yield (
                f"{entry}: {weight.module}: theirs {weight.theirs.side} "
                f"({weight.style or 'silent'}), ours {weight.ours.side}{words}; {weight.kind}; "
                f"{len(reasons)} reasons"
            )


def complaints(rows: Sequence[Compared]) -> list[str]:
    """What must not be in a comparison of all types."""
    found = [f"{row.entry}: {row.failure}" for row in rows if row.stage not in ("", "capture")]
    found += [text for row in rows for text in unexplained(row.entry, row.weights)]
    used = {r.text for row in rows for w in row.differences for r in reasons_for(w)}
    return found + [
        f"no difference has the reason: {r.text}" for r in REASONS if r.text not in used
    ]


def render(rows: Sequence[Compared], command: str) -> str:
    """The whole document."""
    rows = sorted(rows, key=lambda row: row.entry)
    done = [row for row in rows if not row.stage]
    sections = (
        "# Tensor-parallel plans of transformers, compared",
        _introduction(command),
        _table(("", "types", "weights"), _counts(rows)),
        "## Differences",
        _table(("what", "theirs -> ours", "why", "weights", "types"), _differences(done)),
        "## Every type",
        _table(("type", *Kind), ((r.entry, *_numbers(r)) for r in done)),
        "## Rules of plans that name nothing in the small model",
        _table(("rules", "types"), _grouped((", ".join(r.idle), r.entry) for r in done if r.idle)),
        "## Not captured, so not compared",
        _table(("reason", "types"), _grouped((r.failure, r.entry) for r in rows if r.stage)),
    )
    return "\n\n".join(sections) + "\n"


def _introduction(command: str) -> str:
    return (
        f"Written by `{command}`; not to be edited. torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {time.strftime('%Y-%m-%d')}.\n\n"
        "The configs of many types carry a hand-written `base_model_tp_plan`. The compiler never "
        "reads it, so it is an outside witness. For each type that has one and can be captured, "
        "every linear, every weight of experts and every embedding is compared, and every vector "
        f"that the plan names itself: over {TP} ranks, is it split by its output features "
        "(columns), by its input features (rows) or whole on every rank, and which indices does "
        "each rank hold? What a plan does not name is whole. Stars stand for layer numbers; a "
        "weight counts once for all layers of a type."
    )


def _counts(rows: Sequence[Compared]) -> Iterator[tuple[str, str, str]]:
    done = [row for row in rows if not row.stage]
    yield "with a plan", _types(rows), ""
    yield "compared", _types(done), str(sum(len(row.modules(k)) for row in done for k in Kind))
    for kind in Kind:
        having = [row for row in done if row.modules(kind)]
        yield kind, _types(having), str(sum(len(row.modules(kind)) for row in having))
    agreeing = [row for row in done if all(_is_lookup(w) for w in row.differences)]
    yield "of these types, with no difference but in lookups", _types(agreeing), ""


def _is_lookup(weight: Weight) -> bool:
    return weight.style.startswith("embedding")


def _types(rows: Iterable[Compared]) -> str:
    return str(len({model_type(row.entry) for row in rows}))


def _differences(done: Sequence[Compared]) -> Iterator[tuple[str, ...]]:
    for reason in REASONS:
        pairs = [(row.entry, w) for row in done for w in row.weights if reason.covers(w)]
        ways = {f"{w.style or 'no rule'} -> {w.ours.side}" for _, w in pairs}
        modules = {w.module for _, w in pairs}
        entries = list(dict.fromkeys(entry for entry, _ in pairs))
        others = [row.entry for row in done if row.entry not in entries]
        types = ", ".join(entries)
        if len(others) < len(entries):
            types = f"all but {', '.join(others)}" if others else "all"
        yield (
            reason.kind,
            ", ".join(sorted(ways)),
            reason.text,
            ", ".join(sorted(modules)),
            types,
        )


def _numbers(row: Compared) -> Iterator[str]:
    for kind in Kind:
        yield str(len(row.modules(kind)) or "-")


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    groups: dict[str, list[str]] = {}
    for key, entry in pairs:
        groups.setdefault(key, []).append(entry)
    return [(key, ", ".join(entries)) for key, entries in groups.items()]


def _table(headers: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in cells]
    return tabulate(escaped, headers, tablefmt="pipe", disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints and writes; 1 if a difference is unexplained or a reason unused."""
    args = _parse(argv)
    began = time.monotonic()
    rows = []
    for found_row in measure_all(args.only, compare, jobs=args.jobs, limit_s=args.limit):
        row = found_row
        if not isinstance(row, Compared):  # a crash, or out of time
            row = Compared(row.entry, stage=row.stage, failure=row.failure)
        rows.append(row)
        found = row.failure or f"{len(row.differences)} differences"
        print(f"[{len(rows)}/{len(args.only)}] {row.entry}: {found}", flush=True)
    whole = set(args.only) == set(planned())
    wrong = (
        complaints(rows) if whole else [t for r in rows for t in unexplained(r.entry, r.weights)]
    )
    print("\n".join(wrong) or "every difference has its reason", file=sys.stderr)
    print(f"{len(rows)} entries, {time.monotonic() - began:.0f} s")
    if args.write:
        words = sys.argv[1:] if argv is None else argv
        text = render(rows, shlex.join(["python", "-m", "tests.zoo.tp_plan", *words]))
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text, encoding="utf-8")
    return 1 if wrong else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.tp_plan", description=__doc__)
    parser.add_argument("--only", type=lambda text: text.split(","), default=planned())
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one entry")
    parser.add_argument("--write", type=Path, help="Markdown file; needs all types")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.only) - set(planned())):
        parser.error(f"no such entries with a plan: {', '.join(unknown)}")
    if args.write and set(args.only) != set(planned()):
        parser.error("--write needs all types: a table of a part would read as all of it")
    return args


if __name__ == "__main__":
    sys.exit(main())
