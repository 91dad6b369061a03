"""What the sections share: the model, its texts, and what is expensive to make."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import spdcompile
from examples.study.quality import Score, Yardstick
from examples.study.sizes import Sizes
from spdcompile.plan import HeadGroups, Point

MODEL = Path(__file__).parent.parent / "models" / "tiny-llama"
ATTENTION, MLP = "attn", "mlp"


class Context:
    """The bundled model and its texts, at all tp.

    Args:
        sizes: how much of everything.
        work: directory in which distilled weights, groupings and scores are kept.
        num_layers: the model's first so many blocks alone, for a quick run; all by default.
    """

    def __init__(self, sizes: Sizes, work: Path, num_layers: int | None = None) -> None:
        self.sizes, self.work = sizes, work
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.model.model.layers = self.model.model.layers[:num_layers]
        self.num_layers = self.model.config.num_hidden_layers = len(self.model.model.layers)
        self.compiled = cache(self._compiled)
        self.sensitivity = cache(self._sensitivity)
        self.head_groups = cache(self._head_groups)

    # ---- texts

    def chunks(self, text: str, count: int, length: int | None = None) -> Tensor:
        """Chunks of a text, int64 [count, length]."""
        length = length or self.sizes.length
        return spdcompile.chunks_of(text, self.tokenizer, length=length, count=count)

    @cached_property
    def calibration_text(self) -> str:
        return (MODEL / "calibration.txt").read_text(encoding="utf-8")

    @cached_property
    def heldout_text(self) -> str:
        return (MODEL / "heldout.txt").read_text(encoding="utf-8")

    @cached_property
    def heldout(self) -> Yardstick:
        """What all reported quality is measured on."""
        return Yardstick(self.model, self.chunks(self.heldout_text, self.sizes.heldout))

    @cached_property
    def choosing(self) -> Yardstick:
        """Calibration text on which something is chosen by its loss."""
        return Yardstick(self.model, self.chunks(self.calibration_text, self.sizes.choosing))

    # ---- programs

    def _compiled(self, tp: int, grouped: bool = False) -> spdcompile.CompiledModel:
        """The model at a tp, nothing dropped; split evenly, or with the paper's head groups."""
        return self.compile(tp, self.head_groups(tp) if grouped else None)

    def compile(self, tp: int, groups: HeadGroups | None) -> spdcompile.CompiledModel:
        """The model with some head groups, nothing dropped."""
        return spdcompile.compile(self.model, tp=tp, head_groups=groups, backend="eager")

    def _head_groups(self, tp: int) -> HeadGroups:
        """The paper's head groups, by the calibration text."""
        path = self.work / f"groups-{tp}.json"
        if not path.exists():
            tokens = self.chunks(self.calibration_text, self.sizes.grouping)
            found = spdcompile.group_heads(self.model, tokens, tp=tp, draws=0, progress=False)
            found.plan.save(path)
        return spdcompile.Plan.load(path).head_groups

    def dropped(
        self, compiled: spdcompile.CompiledModel, points: Iterable[Point]
    ) -> spdcompile.CompiledModel:
        """The program without some sync points."""
        return compiled.with_mask(replace(compiled.plan, dropped=frozenset(points)))

    def score(self, compiled: spdcompile.CompiledModel) -> Score:
        """Its quality on held-out text."""
        return self.heldout.score(lambda tokens: compiled(tokens).logits)

    def zero_shot(self, compiled: spdcompile.CompiledModel, points: Iterable[Point]) -> Score:
        """The quality on held-out text without some sync points, nothing recovered."""
        return self.score(self.dropped(compiled, points))

    # ---- sensitivity

    def _sensitivity(self, tp: int) -> spdcompile.Sensitivity:
        """What each sync point costs on the calibration text."""
        return self.sensitivity_on(self.chunks(self.calibration_text, self.sizes.scoring), tp)

    def sensitivity_on(self, tokens: Tensor, tp: int) -> spdcompile.Sensitivity:
        """What each sync point costs by itself and cumulatively, on any text."""
        methods = (spdcompile.Method.ALONE, spdcompile.Method.CUMULATIVE)
        settings = spdcompile.CalibrateSettings(methods=methods, resume=self.work / "scores")
        compiled = self.compiled(tp)
        return spdcompile.calibrate(compiled, tokens, tp=tp, settings=settings, progress=False)

    def least_sensitive(self, tp: int, count: int, kind: str = ATTENTION) -> frozenset[Point]:
        """Points of a kind with the least KL divergence when dropped alone, by calibration text."""
        found = self.sensitivity(tp)
        costs = zip(found.points, found.found[spdcompile.Method.ALONE], strict=True)
        order = sorted((quality.kl, point) for point, quality in costs if point[1] == kind)
        return frozenset(point for _, point in order[:count])

    def attention_share(self, tp: int, share: int) -> frozenset[Point]:
        """The least sensitive share of the attention points, in percent."""
        return self.least_sensitive(tp, round(self.num_layers * share / 100))

    def all_attention(self) -> frozenset[Point]:
        return frozenset((layer, ATTENTION) for layer in range(self.num_layers))

    # ---- distillation

    def distilled(
        self,
        compiled: spdcompile.CompiledModel,
        points: Iterable[Point],
        student_input: spdcompile.StudentInput = spdcompile.StudentInput.PROGRESSIVE,
    ) -> spdcompile.CompiledModel:
        """The program without some sync points, over weights that were trained for it."""
        dropped = self.dropped(compiled, points)
        settings = spdcompile.DistillSettings(
            steps=self.sizes.steps, batch_size=self.sizes.batch, student_input=student_input
        )
        tokens = self.chunks(self.calibration_text, self.sizes.calibration)
        named = [dropped.plan.content_hash, repr(settings), list(tokens.shape)]
        key = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
        path = self.work / f"distilled-{key}.safetensors"
        if not path.exists():
            tp, plan = compiled.plan.tp, dropped.plan
            trained = spdcompile.distill(
                compiled, tokens, tp=tp, spd_mask=plan, settings=settings, progress=False
            )
            partial = path.with_suffix(f".{os.getpid()}")
            save_file({name: x.contiguous() for name, x in trained.tensors.items()}, partial)
            partial.rename(path)
        return dropped.with_weights(load_file(path))
