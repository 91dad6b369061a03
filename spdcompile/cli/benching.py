"""Does what `bench` says: measures a model beside the compiler's peers, and writes tables."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from spdcompile.bench.chart import draw
from spdcompile.bench.launch import bench
from spdcompile.bench.result import Result
from spdcompile.bench.settings import BenchSettings
from spdcompile.bench.tables import markdown
from spdcompile.bench.variants import variants_of
from spdcompile.cli.quiet import quiet_transformers
from spdcompile.cli.ranges import parse_layers
from spdcompile.errors import UsageError
from spdcompile.files import staged
from spdcompile.machine import usable_cores
from spdcompile.models import resolve_model
from spdcompile.passes.capture import decoder_layers

_QUICK = {
    "prompts": (8,),
    "contexts": (8,),
    "batches": (1, 2),
    "new_tokens": 2,
    "rounds": 3,
    "backend": "eager",
}


def bench_model(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    quiet_transformers()
    model = resolve_model(arguments.model, weights=False)
    settings = _settings(arguments, len(decoder_layers(model)[1]))
    _check_lengths(settings, getattr(model.config, "max_position_embeddings", None))
    _check_names(settings)
    directory = Path(arguments.model)
    result = bench(directory, settings, tell=lambda line: print(line, file=sys.stderr, flush=True))
    result = replace(result, conditions={**result.conditions, "model": _in_words(model.config)})
    title = f"{directory.resolve().name}, tp {settings.tp}, {settings.dtype}"
    print(markdown(result, title=title))
    if arguments.out:
        _write(result, title, Path(arguments.out))
    return 0


def _settings(arguments: argparse.Namespace, num_layers: int) -> BenchSettings:
    given = {
        "prompts": arguments.prompt and tuple(arguments.prompt),
        "contexts": arguments.context and tuple(arguments.context),
        "batches": arguments.batch and tuple(arguments.batch),
        "new_tokens": arguments.new_tokens,
        "rounds": arguments.rounds,
        "backend": arguments.backend,
        "blocks_per_graph": arguments.blocks_per_graph
        and tuple(dict.fromkeys(arguments.blocks_per_graph)),
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    return BenchSettings(
        tp=arguments.tp,
        dtype=arguments.dtype,
        masks=_masks(arguments.spd_mask, num_layers),
        threads=arguments.threads or max(1, usable_cores() // arguments.tp),
        only=tuple(arguments.only),
        memory=arguments.memory,
        timeout=float(arguments.timeout),
        **{**(_QUICK if arguments.quick else {}), **chosen},
    )


def _masks(texts: list[str], num_layers: int) -> Mapping[str, list[bool]]:
    masks = {}
    for text in texts:
        layers = parse_layers(text, num_layers)
        if not layers:
            raise UsageError(
                "The mask drops nothing.",
                where=f"--spd-mask {text}",
                needed="layers; programs that drop nothing are always measured",
            )
        masks[text] = [layer in layers for layer in range(num_layers)]
    return masks


def _check_lengths(settings: BenchSettings, longest: int | None) -> None:
    needed = max(step.length for step in settings.steps)
    if longest is not None and needed > longest:
        raise UsageError(
            "The texts are too long for the model.",
            where="--prompt, --context and --new-tokens",
            found=f"{needed} tokens",
            needed=f"at most {longest}, its max_position_embeddings",
        )


def _check_names(settings: BenchSettings) -> None:
    known = [variant.name for variant in variants_of(replace(settings, only=()))]
    unknown = [name for name in settings.only if name not in known]
    if unknown:
        raise UsageError(
            f"There is no variant {unknown[0]!r}.",
            where=f"--only {' '.join(settings.only)}",
            needed=f"one of: {', '.join(known)}",
        )


def _in_words(config: object) -> str:
    """A model's sizes."""
    names = {
        "num_hidden_layers": "layers",
        "hidden_size": "hidden",
        "num_attention_heads": "heads",
        "num_key_value_heads": "K/V heads",
        "intermediate_size": "intermediate",
        "vocab_size": "vocabulary",
    }
    sizes = [
        f"{words} {value}"
        for name, words in names.items()
        if (value := getattr(config, name, None)) is not None
    ]
    return ", ".join([str(getattr(config, "model_type", "model")), *sizes])


def _write(result: Result, title: str, directory: Path) -> None:
    """Writes the tables, all numbers and, where matplotlib is installed, the chart.

    Raises:
        UsageError: they cannot be written.
    """
    drawn = importlib.util.find_spec("matplotlib") is not None
    try:
        with staged(directory) as aside:
            if drawn:
                draw(result, aside / "bench.png")
            page = markdown(result, title=title, chart="bench.png" if drawn else "")
            (aside / "bench.md").write_text(page, encoding="utf-8")
            (aside / "bench.json").write_text(result.to_json(), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            "The results cannot be written.",
            where=f"--out {directory}",
            found=str(error),
            needed="a directory that can be written to",
        ) from error
    if not drawn:
        print("no chart: pip install 'spdcompile[bench]'", file=sys.stderr)
