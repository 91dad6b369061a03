"""Saves a compiled model, so that the next start need not capture and split it again.

An artefact is a directory: `artefact.json` says what it is of, `programs.json` holds its programs
as data, `constants.safetensors` what is no checkpoint tensor, and the weights are files of their
own, beside these or where they were. Nothing in it is executed: programs are rebuilt from the names
of operators, and compiled kernels stay in the cache of the user who compiled them.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from transformers import PreTrainedModel

from spdcompile.compiled import CompiledModel, agree_on
from spdcompile.errors import SaveError, UsageError
from spdcompile.export import copy_checkpoint
from spdcompile.files import staged, write_whole
from spdcompile.loading import Loaded, load_model, lower_loaded
from spdcompile.log import Component, get_logger
from spdcompile.manifest import (
    CONSTANTS,
    FORMAT,
    MANIFEST,
    PROGRAMS,
    Manifest,
    config_digest,
    versions,
)
from spdcompile.passes import pipeline
from spdcompile.passes.base import Program
from spdcompile.passes.vocabulary import POINT, Vocabulary
from spdcompile.passes.written import NotSerializableError, to_data
from spdcompile.running import Running
from spdcompile.runtime.distributed import DistributedExecutor
from spdcompile.runtime.executor import Executor
from spdcompile.runtime.fingerprint import fingerprint

_LOG = get_logger(Component.RUNTIME)


def save(compiled: CompiledModel, directory: str | Path, *, weights: str = "reference") -> None:
    """Writes an artefact that `load` starts from; under torchrun, rank 0 writes.

    Args:
        compiled: a model as it was compiled, with the weights that it was compiled with.
        directory: made if it is not there. The manifest is written last, so that what is not
            finished is no artefact.
        weights: "reference" names the directory that the model was compiled from, "included"
            writes a checkpoint in Hugging Face's format beside the rest.

    Raises:
        UsageError: there is no directory to refer to, or the weights were replaced.
        SaveError: a file cannot be written.
    """
    source = _source_of(compiled, weights)
    executor = compiled.executor
    if isinstance(executor, DistributedExecutor) and torch.distributed.get_rank() != 0:
        return
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / MANIFEST).unlink(missing_ok=True)
        if weights == "included":
            _write_weights(source, target)
        loaded = load_model(source, compiled.model.dtype if isinstance(source, Path) else None)
        manifest = {
            "format": FORMAT,
            "versions": versions(),
            "plan": compiled.plan.to_dict(),
            "vocabulary": _vocabulary(compiled.program).value,
            "dtype": _name(compiled.model.dtype),
            "config": config_digest(compiled.model),
            "weights": "." if weights == "included" else str(source),
            "fingerprint": fingerprint(loaded.tensors),
            "digests": _write_programs(compiled, target),
        }
        write_whole(target / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise SaveError(
            "The artefact cannot be saved.", where=str(target), found=str(error)
        ) from error


def _source_of(compiled: CompiledModel, weights: str) -> Path | PreTrainedModel:
    fault = None
    if weights not in ("reference", "included"):
        fault = repr(weights), "'reference' or 'included'"
    elif compiled.weights_replaced:
        fault = (
            "a model whose weights were replaced",
            ("the weights that it was compiled with: give the model its new ones, and compile it"),
        )
    elif weights == "reference" and compiled.directory is None:
        fault = "a model that was given in memory", "a directory, or weights='included'"
    if fault is not None:
        raise UsageError(
            "The weights cannot be saved so.", where="weights", found=fault[0], needed=fault[1]
        )
    return compiled.model if compiled.directory is None else compiled.directory.resolve()


def _write_weights(source: Path | PreTrainedModel, target: Path) -> None:
    if isinstance(source, Path) and source.samefile(target):
        return
    with staged(target) as aside:
        if isinstance(source, PreTrainedModel):
            source.save_pretrained(aside)
        else:
            copy_checkpoint(source, aside)


def _write_programs(compiled: CompiledModel, target: Path) -> dict[str, str]:
    """Writes the programs, if data can describe them; the digest of each file."""
    programs = [compiled.program]
    if not compiled.cache_refusal:
        programs.append(compiled.remembering_program)
    try:
        text = json.dumps([to_data(program) for program in programs])
    except NotSerializableError as why:
        _LOG.warning("Saved without its programs, so that each start captures the model: %s", why)
        return {}
    constants = {name: x.contiguous().cpu() for name, x in compiled.program.constants.items()}
    files = {PROGRAMS: text.encode(), CONSTANTS: safetensors.torch.save(constants)}
    for name, content in files.items():
        write_whole(target / name, content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def load(
    directory: str | Path,
    *,
    executor: str | None = None,
    backend: str = "inductor",
    device: torch.device | str | None = None,
    timeout: float | None = None,
    transport: str = "auto",
    blocks_per_graph: int = 1,
) -> CompiledModel:
    """Starts from an artefact; nothing in it is executed.

    Programs of other versions of torch or transformers, and damaged ones, are not used: the model
    is captured anew, with a notice.

    Args:
        directory: what `save` wrote.
        executor, backend, device, timeout, transport, blocks_per_graph: as in `compile`.

    Raises:
        ArtefactError: it is no artefact, or its weights or configuration are others than it says.
        PlanError, UsageError, CheckpointError: as in `compile`.
    """
    manifest = Manifest.read(Path(directory))
    tp = manifest.plan.tp
    running = Running(tp, executor, backend, device, timeout, transport, blocks_per_graph)
    with running.among_ranks(manifest.weights):
        loaded = load_model(manifest.weights, manifest.dtype)
        manifest.check(loaded)
        programs = manifest.programs()
        if programs:
            runner = running.executor(programs[0], loaded.tensors, loaded.device)
            compiled: CompiledModel = _Restored(programs, runner, manifest, loaded)
        else:
            loaded, base, lowering = lower_loaded(loaded, manifest.plan, manifest.vocabulary)
            runner = running.executor(lowering.program, loaded.tensors, loaded.device)
            compiled = CompiledModel(
                base, lowering, runner, manifest.plan, loaded.model, loaded.directory
            )
        agree_on(runner, manifest.plan, loaded.model, loaded.tensors)
        return compiled


class _Restored(CompiledModel):
    """A compiled model whose programs were read; it is captured when a pass has to run."""

    def __init__(
        self, programs: list[Program], executor: Executor, manifest: Manifest, loaded: Loaded
    ) -> None:
        self._programs, self._manifest, self._loaded = programs, manifest, loaded
        self.executor, self.plan = executor, manifest.plan
        self.model, self.config = loaded.model, loaded.model.config
        self.directory, self.weights_replaced = loaded.directory, False

    @property
    def program(self) -> Program:
        """The program that runs."""
        return self._programs[0]

    @cached_property
    def remembering_program(self) -> Program:
        """The program that runs on new tokens alone."""
        return self._programs[1] if len(self._programs) > 1 else super().remembering_program

    @cached_property
    def _captured(self) -> tuple[pipeline.Lowering, pipeline.Lowering]:
        manifest = self._manifest
        return lower_loaded(self._loaded, manifest.plan, manifest.vocabulary)[1:]

    @property
    def base(self) -> pipeline.Lowering:  # type: ignore[override]
        """The program before anything was dropped."""
        return self._captured[0]

    @property
    def lowering(self) -> pipeline.Lowering:  # type: ignore[override]
        """The program that runs, and how it came about."""
        return self._captured[1]


def _vocabulary(program: Program) -> Vocabulary:
    points = program.graph_of(program.parts[0]).sync_points
    split = any(point.name == POINT for point in points)
    return Vocabulary.SPLIT if split else Vocabulary.WHOLE


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
