"""The quickstart runs as the README shows it, and the bundled model is what its card says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spdcompile
from spdcompile.runtime.data import perplexity

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "models" / "tiny-llama"


def test_quickstart_prints_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "quickstart.py"))["main"]
    main()
    first, second, third = capsys.readouterr().out.splitlines()
    assert float(first.rsplit(" ", 1)[1]) < 1e-5
    assert second.startswith("3 all-reduces dropped: ")
    assert third == "all-reduces a forward pass: 16 -> 13"


def test_bundled_model_has_the_perplexity_of_its_card() -> None:
    """On a part of the held-out text, so within a band around the card's 25.73."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    tokens = spdcompile.chunks_of(text, tokenizer, length=512, count=12)
    compiled = spdcompile.compile(model, tp=8, backend="eager")
    kept = perplexity(compiled.executor, tokens)
    assert 20 < kept < 32
    mask = [layer == 0 for layer in range(8)]
    assert perplexity(compiled.with_mask(mask).executor, tokens) > 1.5 * kept


def test_bundled_model_is_small_and_its_texts_do_not_overlap() -> None:
    files = [path for path in MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
    lines = [
        {line for line in (MODEL / name).read_text(encoding="utf-8").splitlines() if len(line) > 80}
        for name in ("heldout.txt", "calibration.txt")
    ]
    assert lines[0]
    assert lines[1]
    assert len(lines[0] & lines[1]) < 0.01 * len(lines[0])
