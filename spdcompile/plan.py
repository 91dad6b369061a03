"""Plans: which sync points are dropped and which head groups each rank holds, as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from spdcompile.errors import PlanError, SaveError, UsageError
from spdcompile.files import write_whole

Point = tuple[int, str]
HeadGroups = Mapping[int, tuple[tuple[int, ...], ...]]
PLAN_FILE = "spd_plan.json"
_FORMAT = "spdcompile-plan-1"
_MOST_BYTES = 2**28


class Router(Enum):
    """What the router of a mixture of experts reads where a dropped sync point is pending."""

    EXACT = "exact"
    """The whole sum; a drop that would take it away is refused."""
    REPLICATED = "replicated"
    """The part of the value that all ranks share, without what is pending: an approximation."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to drop and who holds what, for one model at one tp.

    Args:
        tp: number of ranks.
        num_layers: decoder layers of the model.
        dropped: (layer, "attn" or "mlp") of each dropped sync point.
        head_groups: layer -> per rank, ids of its head group units; other layers split evenly.
        measured: what calibration or distillation measured, as JSON data.
        router: what routers read where a dropped sync point is pending.
        model: what tells the model that it was made for (`planning.structure_of`); "" for any.
    """

    tp: int
    num_layers: int
    dropped: frozenset[Point] = frozenset()
    head_groups: HeadGroups = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    router: Router = Router.EXACT
    model: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        named = {"model": self.model} if self.model else {}
        return {
            "format": _FORMAT,
            **named,
            "tp": self.tp,
            "num_layers": self.num_layers,
            "dropped": [f"{layer}.{name}" for layer, name in sorted(self.dropped)],
            "head_groups": {
                str(layer): [list(units) for units in groups]
                for layer, groups in sorted(self.head_groups.items())
            },
            "router": self.router.value,
            "measured": dict(self.measured),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """A plan from JSON data.

        Raises:
            PlanError: not a plan of this format.
        """
        try:
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r}")
            points = [entry.split(".", 1) for entry in data["dropped"]]
            groups = data["head_groups"]
            if not isinstance(data["measured"], Mapping):
                raise TypeError("what was measured is no object")
            return cls(
                tp=int(data["tp"]),
                num_layers=int(data["num_layers"]),
                dropped=frozenset((int(layer), name) for layer, name in points),
                head_groups={
                    int(layer): tuple(tuple(map(int, units)) for units in ranks)
                    for layer, ranks in groups.items()
                },
                measured=dict(data["measured"]),
                # Plans written before there were these settings have no such entries.
                router=Router(data.get("router", Router.EXACT.value)),
                model=str(data.get("model", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                "This is not a plan.",
                found=f"{type(error).__name__}: {error}",
                needed=f"JSON data of the format {_FORMAT}",
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, whole or not at all.

        Raises:
            SaveError: the file cannot be written.
        """
        try:
            write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise SaveError(
                "The plan cannot be written.",
                where=str(path),
                found=str(error),
                needed="room on the disk and the right to write there; what was there is unchanged",
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan that `save` wrote.

        Args:
            path: the file, or a directory in which it is `spd_plan.json`.

        Raises:
            PlanError: the file holds no plan.
        """
        path = Path(path) / PLAN_FILE if Path(path).is_dir() else Path(path)
        try:
            if path.is_file() and path.stat().st_size > _MOST_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes are more than any plan's")
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError("Cannot read the plan.", where=str(path), found=str(error)) from error
        return cls.from_dict(data)

    @property
    def content_hash(self) -> str:
        """SHA-256 of what changes the program: all but the measurements."""
        content = {key: value for key, value in self.to_dict().items() if key != "measured"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def attention_points(mask: Sequence[bool] | None, num_layers: int) -> frozenset[Point]:
    """The sync points that a mask drops: True drops that layer's attention point.

    Args:
        mask: one bool a decoder layer, or None for none.

    Raises:
        UsageError: wrong length or kind.
    """
    if mask is None:
        return frozenset()
    if isinstance(mask, str | Mapping) or not isinstance(mask, Sequence):
        raise _mask_error(f"a {type(mask).__name__}", num_layers)
    if any(not isinstance(entry, bool) for entry in mask):
        kinds = sorted({type(entry).__name__ for entry in mask})
        raise _mask_error(f"entries of type {', '.join(kinds)}", num_layers)
    if len(mask) != num_layers:
        raise _mask_error(f"{len(mask)} entries", num_layers)
    return frozenset((layer, "attn") for layer, drop in enumerate(mask) if drop)


def _mask_error(found: str, num_layers: int) -> UsageError:
    return UsageError(
        "The spd_mask does not fit the model.",
        where="spd_mask",
        found=found,
        needed=f"{num_layers} bools, one a decoder layer: True drops its attention sync point",
        fix="give a list of bools, None, or a Plan",
    )
