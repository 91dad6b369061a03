"""Split a model over 8 ranks in one process, drop three all-reduces, and look at what happened.

python examples/quickstart.py [MODEL_DIRECTORY]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spdcompile

BUNDLED = Path(__file__).parent / "models" / "tiny-llama"


def main(directory: str = str(BUNDLED)) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer("The server reads its configuration from", return_tensors="pt")
    ids, mask = inputs.input_ids, inputs.attention_mask

    # All ranks in this process; under torchrun the same call runs one rank a process.
    compiled = spdcompile.compile(model, tp=8, backend="eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    error = (
        compiled(ids, attention_mask=mask).logits - expected
    ).abs().max() / expected.abs().max()
    print(f"empty mask: largest relative difference {error:.1e}")

    # True drops that layer's attention all-reduce.
    drop = [layer in (2, 3, 4) for layer in range(model.config.num_hidden_layers)]
    dropped = compiled.with_mask(drop)
    logits = dropped(ids, attention_mask=mask).logits
    same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
    print(f"3 all-reduces dropped: {same:.0%} of the next tokens are the same")

    counts = dropped.report.collectives
    print(f"all-reduces a forward pass: {counts.merged_all_reduces} -> {counts.all_reduces}")


if __name__ == "__main__":
    main(*sys.argv[1:])
