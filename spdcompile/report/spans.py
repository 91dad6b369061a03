"""Sets of whole numbers as short text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers as ranges in ascending order: "0-20,25"; "" for none."""
    found: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def name_layers(layers: Sequence[int]) -> str:
    """Layers by name: "layer 3", "layers 0-20,25"."""
    return f"{'layers' if len(layers) > 1 else 'layer'} {spans(layers)}"
