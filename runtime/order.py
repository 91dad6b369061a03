"""In which order sync points are best dropped: a nested sequence of sets, cheapest first.

Greedy on the measured joint cost: from a set that is dropped already, the point is added with which
the cost is least. Lazily: a cost that was measured with fewer points dropped stands for the
present one until its point is the next in line, and only then is it measured anew. That gives what
measuring all of them each time gives, as long as a point costs no less when more is dropped beside
it; where that fails, a point may come later than it would have.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from spdcompile.errors import RefusalError
from spdcompile.passes.drop import PointName, all_points
from spdcompile.runtime.calibrate import Method
from spdcompile.runtime.evaluate import Evaluator
from spdcompile.runtime.first_order import FirstOrder

Cost = Callable[[frozenset[PointName]], float]


class Spread(enum.Enum):
    """How the sync points that stay lie among those that go."""

    FREE = "free"
    """Wherever dropping costs least zero-shot, which may leave long runs without any."""
    EVEN = "even"
    """Evenly: every second point goes first, counted from the last one, which stays; then every
    second of what is left, and so on. No run of dropped points is longer than it has to be, which
    is what distillation cannot mend; within one such round the cheapest goes first."""


@dataclass(frozen=True, slots=True)
class Step:
    """A sync point's place in the order.

    Args:
        alone: what it costs by itself, as it was known before the order.
        joint: what it costs together with all points before it.
        score: the largest `joint` up to here, so that scores never fall along the order.
    """

    point: PointName
    alone: float
    joint: float
    score: float


@dataclass(frozen=True, slots=True)
class Order:
    """A nested sequence of sets of sync points: each set is a prefix of the steps.

    Args:
        spread: how the points that stay lie among those that go.
        refused: points that cannot be dropped together with those before, and why.
        evaluations: how many sets were measured.
    """

    steps: tuple[Step, ...]
    refused: Mapping[PointName, str]
    evaluations: int
    spread: Spread = Spread.FREE

    def prefix(self, count: int) -> frozenset[PointName]:
        """The first `count` points."""
        return frozenset(step.point for step in self.steps[:count])


def greedy_order(
    cost: Cost,
    alone: Mapping[PointName, float],
    *,
    spread: Spread = Spread.FREE,
    rounds: Mapping[PointName, int] | None = None,
    advance: Callable[[PointName], object] = lambda point: None,
) -> Order:
    """The points in the order in which adding the next one costs least.

    Args:
        cost: of a set of points, 0 for none; raises RefusalError for one that cannot be dropped.
        alone: a first guess of what each point costs by itself; points that cost the same keep
            the order that they have here.
        rounds: points of a lower round go before all others; by default there is only one.
        advance: told each point that was put in its place.
    """
    places = list(alone)
    turn = [0 if rounds is None else rounds[point] for point in places]
    queue = [(turn[place], guess, place, -1) for place, guess in enumerate(alone.values())]
    heapq.heapify(queue)
    steps: list[Step] = []
    refused: dict[PointName, str] = {}
    chosen: frozenset[PointName] = frozenset()
    present, score, evaluations = 0.0, 0.0, 0
    while queue:
        _, added, place, known_at = heapq.heappop(queue)
        point = places[place]
        if known_at < len(steps):
            try:
                evaluations += 1
                added = cost(chosen | {point}) - present
            except RefusalError as why:
                refused[point] = why.reason
            else:
                heapq.heappush(queue, (turn[place], added, place, len(steps)))
            continue
        chosen, present = chosen | {point}, present + added
        score = max(score, present)
        steps.append(Step(point, alone[point], present, score))
        advance(point)
    return Order(tuple(steps), refused, evaluations, spread)


def order_points(
    evaluator: Evaluator,
    points: Sequence[PointName],
    *,
    first: Method = Method.ALONE,
    spread: Spread = Spread.FREE,
    progress: bool = True,
) -> Order:
    """The greedy order by the KL divergence to the undropped program.

    Args:
        points: each can be dropped by itself.
        first: how it is found what a point costs by itself. Leave-one-out measures it; first-order
            estimates it from one backward pass, and a point whose cost is overestimated comes
            later than it should.
        spread: how the points that stay lie among those that go.
    """
    every = all_points(evaluator.base.program)
    with tqdm(total=len(points), desc="order", unit="point", disable=not progress) as bar:
        return greedy_order(
            lambda dropped: _kl(evaluator, dropped),
            _alone(evaluator, points, first),
            spread=spread,
            rounds=even_rounds(every) if spread is Spread.EVEN else None,
            advance=lambda point: bar.update(),
        )


def even_rounds(points: Sequence[PointName]) -> dict[PointName, int]:
    """In which round each point goes, so that those that stay are evenly spaced at all times.

    Args:
        points: all of a program, in order.

    Returns: 1 for every second point, counted from the last one; 2 for every second of the
        others, and so on. The last one, which stays whatever happens, has 0.
    """
    distances = {point: len(points) - 1 - place for place, point in enumerate(points)}
    # The place of the lowest binary digit that is 1.
    return {point: (far & -far).bit_length() for point, far in distances.items()}


def _kl(evaluator: Evaluator, points: frozenset[PointName]) -> float:
    kl = evaluator.quality(points).kl
    assert kl is not None, "an evaluation measures it"
    return kl


def _alone(
    evaluator: Evaluator, points: Sequence[PointName], first: Method
) -> dict[PointName, float]:
    if first is Method.FIRST_ORDER:
        try:
            return dict(zip(points, _estimated(evaluator, points), strict=True))
        except RefusalError:
            pass  # a router that reads another value has no gate; each point is measured instead
    return {point: _kl(evaluator, frozenset({point})) for point in points}


def _estimated(evaluator: Evaluator, points: Sequence[PointName]) -> list[float]:
    """To second order, from one backward pass; kept in the record as one result."""
    name = "second-order KL of " + ",".join(f"{layer}.{point}" for layer, point in points)
    found = evaluator.record.get(name)
    if found is None:
        found = [change.kl for change in FirstOrder(evaluator, points).run()]
        evaluator.record.put(name, found)
    return found
