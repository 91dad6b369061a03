"""Measures sections and keeps what was found."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from examples.study.context import Context
from examples.study.machine import facts_of_run
from examples.study.section import Result
from examples.study.sections import SECTIONS
from examples.study.sizes import QUICK, QUICK_LAYERS, Sizes


def measure(name: str, sizes: Sizes, work: Path, context: Context | None = None) -> None:
    """Measures one section and keeps its numbers.

    Args:
        context: where several sections share one; it has these sizes.
    """
    path = _path(work, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"== {name}", flush=True)
    began = time.perf_counter()
    context = context or context_of(sizes, work)
    numbers = SECTIONS[name].measure(context)
    seconds = time.perf_counter() - began
    Result(name, numbers, facts_of_run(_as_data(sizes), seconds)).save(path)
    print(f"== {name}: {seconds:.0f} s", flush=True)


def context_of(sizes: Sizes, work: Path) -> Context:
    """The model and its texts; of the quick form, a few blocks of the model."""
    return Context(sizes, work, QUICK_LAYERS if sizes == QUICK else None)


def measured(name: str, sizes: Sizes, work: Path) -> bool:
    """Whether a section was measured with these sizes."""
    path = _path(work, name)
    return path.exists() and Result.load(path).facts["sizes"] == _as_data(sizes)


def saved(work: Path, folder: Path) -> list[Result]:
    """What was measured here, and else what the page's folder holds, in the page's order."""
    found = []
    for name in SECTIONS:
        places = [_path(work, name), folder / f"{name}.json"]
        found += [Result.load(path) for path in places if path.exists()][:1]
    return found


def _path(work: Path, name: str) -> Path:
    return work / "sections" / f"{name}.json"


def _as_data(sizes: Sizes) -> dict:
    """The sizes as JSON gives them back."""
    return json.loads(json.dumps(asdict(sizes)))
