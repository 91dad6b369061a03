"""Which variants a run has, and that each is what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spdcompile.bench.making import Maker
from spdcompile.bench.settings import BenchSettings
from spdcompile.bench.subject import Compiled
from spdcompile.bench.variants import variants_of
from tests.models import tiny

SETTINGS = BenchSettings(2, masks={"0": [True, False]}, backend="eager", blocks_per_graph=(1, 2))


def test_each_number_of_blocks_has_variants_of_its_own() -> None:
    names = [variant.name for variant in variants_of(SETTINGS) if variant.name.startswith("spd-")]
    own = [f"spd-{way}" for way in ("local", "gloo", "sockets", "shm")]
    assert names == [f"{name}{end}" for end in ("", "/0", "@2", "@2/0") for name in own]
    assert len({variant.label for variant in variants_of(SETTINGS)}) == len(variants_of(SETTINGS))


@pytest.mark.parametrize(("name", "parts"), [("spd-local", 4), ("spd-local@2/0", 3)])
def test_variant_has_the_blocks_a_graph_of_its_name(name: str, parts: int, tmp_path: Path) -> None:
    tiny("llama", layers=2, hidden=32, heads=4, intermediate=48).save_pretrained(tmp_path)
    maker = Maker(tmp_path, SETTINGS)
    variant = next(variant for variant in variants_of(SETTINGS) if variant.name == name)
    subject, _ = maker.make(variant)
    assert isinstance(subject, Compiled)
    compiled = subject.compiled
    assert len(compiled.executor.program.parts) == parts
    assert bool(compiled.plan.dropped) == ("/" in name)
    ids = torch.arange(5)[None]
    assert subject.run(ids, subject.new_cache(ids, 5)).shape[-1] == compiled.config.vocab_size
