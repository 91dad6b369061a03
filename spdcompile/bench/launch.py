"""Starts a run: brings the model into its dtype, launches the ranks, reads what they found."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from spdcompile.bench.result import Outcome, Result
from spdcompile.bench.settings import BenchSettings
from spdcompile.bench.variants import Variant, variants_of
from spdcompile.measuring import check_cores, run_ranks
from spdcompile.models import resolve_model

_RANK = "spdcompile.bench.rank"
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_SHARDS = "*.safetensors"


def bench(
    directory: Path,
    settings: BenchSettings,
    *,
    tell: Callable[[str], object] | None = None,
) -> Result:
    """Measures a model; see `BenchSettings`.

    Args:
        directory: of the model; with a config.json alone, its weights are random.
        tell: is given a line for each thing that is begun; None to say nothing.

    Raises:
        UsageError: the directory holds no causal LM, or there are fewer cores than ranks.
        MeasuringError: the processes failed, or did not end in time.
    """
    check_cores(settings.tp, fix="measure with fewer ranks, or on a larger machine")
    with tempfile.TemporaryDirectory(prefix="spdcompile-") as scratch:
        weights = _in_dtype(directory, settings.torch_dtype, Path(scratch))
        result = _launch(weights, replace(settings, memory=False), progress=tell is not None)
        if not settings.memory:
            return result
        outcomes = [
            outcome if outcome.reason else _with_memory(weights, settings, variant, outcome, tell)
            for variant, outcome in zip(variants_of(settings), result.outcomes, strict=True)
        ]
        return replace(result, outcomes=outcomes)


def _with_memory(
    weights: Path,
    settings: BenchSettings,
    variant: Variant,
    outcome: Outcome,
    tell: Callable[[str], object] | None,
) -> Outcome:
    """Measures the peak memory of a variant in processes that run nothing else."""
    if tell is not None:
        tell(f"memory of {variant.label}")
    alone = replace(settings, only=(variant.name,), rounds=1, memory=True)
    found = _launch(weights, alone, progress=False)
    peaks = (peak for _, peak in found.memory[: variant.ranks] if peak is not None)
    return replace(outcome, memory=tuple(peaks))


def _launch(weights: Path, settings: BenchSettings, *, progress: bool) -> Result:
    with tempfile.TemporaryDirectory(prefix="spdcompile-") as scratch:
        file, result = Path(scratch, "settings.json"), Path(scratch, "result.json")
        file.write_text(settings.to_json(), encoding="utf-8")
        run_ranks(
            _RANK,
            [str(weights), str(file), scratch, str(result)],
            ranks=settings.tp,
            timeout=settings.timeout,
            progress=progress,
        )
        return Result.from_json(result.read_text(encoding="utf-8"))


def _in_dtype(directory: Path, dtype: torch.dtype, scratch: Path) -> Path:
    """A directory whose weights are of the dtype, so that all variants read the same numbers."""
    model = resolve_model(directory, weights=False, dtype=dtype)
    if any(directory.glob(_SHARDS)):
        if _stored_dtypes(directory) == {_STORED[str(dtype).removeprefix("torch.")]}:
            return directory
        model = resolve_model(directory, weights=True, dtype=dtype)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    model.save_pretrained(scratch / "model")
    return scratch / "model"


def _stored_dtypes(directory: Path) -> set[str]:
    """The types of all tensors in a directory's safetensors, by that format's names."""
    found = set()
    for path in directory.glob(_SHARDS):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found
