"""What all-reduces cost: measured on this machine, or given as a table.

All ranks of a calibration run in one process, where an all-reduce is an addition. Its latency is
therefore measured by processes of its own, one a rank, or comes from elsewhere as a table. From it
a linear model says what a plan saves: as many times one all-reduce as the plan drops.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spdcompile.errors import SaveError, SpdCompileError, UsageError
from spdcompile.files import write_whole
from spdcompile.plan import Plan

_FORMAT = "spdcompile-latencies-1"


class MeasuringError(SpdCompileError):
    """The processes that measure latencies failed, or did not end in time."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """What a step takes, and what an all-reduce of its size takes of it.

    Args:
        tp: number of ranks.
        tokens: how many tokens a step has.
        seconds: of a step with nothing dropped.
        all_reduce_seconds: that a step is faster by for each all-reduce that is dropped.
        how: where the numbers come from, in words.
    """

    tp: int
    tokens: int
    seconds: float
    all_reduce_seconds: float
    how: str = ""

    def saved(self, dropped: int) -> float:
        """The share of the latency that is gone with so many all-reduces dropped."""
        return dropped * self.all_reduce_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {"format": _FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Writes the table, whole or not at all.

        Raises:
            SaveError: the file cannot be written.
        """
        try:
            write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise SaveError(
                "The latencies cannot be written.", where=str(path), found=str(error)
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Latencies:
        """Reads a table: JSON with format, tp, tokens, seconds and all_reduce_seconds.

        Raises:
            UsageError: the file holds none.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r}")
            found = cls(
                int(data["tp"]),
                int(data["tokens"]),
                float(data["seconds"]),
                float(data["all_reduce_seconds"]),
                str(data.get("how", "")),
            )
            if not found.seconds > 0:
                raise ValueError(f"{found.seconds} seconds")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                "The latencies cannot be read.",
                where=str(path),
                found=f"{type(error).__name__}: {error}",
                needed=f"JSON of the format {_FORMAT}: tp, tokens, seconds, all_reduce_seconds",
            ) from error
        return found


def step_seconds(
    model: PreTrainedModel | str | Path,
    plan: Plan,
    *,
    tokens: int = 64,
    rounds: int = 40,
    backend: str = "inductor",
    timeout: float = 600,
) -> tuple[float, float]:
    """Seconds of a forward pass of one sequence, with nothing dropped and with a plan.

    One process a rank on this machine's CPU, gloo between them; the median of rounds in which both
    programs run in turn, on rank 0.

    Args:
        model: a model, or a local directory.
        tokens: of the sequence.
        timeout: seconds after which the processes are ended.

    Raises:
        UsageError: the machine has fewer cores than the plan has ranks.
        MeasuringError: the processes failed, or did not end in time.
    """
    check_cores(plan.tp)
    with tempfile.TemporaryDirectory(prefix="spdcompile-") as scratch:
        directory = Path(scratch)
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(directory / "model")
            model = directory / "model"
        plan.save(directory / "plan.json")
        result = directory / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            f"--nproc-per-node={plan.tp}",
            "-m",
            "spdcompile.tuning.latency_rank",
            str(model),
        ]
        command += [str(directory / "plan.json"), str(result), str(tokens), str(rounds), backend]
        run_ranks(command, timeout)
        undropped, dropped = json.loads(result.read_text(encoding="utf-8"))
    return undropped, dropped


def measure_latencies(
    model: PreTrainedModel | str | Path, plan: Plan, *, tokens: int = 64, **settings: Any
) -> Latencies:
    """What one all-reduce costs: what a plan's step is faster by, shared among what it drops.

    Args:
        plan: drops something; the more, the less noise.
        settings: those of `step_seconds`.

    Raises:
        UsageError, MeasuringError: as `step_seconds`.
    """
    undropped, dropped = step_seconds(model, plan, tokens=tokens, **settings)
    count = len(plan.dropped)
    how = f"measured: {plan.tp} processes on this machine, gloo, {count} all-reduces dropped"
    return Latencies(plan.tp, tokens, undropped, (undropped - dropped) / count, how)


def check_cores(tp: int) -> None:
    """Raises UsageError if ranks would have to share cores: that measures waiting, not adding."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if tp > (cores or 1):
        raise UsageError(
            "The latencies cannot be measured on this machine.",
            where=f"tp={tp}",
            found=f"{cores} cores, for {tp} processes that wait for each other",
            needed=f"{tp} cores, or a table of latencies",
            fix="measure on the machine that will serve, and give the table: --latencies FILE",
        )


def run_ranks(command: list[str], timeout: float) -> None:
    """Runs a command; it and all that it started end when it does not do so in time.

    Raises:
        MeasuringError: it failed, or did not end in time.
    """
    environ = {"OMP_NUM_THREADS": "1", **os.environ}
    with subprocess.Popen(
        command,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise MeasuringError(
                    "Measuring the latencies took too long.",
                    found=f"no result after {timeout:.0f} s",
                    fix="give a table of latencies, or more time",
                ) from error
            raise
    if process.returncode:
        raise MeasuringError(
            "Measuring the latencies failed.",
            found="\n".join(output.strip().splitlines()[-8:]),
            fix="give a table of latencies",
        )
