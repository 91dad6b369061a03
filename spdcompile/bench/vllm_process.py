"""A rank of vLLM in a process of its own, started by `vllm_subject.py`; tried with vLLM 0.32.0.

vLLM cannot share a process with other variants: it replaces `torch.set_num_threads`, parts of
`torch.cuda` and of Inductor, and binds the process' memory.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spdcompile.runtime.processes import signal_at_end


class Engine:
    """vLLM's engine, told which tokens to decode.

    Args:
        settings: of `LLM`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM  # here and below, not above: it is no dependency

        self._seen: dict[int, Tensor] = {}
        llm = LLM(**settings, logits_processors=[_forcing(self._seen)])
        self._engine = llm.llm_engine
        dist.barrier()  # by now all ranks have opened each other's shared memory
        _unname_shared_memory()
        self._texts = self._rows = 0

    def add(self, texts: list[list[int]], prompt: int) -> None:
        """Asks for texts that are as long as each other, of which so many tokens are prompts."""
        from vllm import SamplingParams, TokensPrompt

        self._texts += 1
        self._rows = len(texts)
        for row, text in enumerate(texts):
            tokens = [*text[prompt:], 0]  # behind the text comes whatever there is
            self._engine.add_request(
                f"{self._texts}-{row}",
                TokensPrompt(prompt_token_ids=text[:prompt]),
                SamplingParams(
                    temperature=0,
                    max_tokens=len(tokens),
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={"row": row, "tokens": tokens},
                ),
            )

    def step(self) -> tuple[np.ndarray, float]:
        """One token more of each text: the logits that it was taken from, [B, V], and seconds."""
        self._seen.clear()
        dist.barrier()
        began = time.perf_counter()
        self._engine.step()
        seconds = time.perf_counter() - began
        if len(self._seen) != self._rows:
            raise RuntimeError(f"vLLM took {len(self._seen)} of {self._rows} texts into a step")
        return torch.stack([self._seen[row] for row in range(self._rows)]).numpy(), seconds


def _forcing(seen: dict[int, Tensor]) -> type:
    """A logits processor that keeps each text's logits, and has the text's own token taken."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forcing(AdapterLogitsProcessor):
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            given = params.extra_args
            if not given:  # vLLM's own warm-up
                return None

            def force(output_ids: list[int], logits: Tensor) -> Tensor:
                seen[given["row"]] = logits.clone()
                logits[given["tokens"][len(output_ids)]] = float("inf")
                return logits

            return force

    return Forcing


def _unname_shared_memory() -> None:
    """Has the kernel free this process' shared memory with it, however it ends.

    vLLM names it alike on every start, and none starts while the name is there.
    """
    for path in re.findall(r"/dev/shm/.*", Path("/proc/self/maps").read_text(encoding="utf-8")):
        Path(path).unlink(missing_ok=True)


def main() -> None:
    """Answers what comes through the connection whose number is the argument."""
    signal_at_end(os.getppid(), signal.SIGKILL)
    connection = Connection(int(sys.argv[1]))
    try:
        engine = Engine(connection.recv())
        connection.send(None)
        while True:
            name, *arguments = connection.recv()
            connection.send(getattr(engine, name)(*arguments))
    except EOFError:
        return
    except Exception as error:  # of whatever kind, it is the reason that the table gives
        _unname_shared_memory()
        lines = str(error).strip().splitlines()
        connection.send(f"{type(error).__name__}: {lines[0] if lines else ''}")


if __name__ == "__main__":
    main()
