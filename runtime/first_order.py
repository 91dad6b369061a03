"""What dropping a sync point does, from one backward pass for all points.

A rank sees R + S where a point is kept and R + P_i where it is dropped, P_i being its own share of
the sum S. With G_i the gradient of the loss by what rank i sees in the undropped program,

    d loss = sum over the ranks of <G_i, P_i - S>                               (first order).

What the ranks add up at the next kept point is the same sum in both, so nothing else changes to
first order. passes/blend.py has programs in which a gate leads from the one to the other; the
derivative by the gate at 0 is that sum.

The KL divergence has no first order: it is least where nothing is dropped. To second order it is
half the mean square of d log p(token) over tokens drawn from the model itself (the Fisher metric).
Drawn once for each position, and independently, their cross terms vanish on average:

    KL = 1/2 sum over chunks of (d sum over positions of log p(drawn token))^2  (second order),

from the same pass, carrying the gradient for drawn tokens beside that for the text's own.

The pass goes from the last block to the first and carries the gradients by each block's output; a
block is run anew, so that memory is that of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spdcompile.passes.base import Part
from spdcompile.passes.blend import GATE, blend
from spdcompile.passes.drop import PointName
from spdcompile.runtime.evaluate import Evaluator, Values
from spdcompile.runtime.local import LocalExecutor

BACKWARD = 5
"""Evaluations of a block that a forward run and two backward runs cost, two each."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a drop does to the undropped program.

    Args:
        loss: change of the mean loss per token, to first order, in nats.
        kl: mean KL divergence per token, to second order, in nats; an estimate from as many draws
            as there are chunks, with a relative standard error of sqrt(2 / chunks).
    """

    loss: float
    kl: float


@dataclass(frozen=True, slots=True)
class _Span:
    """The parts that a drop changes: from the block of the point to where its sum is taken.

    Args:
        executor: runs them with a gate.
        first, last: places of the parts.
    """

    executor: LocalExecutor
    first: int
    last: int

    @property
    def parts(self) -> Sequence[Part]:
        return self.executor.program.parts[self.first : self.last + 1]


class FirstOrder:
    """The change that each drop makes by itself.

    Args:
        points: sync points, each of which can be dropped by itself.

    Raises:
        RefusalError: a router reads another value as soon as a point is dropped.
    """

    def __init__(self, evaluator: Evaluator, points: Sequence[PointName]) -> None:
        self._evaluator = evaluator
        self._spans = [_span(evaluator, point) for point in points]

    @property
    def blocks(self) -> int:
        """What it costs, in block evaluations: of the gates, and of the blocks between them."""
        gates = [BACKWARD * (span.last - span.first + 1) for span in self._spans]
        gated = {span.first for span in self._spans if span.first == span.last}
        end = len(self._evaluator.parts) - 1
        lowest = min((span.first for span in self._spans), default=end)
        return sum(gates) + BACKWARD * len(set(range(lowest + 1, end)) - gated)

    def run(self) -> tuple[Change, ...]:
        """One a point."""
        sums = torch.zeros(2, len(self._spans), dtype=torch.float64)
        for batch in range(len(self._evaluator.batches)):
            by_gates = _Sweep(self._evaluator, batch).run(self._spans)
            sums[0] += by_gates[0].sum(-1)
            sums[1] += by_gates[1].square().sum(-1) / 2
        predicted = sum(tokens[:, 1:].numel() for tokens in self._evaluator.batches)
        return tuple(Change(*column) for column in (sums / predicted).T.tolist())


def _span(evaluator: Evaluator, point: PointName) -> _Span:
    program = evaluator.program_without(frozenset({point}))
    pairs = zip(evaluator.parts, program.parts, strict=True)
    changed = [place for place, (old, new) in enumerate(pairs) if old.graph != new.graph]
    executor = evaluator.plain.with_program(evaluator.known_graphs(blend(program)))
    return _Span(executor, changed[0], changed[-1])


class _Sweep:
    """One batch's backward pass.

    Args:
        batch: which of the evaluator's batches.
    """

    def __init__(self, evaluator: Evaluator, batch: int) -> None:
        self.evaluator, self.batch = evaluator, batch
        self.parts, self.plain = evaluator.parts, evaluator.plain
        self.made = {name for part in self.parts[1:] for name in part.outputs}
        self.gradients: list[Values] = []

    def run(self, spans: Sequence[_Span]) -> Tensor:
        """The derivatives by each span's gates of the batch's loss, float64 [2, spans, B].

        First for the text's own tokens, then for drawn ones.
        """
        tokens = self.evaluator.batches[self.batch]
        self._begin(tokens)
        found = torch.zeros(2, len(spans), len(tokens), dtype=torch.float64)
        lowest = min((span.first for span in spans), default=len(self.parts) - 1)
        for place in range(len(self.parts) - 2, lowest - 1, -1):
            by_inputs: list[Values] = []
            for number, span in enumerate(spans):
                if span.last != place:
                    continue
                joint = not by_inputs and span.first == place > lowest
                pairs = self._gated(span, joint)
                found[:, number] = torch.stack([by_gate for by_gate, _ in pairs])
                if joint:
                    by_inputs = [inputs for _, inputs in pairs]
            if place > lowest:
                self._carry(by_inputs or self._through(place), self.parts[place])
        return found

    def _begin(self, tokens: Tensor) -> None:
        """The gradients of both losses by what the last block gives."""
        postlude = self.parts[-1]
        values = self.evaluator.plain_values(self.batch, [postlude])

        def logits(leaves: Values) -> Tensor:
            made = self.plain.call(postlude, {**values, **leaves})
            return made[self.plain.program.output][:, :-1].float().flatten(0, 1)

        found, backward, *_ = torch.func.vjp(logits, self._leaves(values))
        odds = found.detach().softmax(-1)
        generator = torch.Generator(odds.device).manual_seed(self.batch)
        drawn = torch.multinomial(odds, 1, generator=generator).squeeze(1)
        own = tokens[:, 1:].flatten().to(odds.device)
        for targets in (own, drawn):
            # Of the summed cross entropy by the logits.
            by_logits = odds - F.one_hot(targets, odds.shape[1])
            self.gradients += backward(by_logits)

    def _gated(self, span: _Span, by_inputs: bool) -> list[tuple[Tensor, Values]]:
        """For both losses the derivative by the gates, and by what the block reads if asked for."""
        values = self.evaluator.plain_values(self.batch, span.parts)
        outputs = self._outputs(span.parts)

        def run(gate: Tensor, leaves: Values) -> Values:
            env = {**values, **leaves, GATE: gate}
            span.executor.run_parts(env, span.parts)
            return {name: env[name] for name in outputs}

        closed = torch.zeros(len(self.evaluator.batches[self.batch]), device=self.plain.device)
        leaves = self._leaves(values) if by_inputs else {}
        _, backward, *_ = torch.func.vjp(run, closed, leaves)
        self.evaluator.count(BACKWARD * len(span.parts))
        pairs = [backward({name: by[name] for name in outputs}) for by in self.gradients]
        return [(by_gate.double().cpu(), by_leaves) for by_gate, by_leaves in pairs]

    def _through(self, place: int) -> list[Values]:
        """The gradients of both losses by what a block reads."""
        part = self.parts[place]
        values = self.evaluator.plain_values(self.batch, [part])
        outputs = self._outputs([part])

        def run(leaves: Values) -> Values:
            made = self.plain.call(part, {**values, **leaves})
            return {name: made[name] for name in outputs}

        _, backward, *_ = torch.func.vjp(run, self._leaves(values))
        self.evaluator.count(BACKWARD)
        return [backward({name: by[name] for name in outputs})[0] for by in self.gradients]

    def _carry(self, by_inputs: Sequence[Values], part: Part) -> None:
        """Goes over from the gradients by a block's outputs to those by its inputs."""
        for gradients, added in zip(self.gradients, by_inputs, strict=True):
            for name in part.outputs:
                gradients.pop(name, None)
            for name, gradient in added.items():
                before = gradients.get(name)
                gradients[name] = gradient if before is None else before + gradient

    def _outputs(self, parts: Sequence[Part]) -> list[str]:
        """What of the parts' outputs later parts read that the losses depend on."""
        made = [name for part in parts for name in part.outputs]
        return [name for name in made if name in self.gradients[0]]

    def _leaves(self, values: Values) -> Values:
        """What of some values earlier blocks made, and has a gradient."""
        return {
            name: value
            for name, value in values.items()
            if name in self.made and value.is_floating_point()
        }
