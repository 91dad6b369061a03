"""Reads layers and sync points off the command line: `0-20,25`, `3.mlp,4-6.attn`, `all`, `none`."""

from __future__ import annotations

import argparse
import re

from spdcompile.errors import UsageError

_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_POINTS = re.compile(r"([^.]+)\.([A-Za-z]\w*)", re.ASCII)


def parse_layers(text: str, num_layers: int, *, option: str = "--spd-mask") -> frozenset[int]:
    """Layers named as ranges.

    Args:
        text: such as "0-20,25", "all" or "none"; both ends of a range belong to it.
        num_layers: how many layers the model has.
        option: the option that the text was given to, for messages.

    Raises:
        UsageError: the text is not of this form, or names a layer that the model does not have.
    """
    if text.strip() in ("none", ""):
        return frozenset()
    items = [item.strip() for item in text.split(",")]
    found = [_layers_of(item, num_layers, f"{option} {text}") for item in items]
    return frozenset(layer for layers in found for layer in layers)


def parse_points(
    text: str, num_layers: int, *, option: str = "--drop"
) -> frozenset[tuple[int, str]]:
    """Sync points named one by one: "3.mlp,4-6.attn,all.attn", or "none".

    Returns: (layer, name within the block) of each.

    Raises:
        UsageError: the text is not of this form, or names a layer that the model does not have.
    """
    if text.strip() in ("none", ""):
        return frozenset()
    points: set[tuple[int, str]] = set()
    for item in (item.strip() for item in text.split(",")):
        match = _POINTS.fullmatch(item)
        if not match:
            raise _not_of_form(item, f"{option} {text}", "sync points such as 3.mlp or 4-6.attn")
        layers = _layers_of(match[1], num_layers, f"{option} {text}")
        points |= {(layer, match[2]) for layer in layers}
    return frozenset(points)


def dropped_points(arguments: argparse.Namespace, num_layers: int) -> frozenset[tuple[int, str]]:
    """The sync points that `plan_options` name."""
    masked = parse_layers(arguments.spd_mask, num_layers)
    return parse_points(arguments.drop, num_layers) | {(layer, "attn") for layer in masked}


def _layers_of(item: str, num_layers: int, where: str) -> range:
    if item == "all":
        return range(num_layers)
    match = _RANGE.fullmatch(item)
    if not match:
        raise _not_of_form(item, where, "layers such as 3 or 0-20, or all, or none")
    first = int(match[1])
    last = int(match[2] or first)
    if first > last:
        raise UsageError(
            f"The range {item} runs backwards.",
            where=where,
            found=f"{first} before {last}",
            needed="the lower layer first",
            fix=f"write {last}-{first}",
        )
    if last >= num_layers:
        raise UsageError(
            f"The model has no layer {last}.",
            where=where,
            found=f"{item} for a model of {num_layers} layers",
            needed=f"layers 0 to {num_layers - 1}",
        )
    return range(first, last + 1)


def _not_of_form(item: str, where: str, needed: str) -> UsageError:
    return UsageError(
        f"{item!r} names no layers.", where=where, found=repr(item), needed=f"{needed}, by commas"
    )
