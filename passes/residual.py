"""Values of the residual stream as pairs (R, P): a rank holds R + its own P."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx


class LeakError(Exception):
    """Dropping would leave the ranks with different values for good; the text is the reason."""


class ChoiceError(LeakError):
    """An operator would choose by a value that differs between the ranks."""


@dataclass(eq=False)
class Pending:
    """A value R + sum of P over the ranks.

    Args:
        whole: R, or None for zero.
        partial: P.
        points: the sync points that P comes from and that are kept.
        kept: whether it is to be summed at the first nonlinear reader.
    """

    whole: fx.Node | None
    partial: fx.Node
    points: tuple[str, ...]
    kept: bool
    seen: fx.Node | None = field(default=None)


Value = fx.Node | Pending


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph.

    Args:
        points: the sync points in it, in order: each with the points merged into it, itself last.
        partial_inputs: placeholder -> the added placeholder of its pending part.
        partial_outputs: output position -> position of the added output of its pending part.
        routers: modules that choose or weigh by the replicated part alone.
    """

    graph: fx.Graph
    points: tuple[tuple[str, ...], ...]
    partial_inputs: dict[str, str]
    partial_outputs: dict[int, int]
    routers: tuple[str, ...] = ()
