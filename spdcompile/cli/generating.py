"""Does what `generate` says: compiles a model and streams its text to the terminal."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import TextStreamer

import spdcompile
from spdcompile.cli.plans import plan_of
from spdcompile.cli.quiet import quiet_transformers
from spdcompile.cli.reading import read_tokenizer
from spdcompile.errors import UsageError
from spdcompile.models import resolve_model
from spdcompile.passes.capture import decoder_layers


def generate_text(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code. Under torchrun, rank 0 prints."""
    settings = _settings(arguments)
    quiet_transformers()
    model = resolve_model(arguments.model, weights=False)
    tokenizer = read_tokenizer(arguments.model)
    if arguments.stop:
        settings |= {"stop_strings": arguments.stop, "tokenizer": tokenizer}
    plan = plan_of(arguments, len(decoder_layers(model)[1]))
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
    prompt = tokenizer(arguments.prompt, return_tensors="pt")
    torch.manual_seed(arguments.seed)
    compiled.generate(
        prompt.input_ids,
        attention_mask=prompt.attention_mask,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **settings,
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `generate` is told.

    Raises:
        UsageError: settings of draws where nothing is drawn.
    """
    draws = {"top_k": arguments.top_k, "top_p": arguments.top_p}
    draws = {name: value for name, value in draws.items() if value is not None}
    if arguments.temperature is None and draws:
        raise UsageError(
            "Nothing is drawn without a temperature.",
            where=", ".join(f"--{name.replace('_', '-')}" for name in draws),
            needed="--temperature besides, for example --temperature 0.8",
        )
    settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    if arguments.temperature is not None:
        settings |= {"do_sample": True, "temperature": arguments.temperature, **draws}
    return settings
