"""Does what `eval` says: measures a compiled model on texts and tasks, beside the unsharded one."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import spdcompile
from spdcompile.cli.plans import plan_of
from spdcompile.cli.quiet import quiet_transformers
from spdcompile.cli.reading import read_tokenizer
from spdcompile.cli.scoring import Measured, render
from spdcompile.cli.writing import STDOUT, check_target, write_output
from spdcompile.compiled import CompiledModel
from spdcompile.errors import UsageError
from spdcompile.evaluation import evaluate, evaluation_tokens
from spdcompile.models import check_weights, resolve_model
from spdcompile.passes.capture import decoder_layers
from spdcompile.reference import PROGRAM, Reference
from spdcompile.runtime.data import check_tokens
from spdcompile.tasks import Scores, load_tasks, run_tasks


def evaluate_model(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code. Under torchrun, rank 0 prints and writes."""
    _check_options(arguments)
    quiet_transformers()
    model = resolve_model(arguments.model, weights=False)
    plan = plan_of(arguments, len(decoder_layers(model)[1]))
    if arguments.reference not in (None, "none", PROGRAM):
        resolve_model(arguments.reference, weights=False)
        check_weights(Path(arguments.reference))
    tokenizer = read_tokenizer(arguments.model)
    texts = [_read(text, tokenizer, arguments, model) for text in arguments.text]
    progress = _shows_progress()
    tasks = load_tasks(_names(arguments.tasks), progress=progress) if arguments.tasks else []
    compiled = spdcompile.compile(
        arguments.model,
        tp=plan.tp,
        spd_mask=plan,
        backend=arguments.backend,
        dtype=arguments.dtype and getattr(torch, arguments.dtype),
        vocab=arguments.vocab,
        transport=arguments.transport,
        blocks_per_graph=arguments.blocks_per_graph,
    )
    reference = None
    if arguments.reference != "none":
        reference = Reference(arguments.reference or arguments.model, compiled)
    settings = {"batch_size": arguments.batch_size, "progress": progress}
    rows = [evaluate(compiled, tokens, reference=reference, **settings) for tokens in texts]
    found = ()
    if tasks:
        found = _run_tasks(compiled, reference, tokenizer, tasks, arguments)
    if not dist.is_initialized() or dist.get_rank() == 0:
        measured = Measured(plan, dict(zip(arguments.text, rows, strict=True)), *found)
        _write(arguments, measured, reference)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _run_tasks(
    compiled: CompiledModel,
    reference: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    arguments: argparse.Namespace,
) -> tuple[Scores | None, Scores | None, int]:
    """What the model scores, and the reference, which rank 0 alone runs; how much was cut."""
    # Imported here because the harness takes seconds, which texts need not wait for.
    from spdcompile.harness import HarnessLM, reference_lm

    settings: dict[str, Any] = {
        "num_fewshot": arguments.num_fewshot,
        "limit": arguments.limit,
        "progress": _shows_progress(),
    }
    lm_settings = {"batch_size": arguments.batch_size, "progress": settings["progress"]}
    lm = HarnessLM(compiled, tokenizer, **lm_settings)
    own = run_tasks(lm, tasks, **settings)
    model = None if reference is None else reference.model
    if isinstance(model, PreTrainedModel) and dist.is_initialized() and dist.get_rank() != 0:
        model = None
    if model is None:
        return own, None, lm.num_cut
    other = run_tasks(reference_lm(model, tokenizer, **lm_settings), tasks, **settings)
    return own, other, lm.num_cut


def _read(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    arguments: argparse.Namespace,
    model: PreTrainedModel,
) -> Tensor:
    """The chunks of a text, int64 [chunks, length]."""
    tokens = evaluation_tokens(
        text,
        tokenizer,
        length=arguments.length,
        count=arguments.count,
        max_length=getattr(model.config, "max_position_embeddings", None),
    )
    check_tokens(model, tokens)
    return tokens


def _shows_progress() -> bool:
    """Whether there is someone to see it, and this is the process that shows it."""
    return sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


def _names(tasks: str) -> list[str]:
    return [name.strip() for name in tasks.split(",") if name.strip()]


def _check_options(arguments: argparse.Namespace) -> None:
    """Raises UsageError if there is nothing to do, or nowhere to write it."""
    if not arguments.text and not _names(arguments.tasks or ""):
        raise UsageError(
            "There is nothing to evaluate on.",
            where="--text, --tasks",
            found="neither",
            needed="--text FILE or --tasks LIST, or both",
        )
    outputs = ("json", "markdown", "samples")
    if [getattr(arguments, name) for name in outputs].count(STDOUT) > 1:
        raise UsageError(
            "Only one of them can go to stdout.", where="--json, --markdown, --samples"
        )
    for name in outputs:
        check_target(f"--{name}", getattr(arguments, name))


def _write(arguments: argparse.Namespace, measured: Measured, reference: Reference | None) -> None:
    described = None if reference is None else reference.description
    outputs = {
        "json": json.dumps(measured.to_dict(arguments.model, described), indent=2),
        "markdown": render(measured, described, "pipe"),
        "samples": json.dumps(asdict(measured.own)["samples"] if measured.own else {}, indent=1),
    }
    for name, text in outputs.items():
        if getattr(arguments, name):
            write_output(f"--{name}", getattr(arguments, name), text)
    if STDOUT not in [getattr(arguments, name) for name in outputs]:
        print(render(measured, described, "simple"))
