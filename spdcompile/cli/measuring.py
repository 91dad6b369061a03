"""Does what `measure-machine` says: measures this machine and writes its table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from spdcompile.cli.writing import STDOUT, check_target, write_output
from spdcompile.estimate.machines import Machines
from spdcompile.estimate.measuring import measure_machine


def measure(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    check_target("--output", arguments.output)
    dtypes = arguments.dtype or ["float32"]
    table = measure_machine(ranks=arguments.ranks, dtypes=dtypes, name=arguments.name)
    write_output("--output", arguments.output, json.dumps(table, indent=1))
    if arguments.output == STDOUT:
        return 0
    machines = Machines.load(Path(arguments.output))
    device = machines.device(arguments.name)
    rates = ", ".join(
        f"{flops / 1e9:.0f} GFLOP/s in {str(d).removeprefix('torch.')}"
        for d, flops in device.flops.items()
    )
    print(
        f"{device.name}: {rates}, {device.bytes_per_s / 1e9:.1f} GB/s, "
        f"{1e6 * device.kernel_s:.1f} us a kernel"
    )
    for host in device.host:
        print(
            f"{device.name}, beside kernels in a step of {host.tokens}: "
            f"{1e6 * host.block_s:.0f} us a block, {1e6 * host.step_s:.0f} us besides"
        )
    for name in table["links"]:
        (way,) = machines.link(name).ways
        bandwidth = f"{1e-9 / way.s_per_byte:.2f} GB/s" if way.s_per_byte else "no limit found"
        print(f"{name}: {1e6 * way.base_s:.0f} us, {1e6 * way.hop_s:.0f} us a step, {bandwidth}")
    return 0
