"""The program after each pass, as text: what a pass does is a diff of two files in golden/.

Rewrite the files with `UPDATE_GOLDEN=1 pytest tests/passes/test_golden.py`, and read the diff.
Other versions of torch and transformers write the same models with other operators (5.17 computes
rotary embeddings otherwise than 5.23), so the texts are compared under the versions they were
written with.
"""

from __future__ import annotations

import os
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers

from spdcompile.passes import pipeline
from spdcompile.passes.base import Program
from spdcompile.passes.layout import Layout
from spdcompile.passes.printer import print_program
from tests.models import tiny

GOLDEN = Path(__file__).parent / "golden"
WRITTEN_WITH = ("2.13", "5.23")  # torch, transformers
TP = 2
SIZES = {"layers": 1, "hidden": 16, "heads": 4, "intermediate": 24, "vocab": 32}
ATTENTION = frozenset({(0, "attn")})
PASSES = (
    "normalize",
    "split",
    "tokens",
    "regions",
    "assign",
    "propagate",
    "sync",
    "localize",
    "vocabulary",
    "drop",
)

# What counts tokens is not in the text, and a small embedding table stays whole.
_SAME = ("tokens", "vocabulary")
# Biases (opt), partial sums that merge (gpt_neox), fused projections (phi3).
CASES = [
    *(("llama", name) for name in PASSES if name not in (*_SAME, "localize")),
    ("opt", "sync"),
    ("opt", "drop"),
    ("gpt_neox", "sync"),
    ("phi3", "sync"),
    ("phi3", "localize"),
    ("phi3", "drop"),
]
FAMILIES = ("llama", "opt", "gpt_neox", "phi3")
# Views that say -1 where a rank has fewer heads need no localizing; a parallel block has nothing to
# drop.
UNCHANGED = {
    *(("llama", "localize"), ("gpt_neox", "localize"), ("gpt_neox", "drop")),
    *((family, name) for family in FAMILIES for name in _SAME),
}


@cache
def _stages(family: str) -> dict[str, str]:
    """The text after each pass, capture first."""
    lowering = pipeline.start(tiny(family, **SIZES))
    stages = {"capture": _render(lowering.program)}
    points = frozenset() if family == "gpt_neox" else ATTENTION
    for step in (*pipeline.preserving(TP, {}), *pipeline.changing(points)):
        lowering = pipeline.advance(lowering, (step,))
        stages[step.name] = _render(lowering.program)
    return stages


@pytest.mark.parametrize(("family", "name"), CASES)
def test_program_after_a_pass_is_the_golden_text(family: str, name: str) -> None:
    versions = tuple(".".join(m.__version__.split(".")[:2]) for m in (torch, transformers))
    if versions != WRITTEN_WITH:
        pytest.skip(f"golden text is of torch, transformers {WRITTEN_WITH}, not {versions}")
    text = _stages(family)[name]
    path = GOLDEN / f"{family}_{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_pass_changes_the_program(family: str) -> None:
    stages = list(_stages(family).items())
    for (_, before), (name, after) in pairwise(stages):
        assert (after == before) == ((family, name) in UNCHANGED), name


def test_golden_files_are_those_of_the_cases() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {f"{f}_{name}" for f, name in CASES}


@pytest.mark.parametrize("family", FAMILIES)
def test_later_passes_leave_earlier_programs_as_they_were(family: str) -> None:
    lowerings = [pipeline.start(tiny(family, **SIZES))]
    for step in (*pipeline.preserving(TP, {}), *pipeline.changing(frozenset())):
        lowerings.append(pipeline.advance(lowerings[-1], (step,)))
    kept = [_stages(family)[name] for name in ("capture", *PASSES[:-1])]
    assert [_render(lowering.program) for lowering in lowerings[:-1]] == kept


def _render(program: Program) -> str:
    """The program with its regions and shards; nothing that differs from run to run."""
    lines = [print_program(program)]
    for key, block in program.graphs.items():
        for region in block.regions:
            lines.append(f"\nregion {key}.{region.name}: {region.num_units} units")
            lines += [f"    columns {name}: {_runs(x)}" for name, x in region.columns.items()]
            lines += [f"    rows {name}: {_runs(x)}" for name, x in region.rows.items()]
        for point in block.sync_points:
            merged = f" with {', '.join(point.merged)}" if point.merged else ""
            lines.append(f"\nsync point {key}.{point.name}{merged}")
    for part in program.parts:
        for name, units in part.assignments.items():
            lines.append(f"\nunits of {part.name}.{name}: {_ranks(units)}")
        for name, spec in part.shards.items():
            lines.append(f"    shard {name}: {spec.local_size} along dim {spec.dim}")
    return _canonical("\n".join(lines)) + "\n"


def _runs(layout: Layout) -> str:
    """A layout as the channels that each unit has in each run."""
    return " + ".join(f"{run.each} a unit from {run.start}" for run in layout.runs)


def _ranks(assignment: tuple[tuple[int, ...], ...]) -> str:
    return " | ".join(f"{units[0]}..{units[-1]}" for units in assignment)


def _canonical(text: str) -> str:
    """Numbers sizes and symbols by their first use; torch counts them anew in each version."""
    text = text.replace(str(2**63 - 1), "END")
    for pattern, name in ((r"\bsym_size_int(?:_\d+)?\b", "size"), (r"\bs\d+\b", "symbol")):
        found = {
            old: f"{name}_{n}" for n, old in enumerate(dict.fromkeys(re.findall(pattern, text)))
        }
        text = re.sub(pattern, lambda match, found=found: found[match[0]], text)
    return text
