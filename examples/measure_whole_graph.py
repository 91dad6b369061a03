"""Measures graphs of several blocks, and one of the whole model, against a graph a block.

    torchrun --standalone --nproc-per-node 2 examples/measure_whole_graph.py [--layers 8]

All run the same operators on the same weights, a token at a time behind a prompt. A block's graph,
which is what the compiler makes if nothing is said, is compiled once for all blocks that equal it;
the whole model's graph has every block in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from datetime import date

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import spdcompile
from spdcompile.runtime.cache import KVCache
from spdcompile.runtime.inputs import program_inputs

PROMPT, SLOTS = 128, 512
WHOLE = "one graph"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        vocab_size=32000,
    )
    model = LlamaForCausalLM(config).eval()
    tp = dist_size()
    steps = {"a graph a block": Steps(spdcompile.compile(model, tp=tp), whole=False)}
    for blocks in (args.layers // 2, args.layers):
        joined = spdcompile.compile(model, tp=tp, blocks_per_graph=blocks)
        steps[f"{blocks} blocks a graph"] = Steps(joined, whole=False)
    steps[WHOLE] = Steps(spdcompile.compile(model, tp=tp, backend="eager"), whole=True)
    prompt = torch.randint(3, config.vocab_size, (1, PROMPT))
    first = {name: each.first_calls(prompt) for name, each in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, each in steps.items():
            dist.barrier()
            times[name].append(timed(each.step))
    logits = [each.step() for each in steps.values()]
    error = max(float((x - logits[0]).abs().max() / logits[0].abs().max()) for x in logits)
    if dist.get_rank() == 0:
        rows = [
            (name, f"{first[name]:.1f}", *(f"{1000 * x:.2f}" for x in quantiles(times[name])))
            for name in steps
        ]
        headers = ["", "first calls (s)", "step p10 (ms)", "median (ms)", "p90 (ms)"]
        print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True))
        print(
            f"\n{args.layers} layers of width {args.hidden}, tp {tp}, float32, after "
            f"{PROMPT} tokens, {args.rounds} rounds, difference {error:.0e}; {platform.machine()}, "
            f"{os.cpu_count()} cores, torch {torch.__version__}, {date.today()}"
        )
    dist.barrier()
    dist.destroy_process_group()


class Steps:
    """A model that writes token after token, of which each is the first one's successor.

    Args:
        whole: whether all parts are compiled as one graph here.
    """

    def __init__(self, compiled: spdcompile.CompiledModel, whole: bool) -> None:
        self.compiled = compiled
        self.run = self._as_one() if whole else self._by_parts
        self.cache: KVCache = compiled.new_cache(1, SLOTS)
        self.token = torch.zeros(1, 1, dtype=torch.long)

    def first_calls(self, prompt: Tensor) -> float:
        """Seconds of the prompt and three steps, compilation included."""
        return timed(lambda: (self._call(prompt), [self.step() for _ in range(3)]))

    def step(self) -> Tensor:
        """The logits of the next token."""
        return self._call(self.token)

    def _call(self, ids: Tensor) -> Tensor:
        if self.cache.longest + ids.shape[1] > SLOTS:
            self.cache.crop(PROMPT)
        logits = self.run(ids)
        self.token = logits[:, -1:].argmax(-1)
        return logits

    def _by_parts(self, ids: Tensor) -> Tensor:
        return self.compiled(ids, past_key_values=self.cache, logits_to_keep=1).logits

    def _as_one(self) -> Callable[[Tensor], Tensor]:
        """The same as one compiled function of the inputs, the weights and the caches."""
        program = self.compiled.remembering_program
        executor = self.compiled.executor.with_program(program)

        @torch.compile(dynamic=True, fullgraph=True)
        def all_parts(
            env: dict[str, Tensor], caches: dict[str, dict[str, Tensor]]
        ) -> dict[str, Tensor]:
            for part in program.parts:
                env.update(executor.call(part, env, caches[part.name]))
            return env

        def run(ids: Tensor) -> Tensor:
            inputs = program_inputs(program, ids, cache=self.cache)
            with torch.no_grad():
                env = all_parts(inputs, self.cache.tensors)
            self.cache.advance(ids.shape[1])
            return env[program.output]

        return run


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def quantiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[int(share * (len(ordered) - 1))] for share in (0.1, 0.5, 0.9)]


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


if __name__ == "__main__":
    main()
