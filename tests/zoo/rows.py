"""One row of the zoo's table, and what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

BOUND = 2e-5
"""Largest error of a program that drops nothing, in float32, relative to the largest logit.

A sum over ranks rounds apart from the whole sum by parts in 1e7, and the layers add to that: the
table says what the largest error is. A weight, head or mask in the wrong place makes 1e-2 and more,
since another token does: `MIN_CONTROL` holds each model to that.
"""

_NAMES = {"attention": "attention", "recurrent": "recurrent", "mlp": "MLP", "experts": "experts"}

MIN_CONTROL = 1e-2
MAX_REPEAT = 1e-6


@dataclass(frozen=True, slots=True)
class Share:
    """How many of some things are split.

    Args:
        exempt: of the rest, those that are no loss where they are whole (`structure`).
    """

    total: int
    split: int
    exempt: int = 0

    @property
    def is_full(self) -> bool:
        """Whether nothing is whole that could be split."""
        return self.split + self.exempt == self.total


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something stays as it is: weights that stay whole, a sync point that cannot be dropped.

    Args:
        kind: of the weights, or "" for a sync point.
    """

    kind: str
    subjects: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Structure:
    """What a compilation made of a model, at the first tp.

    Args:
        mixers, weights: kind -> share of its operators that combine tokens, of its weights.
        all_reduces: of all blocks, before and after merging.
        droppable: name of a sync point -> (blocks in which it can be dropped, all that have it).
        whole: why weights of blocks are whole that could be split.
        fixed: why sync points cannot be dropped.
        recomputed: why there is no KV cache, so that all tokens are computed anew; or "".
    """

    layers: int
    mixers: dict[str, Share]
    weights: dict[str, Share]
    all_reduces: tuple[int, int]
    droppable: dict[str, tuple[int, int]]
    whole: tuple[Reason, ...] = ()
    fixed: tuple[Reason, ...] = ()
    recomputed: str = ""

    def is_full(self, kind: str) -> bool:
        """Whether nothing of a kind is whole that could be split."""
        mixers, weights = self.mixers.get(kind), self.weights.get(kind)
        return (not mixers or mixers.split == mixers.total) and (not weights or weights.is_full)

    def splits_any(self, kind: str) -> bool:
        """Whether a weight of a kind is split."""
        return kind in self.weights and self.weights[kind].split > 0

    def has(self, kind: str) -> bool:
        """Whether the model has anything of a kind."""
        return kind in self.mixers or kind in self.weights


@dataclass(frozen=True, slots=True)
class Run:
    """One tp: errors relative to the largest logit, or why there are none.

    Args:
        unpadded: the largest over the shapes.
        padded: at the real tokens of a left-padded batch; None if the model itself fails on it.
        cached: of the last batch in pieces, with a KV cache; None without one.
        refused: the model cannot use so many ranks, and the compiler said so.
    """

    tp: int
    unpadded: float | None = None
    padded: float | None = None
    cached: float | None = None
    failure: str = ""
    refused: bool = False

    @property
    def error(self) -> float:
        """The larger of the errors; infinity if there is none."""
        if self.failure:
            return math.inf
        errors = (self.unpadded, self.padded, self.cached)
        return max((error for error in errors if error is not None), default=math.inf)


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one entry.

    Args:
        stage: where it failed: "build", "model", "capture", "compile", "crash" or "time"; or "".
        padding: why the model itself fails on a padded batch, or "".
        repeat: difference between runs of the unsharded model before and after the compilations.
        control: how far another first token moves the last logits, relative to the largest.
    """

    entry: str
    model: str = ""
    stage: str = ""
    failure: str = ""
    structure: Structure | None = None
    runs: tuple[Run, ...] = ()
    padding: str = ""
    repeat: float = 0.0
    control: float = field(default=math.inf)
    seconds: float = 0.0

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph."""
        return self.stage in ("", "compile")

    @property
    def worst_error(self) -> float:
        """The largest error at a tp that the model can use; infinity if there is none."""
        return max((run.error for run in self.runs if not run.refused), default=math.inf)

    @property
    def is_exact(self) -> bool:
        """Whether every tp that the model can use is within the bound."""
        return self.worst_error <= BOUND

    @property
    def is_split(self) -> bool:
        """Whether every attention and every MLP or expert region is split, and there is one."""
        made = self.structure
        return (
            made is not None
            and any(map(made.splits_any, _NAMES))
            and all(made.is_full(kind) for kind in _NAMES if kind != "recurrent")
        )

    @property
    def complaints(self) -> tuple[str, ...]:
        """What must not be: wrong logits, or a comparison that would not show them."""
        found = [
            f"tp {run.tp}: error {run.error:.1e}, more than {BOUND:.0e}"
            for run in self.runs
            if run.unpadded is not None and run.error > BOUND
        ]
        if self.repeat > MAX_REPEAT:
            found.append(f"the unsharded model differs from itself by {self.repeat:.1e}")
        if self.control < MIN_CONTROL:
            found.append(f"another first token moves the last logits by {self.control:.1e} only")
        return tuple(found)

    @property
    def verdict(self) -> str:
        """The row in a few words."""
        if self.complaints:
            return "WRONG"
        if self.structure is None:
            return {"capture": "not captured", "compile": "captured, not compiled"}.get(
                self.stage, f"fails: {self.stage}"
            )
        if not self.is_exact:
            return "fails when run"
        return self._extent(self.structure)

    def _extent(self, made: Structure) -> str:
        kinds = [kind for kind in _NAMES if made.has(kind)]
        groups = {"split": [k for k in kinds if made.is_full(k)]}
        rest = [kind for kind in kinds if kind not in groups["split"]]
        groups["split in part"] = [kind for kind in rest if made.splits_any(kind)]
        groups["whole"] = [kind for kind in rest if not made.splits_any(kind)]
        if not rest:
            return "all split" if self.is_split else "nothing to split"
        texts = (
            f"{', '.join(_NAMES[k] for k in own)} {what}" for what, own in groups.items() if own
        )
        return "; ".join(texts)
