"""vLLM, each rank in a process beside the one that measures; see `vllm_process.py`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spdcompile.bench.settings import BenchSettings
from spdcompile.bench.subject import NotMeasuredError, Subject

_PROCESS = "spdcompile.bench.vllm_process"
_CACHE_BYTES = 2**30  # of keys and values, on each rank; VLLM_CPU_KVCACHE_SPACE=GiB overrides it


class Vllm(Subject):
    """An engine that is asked through a pipe for one step at a time, and stopped in between.

    Every rank makes one, and they find each other. The engine's process times the step, so that
    the way there and back is not counted.

    Args:
        directory: of the model, in the dtype of the run.
        threads: of each rank.

    Raises:
        NotMeasuredError: vLLM cannot run the model; its own reason.
    """

    def __init__(self, directory: Path, settings: BenchSettings, threads: int) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _PROCESS, str(theirs.fileno())],
                env=_environment(threads),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._ask(_engine_settings(directory, settings))

    @property
    def processes(self) -> list[int]:
        return [self._process.pid]

    def new_cache(self, text: Tensor, prompt: int) -> Any:
        self._ask(("add", text.tolist(), prompt))

    def run(self, input_ids: Tensor, cache: Any) -> Tensor:
        return self.timed(input_ids, cache)[0]

    def timed(self, input_ids: Tensor, cache: Any) -> tuple[Tensor, float]:
        # What the tokens are vLLM has known since `new_cache`.
        logits, seconds = self._ask(("step",))
        return torch.from_numpy(logits), seconds

    def close(self) -> None:
        """Ends the process; it ends with this one, too."""
        self._process.kill()
        self._process.wait()

    def _ask(self, message: Any) -> Any:
        # Left to run, the threads of its process groups would take 1 % of a core from the others.
        self._process.send_signal(signal.SIGCONT)
        try:
            self._connection.send(message)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise NotMeasuredError(f"vLLM's process ended, with code {code}") from error
        if isinstance(answer, str):
            self.close()
            raise NotMeasuredError(answer)
        self._process.send_signal(signal.SIGSTOP)
        return answer


def _environment(threads: int) -> dict[str, str]:
    """That of this rank, with a meeting place of their own for vLLM's ranks."""
    # With torchrun's own names vLLM would take torchrun's store for its meeting place.
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")
    }
    return inherited | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_common_port()),
        "OMP_NUM_THREADS": str(threads),
        # vLLM keeps programs there: an empty directory, as Inductor's is.
        "VLLM_CACHE_ROOT": f"{os.environ['TORCHINDUCTOR_CACHE_DIR']}-vllm",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _common_port() -> int:
    """A free port, the same for all ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = [server.getsockname()[1]]
    dist.broadcast_object_list(found)
    return found[0]


def _engine_settings(directory: Path, settings: BenchSettings) -> dict[str, Any]:
    """For vLLM's `LLM`: a rank in each process, and every prompt computed anew in one step."""
    found: dict[str, Any] = {
        "model": str(directory),
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tp,
        "distributed_executor_backend": "external_launcher",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": _CACHE_BYTES,
        # One token more than the text: vLLM ends a text that has reached its limit.
        "max_model_len": max(step.length for step in settings.steps) + 1,
        "max_num_seqs": max(step.batch for step in settings.steps),
        "max_num_batched_tokens": max(step.batch * step.length for step in settings.steps) + 1,
        "seed": 0,
    }
    if settings.backend == "eager":
        found["compilation_config"] = {"mode": 2, "backend": "eager"}  # once, by Dynamo
    return found
