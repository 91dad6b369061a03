"""Generation in bfloat16 and float16, from weights that are cast while they are read.

Logits are compared with those of the same rounded weights in float32. The bound is that of
tests/numerics/test_lossless.py for bfloat16, an eighth of it for float16, which has three more bits
of precision; or twice the error of Hugging Face's own run, in either. In mixtures of experts every
expert serves every token here: otherwise rounding alone sends a token to another expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spdcompile
from tests.compare import rel_err
from tests.runtime.checkpoints import edit_config, saved
from tests.zoo.models import build, left_padded, token_ids

BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
SHAPE, PADS, NUM_NEW = (3, 12), (0, 2, 5), 12
SURE = {torch.bfloat16: 0.3, torch.float16: 0.8}  # so that tokens are compared at all
PROMPT = 7  # tokens before the cached steps


class Case(NamedTuple):
    """A model of the zoo over tp ranks.

    Args:
        settings: of its config, where they are not the zoo's.
    """

    entry: str
    tp: int = 2
    settings: dict[str, Any] = {}  # noqa: RUF012  (never written to)


CASES = {
    "heads padded": Case("llama", tp=3),
    "positions learnt": Case("opt"),
    "windows and softcaps": Case("gemma2", tp=3),
    "latents, experts": Case("deepseek_v3", settings={"num_experts_per_tok": 4, "topk_group": 2}),
    "windows and sinks, experts": Case("gpt_oss", settings={"num_experts_per_tok": 4}),
}
EACH = [pytest.param(name, dtype, id=f"{name}-{dtype}") for name in CASES for dtype in BOUNDS]


class Models(NamedTuple):
    """A checkpoint in half precision, its rounded weights in float32, and the compiled one."""

    own: PreTrainedModel
    truth: PreTrainedModel
    compiled: spdcompile.CompiledModel


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Models]:
    """What a case and a dtype need, made once."""

    @cache
    def make(name: str, dtype: torch.dtype) -> Models:
        case, model = CASES[name], build(CASES[name].entry)
        model.generation_config.eos_token_id = None  # so that every sequence goes on to the end
        model.generation_config.pad_token_id = 0
        folder = saved(model, tmp_path_factory.mktemp("half"))
        edit_config(folder, **case.settings)
        own, truth = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for _ in range(2))
        compiled = spdcompile.compile(
            folder, tp=case.tp, dtype=dtype, backend="eager", executor="local"
        )
        return Models(own, truth.float(), compiled)

    return make


@torch.no_grad()
def _logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=mask).logits.float()


def _bound(found: Models, ids: Tensor, mask: Tensor, dtype: torch.dtype) -> float:
    own, truth = _logits(found.own, ids, mask), _logits(found.truth, ids, mask)
    return max(BOUNDS[dtype], 2 * rel_err(own, truth, real=mask))


def _by_steps(compiled: spdcompile.CompiledModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of a prompt and, token by token, of what follows it."""
    cache = compiled.new_cache(*ids.shape)
    kept = {tensor.dtype for tensors in cache.tensors.values() for tensor in tensors.values()}
    assert kept == {compiled.model.dtype}
    logits = [compiled(ids[:, :PROMPT], mask[:, :PROMPT], past_key_values=cache).logits]
    for n in range(PROMPT, ids.shape[1]):
        step = compiled(ids[:, n : n + 1], mask[:, : n + 1], past_key_values=cache)
        logits.append(step.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_cached_steps_equal_float32(
    name: str, dtype: torch.dtype, models: Callable[[str, torch.dtype], Models]
) -> None:
    found = models(name, dtype)
    ids, mask = left_padded(token_ids(SHAPE, found.own.config.vocab_size), PADS)
    logits = _by_steps(found.compiled, ids, mask)
    assert logits.dtype == dtype
    error = rel_err(logits.float(), _logits(found.truth, ids, mask), real=mask)
    assert error < _bound(found, ids, mask, dtype)


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_greedy_tokens_are_the_model_s_own_where_rounding_cannot_change_them(
    name: str, dtype: torch.dtype, models: Callable[[str, torch.dtype], Models]
) -> None:
    """A token cannot be another where it leads by more than two errors in float32."""
    found = models(name, dtype)
    ids, mask = left_padded(token_ids(SHAPE, found.own.config.vocab_size), PADS)
    settings = {"attention_mask": mask, "max_new_tokens": NUM_NEW, "do_sample": False}
    tokens, own = (each.generate(ids, **settings) for each in (found.compiled, found.own))
    assert tokens.shape == own.shape == (SHAPE[0], SHAPE[1] + NUM_NEW)
    seen = torch.cat([mask, mask.new_ones(SHAPE[0], NUM_NEW)], 1)
    truth = _logits(found.truth, tokens, seen)
    error = _bound(found, tokens, seen, dtype) * truth[seen.bool()].abs().max()
    best = truth[:, SHAPE[1] - 1 : -1].topk(2)
    sure = best.values[..., 0] - best.values[..., 1] > 2 * error
    assert sure.float().mean() > SURE[dtype]
    assert torch.equal(tokens[:, SHAPE[1] :][sure], best.indices[..., 0][sure])
    so_far = sure.cumprod(1).bool()  # behind a token that is another, all may be
    assert torch.equal(tokens[:, SHAPE[1] :][so_far], own[:, SHAPE[1] :][so_far])


@pytest.mark.slow
def test_inductor_keeps_to_the_bound(models: Callable[[str, torch.dtype], Models]) -> None:
    """Inductor computes in float32 between its loads and stores: fewer roundings, not more."""
    dtype = torch.bfloat16
    found = models("heads padded", dtype)
    compiled = spdcompile.compile(found.own, tp=2, backend="inductor", executor="local")
    ids, mask = left_padded(token_ids(SHAPE, found.own.config.vocab_size), PADS)
    logits = _by_steps(compiled, ids, mask).float()
    error = rel_err(logits, _logits(found.truth, ids, mask), real=mask)
    assert error < _bound(found, ids, mask, dtype)
