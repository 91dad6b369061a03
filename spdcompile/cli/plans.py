"""The plan that `plan_options` describe."""

from __future__ import annotations

import argparse

from spdcompile.cli.ranges import dropped_points
from spdcompile.errors import PlanError, UsageError
from spdcompile.plan import Plan, Router


def plan_of(arguments: argparse.Namespace, num_layers: int) -> Plan:
    """What is dropped, and over how many ranks.

    Raises:
        UsageError: the options contradict each other, or do not fit the model.
        PlanError: the file holds no plan, or one for another model.
    """
    if arguments.plan is None:
        if arguments.tp is None:
            raise UsageError(
                "The number of ranks is missing.", where="--tp", needed="--tp N, or --plan FILE"
            )
        points = dropped_points(arguments, num_layers)
        return Plan(arguments.tp, num_layers, points, router=Router(arguments.router or "exact"))
    others = ("spd_mask", "drop", "router")
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name)]
    if given:
        raise UsageError(
            "A plan says itself what is dropped.",
            where=f"--plan {arguments.plan}",
            found=", ".join(given),
            needed="one or the other",
        )
    plan = Plan.load(arguments.plan)
    tp = plan.tp if arguments.tp is None else arguments.tp
    if (plan.tp, plan.num_layers) != (tp, num_layers):
        raise PlanError(
            "The plan was made for something else.",
            where=f"--plan {arguments.plan}",
            found=f"a plan for tp={plan.tp} and {plan.num_layers} layers",
            needed=f"tp={tp} and {num_layers} layers",
        )
    return plan
