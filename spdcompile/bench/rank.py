"""One rank of a run, started by torchrun; see `launch.py`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from spdcompile.bench._torch import fail_beyond_recompilations
from spdcompile.bench.making import Maker, reference_logits
from spdcompile.bench.meeting import Meeting
from spdcompile.bench.result import Result
from spdcompile.bench.settings import BenchSettings
from spdcompile.bench.timing import Course, Entrant, Timed
from spdcompile.bench.variants import Variant, variants_of

_PROGRAMS = 64  # of one function: more would mean that something is compiled at each call


def main(argv: Sequence[str]) -> None:
    """Measures what settings say, and writes what was found.

    Args:
        argv: the model's directory, the settings' file, a directory for the run's own files, and
            the file for the result.
    """
    directory, settings_file, scratch, result_file = map(Path, argv)
    settings = BenchSettings.from_json(settings_file.read_text(encoding="utf-8"))
    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fail_beyond_recompilations(_PROGRAMS)
    dist.init_process_group("gloo", timeout=timedelta(seconds=settings.timeout))
    found = _Run(directory, settings, scratch).measure()
    if found is not None:
        result_file.write_text(found.to_json(), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


class _Run:
    """A run as one rank sees it."""

    def __init__(self, directory: Path, settings: BenchSettings, scratch: Path) -> None:
        self._directory, self._settings, self._scratch = directory, settings, scratch
        self._meeting = Meeting(settings.timeout)
        self._maker = Maker(directory, settings)

    def measure(self) -> Result | None:
        """Makes every variant and takes them through the rounds; rank 0 has the result."""
        if self._settings.backend == "inductor":
            self._compile_into(f"inductor-{self._meeting.rank}")
            torch.compile(torch.sin)(torch.ones(8))  # what torch does once a process is nobody's
        before = _peak_bytes()
        entrants = [self._entrant(variant) for variant in variants_of(self._settings)]
        course = self._course()
        for number, entrant in enumerate(entrants):
            self._compile_into(f"inductor-{number}-{self._meeting.rank}")
            self._make(entrant)
            course.get_ready(entrant)
            self._tell(entrant.variant.label, entrant.reason or "ready")
        self._maker.forget()
        course.rounds(
            [entrant for entrant in entrants if not entrant.reason],
            self._settings.rounds,
            lambda number: self._tell(f"round {number} of {self._settings.rounds}"),
        )
        subjects = [entrant.subject for entrant in entrants if entrant.subject is not None]
        others = [process for subject in subjects for process in subject.processes]
        peaks = [peak for peak in map(_peak_bytes, [None, *others]) if peak is not None]
        memory = self._meeting.gather([before, max(peaks, default=None)])
        collected = [self._collected(entrant) for entrant in entrants]
        return None if self._meeting.rank else Result.of(self._settings, collected, memory)

    def _compile_into(self, name: str) -> None:
        """Gives Inductor an empty directory.

        So compile times are those of a first start, ranks do not wait for each other's locks, and
        no variant is given a program of another: their names say nothing of threads.
        """
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self._scratch / name)

    def _entrant(self, variant: Variant) -> Entrant:
        timed = {step.name: Timed() for step in self._settings.steps}
        return Entrant(variant, None, timed)

    def _course(self) -> Course:
        path = self._scratch / "reference.safetensors"
        if self._meeting.rank == 0 and not self._settings.memory:
            save_file(reference_logits(self._directory, self._settings), path)
        self._meeting.meet()
        reference = {} if self._settings.memory else load_file(path)
        config = AutoConfig.from_pretrained(self._directory).get_text_config()
        return Course(self._meeting, self._settings.steps, config.vocab_size, reference)

    def _make(self, entrant: Entrant) -> None:
        variant = entrant.variant
        torch.set_num_threads(variant.threads)
        made, entrant.reason = self._meeting.attempt(
            lambda: self._maker.make(variant), alone=variant.ranks == 1
        )
        if made is not None:
            entrant.subject, entrant.load = made

    def _collected(self, entrant: Entrant) -> dict[str, Any]:
        """An entrant as JSON data: the times of rank 0, the largest error of all ranks."""
        everyone = self._meeting.gather([timed.error for timed in entrant.timed.values()])
        steps = {}
        for number, (name, timed) in enumerate(entrant.timed.items()):
            errors = [errors[number] for errors in everyone if errors[number] is not None]
            steps[name] = {**asdict(timed), "error": max(errors, default=None)}
        return {"name": entrant.variant.name, "label": entrant.variant.label} | {
            "load": entrant.load,
            "reason": entrant.reason,
            "steps": steps,
        }

    def _tell(self, *words: str) -> None:
        if self._meeting.rank == 0:
            print(": ".join(words), flush=True)


def _peak_bytes(process: int | None = None) -> int | None:
    """The most memory that a process, or this one, held at once; None where Linux does not say.

    Not ru_maxrss, which also counts what the process was before it became this program.
    """
    try:
        status = Path(f"/proc/{process or 'self'}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else None


if __name__ == "__main__":
    main(sys.argv[1:])
