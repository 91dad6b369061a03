"""The zoo as Markdown: every number comes out of rows."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import transformers
from tabulate import tabulate

from tests.zoo.measure import PADS, SHAPES
from tests.zoo.models import mapped_types, model_type, reasons_without
from tests.zoo.rows import BOUND, MIN_CONTROL, Reason, Row, Structure

_HEADERS = (
    *("type", "verdict", "attention", "MLP", "experts", "recurrent"),
    *("all-reduces a layer", "SPD may drop"),
)
_KINDS = ("attention", "mlp", "experts", "recurrent")
_MODULE = r"[\w.]*\w"
_DOES = "reads them whole|acts on|chooses|takes a mean"
K = TypeVar("K")


def render(rows: Sequence[Row], tps: Sequence[int], *, seconds: float, command: str) -> str:
    """The whole document.

    Args:
        rows: one an entry.
        seconds: wall time of the run.
    """
    rows = sorted(rows, key=lambda row: row.entry)
    sections = (
        "# Architectures",
        _introduction(tps, seconds, command),
        summary(rows),
        "## Every type",
        _table(
            (*_HEADERS, *(f"error tp {tp}" for tp in tps), "padded", "cached", "s"),
            _cells(rows, tps),
        ),
        _legend(),
        *_titled("Wrong", ("type", "what"), _complaints(rows)),
        *_titled("Not compiled", ("reason", "types"), _failures(rows)),
        *_titled("Fails when run, or at a higher tp", ("reason", "types"), _run_failures(rows)),
        *_titled(
            "Whole, though it could be split",
            ("what", "reason", "types"),
            _reasons(rows, lambda made: made.whole),
        ),
        *_titled(
            "Sync points that cannot be dropped",
            ("point", "reason", "types"),
            _reasons(rows, lambda made: made.fixed),
        ),
        *_titled("Without a KV cache", ("reason", "types"), _recomputed(rows)),
        *_titled("Types without a row", ("type", "class", "reason"), _without()),
    )
    return "\n\n".join(sections) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """How many types are captured, exact and split; a type counts once, variants do not."""
    types = [row for row in rows if row.entry == model_type(row.entry)]
    exact = [row for row in types if row.is_exact]
    split = [row for row in exact if row.is_split]
    worst = max((row.worst_error for row in exact), default=0.0)
    everything = [row for row in split if row.verdict == "all split"]
    without = set(mapped_types()) & set(reasons_without())
    counts = (
        ("types that transformers maps to causal LMs", len(mapped_types())),
        ("of these without a row here, for a reason given below", len(without)),
        ("measured", len(types)),
        ("captured as one graph", sum(row.is_captured for row in types)),
        ("compiled and equal to the unsharded model", len(exact)),
        ("largest error of these", f"{worst:.0e}"),
        ("with a KV cache, and equal with it", sum(map(_has_cache, exact))),
        ("with every attention and every MLP or expert region split", len(split)),
        ("of these with recurrent mixers split too, or without any", len(everything)),
        ("wrong", sum(bool(row.complaints) for row in types)),
        ("variants measured besides", len(rows) - len(types)),
    )
    return _table(("", ""), counts)


def _has_cache(row: Row) -> bool:
    return all(run.cached is not None for run in row.runs if not run.refused)


def progress(row: Row) -> str:
    """A row in one line."""
    errors = " ".join(f"{run.error:.0e}" for run in row.runs)
    failures = dict.fromkeys([row.failure, *(run.failure for run in row.runs)])
    text = "; ".join([*row.complaints, *filter(None, failures)])
    return f"{row.entry:24} {row.seconds:6.1f} s  {row.verdict}  {errors}  {text}".rstrip()


def _introduction(tps: Sequence[int], seconds: float, command: str) -> str:
    shapes = " and ".join(f"{batch} x {length}" for batch, length in SHAPES)
    return (
        f"Written by `{command}`; not to be edited. "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, "
        f"{time.strftime('%Y-%m-%d')}, {seconds:.0f} s in all.\n\n"
        "Each type of transformers' own mapping of causal LMs is built small (hidden size 64, 2 to "
        "4 layers, random weights, no bias or norm weight at its initial value), compiled for tp "
        f"{' and '.join(map(str, tps))} and compared with the model itself in float32: the largest "
        "difference of the logits, relative to the largest logit, at batches of "
        f"{shapes} tokens and at real tokens of a left-padded one ({', '.join(map(str, PADS))} "
        f"pads). More than {BOUND:.0e} counts as wrong. Another first token moves the last logits "
        f"of each model by at least {MIN_CONTROL:.0e}."
    )


def _legend() -> str:
    return (
        "Attention to recurrent: weights split / all of the kind in all blocks, then how many of "
        "the rest need not be split: small ones, routers, and those whose results every rank needs "
        "whole (a latent, a K/V head that all query heads share); *whole* where an operator that "
        "combines tokens runs whole on every rank. All-reduces: partial sums, then sums after "
        "those that meet were merged. SPD may drop: blocks in which a sync point can be dropped / "
        "that have it. Cached: the last of the batches in four pieces, with a KV cache."
    )


def _cells(rows: Iterable[Row], tps: Sequence[int]) -> Iterable[tuple[str, ...]]:
    for row in rows:
        runs = {run.tp: run for run in row.runs}
        padded = [run.padded for run in row.runs if run.padded is not None]
        cached = [run.cached for run in row.runs if run.cached is not None]
        yield (
            row.entry,
            row.verdict,
            *_structure_cells(row.structure),
            *(_error(runs[tp].unpadded if tp in runs else None) for tp in tps),
            "the model fails" if row.padding else _error(max(padded, default=None)),
            _error(max(cached, default=None)),
            f"{row.seconds:.0f}",
        )


def _structure_cells(made: Structure | None) -> tuple[str, ...]:
    if made is None:
        return ("-",) * 6
    before, after = (count / made.layers for count in made.all_reduces)
    points = (f"{name} {free}/{total}" for name, (free, total) in made.droppable.items())
    shares = (_share(made, kind) for kind in _KINDS)
    return (*shares, f"{before:.3g} -> {after:.3g}", ", ".join(points) or "-")


def _share(made: Structure, kind: str) -> str:
    if not made.has(kind):
        return "-"
    weights, mixers = made.weights.get(kind), made.mixers.get(kind)
    text = f"{weights.split}/{weights.total}" if weights else ""
    if weights and weights.exempt:
        text += f" ({weights.exempt} need not)"
    return text if not mixers or mixers.split == mixers.total else f"{text} whole".strip()


def _complaints(rows: Iterable[Row]) -> Iterable[tuple[str, str]]:
    return [(row.entry, text) for row in rows for text in row.complaints]


def _failures(rows: Iterable[Row]) -> Iterable[tuple[str, str]]:
    return _grouped((row.failure, row.entry) for row in rows if row.failure)


def _run_failures(rows: Iterable[Row]) -> Iterable[tuple[str, str]]:
    found = ((f"tp {r.tp}: {r.failure}", row) for row in rows for r in row.runs if r.failure)
    padding = [(f"the model itself, padded: {r.padding}", r.entry) for r in rows if r.padding]
    return _grouped([*((text, row.entry) for text, row in found if row.structure), *padding])


def _recomputed(rows: Iterable[Row]) -> Iterable[tuple[str, str]]:
    made = ((row.structure, row.entry) for row in rows if row.structure)
    return _grouped((generic(m.recomputed), entry) for m, entry in made if m.recomputed)


def _reasons(
    rows: Iterable[Row], reasons_of: Callable[[Structure], Sequence[Reason]]
) -> list[tuple[str, str, str]]:
    found = (
        ((f"{reason.kind} {_names(reason)}".strip(), generic(reason.text)), row.entry)
        for row in rows
        if row.structure
        for reason in reasons_of(row.structure)
    )
    return [(what, text, entries) for (what, text), entries in _grouped(found)]


def _without() -> Iterable[tuple[str, str, str]]:
    mapped = mapped_types()
    return [(t, mapped[t], why) for t, why in sorted(reasons_without().items()) if t in mapped]


def generic(reason: str) -> str:
    """A reason without the module paths of the model that it was given for."""
    text = re.sub(rf" \((?:the block|{_MODULE})\)", "", reason)
    text = re.sub(rf"(?:the block|\b{_MODULE}) ({_DOES})", r"a module \1", text)
    return "; ".join(dict.fromkeys(text.split("; ")))


def _names(reason: Reason) -> str:
    """Weights or points by their own names, without the modules that they are in."""
    names = (subject.removesuffix(".weight").rpartition(".")[2] for subject in reason.subjects)
    return ", ".join(dict.fromkeys(names))


def _grouped(pairs: Iterable[tuple[K, str]]) -> list[tuple[K, str]]:
    groups: dict[K, dict[str, None]] = {}
    for key, entry in pairs:
        groups.setdefault(key, {})[entry] = None
    largest_first = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [(key, ", ".join(entries)) for key, entries in largest_first]


def _titled(
    title: str, headers: Sequence[str], cells: Iterable[Sequence[object]]
) -> tuple[str, ...]:
    cells = list(cells)
    return (f"## {title}", _table(headers, cells)) if cells else ()


def _table(headers: Sequence[str], cells: Iterable[Sequence[object]]) -> str:
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in cells]
    return tabulate(escaped, headers, tablefmt="pipe", disable_numparse=True)


def _error(error: float | None) -> str:
    return "-" if error is None else "0" if error == 0 else f"{error:.0e}"
