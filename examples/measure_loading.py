"""Measures what a rank reads and holds while it loads its slices of a checkpoint.

    python examples/measure_loading.py [--tp 4] [--layers 12] [--dtype bfloat16] [--vocab split]

A random checkpoint of 1 GB or more is made on the spot, in several files, and compiled with one
process a rank under torchrun. The peak is VmHWM of /proc, the imports of torch and transformers
included; the bound is 1.15 times the rank's own share and 400 MB. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from tabulate import tabulate
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

MB = 10**6
BOUND = "1.15 x share + 400 MB"
LAYERS_A_FILE = 3


def make_checkpoint(folder: Path, layers: int, hidden: int = 2048, vocab: int = 32000) -> int:
    """Writes a random Llama in bfloat16, a few layers a file; returns the bytes of its tensors."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=hidden // 128,
        num_key_value_heads=4,
        num_hidden_layers=layers,
        vocab_size=vocab,
        architectures=["LlamaForCausalLM"],
    )
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    files: dict[int, dict[str, torch.Size]] = {}
    for name, tensor in shapes.items():
        words = name.split(".")
        number = int(words[2]) // LAYERS_A_FILE + 1 if words[1] == "layers" else 0
        files.setdefault(number, {})[name] = tensor.shape
    generator, places, total = torch.Generator().manual_seed(0), {}, 0
    for number, names in files.items():
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        tensors = {name: _random(shape, generator) for name, shape in names.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return tensor.normal_(std=shape[-1] ** -0.5, generator=generator)


def rank_main(folder: Path, tp: int, dtype: torch.dtype, vocab: str | None) -> None:
    """Compiles as one rank; writes what it took to FOLDER/rank_<r>.json."""
    import spdcompile
    from spdcompile.runtime.file_tensor import FileTensor

    torch.set_num_threads(1)
    reads: list[tuple[str, int, int]] = []
    read_run = FileTensor._read_run

    def counted(self: FileTensor, descriptor: int, into: memoryview, place: int) -> None:
        reads.append((str(self.file), self.offset + place, self.offset + place + len(into)))
        read_run(self, descriptor, into, place)

    FileTensor._read_run = counted
    imported, began = peak(), time.perf_counter()
    compiled = spdcompile.compile(folder, tp=tp, backend="eager", dtype=dtype, vocab=vocab)
    seconds, loaded = time.perf_counter() - began, peak()
    compiled(torch.ones((1, 16), dtype=torch.long))
    shares = {
        p.data_ptr(): p.nbytes for ps in compiled.executor.params.values() for p in ps.values()
    }
    reads.sort()
    twice = sum(
        max(0, min(stop, end) - start)
        for (file, _, stop), (other, start, end) in pairwise(reads)
        if file == other
    )
    found = {
        "rank": int(os.environ["RANK"]),
        "share": sum(shares.values()),
        "read": sum(stop - start for _, start, stop in reads),
        "twice": twice,
        "imported": imported,
        "peak": loaded,
        "after a call": peak(),
        "seconds": seconds,
    }
    path = folder / f"rank_{found['rank']}.json"
    path.write_text(json.dumps(found), encoding="utf-8")


def peak() -> int:
    """Peak resident memory of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="bfloat16", help="dtype on load")
    parser.add_argument("--vocab", choices=("split", "whole"), help="default: by size")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of is not None:
        rank_main(args.rank_of, args.tp, getattr(torch, args.dtype), args.vocab)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = make_checkpoint(folder, args.layers)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(args.tp), __file__, "--rank-of", name]
        command += ["--tp", str(args.tp), "--dtype", args.dtype]
        command += ["--vocab", args.vocab] if args.vocab else []
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]
    if twice := {rank["rank"]: rank["twice"] for rank in ranks if rank["twice"]}:
        print(f"\nbytes read twice, by rank: {twice}")
    print(f"\n{total / MB:.0f} MB in bfloat16, loaded in {args.dtype}, tp {args.tp}; MB:\n")
    columns = ("share", "read", "twice", "imported", "peak", "after a call")
    rows = [
        (
            rank["rank"],
            *(f"{rank[column] / MB:.0f}" for column in columns),
            f"{1.15 * rank['share'] / MB + 400:.0f}",
            f"{rank['seconds']:.1f}",
        )
        for rank in ranks
    ]
    print(tabulate(rows, headers=("rank", *columns, BOUND, "s"), tablefmt="github"))


if __name__ == "__main__":
    main()
