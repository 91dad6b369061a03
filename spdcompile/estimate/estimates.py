"""What a plan saves on machines that are not here: latencies with nothing dropped and with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from spdcompile.errors import RefusalError, UsageError
from spdcompile.estimate.devices import Device
from spdcompile.estimate.latency import Latency, expected_gain, ideal_gain, latency_of
from spdcompile.estimate.links import Link
from spdcompile.estimate.machines import Machines
from spdcompile.estimate.structure import Structure
from spdcompile.estimate.work import Step
from spdcompile.models import ModelSource
from spdcompile.plan import Plan
from spdcompile.planning import check_tp, make_plan


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """One call of the program.

    Args:
        name: "prefill" or "decode".
        plain: with nothing dropped.
        dropped: with what the plan drops.
    """

    name: str
    step: Step
    plain: Latency
    dropped: Latency

    @property
    def title(self) -> str:
        """In words."""
        step = self.step
        if self.name == "prefill":
            return f"prefill, {step.batch} x {step.new} tokens"
        return f"decode, {step.batch} x 1 token at context {step.context + step.new}"

    @property
    def ideal_gain(self) -> float:
        """The share of the step that the dropped collectives take."""
        return ideal_gain(self.plain, self.dropped)

    @property
    def expected_gain(self) -> float:
        """The share of the step that is gone, what the drop adds to compute counted."""
        return expected_gain(self.plain, self.dropped)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data; times in seconds."""
        return {
            "step": self.name,
            "batch": self.step.batch,
            "new_tokens": self.step.new,
            "context": self.step.context,
            "plain": _latency_dict(self.plain),
            "dropped": _latency_dict(self.dropped),
            "ideal_gain": self.ideal_gain,
            "expected_gain": self.expected_gain,
        }


@dataclass(frozen=True, slots=True)
class Estimate:
    """Latencies of one model, plan and machine.

    Args:
        refusal: why there is no decode step; "" if there is one.
    """

    plan: Plan
    device: Device
    link: Link
    steps: tuple[StepEstimate, ...]
    refusal: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON data; times in seconds."""
        return {
            "plan": self.plan.to_dict(),
            "device": {"name": self.device.name, "sources": list(self.device.sources)},
            "link": {"name": self.link.name, "sources": list(self.link.sources)},
            "steps": [step.to_dict() for step in self.steps],
            "refusal": self.refusal,
        }

    def __str__(self) -> str:
        headers = ["step", "dropped", "compute ms", "communication ms", "total ms"]
        headers += ["communication", "ideal gain", "expected gain"]
        rows: list[tuple[str, ...]] = []
        for step in self.steps:
            rows.append((step.title, "nothing", *_cells(step.plain), "", ""))
            if self.plan.dropped:
                gains = (f"{step.ideal_gain:.1%}", f"{step.expected_gain:.1%}")
                name = f"{len(self.plan.dropped)} sync points"
                rows.append((step.title, name, *_cells(step.dropped), *gains))
        table = tabulate(rows, headers, tablefmt="simple", disable_numparse=True)
        title = f"Estimated: tp {self.plan.tp}, {self.device.name}, {self.link.name}"
        refusal = f"\nNo decode step: {self.refusal}" if self.refusal else ""
        sources = "\n".join(
            f"  {named.name}: {source}"
            for named in (self.device, self.link)
            for source in named.sources
        )
        return f"{title}\n{table}{refusal}\n\nConstants\n{sources}"


def estimate_latency(
    model: ModelSource,
    *,
    tp: int,
    device: str,
    link: str,
    spd_mask: Sequence[bool] | Plan | None = None,
    dtype: torch.dtype | None = None,
    batch: int = 1,
    prompt: int = 128,
    context: int = 2048,
    machine: str | Path | None = None,
) -> Estimate:
    """Latencies of a step over a prompt and of a step of one token, from counted work.

    Args:
        model: a model, a local directory with a config.json, or a configuration; no weights.
        tp: number of ranks.
        device: a name in machines.json or in `machine`: what each rank computes on.
        link: likewise: what ranks exchange through.
        spd_mask: as in `compile`.
        dtype: of parameters; that of the configuration by default.
        batch: sequences.
        prompt: tokens of each in the prefill step.
        context: tokens of each in the decode step, the new one included.
        machine: a file of `measure-machine`, whose entries come before the package's own.

    Raises:
        UsageError: a name or number that does not exist or fit, or an operator of unknown cost.
        RefusalError: a sync point that cannot be dropped; names it and the reason.
    """
    check_tp(tp)
    machines = Machines.load(machine)
    on, through = machines.device(device), machines.link(link)
    structure = Structure(model, dtype)
    plan = make_plan(structure.model, tp, spd_mask)
    steps = steps_of(batch, prompt, context)
    return estimate_of(structure, plan, on, through, steps)


def steps_of(batch: int, prompt: int, context: int) -> dict[str, Step]:
    """The two steps by name.

    Raises:
        UsageError: a number below 1.
    """
    for name, value in (("batch", batch), ("prompt", prompt), ("context", context)):
        if value < 1:
            raise UsageError(f"{name} is too small.", where=f"{name}={value}", needed="at least 1")
    return {"prefill": Step(batch, prompt), "decode": Step(batch, 1, context - 1)}


def estimate_of(
    structure: Structure, plan: Plan, device: Device, link: Link, steps: dict[str, Step]
) -> Estimate:
    """The same of a model that is captured.

    Args:
        steps: by "prefill" and "decode".
    """
    undropped = replace(plan, dropped=frozenset())
    found, refusal = [], ""
    for name, step in steps.items():
        try:
            plain, dropped = (
                latency_of(structure.work(each, step), device, link, plan.tp)
                for each in (undropped, plan)
            )
        except RefusalError as why:
            if name == "prefill" or not step.context:
                raise
            refusal = why.reason
        else:
            found.append(StepEstimate(name, step, plain, dropped))
    return Estimate(plan, device, link, tuple(found), refusal)


def _latency_dict(latency: Latency) -> dict[str, float]:
    return {
        "compute_s": latency.compute,
        "communication_s": latency.exchange,
        "total_s": latency.total,
        "communication_share": latency.exchange_share,
    }


def _cells(latency: Latency) -> tuple[str, ...]:
    times = (latency.compute, latency.exchange, latency.total)
    return *(f"{1e3 * seconds:.3f}" for seconds in times), f"{latency.exchange_share:.1%}"
